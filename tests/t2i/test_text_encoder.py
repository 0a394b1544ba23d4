from __future__ import annotations

import importlib.util
import logging
import pickle
import shutil

import numpy as np
import pytest
import torch

from raev2.errors import DataError, FileError, SpecError
from raev2.spec_io import apply_overrides
from raev2.task import get_recipe, get_task
from raev2_tasks.t2i.spec import TextEncoderSpec
from raev2_tasks.t2i.text.cache import CaptionCache, write_cache
from raev2_tasks.t2i.text.encoder import (
    ENCODE_ROWS,
    KNOWN_ENCODERS,
    VOCAB_SIZE,
    FrozenTextEncoder,
    _unreachable,
    build_text_encoder,
    build_text_tokenizer,
    text_sizes,
    trim,
)

CPU = torch.device("cpu")
FAMILIES = ("t5", "clip", "bert", "gemma2", "gemma3", "qwen3", "t5gemma", "t5gemma2", "siglip", "siglip2")
NUM_NULL = {"t5": 1, "clip": 2, "bert": 2, "gemma2": 1, "qwen3": 0, "t5gemma": 1}
NUM_NULL |= {"gemma3": 1, "t5gemma2": 1, "siglip": 1, "siglip2": 1}
CLASSES = {"t5": "T5EncoderModel", "clip": "CLIPTextModel", "bert": "BertModel"}
CLASSES |= {"gemma2": "Gemma2Model", "qwen3": "Qwen3Model", "t5gemma": "T5GemmaEncoderModel"}
CLASSES |= {"gemma3": "Gemma3TextModel", "t5gemma2": "T5Gemma2TextEncoder"}
CLASSES |= {"siglip": "SiglipTextModel", "siglip2": "Siglip2TextModel"}
CAPTIONS = ["a red cat", "a photo of the big dog", "dog", ""]


@pytest.fixture
def encoder(request, encoder_folder) -> FrozenTextEncoder:
    return load(encoder_folder(request.param))


def load(folder, **fields) -> FrozenTextEncoder:
    return build_text_encoder(TextEncoderSpec(name=str(folder), dtype="fp32", max_tokens=16).replace(**fields), CPU)


every_family = pytest.mark.parametrize("encoder", FAMILIES, indirect=True)


# The choice.


def test_the_name_alone_chooses_the_encoder():
    spec = get_recipe(get_task("t2i"), "quickstart")
    assert spec.task.text_encoder.kind == "scratch"
    changed = apply_overrides(spec, ["task.text_encoder.name=google/t5-v1_1-xl"])
    assert changed.task.text_encoder.kind == "pretrained"
    assert text_sizes(changed.task.text_encoder) == (2048, 1), "known without any file"
    assert apply_overrides(spec, ["task.text_encoder.name=hash"]).task.text_encoder.kind == "hash"


def test_a_setting_without_effect_is_refused():
    spec = get_recipe(get_task("t2i"), "quickstart")
    for field, value in (("text_encoder.prefix", "draw"), ("text_encoder.keep_pad", 1), ("null", "none_visible")):
        with pytest.raises(SpecError, match=f"{field.split('.')[-1]} has no effect with text_encoder.name=scratch"):
            apply_overrides(spec, [f"task.{field}={value}"])
    apply_overrides(spec, ["task.text_encoder.name=google/t5-v1_1-base", "task.null=none_visible"])


@pytest.mark.parametrize(("encoder", "family"), [(f, f) for f in FAMILIES], indirect=["encoder"])
def test_the_part_that_reads_text_is_loaded_alone(encoder, family):
    assert type(encoder.model).__name__ == CLASSES[family]
    names = "\n".join(encoder.state_dict())
    assert "lm_head" not in names and "decoder" not in names and "vision" not in names
    assert text_sizes(encoder.spec) == (16, NUM_NULL[family]) and encoder.width == 16
    assert len(encoder.null_tokens()) == NUM_NULL[family]


def test_known_encoders_name_their_licence():
    for known in KNOWN_ENCODERS.values():
        assert known.licence and known.width % 64 == 0 and known.hub_id.count("/") == 1
    assert KNOWN_ENCODERS["Qwen/Qwen3-0.6B"].num_null_tokens == 0
    assert KNOWN_ENCODERS["google/gemma-2-2b"].gated and not KNOWN_ENCODERS["google/t5-v1_1-xl"].gated


