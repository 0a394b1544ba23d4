"""What a run is: frozen pydantic models, and the only place where defaults live.

Read `RunSpec` at the end first; it lists the parts. A recipe is a function that returns a `RunSpec`; a variant calls
its base and then `replace`. Nothing changes a spec after it was built, derived numbers are properties.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, SerializeAsAny, Tag, model_validator

from raev2.errors import TaskError
from raev2.files.plugins import GUIDANCE, PREDICTIONS, installed, load_kind, unknown
from raev2.files.spec_base import Spec


def _installed_name(group: str, name: object) -> str:
    """`name`, if a package brings it."""
    if name not in installed(group):
        raise ValueError(unknown(group, name))
    return str(name)


# Data


class DataSpec(Spec):
    """Which prepared dataset folder to read (see docs/how_to/own_data.md) and how."""

    model_config = ConfigDict(coerce_numbers_to_str=True)  # --set data.options.size=128

    dir: str = Field(description="dataset folder with manifest.json, written by `raev2 data build`")
    recipe: str | None = Field(None, description="data recipe that builds the folder when it is missing")
    options: dict[str, str] = Field(default_factory=dict, description="options of the data recipe")
    horizontal_flip: bool = Field(False, description="flip each training image with probability 1/2")
    num_workers: int = Field(0, ge=0, description="decoding processes; 0 decodes in the training process")
    cache: bool = Field(False, description="keep decoded 8-bit images in memory (small datasets)")


# Tokenizer (stage 1)


class EncoderSpec(Spec):
    """A frozen vision encoder and how its layers become one token map.

    The token of a patch is an aggregate over the outputs of `layers` (block indices from 0, each passed through the
    final norm). One layer is RAE; several are RAEv2's generalised RAE.
    """

    name: str = Field(description="name from `raev2 encoders`, 'timm:ID', 'hf:ID', or a local folder")
    layers: tuple[int, ...] = Field((), description="block indices from 0, ascending; empty: the last block")
    aggregate: Literal["sum", "mean", "random_projection"] = Field(
        "sum", description="sum, mean, or a seeded random projection of the concatenated layers to the encoder width"
    )
    pooled_term: bool = Field(False, description="add the token mean of the last selected layer to every token")
    norm: Literal["plain", "affine", "none"] | None = Field(
        None, description="final norm per layer: without gain and bias, with, or none; null: the family's default"
    )
    antialias: bool = Field(True, description="antialias pictures shrunk to the encoder's input; released code: never")

    @model_validator(mode="after")
    def _ascending(self) -> EncoderSpec:
        if list(self.layers) != sorted(set(self.layers)) or any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers must be ascending block indices from 0 without repeats; got {list(self.layers)}")
        return self


class DecoderSpec(Spec):
    """ViT pixel decoder. Sizes by name: `decoder_size`."""

    added: ClassVar = {"overlap": False}

    width: int = Field(gt=0)
    depth: int = Field(gt=0, le=1000)
    num_heads: int = Field(gt=0)
    mlp_dim: int = Field(gt=0)
    patch_size: int = Field(gt=0, description="pixels per token side in the output image")
    overlap: bool = Field(False, description="tokens paint twice the patch, cross-faded: no seams (not in the papers)")

    @model_validator(mode="after")
    def _heads(self) -> DecoderSpec:
        _check_heads("decoder", self.width, self.num_heads)
        if self.width % 4:
            raise ValueError(f"width must be a multiple of 4 for the sin-cos positions; got width={self.width}")
        return self


class TokenizerSpec(Spec):
    """Representation autoencoder: frozen encoder, trained decoder, latent statistics."""

    added: ClassVar = {"noise_unit": "tokens", "whiten": None}

    kind: Literal["rae"] = "rae"
    encoder: EncoderSpec
    decoder: DecoderSpec
    grid: tuple[int, int] = Field((16, 16), description="latent rows and columns; the encoder sees grid * its patch")
    noise_tau: float = Field(0.8, ge=0, description="strength of the noise on tokens while the decoder trains")
    noise_unit: Literal["std", "tokens"] = Field(
        "std",
        description="std: noise_tau is in standard deviations of the tokens, so that it means the same for a sum, a "
        "mean and any number of layers; tokens: it is absolute (the released code)",
    )
    noise_distribution: Literal["uniform", "half_normal"] = Field(
        "uniform", description="sigma = tau * U[0, 1) (the released code) or |N(0, tau^2)| (the RAE paper's text)"
    )
    whiten: float | None = Field(
        None, ge=0, le=1, description="null: latents of unit variance per element (published); a number: whitened over "
        "channels, a direction of variance v gets v ** (1 - whiten)",
    )  # fmt: skip

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of decoded images in pixels."""
        return self.grid[0] * self.decoder.patch_size, self.grid[1] * self.decoder.patch_size


