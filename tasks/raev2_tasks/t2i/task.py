"""Text to image: captions as conditions, through a text encoder that is frozen or trained with the generator."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raev2.errors import SpecError
from raev2.spec import RunSpec
from raev2.task import EncodeImages, Evaluator, Task
from raev2_tasks.t2i.recipes import RECIPES
from raev2_tasks.t2i.spec import StreamSpec, TextToImageSpec, task_spec

if TYPE_CHECKING:
    import torch

    from raev2.batch import Cond, Measurement
    from raev2.data import ImageDataset
    from raev2.files.assets import Asset
    from raev2.model.condition import ConditionSpec
    from raev2_tasks.t2i.shards.reader import TextImageDataset
    from raev2_tasks.t2i.text.captions import CaptionRule

logger = logging.getLogger(__name__)


class TextToImage(Task):
    """A caption a picture. Raw condition: {"token_ids", "token_mask"}, padded to the longest caption of the batch."""

    name = "t2i"
    summary = "caption -> image (captioned shards, embedded scenes with exact scores)"
    spec_type = TextToImageSpec

    def dataset(self, spec: RunSpec, split: str) -> ImageDataset:
        """Captioned images; every training batch holds each source in its exact share, but for a stream."""
        stream = task_spec(spec).stream
        if split == "train" and stream is not None:
            return _stream(spec, stream)
        return self.captioned(spec, split)

    def captioned(self, spec: RunSpec, split: str) -> TextImageDataset:
        """A split of the dataset folder."""
        from raev2_tasks.t2i.shards.reader import TextImageDataset
        from raev2_tasks.t2i.text.encoder import build_text_tokenizer

        task = task_spec(spec)
        return TextImageDataset(
            spec.data.dir, split, spec.tokenizer.image_size, weights=task.weights or None,
            batch_size=spec.generator_training.batch_size, caption_mix=_caption_rule(task),
            tokenize=build_text_tokenizer(task.text_encoder), seed=spec.seed, cache=spec.data.cache,
            **task.samples.model_dump(),
        )  # fmt: skip

    def condition(self, spec: RunSpec, dataset: ImageDataset | None) -> ConditionSpec:
        """Outputs of a frozen encoder, or token ids for the trained one."""
        from raev2.model.condition import TextCondition
        from raev2.training import dist
        from raev2_tasks.t2i.text.condition import ScratchTextCondition
        from raev2_tasks.t2i.text.encoder import VOCAB_SIZE, build_text_encoder, text_sizes

        task = task_spec(spec)
        encoder = task.text_encoder
        if encoder.kind == "scratch":
            sizes = encoder.scratch.model_dump()
            return ScratchTextCondition(vocab_size=VOCAB_SIZE, max_tokens=encoder.max_tokens, **sizes)
        width, num_null = text_sizes(encoder)
        condition = TextCondition(
            dim=width, max_tokens=encoder.max_tokens, adapter=task.adapter,
            num_null_tokens=0 if task.null == "none_visible" else num_null,
        )  # fmt: skip
        if dataset is None or task.null == "none_visible":
            return condition
        null_tokens = build_text_encoder(encoder, dist.device()).null_tokens()
        return condition.replace(num_null_tokens=len(null_tokens), null_tokens=null_tokens.cpu())

    def condition_types(self) -> Sequence[type[ConditionSpec]]:
        """The text encoder that is trained with the generator."""
        from raev2_tasks.t2i.text.condition import ScratchTextCondition

        return (ScratchTextCondition,)

    def cond_encoder(self, spec: RunSpec, encode: EncodeImages, device: torch.device) -> Callable[[Cond], Cond]:
        """The frozen text encoder on the tokens that the batch has; for the trained encoder only the cut."""
        from raev2_tasks.t2i.text.encoder import build_text_encoder, trim

        task = task_spec(spec)
        if task.text_encoder.kind == "scratch":
            return lambda raw: trim(raw, at_least=1)
        encoder = build_text_encoder(task.text_encoder, device)
        at_least = len(encoder.null_tokens())
        outputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = encoder
        if task.caption_cache is not None:
            from raev2_tasks.t2i.text.cache import CaptionCache

            outputs = CaptionCache(Path(task.caption_cache), encoder)
        return _EncodeCaptions(outputs, at_least, encoder.fingerprint)

    def eval_cond(self, spec: RunSpec, dataset: ImageDataset, indices: Sequence[int]) -> Cond:
        """Captions of a random subset of `dataset`, repeated as needed."""
        asked = dataset.asked(spec.evaluation.num_samples, indices)
        return dataset.collate_cond([dataset.cond(index) for index in asked])

    def prompt_cond(self, spec: RunSpec, prompts: Sequence[str]) -> Cond:
        """Raw conditions of texts; a text that is too long is cut, with a warning."""
        from raev2_tasks.t2i.text.encoder import build_text_tokenizer

        text_tokenizer = build_text_tokenizer(task_spec(spec).text_encoder)
        for prompt in dict.fromkeys(prompts):
            num = len(text_tokenizer.ids(prompt))
            if num > text_tokenizer.max_tokens:
                logger.warning(
                    "prompt cut from %d to %d tokens: %.60s...", num, text_tokenizer.max_tokens, prompt
                )  # fmt: skip
        return text_tokenizer(prompts)

    def sample_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Texts, or a file of them."""
        return {
            "--prompt": {"nargs": "+", "metavar": "TEXT", "help": "texts"},
            "--prompts": {"metavar": "FILE", "help": "texts, one a line"},
        }

    def sample_cond(
        self, spec: RunSpec, dataset: ImageDataset, options: Mapping[str, object]
    ) -> tuple[Cond, list[str]]:
        """`prompt`: texts, `prompts`: a file with one a line, repeated to fill `n`; default: validation captions."""
        from raev2_tasks.t2i.text.prompts import given_prompts, spread

        num = int(str(options["n"]))
        prompts = given_prompts(options)
        if not prompts:
            val = self.captioned(spec, "val")
            prompts = [val.caption(i * len(val) // num) for i in range(min(num, len(val)))]
        prompts = spread(prompts, num)
        return self.prompt_cond(spec, prompts), prompts

    def evaluators(self, spec: RunSpec) -> list[Evaluator]:
        """Protocols; the names say what measures."""
        from raev2_tasks.t2i.protocols import protocols

        return protocols(self, spec)

    def recipes(self) -> dict[str, Callable[[], RunSpec]]:
        """quickstart, laptop, and the published systems."""
        return RECIPES

    def needs(self, spec: RunSpec) -> Sequence[Asset]:
        """The weights of a pretrained text encoder."""
        from raev2_tasks.t2i.text.encoder import text_asset

        return text_asset(task_spec(spec).text_encoder)

    def commands(self) -> dict[str, Callable[[Sequence[str]], None]]:
        """Shards, cached captions, and benchmarks that other programs score."""
        from raev2_tasks.t2i.benchmark import external_eval
        from raev2_tasks.t2i.shards import commands as shards_commands
        from raev2_tasks.t2i.text import cache
        from raev2_tasks.t2i.text import encoder as text_encoder

        return {**shards_commands.COMMANDS, **cache.COMMANDS, **external_eval.COMMANDS, **text_encoder.COMMANDS}

    def benchmarks(self) -> dict[str, Callable[[], list[Measurement]]]:
        """Training step with trimmed and with padded captions."""
        from raev2_tasks.t2i.bench import BENCHMARKS

        return BENCHMARKS


def _caption_rule(task: TextToImageSpec) -> CaptionRule:
    from raev2_tasks.t2i.text.captions import CaptionRule

    fields = task.captions.model_dump()
    return CaptionRule(**{**fields, "mix": fields["mix"] or None, "fields": fields["fields"] or None})


def _stream(spec: RunSpec, stream: StreamSpec) -> ImageDataset:
    """The training split of a run that streams it; SpecError for settings that read it by number."""
    from raev2_tasks.t2i.shards.stream import StreamedDataset
    from raev2_tasks.t2i.text.captions import caption_fields
    from raev2_tasks.t2i.text.encoder import build_text_tokenizer

    task = task_spec(spec)
    for wrong, field, hint in (
        (spec.tokenizer_from is None, "tokenizer_from", "Train the tokenizer on a folder, and name it here."),
        (spec.generator_training.latent_cache, "generator_training.latent_cache", "Set it to false."),
        (spec.generator_training.latents is not None, "generator_training.latents", "Set it to null."),
    ):
        if wrong:
            raise SpecError(f"spec.{field}", "does not go with task.stream, which cannot be read by number", hint=hint)
    return StreamedDataset(
        stream.urls, spec.tokenizer.image_size, num_samples=stream.num_samples,
        batch_size=spec.generator_training.batch_size, licence=stream.licence, attribution=stream.attribution,
        caption_mix=_caption_rule(task), caption_kind=stream.kind,
        caption_fields=caption_fields(stream.captions, stream.kind), allow_pipe=stream.allow_pipe,
        tokenize=build_text_tokenizer(task.text_encoder), seed=spec.seed, shuffle_buffer=stream.shuffle_buffer,
        **task.samples.model_dump(),
    )  # fmt: skip


@dataclass(frozen=True)
class _EncodeCaptions:
    """Token ids -> outputs of a frozen text encoder, with the fingerprint of that encoder."""

    outputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    at_least: int  # tokens
    fingerprint: str

    def __call__(self, raw: Cond) -> Cond:
        from raev2_tasks.t2i.text.encoder import trim

        cond = trim(raw, self.at_least)
        return {"text_tokens": self.outputs(cond["token_ids"], cond["token_mask"]), "text_mask": cond["token_mask"]}