# Outputs.


@every_family
def test_padding_changes_nothing_and_is_exactly_zero(encoder):
    raw = encoder.tokenizer(CAPTIONS)
    together = encoder(**raw)
    longer = {name: torch.nn.functional.pad(value, (0, 200)) for name, value in raw.items()}
    longer["token_ids"][~longer["token_mask"]] = 3  # garbage in the padding
    if encoder.spec.name.endswith(("clip", "bert", "siglip", "siglip2")):
        longer = {name: value[:, :16] for name, value in longer.items()}  # positions of these end at 20
    padded = encoder(**longer)
    length = together.shape[1]
    assert torch.allclose(padded[:, :length], together, atol=1e-5)
    assert (padded[~longer["token_mask"]] == 0).all() and padded.isfinite().all()
    for row, caption in enumerate(CAPTIONS[:3]):
        alone = encoder(**encoder.tokenizer([caption]))[0]
        assert torch.allclose(together[row, : len(alone)], alone, atol=1e-5)
        assert alone.abs().max() > 0.01


@every_family
def test_the_output_is_that_of_the_final_norm(encoder):
    """Recomputed from what goes into the norm of the model."""
    norms = [
        module for name, module in encoder.model.named_modules() if name.split(".")[-1] in ("norm", "final_layer_norm")
    ]
    if encoder.spec.name.endswith("bert"):  # normalises inside its last block
        norms = [encoder.model.encoder.layer[-1].output.LayerNorm]
    seen = []
    hook = norms[-1].register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
    raw = encoder.tokenizer(["a photo of the big dog"])
    found = encoder(**raw)
    hook.remove()
    module, inputs, output = seen[-1]
    num = found.shape[1]
    assert torch.allclose(found, output[:1, :num], atol=1e-6)
    assert torch.allclose(found, module(inputs)[:1, :num], atol=1e-6)


def test_an_inner_layer_is_the_output_of_that_block(encoder_folder):
    folder = encoder_folder("qwen3")
    encoder = load(folder, hidden="layer:1")
    raw = encoder.tokenizer(["a red cat"])
    seen = []
    hook = encoder.model.layers[1].register_forward_hook(
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    found = encoder(**raw)
    assert torch.allclose(found, seen[0][:1, : found.shape[1]])
    hook.remove()
    assert not torch.allclose(encoder(**raw), load(folder)(**raw))
    with pytest.raises(SpecError, match="hidden: no such inner layer; got layer:2; expected layer:0 to layer:1"):
        load(folder, hidden="layer:2")


def test_the_encoder_never_sees_a_caption_without_tokens(encoder_folder):
    encoder = load(encoder_folder("qwen3"))
    lengths = []
    hook = encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["attention_mask"].sum(1)), with_kwargs=True
    )
    found = encoder(**encoder.tokenizer(["", "a cat", ""]))
    assert encoder.null_tokens().shape == (0, 16)
    hook.remove()
    assert [length.tolist() for length in lengths] == [[2, *[1] * (ENCODE_ROWS - 1)]]
    assert (found[[0, 2]] == 0).all() and found[1].abs().sum() > 0


def test_a_prefix_is_read_but_not_returned(encoder_folder):
    plain, prefixed = load(encoder_folder("gemma2")), load(encoder_folder("gemma2"), prefix="the big photo of")
    raw = plain.tokenizer(["a red cat"])
    assert torch.equal(prefixed.tokenizer(["a red cat"])["token_ids"], raw["token_ids"])
    found = prefixed(**raw)
    assert found.shape == plain(**raw).shape
    assert torch.allclose(found[:, 0], plain(**raw)[:, 0], atol=1e-6), "the begin token stands before the prefix"
    assert not torch.allclose(found[:, 1:], plain(**raw)[:, 1:], atol=1e-3)
    assert torch.allclose(prefixed.null_tokens(), plain.null_tokens()), "the empty prompt has no prefix"
    assert prefixed.fingerprint != plain.fingerprint