class VAESpec(Spec):
    """Latents of a published VAE, the baseline; nothing is trained in stage 1. Needs the extra `diffusers`."""

    kind: Literal["vae"] = "vae"
    name: str = Field(description="sdvae-ema, sdxl, flux, vavae, ..., a hub id or a local folder of a diffusers VAE")
    image_size: tuple[int, int] = Field((256, 256), description="height and width in pixels")


class PixelSpec(Spec):
    """Pixels in [-1, 1] as latents, the baseline without a tokenizer; set generator.patch_size to 16 or so."""

    kind: Literal["pixels"] = "pixels"
    image_size: tuple[int, int] = Field((256, 256), description="height and width in pixels")


def _tokenizer_kind(value: Any) -> str:
    """Which tokenizer spec a value is; a mapping without `kind` is an RAE."""
    return value.get("kind", "rae") if isinstance(value, Mapping) else getattr(value, "kind", "rae")


AnyTokenizerSpec = Annotated[
    Annotated[TokenizerSpec, Tag("rae")] | Annotated[VAESpec, Tag("vae")] | Annotated[PixelSpec, Tag("pixels")],
    Discriminator(_tokenizer_kind),
]


class LPIPSLoss(Spec):
    """LPIPS (VGG) through torchmetrics; needs the VGG weights of torchvision."""

    kind: Literal["lpips"] = "lpips"
    weight: float = Field(1.0, ge=0)


class FeatureLoss(Spec):
    """Distance of unit-normalised tokens of a frozen encoder: the perceptual loss that needs no download."""

    kind: Literal["encoder"] = "encoder"
    weight: float = Field(1.0, ge=0)
    encoder: str = "micro"
    layers: tuple[int, ...] = Field((0, 1, 3, 5), description="block indices compared")


class AdversarialSpec(Spec):
    """Discriminator on frozen features with DiffAug; hinge loss. Starts are fractions of the training images."""

    weight: float = Field(0.75, ge=0)
    max_adaptive_weight: float = Field(1e4, gt=0)
    encoder: str = Field("micro", description="frozen trunk; the published recipes use DINO ViT-S/8")
    layers: tuple[int, ...] = Field((1, 3, 5), description="block indices with a discriminator head")
    kernel_size: int = Field(9, ge=1)
    input_size: int = Field(64, gt=0, description="pixels of the square image that the trunk sees")
    disc_start: float = Field(6 / 16, ge=0, le=1, description="the discriminator trains from here on")
    gan_start: float = Field(8 / 16, ge=0, le=1, description="its loss reaches the decoder from here on")
    lr: float = Field(2e-4, gt=0)


class ScheduleSpec(Spec):
    """Learning rate as a function of images seen: warm-up, constant, then decay to `final_lr`."""

    lr: float = Field(2e-4, gt=0)
    final_lr: float = Field(2e-5, ge=0)
    warmup_images: int = Field(0, ge=0)
    decay: Literal["linear", "cosine"] = "cosine"
    decay_start_images: int = Field(0, ge=0, description="images before the decay begins")
    decay_end_images: int | None = Field(None, ge=0, description="images where it ends; null: the last image")


