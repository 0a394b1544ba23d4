"""Captions to tokens, and tokens to the outputs of a frozen text encoder.

Read `build_text_tokenizer` and `build_text_encoder`. A caption travels as {"token_ids", "token_mask"}, padded on the
right to the longest of its batch; a frozen encoder turns that into {"text_tokens", "text_mask"}. The text encoder that
is trained with the generator is not here, that is `condition.py`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from typing_extensions import override

from raev2.errors import DataError, SpecError, did_you_mean
from raev2.files.assets import Asset
from raev2.files.hashes import json_sha256
from raev2_tasks.t2i.spec import TextEncoderSpec

logger = logging.getLogger(__name__)
WHERE = "spec.task.text_encoder"
CAPTION_MODEL = Path(__file__).parent / "assets" / "captions.model"
VOCAB_SIZE = 2048  # pieces of that model
HASH_WIDTH, HASH_WORDS = 256, 1 << 15
ENCODE_ROWS = 16  # of every forward of a frozen encoder, see `FrozenTextEncoder.forward`
ENCODE_LENGTHS = (16, 32, 64, 96, 128, 192, 256)  # longer ones: multiples of 128
WARN_SHARE, WARN_AFTER = 0.02, 1_000  # cut captions that are worth a warning, and when to look


# Known encoders


@dataclass(frozen=True)
class KnownEncoder:
    """Facts about a text encoder on the hub.

    num_null_tokens   tokens of the empty prompt; Qwen has none
    parameters        of the part that runs, without a language model head
    """

    hub_id: str
    family: str
    width: int
    num_null_tokens: int
    parameters: str
    licence: str
    gated: bool = False


def _known() -> list[KnownEncoder]:
    t5 = [("small", 512, "35 M"), ("base", 768, "110 M"), ("large", 1024, "340 M"), ("xl", 2048, "1.2 B")]
    t5 = [*t5, ("xxl", 4096, "4.7 B")]
    t5gemma = [("s-s", 512), ("b-b", 768), ("2b-2b", 2304), ("9b-9b", 3584)]
    gemma = "Gemma terms of use"
    return [
        *(KnownEncoder(f"google/t5-v1_1-{s}", "T5", width, 1, size, "Apache-2.0") for s, width, size in t5),
        *(KnownEncoder(f"google/flan-t5-{s}", "T5", width, 1, size, "Apache-2.0") for s, width, size in t5),
        *(KnownEncoder(f"google/t5gemma-{s}-prefixlm", "T5Gemma", width, 1, "", gemma, True) for s, width in t5gemma),
        KnownEncoder("google/gemma-2-2b", "Gemma 2", 2304, 1, "2.6 B", gemma, True),
        KnownEncoder("google/gemma-2-2b-it", "Gemma 2", 2304, 1, "2.6 B", gemma, True),
        KnownEncoder("google/gemma-2-9b", "Gemma 2", 3584, 1, "9.2 B", gemma, True),
        KnownEncoder("google/gemma-3-270m", "Gemma 3", 640, 1, "270 M", gemma, True),
        KnownEncoder("google/gemma-3-1b-pt", "Gemma 3", 1152, 1, "1.0 B", gemma, True),
        KnownEncoder("Qwen/Qwen3-0.6B", "Qwen 3", 1024, 0, "600 M", "Apache-2.0"),
        KnownEncoder("Qwen/Qwen3-1.7B", "Qwen 3", 2048, 0, "1.7 B", "Apache-2.0"),
        KnownEncoder("Qwen/Qwen3-4B", "Qwen 3", 2560, 0, "4.0 B", "Apache-2.0"),
        KnownEncoder("Qwen/Qwen2.5-1.5B", "Qwen 2.5", 1536, 0, "1.5 B", "Apache-2.0"),
        *(
            KnownEncoder(f"google/t5gemma-2-{s}", "T5Gemma 2", width, 1, "", gemma, True)
            for s, width in [("270m-270m", 640), ("1b-1b", 1152), ("4b-4b", 2560)]
        ),
        KnownEncoder("google/gemma-3-4b-pt", "Gemma 3", 2560, 1, "3.9 B", gemma, True),
        KnownEncoder("google/siglip2-base-patch16-256", "SigLIP 2", 768, 1, "282 M", "Apache-2.0"),
        KnownEncoder("google/siglip2-large-patch16-256", "SigLIP 2", 1024, 1, "565 M", "Apache-2.0"),
        KnownEncoder("openai/clip-vit-large-patch14", "CLIP", 768, 2, "123 M", "MIT"),
        KnownEncoder("sentence-transformers/all-MiniLM-L6-v2", "BERT", 384, 2, "23 M", "Apache-2.0"),
        KnownEncoder("google-bert/bert-base-uncased", "BERT", 768, 2, "110 M", "Apache-2.0"),
    ]


KNOWN_ENCODERS = {encoder.hub_id: encoder for encoder in _known()}

# Checkpoints that hold more than a text encoder: the class that reads its part alone. The others are read by AutoModel,
# which has no language model head. (A head at 128 x 256 tokens would need 20 GB for logits that nobody looks at.) Of
# models of text and images, known by their `text_config`, AutoModel reads the text part.
ENCODER_CLASSES = {
    "t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel", "t5gemma": "T5GemmaEncoderModel",
    "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel",
    "siglip": "SiglipTextModel", "siglip_text_model": "SiglipTextModel",
    "siglip2": "Siglip2TextModel", "siglip2_text_model": "Siglip2TextModel",
}  # fmt: skip
PADDED_FAMILIES = ("siglip_text_model", "siglip2_text_model")  # trained on texts padded to their full length, no mask
TEXT_PART = r"^(?:model\.)?(?:language_model\.(?:model\.)?|encoder\.(?:text_model\.)?)"  # of weights, before their name
PIECE_FILES = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
TEXT_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")  # with those of tokenizers, none of them a pickle
TOKENIZER_FILES = ("tokenizer.json", *PIECE_FILES, "vocab.json", "vocab.txt")
PIECE_PACKAGES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}  # package -> module, for such files


# Captions to token ids


class TextTokenizer(ABC):
    """Captions -> {"token_ids": (B, M) int64, "token_mask": (B, M) bool}, M the longest caption, padded on the right.

    num_seen, num_cut   captions so far, and how many of them were longer than `max_tokens`
    """

    pad_id: int = 0

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_seen = self.num_cut = 0

    @abstractmethod
    def ids(self, caption: str) -> list[int]:
        """Token ids of one caption, special tokens included, not cut."""

    @abstractmethod
    def cut(self, ids: list[int]) -> list[int]:
        """At most `max_tokens` of them, special tokens kept."""

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """See the class."""
        rows = [self._row(caption) for caption in captions]
        length = max((len(row) for row in rows), default=0)
        token_ids = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        token_mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for row, ids in enumerate(rows):
            token_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            token_mask[row, : len(ids)] = True
        return {"token_ids": token_ids, "token_mask": token_mask}

    def _row(self, caption: str) -> list[int]:
        ids = self.ids(caption)
        cut = self.cut(ids)
        self.num_seen += 1
        self.num_cut += len(cut) < len(ids)
        if self.num_seen == WARN_AFTER and self.num_cut > WARN_SHARE * self.num_seen:
            logger.warning(
                "%d of the first %d captions are longer than task.text_encoder.max_tokens=%d and were cut",
                self.num_cut, self.num_seen, self.max_tokens,
            )  # fmt: skip
        return cut


class CaptionPieces(TextTokenizer):
    """The packaged sentencepiece model of the encoder 'scratch': 2,048 pieces, capitals one by one, bytes for the rest.

    A caption ends with the piece `</s>`. The card beside the model says how it was made.
    """

    def __init__(self, max_tokens: int) -> None:
        super().__init__(max_tokens)
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise DataError(
                "text encoder scratch", "sentencepiece is not installed", hint="Run `pip install 'raev2[t2i]'`."
            ) from error
        self.model = SentencePieceProcessor(model_file=str(CAPTION_MODEL))
        self.pad_id = self.model.pad_id()

    @override
    def ids(self, caption: str) -> list[int]:
        return [*self.model.encode(caption), self.model.eos_id()]

    @override
    def cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]


class HashedWords(TextTokenizer):
    """Lower-case words by a hash of their letters; the tokenizer of the encoder 'hash'."""

    @override
    def ids(self, caption: str) -> list[int]:
        return [1 + zlib.crc32(word.encode()) % (HASH_WORDS - 1) for word in caption.lower().split()]

    @override
    def cut(self, ids: list[int]) -> list[int]:
        return ids[: self.max_tokens]


class HubTokenizer(TextTokenizer):
    """The tokenizer of a pretrained encoder.

    lead   special tokens in front of every caption; a prefix goes behind them
    """

    def __init__(self, spec: TextEncoderSpec) -> None:
        self.spec, self.tokenizer = spec, _load_tokenizer(spec)
        limit = getattr(_text_config(spec), "max_position_embeddings", None) or spec.max_tokens
        prefix = self.tokenizer(spec.prefix, add_special_tokens=False)["input_ids"] if spec.prefix else []
        self.prefix: list[int] = list(prefix)
        super().__init__(min(spec.max_tokens, limit - len(self.prefix), self.tokenizer.model_max_length))
        self.pad_id = next(
            (i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0
        )  # fmt: skip
        empty, letter = self._special(""), self._special("a")
        same = [a == b for a, b in zip(empty, letter, strict=False)]
        self.lead = same.index(False) if False in same else (len(empty) if len(letter) > len(empty) else 0)
        self.tail = len(empty) - self.lead

    @override
    def ids(self, caption: str) -> list[int]:
        return [*self._special(caption), *[self.pad_id] * self.spec.keep_pad]

    @override
    def cut(self, ids: list[int]) -> list[int]:
        end = self.tail + self.spec.keep_pad
        if len(ids) <= self.max_tokens:
            return ids
        return [*ids[: self.max_tokens - end], *ids[len(ids) - end :]]

    def _special(self, caption: str) -> list[int]:
        return list(self.tokenizer(caption, verbose=False)["input_ids"])


def build_text_tokenizer(spec: TextEncoderSpec) -> TextTokenizer:
    """The tokenizer that belongs to a text encoder. It can be pickled, for worker processes."""
    if spec.kind == "scratch":
        return CaptionPieces(spec.max_tokens)
    return HashedWords(spec.max_tokens) if spec.kind == "hash" else HubTokenizer(spec)


def trim(cond: Mapping[str, Tensor], at_least: int = 0) -> dict[str, Tensor]:
    """Token ids and mask without the columns that no row uses, but with `at_least` columns."""
    mask = cond["token_mask"]
    used = int(mask.sum(1).max()) if mask.numel() else 0
    length = max(used, at_least)
    if length <= mask.shape[1]:
        return {name: value[:, :length] for name, value in cond.items()}
    return {name: nn.functional.pad(value, (0, length - mask.shape[1])) for name, value in cond.items()}


# Token ids to frozen outputs


class FrozenTextEncoder(nn.Module, ABC):
    """A frozen text encoder.

    width         of its outputs
    fingerprint   hash of everything that the outputs depend on
    tokenizer     the tokenizer whose ids it takes
    """

    width: int
    fingerprint: str
    tokenizer: TextTokenizer

    @abstractmethod
    def outputs(
        self, token_ids: Int[Tensor, "B M"], token_mask: Bool[Tensor, "B M"], *, prefix: bool = True
    ) -> Float[Tensor, "B M D"]:
        """Outputs of rows that have at least one token each."""

    @torch.no_grad()
    def forward(
        self, token_ids: Int[Tensor, "B M"], token_mask: Bool[Tensor, "B M"], *, prefix: bool = True
    ) -> Float[Tensor, "B M D"]:
        """Outputs in float32, exactly 0 where there is no token. The encoder never sees a row without tokens.

        They are a function of the caption alone, not of its neighbours, also in bfloat16: a caption is always encoded
        in a batch of `ENCODE_ROWS` rows, padded to a length that depends on its own, with a mask. In other shapes the
        same sums are rounded differently (up to 1e-2 of the features).

        prefix   put the instruction of the spec in front; not for the empty prompt
        """
        out = torch.zeros(*token_ids.shape, self.width, device=token_ids.device)
        used = token_mask.sum(1).tolist()
        lengths = [self.encode_length(num) if num else 0 for num in used]
        for length in sorted(set(lengths) - {0}):
            rows = torch.tensor([row for row, its in enumerate(lengths) if its == length], device=token_ids.device)
            num = min(length, token_ids.shape[1])
            for chunk in rows.split(ENCODE_ROWS - 1):  # at least one row is a filler, so that there always is a mask
                ids, mask = (
                    _filled(value[chunk, :num], length, fill)
                    for value, fill in ((token_ids, self.tokenizer.pad_id), (token_mask, False))
                )
                found = self.outputs(ids, mask, prefix=prefix)[: len(chunk), :num].float()
                out[chunk, :num] = found.masked_fill(~mask[: len(chunk), :num, None], 0)
        return out

    def encode_length(self, num_tokens: int) -> int:
        """To which length a caption of so many tokens is padded."""
        long = -(-num_tokens // 128) * 128
        length = next((length for length in ENCODE_LENGTHS if num_tokens <= length), long)
        return max(num_tokens, min(length, self.tokenizer.max_tokens))

    def null_tokens(self) -> Float[Tensor, "M D"]:
        """Outputs of the empty prompt, one row a token; no row for a tokenizer that gives it none."""
        raw = self.tokenizer([""])
        device = next(iter(self.state_dict().values())).device
        return self(raw["token_ids"].to(device), raw["token_mask"].to(device), prefix=False)[0]


def _filled(values: Tensor, length: int, fill: int | bool) -> Tensor:
    """(B, M) -> (ENCODE_ROWS, length): columns of `fill`, and rows of which only the first token is there."""
    padded = nn.functional.pad(values, (0, length - values.shape[1]), value=fill)
    filler = torch.full_like(padded[:1], fill)
    filler[:, 0] = padded[0, 0]
    return torch.cat([padded, filler.expand(ENCODE_ROWS - len(padded), -1)])


class HashEncoder(FrozenTextEncoder):
    """Fixed random word vectors N(0, 1) plus sine-cosine positions: no download, no meaning, good for tests."""

    table: Tensor

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.width, self.tokenizer = HASH_WIDTH, build_text_tokenizer(spec)
        self.fingerprint = json_sha256(["hash", HASH_WIDTH, HASH_WORDS, spec.max_tokens])
        rows = np.random.Generator(np.random.Philox(key=[0, 0])).standard_normal((HASH_WORDS, HASH_WIDTH), np.float32)
        self.register_buffer("table", torch.from_numpy(rows))

    @override
    def outputs(self, token_ids: Tensor, token_mask: Tensor, *, prefix: bool = True) -> Tensor:
        frequencies = 10_000.0 ** (-torch.arange(0, HASH_WIDTH, 2, device=token_ids.device) / HASH_WIDTH)
        angles = torch.arange(token_ids.shape[1], device=token_ids.device)[:, None] * frequencies
        return self.table[token_ids] + torch.cat([angles.sin(), angles.cos()], dim=1)


class HubEncoder(FrozenTextEncoder):
    """A pretrained encoder of transformers, without a language model head, in the dtype of the spec."""

    tokenizer: HubTokenizer

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.spec, self.tokenizer = spec, HubTokenizer(spec)
        self.model = _load_model(spec)
        config: Any = self.model.config
        self.width = _width(config)
        self.full_length: int | None = None
        if config.model_type in PADDED_FAMILIES:
            self.full_length = config.max_position_embeddings
        self.layer = None if spec.hidden == "last_norm" else int(spec.hidden.removeprefix("layer:"))
        depth = _depth(self.model.config)
        if self.layer is not None and self.layer >= depth - 1:
            raise SpecError(
                f"{WHERE}.hidden", "no such inner layer", got=spec.hidden, expected=f"layer:0 to layer:{depth - 2}",
                hint="The output of the last block is last_norm.",
            )  # fmt: skip
        weights = {name: value.flatten()[:64].float().tolist() for name, value in self.model.state_dict().items()}
        vocabulary = json_sha256(self.tokenizer.tokenizer.get_vocab())
        self.fingerprint = json_sha256([
            weights, vocabulary, spec.hidden, spec.prefix, spec.dtype, spec.keep_pad, self.tokenizer.max_tokens,
        ])  # fmt: skip

    @override
    def outputs(self, token_ids: Tensor, token_mask: Tensor, *, prefix: bool = True) -> Tensor:
        lead, extra = self.tokenizer.lead, self.tokenizer.prefix if prefix else []
        if extra:
            shown = torch.tensor(extra, device=token_ids.device).expand(len(token_ids), -1)
            token_ids = torch.cat([token_ids[:, :lead], shown, token_ids[:, lead:]], dim=1)
            token_mask = torch.cat([token_mask[:, :lead], shown == shown, token_mask[:, lead:]], dim=1)
        device = token_ids.device
        mask: Tensor | None = token_mask.long()
        if self.full_length is not None:
            token_ids = token_ids.masked_fill(~token_mask, self.tokenizer.pad_id)
            token_ids = nn.functional.pad(
                token_ids, (0, self.full_length - token_ids.shape[1]), value=self.tokenizer.pad_id
            )
            mask = None
        with torch.autocast(device.type, enabled=False):
            found = self.model(input_ids=token_ids, attention_mask=mask, output_hidden_states=self.layer is not None)
        hidden = found.last_hidden_state if self.layer is None else found.hidden_states[self.layer + 1]
        return torch.cat([hidden[:, :lead], hidden[:, lead + len(extra) :]], dim=1)


@functools.lru_cache(maxsize=2)
def build_text_encoder(spec: TextEncoderSpec, device: torch.device) -> FrozenTextEncoder:
    """The frozen encoder of a spec, loaded once a process."""
    assert spec.kind != "scratch", "it is trained, see condition.py"
    encoder = HashEncoder(spec) if spec.kind == "hash" else HubEncoder(spec)
    return encoder.to(device).eval().requires_grad_(False)


def text_sizes(spec: TextEncoderSpec) -> tuple[int, int]:
    """Width and tokens of the empty prompt of a frozen encoder; known ones need no files."""
    if spec.kind == "hash":
        return HASH_WIDTH, 0
    known = KNOWN_ENCODERS.get(spec.name)
    if known is not None:
        return known.width, known.num_null_tokens + spec.keep_pad
    return _width(_text_config(spec)), len(HubTokenizer(spec).ids(""))


def text_asset(spec: TextEncoderSpec) -> list[Asset]:
    """The weights of a pretrained encoder; none of the other kinds."""
    if spec.kind != "pretrained":
        return []
    known = KNOWN_ENCODERS.get(spec.name)
    gated = known is not None and known.gated
    note = f"Its licence ({known.licence}) must be accepted there" if known is not None and known.gated else ""
    revision = f"@{spec.revision}" if spec.revision else ""
    return [Asset(f"text encoder {spec.name}", spec.name + revision, files=TEXT_FILES, gated=gated, note=note)]


def text_encoders(argv: Sequence[str]) -> None:
    """List known text encoders with width, licence and access; every other transformers folder works too."""
    argparse.ArgumentParser("raev2 t2i text-encoders", description=text_encoders.__doc__).parse_args(argv)
    from raev2.command.actions import print_table

    header = ("name", "family", "width", "tokens of ''", "parameters", "licence", "access")
    rows = [
        (e.hub_id, e.family, str(e.width), str(e.num_null_tokens), e.parameters, e.licence, "gated" if e.gated else "")
        for e in KNOWN_ENCODERS.values()
    ]
    print_table(header, rows)


COMMANDS = {"text-encoders": text_encoders}


# Loading


def _resolve(spec: TextEncoderSpec) -> dict[str, Any]:
    """Arguments that say where a pretrained encoder is; SpecError for a name that cannot be one."""
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise SpecError(f"{WHERE}.name", "not a transformers folder, config.json is missing", got=spec.name)
        return {"pretrained_model_name_or_path": str(folder)}
    if spec.name.count("/") != 1 or spec.name.startswith((".", "/", "~")):
        raise _unknown(spec.name, "neither a folder nor a hub id")
    return {"pretrained_model_name_or_path": spec.name, "revision": spec.revision or "main"}


def _load_config(spec: TextEncoderSpec) -> Any:
    from transformers import AutoConfig

    where = _resolve(spec)
    try:
        return AutoConfig.from_pretrained(**where, trust_remote_code=False)
    except Exception as error:  # transformers and the hub client have many error types
        raise _unreachable(spec, error) from error


def _load_tokenizer(spec: TextEncoderSpec) -> Any:
    from transformers import AutoTokenizer

    where = _resolve(spec)
    folder = Path(where["pretrained_model_name_or_path"])
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise SpecError(
            f"{WHERE}.name", f"{folder} has no tokenizer files", expected=f"one of {', '.join(TOKENIZER_FILES)}",
            hint="Copy them from the model's page.",
        )  # fmt: skip
    if folder.is_dir() and not (folder / "tokenizer.json").is_file() and (missing := _missing_piece_packages()):
        raise _needs(spec, missing[0], f"reading {next(f for f in TOKENIZER_FILES if (folder / f).is_file())}")
    try:
        return AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
    except Exception as error:
        missing = _missing_piece_packages()
        if missing and any(word in str(error) for word in ("tiktoken", "SentencePiece", *PIECE_PACKAGES)):
            raise _needs(spec, missing[0], "its tokenizer") from error  # transformers may name tiktoken instead
        raise _unreachable(spec, error, "its tokenizer cannot be loaded") from error


def _load_model(spec: TextEncoderSpec) -> nn.Module:

    config = _load_config(spec)
    if spec.dtype == "fp16" and config.model_type in ("t5", "mt5", "umt5"):
        raise SpecError(
            f"{WHERE}.dtype", "T5 overflows in float16", got="fp16", expected="bf16 or fp32", hint="Use bf16."
        )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[spec.dtype]
    class_, extra = _text_class(spec, config)
    reports = logging.getLogger("transformers")
    level = reports.level
    reports.setLevel(logging.ERROR)  # it lists every weight of the head and the decoder that are left out on purpose
    try:
        model, report = class_.from_pretrained(
            **_resolve(spec), dtype=dtype, trust_remote_code=False, output_loading_info=True, **extra
        )
    except Exception as error:
        raise _unreachable(spec, error) from error
    finally:
        reports.setLevel(level)
    if absent := sorted(name for name in report["missing_keys"] if not name.startswith("pooler")):
        raise SpecError(
            f"{WHERE}.name", "its files lack weights of the text encoder", got=f"{len(absent)}, first {absent[0]}",
            expected=f"all weights of {type(model).__name__}", hint="Download them again.",
        )  # fmt: skip
    return model


def _text_class(spec: TextEncoderSpec, config: Any) -> tuple[Any, dict[str, Any]]:
    """The class that reads the text encoder of a checkpoint alone, and what it must be told."""
    import transformers

    if config.model_type == "t5gemma2":
        try:
            from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2TextEncoder
        except ImportError as error:
            raise _unreachable(spec, error) from error
        encoder = config.encoder
        return T5Gemma2TextEncoder, {
            "config": encoder.text_config, "key_mapping": {TEXT_PART: ""}, "eoi_token_index": encoder.eoi_token_index
        }  # fmt: skip
    if config.model_type in ENCODER_CLASSES:
        extra = {"config": _encoder_only(config)} if config.model_type == "t5gemma" else {}
        return getattr(transformers, ENCODER_CLASSES[config.model_type]), extra
    if getattr(config, "text_config", None) is not None:
        return transformers.AutoModel, {"config": config.text_config, "key_mapping": {TEXT_PART: ""}}
    return transformers.AutoModel, {}


def _encoder_only(config: Any) -> Any:
    config.is_encoder_decoder = False
    return config


def _text_config(spec: TextEncoderSpec) -> Any:
    """The part of a configuration that describes the text encoder."""
    return _text_part(_load_config(spec))


def _text_part(config: Any) -> Any:
    while (inner := getattr(config, "text_config", None) or getattr(config, "encoder", None)) is not None:
        config = inner
    return config


def _width(config: Any) -> int:
    config = _text_part(config)
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise SpecError(f"{WHERE}.name", "not a text encoder, its configuration has no hidden_size",
                        got=config.model_type)  # fmt: skip
    return int(width)


def _depth(config: Any) -> int:
    return int(_text_part(config).num_hidden_layers)


def _missing_piece_packages() -> list[str]:
    """Packages for sentencepiece files that are not installed."""
    return [package for package, module in PIECE_PACKAGES.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it lies in is missing
        return False


def _named_package(text: str) -> str:
    """The package in an ImportError of transformers, which says `pip install NAME` or 'the NAME library'."""
    found = re.search(r"pip install (?:-U )?`?([\w-]+)|the ([\w-]+) library", text)
    return next((name.lower() for name in found.groups() if name), text) if found else text[:100]


def _needs(spec: TextEncoderSpec, package: str, what: str) -> SpecError:
    return SpecError(
        f"{WHERE}.name", f"{what} needs the package {package}, which is not installed", got=spec.name,
        hint=f"Run `pip install {package}`, or `pip install 'raev2[t2i]'` for all that text encoders need.",
    )  # fmt: skip


def _unknown(name: str, what: str) -> SpecError:
    short = {hub_id.rpartition("/")[2]: hub_id for hub_id in KNOWN_ENCODERS}
    close = did_you_mean(name.rpartition("/")[2], short)
    for short_name, hub_id in short.items():
        close = close.replace(f"'{short_name}'", f"'{hub_id}'")
    return SpecError(
        f"{WHERE}.name", what, got=repr(name), expected="'scratch', 'hash', a local folder or a hub id",
        hint=close or "`raev2 t2i text-encoders` lists known ones.",
    )  # fmt: skip


def _unreachable(spec: TextEncoderSpec, error: Exception, what: str = "cannot be loaded") -> SpecError:
    if isinstance(error, ImportError):
        package = (error.name or "").partition(".")[0] or _named_package(str(error))
        return _needs(spec, package, "it")
    known = KNOWN_ENCODERS.get(spec.name)
    if Path(spec.name).expanduser().is_dir():
        return SpecError(f"{WHERE}.name", what, got=f"{spec.name} ({type(error).__name__}: {str(error)[:200]})")
    if known is None:
        return _unknown(spec.name, f"{what}, neither from the hub nor from its local cache")
    hint = "Accept its licence on the hub and log in there. " if known.gated else ""
    return SpecError(
        f"{WHERE}.name", f"{what}, neither from the hub nor from its local cache", got=spec.name,
        hint=f"{hint}Or set a local folder that holds it.",
    )  # fmt: skip