def test_visible_padding_is_an_option(encoder_folder):
    plain, kept = load(encoder_folder("t5")), load(encoder_folder("t5"), keep_pad=1)
    assert kept.tokenizer.ids("a cat") == [*plain.tokenizer.ids("a cat"), 0]
    assert len(kept.null_tokens()) == 2


def test_half_precision_is_close(encoder_folder):
    exact, fast = load(encoder_folder("t5")), load(encoder_folder("t5"), dtype="bf16")
    raw = exact.tokenizer(CAPTIONS)
    assert fast(**raw).dtype == torch.float32
    assert (fast(**raw) - exact(**raw)).norm() < 2e-2 * exact(**raw).norm()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_features_of_a_caption_do_not_depend_on_its_neighbours(encoder_folder, family, dtype):
    """Bit for bit: alone, among short and long ones, in another place, and padded further."""
    encoder = load(encoder_folder(family), dtype=dtype)
    words = ["a", "red", "cat", "photo", "of", "the", "big", "dog"]
    captions = [" ".join(words[(i + k) % 8] for k in range(1 + i % 14)) for i in range(40)]
    alone = [encoder(**encoder.tokenizer([caption]))[0] for caption in captions]
    for order in (list(range(40)), list(reversed(range(40)))):
        together = encoder(**encoder.tokenizer([captions[i] for i in order]))
        for row, i in enumerate(order):
            assert torch.equal(together[row, : len(alone[i])], alone[i])
    trimmed, padded = encoder.tokenizer(captions[:3]), encoder.tokenizer(captions[:3] + captions[13:14])
    assert torch.equal(encoder(**trimmed)[2], encoder(**padded)[2, : trimmed["token_ids"].shape[1]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_features_do_not_depend_on_the_neighbours_either(encoder_folder):
    spec = TextEncoderSpec(name=str(encoder_folder("qwen3")), max_tokens=16)
    encoder = build_text_encoder(spec, torch.device("cuda"))
    raw = {name: value.cuda() for name, value in encoder.tokenizer(CAPTIONS[:3] * 20).items()}
    together = encoder(**raw)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in raw.items()}
        assert torch.equal(encoder(**one)[0], together[row])


def test_the_text_part_of_larger_models_computes_what_the_whole_does(encoder_folder):
    """By transformers' own whole models, in float32."""
    import transformers as hf

    ids = torch.tensor([[2, 4, 5, 6]])
    gemma = hf.Gemma3ForConditionalGeneration.from_pretrained(encoder_folder("gemma3")).eval()
    t5gemma2 = hf.T5Gemma2ForConditionalGeneration.from_pretrained(encoder_folder("t5gemma2")).eval().get_encoder()
    for family, whole in (("gemma3", gemma.model), ("t5gemma2", t5gemma2)):
        encoder = load(encoder_folder(family))
        found = encoder(**encoder.tokenizer(["a red cat"]))
        assert torch.allclose(found, whole(input_ids=ids).last_hidden_state, atol=1e-6), family
    for family, class_ in (("siglip", hf.SiglipModel), ("siglip2", hf.Siglip2Model)):
        encoder, whole = load(encoder_folder(family)), class_.from_pretrained(encoder_folder(family)).eval()
        raw = encoder.tokenizer(["a red cat"])
        num = raw["token_ids"].shape[1]
        full = torch.nn.functional.pad(raw["token_ids"], (0, 20 - num))  # as in their training, without a mask
        expected = whole.text_model(input_ids=full).last_hidden_state[:, :num]
        assert torch.allclose(encoder(**raw), expected, atol=1e-6), family


# Tokens.


@pytest.mark.parametrize("encoder", [f for f in FAMILIES if f != "siglip2"], indirect=True)  # it splits our words away
def test_long_captions_are_cut_and_keep_their_special_tokens(encoder):
    tokenizer = build_text_tokenizer(encoder.spec.replace(max_tokens=5))
    ids = tokenizer.ids("a photo of the big dog")
    cut = tokenizer.cut(ids)
    assert len(cut) == 5 < len(ids)
    assert cut[: tokenizer.lead] == ids[: tokenizer.lead]
    assert tokenizer.tail == 0 or cut[-tokenizer.tail :] == ids[-tokenizer.tail :]
    assert tokenizer(["a photo of the big dog", "cat"])["token_mask"].sum(1).tolist()[0] == 5
    assert (tokenizer.num_seen, tokenizer.num_cut) == (2, 1)


def test_many_cut_captions_are_warned_about(caplog):
    tokenizer = build_text_tokenizer(TextEncoderSpec(name="hash", max_tokens=2))
    with caplog.at_level(logging.WARNING):
        tokenizer(["a b"] * 900 + ["a b c"] * 100)
    assert "100 of the first 1000 captions are longer than task.text_encoder.max_tokens=2 and were cut" in caplog.text


def test_caption_pieces_spell_capitals_and_know_every_character():
    tokenizer = build_text_tokenizer(TextEncoderSpec(max_tokens=64))
    pieces = tokenizer.model.encode('the word "ZEBRA" in red letters', out_type=str)
    assert pieces[3:8] == list("ZEBRA")
    assert tokenizer.model.get_piece_size() == VOCAB_SIZE
    ids = tokenizer.ids("漢字 \U0001f600")
    assert tokenizer.model.unk_id() not in ids and ids[-1] == tokenizer.model.eos_id()
    assert max(ids) < VOCAB_SIZE
    assert tokenizer.model.decode(ids[:-1]) == "漢字 \U0001f600"
    short = build_text_tokenizer(TextEncoderSpec(max_tokens=4))
    assert len(short.cut(short.ids("a photo of three cats"))) == 4


def test_text_tokenizers_travel_to_workers(encoder_folder):
    for name in ("scratch", "hash", str(encoder_folder("t5"))):
        tokenizer = build_text_tokenizer(TextEncoderSpec(name=name))
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy(["a red cat"])["token_ids"].tolist() == tokenizer(["a red cat"])["token_ids"].tolist()


def test_trim_cuts_to_the_longest_caption_or_pads():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    cond = {"token_ids": torch.arange(8).view(2, 4), "token_mask": mask}
    assert trim(cond)["token_ids"].tolist() == [[0, 1], [4, 5]]
    assert trim(cond, at_least=6)["token_mask"].shape == (2, 6)
    assert trim({name: value[:, :0] for name, value in cond.items()})["token_ids"].shape == (2, 0)


# Errors.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5-v1_1-xxl", "neither a folder nor a hub id.*Did you mean 'google/t5-v1_1-xxl'"),
        ("gogle/t5-v1_1-bse", "neither from the hub nor from its local cache.*Did you mean 'google/t5-v1_1-base'"),
        ("./no/such/folder", "neither a folder nor a hub id; got './no/such/folder'"),
        ("google/gemma-2-2b", "Accept its licence on the hub"),
    ],
)
def test_an_unknown_encoder_names_the_closest_one(name, message):
    with pytest.raises(SpecError, match=message):
        build_text_encoder(TextEncoderSpec(name=name), CPU)