class LoopSpec(Spec):
    """What the two training loops share. Progress is counted in images."""

    images: int = Field(gt=0, description="training images to see in total")
    batch_size: int = Field(gt=0, description="global batch; kept by accumulation on any number of processes")
    micro_batch_size: int | None = Field(None, gt=0, description="images per process at once; null: what fits a GPU")
    schedule: ScheduleSpec = ScheduleSpec()
    clip_grad_norm: float | None = Field(1.0, gt=0)
    log_every_steps: int = Field(10, gt=0)
    sample_every_images: int = Field(gt=0, description="fixed grids of reconstructions or samples")
    save_every_images: int = Field(gt=0)
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept; the last one is always there")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return math.ceil(self.images / self.batch_size)

    @property
    def final_images(self) -> int:
        """Images seen at the end: whole batches, so `images` or a little more."""
        return self.num_steps * self.batch_size


class AdamWSpec(Spec):
    """AdamW; the learning rate comes from the schedule."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    eps: float = Field(1e-8, gt=0)


class MuonSpec(Spec):
    """Muon for matrices, AdamW for the rest.

    `routing="hidden"` (default) sends label tables, condition tokens, modulation and output heads to AdamW, the usual
    Muon practice; `"all_matrices"` reproduces RAEv2, where every 2-D parameter goes to Muon.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    weight_decay: float = Field(0.0, ge=0)
    routing: Literal["hidden", "all_matrices"] = "hidden"
    adamw: AdamWSpec = AdamWSpec()


OptimizerSpec = Annotated[AdamWSpec | MuonSpec, Field(discriminator="kind")]


class TokenizerTrainingSpec(LoopSpec):
    """Stage 1: L1 + perceptual + adversarial loss on the decoder."""

    optimizer: OptimizerSpec = AdamWSpec()
    perceptual: Annotated[LPIPSLoss | FeatureLoss, Field(discriminator="kind")] = FeatureLoss()
    adversarial: AdversarialSpec | None = AdversarialSpec()
    ema_decay: float = Field(0.9978, ge=0, lt=1)
    stats_images: int | None = Field(None, gt=0, description="images for the latent statistics; null: the whole split")


# Generator (stage 2)


