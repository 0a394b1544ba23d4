"""The task's own fields: how captions become tokens, and which captions of which sources are drawn."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from raev2.spec import RunSpec, Spec, TaskSpec

SCRATCH, HASH = "scratch", "hash"


def _refuse_changed(spec: Spec, fields: tuple[str, ...], where: str) -> None:
    """A setting without effect is an error, so that nobody believes in it."""
    for field in fields:
        value = getattr(spec, field)
        if value != type(spec).model_fields[field].default:
            raise ValueError(f"{field} has no effect with {where}; got {field}={value}")


class ScratchEncoderSpec(Spec):
    """Sizes of the text encoder that is trained with the generator."""

    width: int = Field(192, gt=0)
    depth: int = Field(3, ge=1)
    num_heads: int = Field(3, gt=0)

    @model_validator(mode="after")
    def _heads(self) -> ScratchEncoderSpec:
        if self.width % (2 * self.num_heads):
            raise ValueError(
                f"width must be a multiple of 2 * num_heads; got width={self.width}, num_heads={self.num_heads}"
            )
        return self


class TextEncoderSpec(Spec):
    """How a caption becomes tokens. `name` alone chooses; the other fields belong to frozen, pretrained encoders."""

    name: str = Field(
        SCRATCH,
        description="'scratch': small, trained with the generator, needs no download; 'hash': fixed word vectors, for "
        "tests; otherwise a frozen pretrained encoder: a hub id such as google/t5-v1_1-base, or a local folder",
    )
    max_tokens: int = Field(256, gt=0, description="longer captions are cut; a cut caption is counted and warned about")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    hidden: str = Field(
        "last_norm",
        pattern=r"^(last_norm|layer:\d+)$",
        description="which output: the last one after the final norm, or that of block k (from 0), as 'layer:k'",
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field("bf16", description="weights and compute of the frozen encoder")
    prefix: str = Field(
        "", description="instruction in front of every caption; its own tokens are cut off, the empty prompt has none"
    )
    keep_pad: int = Field(0, ge=0, le=8, description="padding tokens that stay visible after each caption")
    scratch: ScratchEncoderSpec = ScratchEncoderSpec()

    @model_validator(mode="after")
    def _belongs_together(self) -> TextEncoderSpec:
        if self.kind != "pretrained":
            _refuse_changed(self, ("revision", "hidden", "prefix", "keep_pad"), f"text_encoder.name={self.name}")
        return self

    @property
    def kind(self) -> Literal["scratch", "hash", "pretrained"]:
        """What `name` means."""
        return self.name if self.name in (SCRATCH, HASH) else "pretrained"  # type: ignore[return-value]


class CaptionSpec(Spec):
    """Which caption of an image a training step sees; evaluation sees the default one."""

    added: ClassVar = {"fields": {}}

    mix: dict[str, float] = Field(
        default_factory=dict,
        description="probability of each kind (short, long, alt, prompt, ocr, template), renormalised over the kinds "
        "that an image has; empty: always the default caption",
    )
    fields: dict[str, float] = Field(
        default_factory=dict,
        description="instead of mix: probability of each caption field ('txt', or a name in the json), in the order in "
        "which they serve as the default caption",
    )
    min_score: float | None = Field(None, description="leave out captions with a lower score, where they have one")
    score_temperature: float | None = Field(
        None, gt=0, description="inside a kind, weight exp(score / temperature); null: equal weights"
    )
    shorten_prob: float = Field(0.0, ge=0, le=1, description="share of captions cut to their first k sentences")

    @model_validator(mode="after")
    def _one_choice(self) -> CaptionSpec:
        if self.mix and self.fields:
            raise ValueError("give probabilities by kind (mix) or by field (fields), not both")
        return self


class SampleSpec(Spec):
    """Which samples training leaves out, and when there are too many of them."""

    min_side: float = Field(0.9, ge=0, description="least shorter side of a picture, as a share of the image size")
    max_aspect: float = Field(2.5, ge=1, description="longest side of a picture over its shorter one")
    max_bad_share: float = Field(
        0.01, ge=0, le=1, description="training stops when more of the last 10,000 samples of a worker are unusable"
    )


class StreamSpec(Spec):
    """Training shards that are read from front to back over the network; validation still reads `data.dir`."""

    urls: tuple[str, ...] = Field(
        min_length=1,
        description="addresses at http(s):// or s3://, or paths; with braces: 'https://host/{000..127}.tar'",
    )
    num_samples: int = Field(gt=0, description="samples in all shards; says where a resumed run goes on")
    licence: str = "unstated"
    attribution: str = ""
    kind: str = Field("alt", description="kind of captions whose files do not say it")
    captions: str = Field("", description="txt and json fields with captions: recaption:long,caption:alt,txt")
    shuffle_buffer: int = Field(10_000, gt=0, description="encoded samples that each worker mixes")
    allow_pipe: bool = Field(
        False, description="take addresses that begin with 'pipe:', which are commands of the shell"
    )


class TextToImageSpec(TaskSpec):
    """Text-conditional image generation."""

    added: ClassVar = {"stream": None, "samples": SampleSpec()}

    name: Literal["t2i"] = "t2i"
    text_encoder: TextEncoderSpec = Field(TextEncoderSpec(), description="how a caption becomes tokens")
    null: Literal["empty_prompt", "none_visible"] = Field(
        "empty_prompt",
        description="the unconditional condition of a frozen encoder: its output for the empty prompt, or no visible "
        "token at all (what RAEv2 does with Qwen3); 'scratch' learns its own",
    )
    adapter: Literal["none", "mlp"] = Field(
        "none", description="layers between a frozen encoder and the generator: one linear layer (published) or two"
    )
    caption_cache: str | None = Field(
        None, description="folder of `raev2 t2i cache-captions`: encoded captions are read instead of computed"
    )
    weights: dict[str, float] = Field(
        default_factory=dict, description="share of each source in every batch; empty: by its number of images"
    )
    captions: CaptionSpec = Field(CaptionSpec(), description="which caption of an image is drawn")
    stream: StreamSpec | None = Field(None, description="train on a stream of shards instead of `data.dir`")
    samples: SampleSpec = Field(SampleSpec(), description="which samples are left out")

    @model_validator(mode="after")
    def _belongs_together(self) -> TextToImageSpec:
        if self.text_encoder.kind == SCRATCH:
            _refuse_changed(self, ("null", "adapter", "caption_cache"), "text_encoder.name=scratch")
        if self.stream is not None and self.weights:
            raise ValueError(f"weights has no effect with a stream; got weights={self.weights}")
        return self


def task_spec(spec: RunSpec) -> TextToImageSpec:
    """The task's own part of a run spec."""
    assert isinstance(spec.task, TextToImageSpec)
    return spec.task
