"""Shared by the tests of text to image: small captioned shards, text encoders with random weights, a tiny run."""

from __future__ import annotations

from pathlib import Path

import pytest

from raev2.spec import DDTSpec, DecoderSpec, EvaluationSpec, FeatureLoss, RunSpec, SamplingSpec, ScheduleSpec
from raev2.task import get_recipe, get_task

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "a", "red", "cat", "photo", "of", "the", "big", "dog"]
SPECIALS = {"t5": (False, True), "clip": (True, True), "bert": (True, True), "gemma2": (True, False)}
SPECIALS |= {"qwen3": (False, False), "t5gemma": (True, False), "t5gemma2": (True, False), "gemma3": (True, False)}
SPECIALS |= {"siglip": (False, True), "siglip2": (False, True)}  # begin token, end token


@pytest.fixture(scope="session")
def scenes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one source, `s12`: 48 training and 16 validation scenes of shapes, 64 px. Read only."""
    from raev2_tasks.t2i.benchmark import s12
    from raev2_tasks.t2i.shards.files import Example, write_shards
    from raev2_tasks.t2i.text.captions import Caption

    def examples(split: str, num: int) -> list[Example]:
        return [
            Example(f"{split}{i}", scene.render(64), [Caption(text, kind) for text, kind in scene.captions])
            for i, scene in enumerate(s12.scenes(split, num))
        ]

    folder = tmp_path_factory.mktemp("data") / "scenes"
    splits = {"train": examples("train", 48), "val": examples("val", 16)}
    write_shards(folder, "s12", splits, licence="CC0-1.0", attribution="drawn here", recipe="test", options={})
    return folder


@pytest.fixture(scope="session")
def t2i_spec(scenes_data: Path) -> RunSpec:
    """The quickstart with tiny networks and a few steps, fp32."""
    base = get_recipe(get_task("t2i"), "quickstart")
    short = {
        "images": 32, "batch_size": 8, "schedule": ScheduleSpec(lr=1e-3, final_lr=1e-4), "log_every_steps": 1,
        "sample_every_images": 32, "save_every_images": 16,
    }  # fmt: skip
    task = base.task.replace(
        text_encoder=base.task.text_encoder.replace(scratch={"width": 32, "depth": 1, "num_heads": 2}), weights={}
    )
    return base.replace(
        recipe="tiny",
        task=task,
        data=base.data.replace(dir=str(scenes_data), recipe=None),
        tokenizer=base.tokenizer.replace(decoder=DecoderSpec(width=32, depth=1, num_heads=2, mlp_dim=64, patch_size=8)),
        tokenizer_training=base.tokenizer_training.replace(
            **short, adversarial=None, perceptual=FeatureLoss(layers=(1,)), ema_decay=0.5
        ),
        generator=DDTSpec(
            width=32, depth=2, num_heads=2, head_width=64, head_depth=1, head_num_heads=2, base_head_depth=1
        ),
        generator_training=base.generator_training.replace(**short, ema_decays=(0.5,)),
        sampling=SamplingSpec(steps=2, guidance=base.sampling.guidance),
        evaluation=EvaluationSpec(protocols=("reconstruction-micro",), num_samples=8),
        precision="fp32",
    )


@pytest.fixture(scope="session")
def t2i_run(t2i_spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of the tiny run, finished. Read only: copy it to change it."""
    from raev2 import pipeline

    return pipeline.train(t2i_spec, tmp_path_factory.mktemp("runs") / "t2i" / "tiny")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory):
    """Family -> folder with a text encoder of it: random weights, a tokenizer of twelve words."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("encoders") / family
            make_encoder(family, made[family])
        return made[family]

    return folder


def make_encoder(family: str, folder: Path) -> None:
    """Save model and tokenizer as their authors do: whole models, with the head where there is one."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": len(WORDS)}
    causal = {**small, "num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3}
    sees = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    sees |= {"image_size": 32, "patch_size": 16}
    siglip_vision = {**sees, "model_type": "siglip_vision_model"}
    torch.manual_seed(0)
    if family == "t5":
        config = hf.T5Config(
            vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0
        )
        model = hf.T5ForConditionalGeneration(config)
    elif family == "clip":
        text = hf.CLIPTextConfig(
            **small, num_hidden_layers=3, max_position_embeddings=20, bos_token_id=2, eos_token_id=3, pad_token_id=0
        ).to_dict()
        vision = hf.CLIPVisionConfig(**sees).to_dict()
        model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    elif family == "bert":
        model = hf.BertModel(hf.BertConfig(**small, num_hidden_layers=3, max_position_embeddings=20))
    elif family == "gemma2":
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**causal))
    elif family == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**causal))
    elif family in ("siglip", "siglip2"):
        config_class, model_class = (
            (hf.SiglipConfig, hf.SiglipModel) if family == "siglip" else (hf.Siglip2Config, hf.Siglip2Model)
        )
        text = {**small, "num_hidden_layers": 3, "max_position_embeddings": 20, "projection_size": 16}
        text |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
        vision = sees if family == "siglip" else {k: v for k, v in sees.items() if k != "image_size"}
        model = model_class(config_class(text_config=text, vision_config=vision))
    elif family == "gemma3":  # a model of text and images, as gemma-3-4b
        model = hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                text_config=causal, vision_config=siglip_vision, mm_tokens_per_image=4, image_token_index=len(WORDS) - 1
            )
        )
    elif family == "t5gemma2":
        part = {**causal, "vocab_size": len(WORDS) + 1}  # the last one stands for images
        encoder = {"text_config": part, "vision_config": siglip_vision, "mm_tokens_per_image": 4}
        ids = {"eoi_token_index": len(WORDS), "image_token_index": len(WORDS)}
        model = hf.T5Gemma2ForConditionalGeneration(
            hf.T5Gemma2Config(encoder={**encoder, **ids}, decoder=dict(part), **ids)
        )
    else:
        part = dict(causal)
        model = hf.T5GemmaForConditionalGeneration(
            hf.T5GemmaConfig(encoder=part, decoder=dict(part), vocab_size=len(WORDS))
        )
    model.save_pretrained(folder)

    begin, end = SPECIALS[family]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin or end:
        single = ("<s> " if begin else "") + "$A" + (" </s>" if end else "")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