class TrunkSpec(Spec):
    """The transformer that sees noisy latent tokens and the condition."""

    added: ClassVar = {"repa_hidden": None}

    width: int = Field(gt=0)
    depth: int = Field(gt=0, le=1000)
    num_heads: int = Field(gt=0)
    patch_size: int = Field(1, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    conditioning: Literal["in_context", "adaln"] = Field(
        "in_context", description="condition as extra tokens (RAEv2) or as modulation of every block (RAE v1)"
    )
    qk_norm: bool = True
    abs_pos_embed: bool = Field(False, description="sin-cos table added to the tokens (RAE v1), besides 2-D RoPE")
    num_time_tokens: int = Field(4, ge=1)
    base_head_depth: int | None = Field(None, ge=1, description="block count after which the base head reads")
    repa_depth: int | None = Field(None, ge=1, description="block count after which the REPA projector reads")
    repa_dim: int | None = Field(None, gt=0, description="width of the REPA target tokens")
    repa_hidden: int | None = Field(
        None, gt=0, description="width inside a projector of three layers (REPA's own is 2048); null: one linear map"
    )

    @model_validator(mode="after")
    def _trunk(self) -> TrunkSpec:
        _check_heads("generator", self.width, self.num_heads)
        if (head := self.width // self.num_heads) % 4:
            raise ValueError(f"width / num_heads must be a multiple of 4 for 2-D RoPE; got {head}")
        for field in ("base_head_depth", "repa_depth"):
            value = getattr(self, field)
            if value is not None and value > self.depth:
                raise ValueError(f"{field} counts blocks of the trunk; got {value} with depth={self.depth}")
        if (self.repa_depth is None) != (self.repa_dim is None):
            raise ValueError("repa_depth and repa_dim belong together; set both or none")
        return self


class DDTSpec(TrunkSpec):
    """DiT^DH: a deep narrow trunk that conditions a shallow wide head, token by token."""

    kind: Literal["ddt"] = "ddt"
    head_width: int = Field(2048, gt=0)
    head_depth: int = Field(2, ge=1, le=1000)
    head_num_heads: int = Field(16, gt=0)

    @model_validator(mode="after")
    def _head(self) -> DDTSpec:
        _check_heads("generator.head", self.head_width, self.head_num_heads)
        return self


class DiTSpec(TrunkSpec):
    """LightningDiT: the trunk alone, the baseline."""

    kind: Literal["dit"] = "dit"


NetworkSpec = Annotated[DDTSpec | DiTSpec, Field(discriminator="kind")]


class FlowSpec(Spec):
    """Flow matching on latents; time runs from 0 (data) to 1 (noise). See docs/conventions.md#time."""

    prediction: Annotated[str, AfterValidator(partial(_installed_name, PREDICTIONS))] = "x"
    time_mean: float = Field(0.0, description="mean of the logit-normal time draw, before the shift")
    time_std: float = Field(1.0, gt=0)
    time_shift: float | None = Field(None, gt=0, description="null: sqrt(latent dimension / 4096)")
    min_t: float = Field(0.05, gt=0, lt=1, description="the x-loss weight is 1 / max(t, min_t)^2")
    reference_clamp: bool = Field(
        False,
        description="divide by max(t, min_t) in the velocity target and the sampler too, as the RAEv2 code does; "
        "it leaves residual noise when a step starts below min_t, so it is off unless parity is wanted",
    )

    def shift_for(self, latent_shape: Sequence[int]) -> float:
        """s of t = s u / (1 + (s - 1) u); by default sqrt(C H W / 4096), so that larger latents see more noise."""
        return self.time_shift or math.sqrt(math.prod(latent_shape) / 4096)


class RepaSpec(Spec):
    """Alignment of hidden tokens with clean encoder tokens."""

    added: ClassVar = {"loss": "mse"}

    encoder: EncoderSpec
    weight: float = Field(0.5, ge=0)
    loss: Literal["mse", "cosine"] = Field("mse", description="squared error (RAEv2), or minus the cosine (REPA)")


class GeneratorTrainingSpec(LoopSpec):
    """Stage 2: flow matching of the generator."""

    added: ClassVar = {"keep_best": None, "latents": None}

    eval_every_images: int | None = Field(None, gt=0, description="evaluation in training; null: only at the end")
    optimizer: OptimizerSpec = MuonSpec()
    ema_decays: tuple[float, ...] = Field((0.9995,), min_length=1, description="the first one is sampled by default")
    cond_drop_prob: float = Field(0.1, ge=0, le=1, description="share of samples trained without their condition")
    base_weight: float = Field(1.0, ge=0, description="weight of the base head's loss")
    repa: RepaSpec | None = None
    latent_cache: bool = Field(False, description="encode the training images once and keep the latents in memory")
    latents: str | None = Field(None, description="folder of `raev2 latents build` that is read in place of pictures")
    keep_best: str | None = Field(None, description="metric: save with each evaluation in training and keep the best")

    @model_validator(mode="after")
    def _evaluated(self) -> GeneratorTrainingSpec:
        if self.keep_best and self.eval_every_images is None:
            raise ValueError("keep_best needs evaluations in training; got eval_every_images=null")
        return self


# Sampling and evaluation


def _not_empty(interval: tuple[float, float]) -> tuple[float, float]:
    if interval[0] >= interval[1]:
        raise ValueError(f"empty interval; got {list(interval)}; expected low < high in [0, 1]")
    return interval


Interval = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]], AfterValidator(_not_empty)
]
Drop = Annotated[
    tuple[str, ...],
    Field(description="parts of the condition that the weak branch lacks, for example action; none: all of it"),
]


# What a guidance may need. Parts of the condition are in its field `drop`, the artefact of a weak generator in `weak`.
Need = Literal["base head", "condition", "weak generator"]