def test_a_folder_without_tokenizer_or_config_says_so(encoder_folder, tmp_path):
    with pytest.raises(SpecError, match="not a transformers folder, config.json is missing"):
        build_text_encoder(TextEncoderSpec(name=str(tmp_path)), CPU)
    (tmp_path / "config.json").write_bytes((encoder_folder("t5") / "config.json").read_bytes())
    with pytest.raises(SpecError, match="has no tokenizer files; expected one of tokenizer.json, spiece.model"):
        build_text_encoder(TextEncoderSpec(name=str(tmp_path)), CPU)


def test_a_missing_package_is_named(encoder_folder, tmp_path, monkeypatch):
    import sentencepiece

    (tmp_path / "corpus.txt").write_text("\n".join(f"a red cat and a big dog, photo {n}" for n in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(tmp_path / "spiece"), vocab_size=45, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "config.json").write_bytes((encoder_folder("t5") / "config.json").read_bytes())
    spec = TextEncoderSpec(name=str(tmp_path))
    assert build_text_tokenizer(spec)(["a red cat"])["token_mask"].all(), "read through protobuf"
    original = importlib.util.find_spec
    for package, module in (("protobuf", "google.protobuf"), ("sentencepiece", "sentencepiece")):
        missing = lambda name, *rest, module=module: None if name == module else original(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", missing)
        message = (
            rf"reading spiece\.model needs the package {package}, which is not installed; .*`pip install {package}`"
        )
        with pytest.raises(SpecError, match=message):
            build_text_tokenizer(spec)
    for text, package in (("X requires the protobuf library but", "protobuf"), ("`pip install einops`", "einops")):
        error = _unreachable(spec, ImportError(text))
        assert f"it needs the package {package}, which is not installed" in str(error)


def test_files_that_lack_weights_are_refused(encoder_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(encoder_folder("gemma3"), tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    with pytest.raises(SpecError, match=r"its files lack weights of the text encoder; got 3, first layers\.1\.mlp"):
        load(tmp_path / "part")


def test_t5_refuses_float16(encoder_folder):
    with pytest.raises(SpecError, match="T5 overflows in float16; got fp16; expected bf16 or fp32"):
        load(encoder_folder("t5"), dtype="fp16")


# Cache.


def test_cached_captions_are_the_encoded_ones(encoder_folder, tmp_path):
    encoder = load(encoder_folder("t5"))
    said: list[str] = []
    about = write_cache(
        iter(["a red cat", "dog", "a red cat", "a big dog"]), encoder, tmp_path / "cache", None, said.append
    )
    assert said == ["3 different captions, 10 tokens x 16 in fp32: 0.0 MiB"], "before the work"
    assert about["num_captions"] == 3 and (tmp_path / "cache" / "rows.bin").stat().st_size == 10 * 16 * 4
    cache = CaptionCache(tmp_path / "cache", encoder)
    raw = encoder.tokenizer(["dog", "a big dog", "a photo", "", "a red cat"])
    assert torch.equal(cache(**raw), encoder(**raw))
    assert (cache.num_hits, cache.num_misses) == (3, 2)
    with pytest.raises(DataError, match="exists already"):
        write_cache(iter(["dog"]), encoder, tmp_path / "cache")


def test_a_cache_in_8_bits_is_close(tmp_path):
    encoder = build_text_encoder(TextEncoderSpec(name="hash", max_tokens=16), CPU)
    captions = [f"a photo of {i} cats and {i + 1} dogs" for i in range(50)]
    write_cache(iter(captions), encoder, tmp_path / "cache", "int8")
    cache, raw = CaptionCache(tmp_path / "cache", encoder), encoder.tokenizer(captions)
    assert torch.nn.functional.cosine_similarity(cache(**raw), encoder(**raw), dim=-1).min() > 0.999
    assert cache.num_misses == 0


def test_a_cache_is_complete_or_absent(tmp_path, monkeypatch):
    encoder, write = build_text_encoder(TextEncoderSpec(name="hash", max_tokens=16), CPU), np.savez

    def full(*args, **arrays):
        write(*args, **arrays)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(FileError, match=r"cache: could not be saved.*free some space"):
        disk.setattr(np, "savez", full)
        write_cache(iter(["a cat"]), encoder, tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".cache.partial").mkdir()
    (tmp_path / ".cache.partial" / "rows.bin").write_bytes(b"of a process that was killed")
    write_cache(iter(["a cat"]), encoder, tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert CaptionCache(tmp_path / "cache", encoder).ends.tolist() == [2]


def test_a_cache_of_another_encoder_is_refused(encoder_folder, tmp_path):
    write_cache(iter(["a cat"]), load(encoder_folder("t5")), tmp_path / "cache")
    with pytest.raises(DataError, match="made by another text encoder, tokenizer or setting"):
        CaptionCache(tmp_path / "cache", load(encoder_folder("t5"), hidden="layer:0"))
    (tmp_path / "cache" / "rows.bin").write_bytes(b"")
    with pytest.raises(DataError, match="rows.bin: missing or not of the size"):
        CaptionCache(tmp_path / "cache", load(encoder_folder("t5")))
    with pytest.raises(DataError, match="Write it with `raev2 t2i cache-captions`"):
        CaptionCache(tmp_path / "nothing", load(encoder_folder("t5")))