class Guidance(Spec, ABC):
    """How the predictions of a step are combined; the formulas are in raev2/guidance.py.

    A new kind: docs/how_to/new_guidance.md.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()

    kind: str

    @model_validator(mode="wrap")
    @classmethod
    def _of_kind(cls, value: Any, handler: Callable[[Any], Any]) -> Any:
        """A mapping is validated by the class that its `kind` names."""
        if cls is not Guidance or not isinstance(value, Mapping):
            return handler(value)
        return _guidance_kind(_installed_name(GUIDANCE, value.get("kind"))).model_validate(value)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, Any]:
        if cls is not Guidance:
            return handler(schema)
        return {"oneOf": [_guidance_kind(name).model_json_schema() for name in sorted(installed(GUIDANCE))]}


def _guidance_kind(name: str) -> type[Guidance]:
    kind = load_kind(GUIDANCE, name, Guidance)
    if (own := kind.model_fields["kind"].default) != name:
        owner = installed(GUIDANCE)[name].value
        raise TaskError(f"guidance {name}", f"{owner} says another kind", got=repr(own), expected=repr(name))
    return kind


class NoGuidance(Guidance):
    """The conditional prediction as it is."""

    kind: Literal["none"] = "none"


class CFG(Guidance):
    """Classifier-free guidance: null + scale * (cond - null) for t inside the closed interval."""

    needs = frozenset({"condition"})

    kind: Literal["cfg"] = "cfg"
    scale: float = Field(description="1 = off")
    interval: Interval = (0.0, 1.0)
    drop: Drop = ()


class InternalGuidance(Guidance):
    """base + scale * (full - base), both from one forward of the generator."""

    needs = frozenset({"base head"})

    kind: Literal["internal"] = "internal"
    scale: float = 1.78
    interval: Interval = (0.0, 1.0)


class AutoGuidance(Guidance):
    """weak + scale * (full - weak), where `weak` is a second, worse generator with the same condition."""

    needs = frozenset({"weak generator"})

    kind: Literal["auto"] = "auto"
    scale: float = 1.42
    weak: str = Field(description="artefact folder or hub id of the weak generator")
    interval: Interval = (0.0, 1.0)


class InternalCFG(Guidance):
    """Internal guidance on both branches, then classifier-free guidance between them."""

    needs = frozenset({"base head", "condition"})

    kind: Literal["internal+cfg"] = "internal+cfg"
    internal_scale: float = 1.78
    internal_interval: Interval = (0.0, 1.0)
    scale: float = Field(description="scale of the classifier-free part; 1 = off")
    interval: Interval = (0.0, 1.0)
    drop: Drop = ()


class SamplingSpec(Spec):
    """How a trained generator is sampled."""

    added: ClassVar = {"compile": False}

    solver: Literal["euler", "heun"] = "euler"
    steps: int = Field(50, gt=0)
    guidance: SerializeAsAny[Guidance] = NoGuidance()
    batch_size: int = Field(64, gt=0)
    compile: bool = Field(False, description="torch.compile of every transformer block: equal up to rounding")


class ExpectedSpec(Spec):
    """A number that a run of this recipe should reach: `raev2 eval --expect` compares."""

    protocol: str
    metric: str = Field(description="name of the metric in the protocol's results")
    value: float
    tolerance: float = Field(gt=0, description="how far the number obtained may be away, to either side")
    source: str = Field(description="who reports it, under which settings")


class EvaluationSpec(Spec):
    """Evaluation settings shared by the protocols of a task."""

    added: ClassVar = {"expected": ()}

    protocols: tuple[str, ...] = Field((), description="protocols run at the end of training; see `raev2 tasks`")
    in_training: tuple[str, ...] = Field(
        (), description="protocols run every `eval_every_images`, without guidance (as EP_FID is defined)"
    )
    num_samples: int = Field(50_000, gt=0, description="generated images per evaluation")
    compare_guidance: tuple[SerializeAsAny[Guidance], ...] = Field(
        (), description="settings compared after training: a grid and the generation protocols for each"
    )
    expected: tuple[ExpectedSpec, ...] = Field((), description="numbers that `raev2 eval --expect` compares with")
    seed: int = Field(0, ge=0, lt=2**63)


# The run


class ParallelSpec(Spec):
    """How stage 2 is spread over processes. It changes speed and memory, not results beyond rounding."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp",
        description="ddp: every process has all weights; fsdp: weights, averages and optimizer state are sharded over "
        "all processes; hsdp: sharded within a machine, replicated across. Stage 1 is always ddp",
    )
    compile: bool = Field(False, description="torch.compile of every transformer block; minutes at the start")
    activation_checkpointing: bool = Field(False, description="recompute blocks backwards: less memory, a third slower")


class TaskSpec(Spec):
    """Fields of a task plugin; each task has its own subclass."""

    name: str


class RunSpec(Spec):
    """Everything a run depends on. The fingerprint in a run folder is the hash of this."""

    added: ClassVar = {"parallel": ParallelSpec(), "cost": "", "tracker": None, "decoder_from": None}

    recipe: str
    summary: str = Field("", description="one line for `raev2 recipes`: what it is, where it runs, what to expect")
    cost: str = Field("", description="hardware and time of the whole run, and how they are known")
    task: SerializeAsAny[TaskSpec]
    data: DataSpec
    tokenizer: AnyTokenizerSpec
    tokenizer_from: str | None = Field(
        None,
        description="tokenizer artefact (folder or hub id) used instead of training one; its spec replaces `tokenizer`",
    )
    decoder_from: str | None = Field(
        None,
        description="tokenizer artefact (folder or hub id) whose decoder stage 1 goes on training; its latents stay",
    )
    tokenizer_training: TokenizerTrainingSpec
    generator: NetworkSpec
    generator_from: str | None = Field(
        None, description="generator artefact (folder or hub id) whose weights the training of stage 2 starts from"
    )
    flow: FlowSpec = FlowSpec()
    generator_training: GeneratorTrainingSpec
    sampling: SamplingSpec = SamplingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    parallel: ParallelSpec = ParallelSpec()
    tracker: Literal["trackio", "wandb", "tensorboard"] | None = Field(None, description="sink beside metrics.jsonl")
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["fp32", "bf16"] = Field("bf16", description="bf16: autocast with fp32 weights; fp32: no TF32")

    @model_validator(mode="after")
    def _parts_fit(self) -> RunSpec:
        """What would otherwise be found hours later, when stage 2 begins."""
        if self.tokenizer_from and self.decoder_from:
            raise ValueError("decoder_from trains a tokenizer, tokenizer_from uses one; got both. Set one of them")
        if (self.generator_training.repa is None) != (self.generator.repa_depth is None):
            raise ValueError(
                "the alignment loss and the network's projector belong together; set generator_training.repa with "
                "generator.repa_depth and generator.repa_dim, or none of them"
            )
        if self.generator_training.latent_cache and self.data.horizontal_flip:
            raise ValueError(
                "cached latents cannot be flipped; got generator_training.latent_cache=true and "
                "data.horizontal_flip=true. Set one of them to false"
            )
        if self.generator_training.latents and self.generator_training.repa:
            raise ValueError("generator_training.repa needs pictures. Set generator_training.latents=null")
        guidance = self.sampling.guidance
        if "base head" in guidance.needs and self.generator.base_head_depth is None:
            raise ValueError(
                f"this guidance needs a base head; got sampling.guidance.kind={guidance.kind} and "
                "generator.base_head_depth=null. Set generator.base_head_depth, or sampling.guidance.kind=none"
            )
        return self


def _check_heads(where: str, width: int, num_heads: int) -> None:
    if rest := width % num_heads:
        raise ValueError(
            f"{where}.width must be divisible by num_heads; got width={width}, num_heads={num_heads}; "
            f"expected a multiple of {num_heads}. Try {width - rest or num_heads} or {width - rest + num_heads}"
        )
