"""The generator: a network, its condition module and its flow, saved and loaded as one artefact.

generator = Generator(network_spec, condition_spec, flow_spec, latent_shape=(768, 16, 16))
output = generator(z_t, t, cond)                      # ModelOutput(pred, base_pred, hidden)
generator.save_pretrained("my_generator")
generator = Generator.from_pretrained("my_generator")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from raev2.batch import Cond, FrameCache, ModelOutput
from raev2.errors import SpecError
from raev2.files.artefact import build_strict, load_artefact, push_to_hub, save_artefact
from raev2.files.damage import damaged
from raev2.model.condition import ConditionSpec, LabelCondition, NoCondition, TextCondition
from raev2.model.dit import DDT, DiT
from raev2.model.frames import FramesCondition
from raev2.nn import Block
from raev2.shapes import Latents, LatentShape, Times
from raev2.spec import DDTSpec, DiTSpec, FlowSpec, NetworkSpec


class Generator(nn.Module):
    """Predicts clean latents or velocity (`flow.prediction`) from a noisy point, its time and the condition.

    latent_shape   C, H, W of the normalised latents
    extra          further entries of config.json: what the weights were trained on, recommended sampling, ...
    """

    def __init__(
        self,
        network: DDTSpec | DiTSpec,
        condition: ConditionSpec,
        flow: FlowSpec,
        latent_shape: LatentShape,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network_spec, self.condition_spec = network, condition
        self.flow, self.latent_shape = flow, latent_shape
        self.extra = dict(extra or {})
        self.network = DDT(network, latent_shape) if isinstance(network, DDTSpec) else DiT(network, latent_shape)
        self.conditioner = condition.build(network, latent_shape)

    def forward(self, z_t: Latents, t: Times, cond: Cond) -> ModelOutput:
        """Prediction at the noisy latents `z_t`, time `t` in [0, 1] (1 = noise), raw or prepared condition `cond`."""
        cond = self.conditioner.prepare(cond, self.network.trunk)
        if self.network_spec.conditioning == "in_context":
            return self.network(z_t, t, self.conditioner(cond), None)
        return self.network(z_t, t, None, self.conditioner.vector(cond))

    def prepare_cond(self, cond: Cond, frames: FrameCache | None = None) -> dict[str, Tensor]:
        """The condition with all that depends neither on `z_t` nor on `t` computed, for the steps of a sampler.

        Past frames become keys and values, with the batch as leading axis; motion, time and flags of the result may
        still be changed. It belongs to this generator with its present weights. Other conditions, and prepared ones,
        come back as they are.

        frames   from `encode_frames`: then "context_id" (B, K) are its rows, and "context_latents" is not needed
        """
        return self.conditioner.prepare(cond, self.network.trunk, frames)

    def encode_frames(self, latents: Float[Tensor, "U C H W"]) -> FrameCache:
        """Past frames as every block sees them, for `prepare_cond`: encode a frame once, use it wherever it occurs.

        Without gradients on a CPU each frame is computed on its own, so that its bits depend on nothing else.
        """
        return self.conditioner.encode_frames(latents, self.network.trunk)

    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        """The unconditional condition in the shapes of `cond`, whose optional tensors get their defaults."""
        return self.conditioner.null_cond(cond)

    def check_cond(self, cond: Cond) -> None:
        """Raise `SpecError` unless the condition has the right names, shapes and values."""
        self.conditioner.check(cond)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, of the trunk and of a head."""
        return [module for module in self.network.modules() if isinstance(module, Block)]

    @property
    def time_shift(self) -> float:
        """s of t = s u / (1 + (s - 1) u), how far times are moved towards noise."""
        return self.flow.shift_for(self.latent_shape)

    @property
    def has_base_head(self) -> bool:
        """Whether `base_pred` is there, which internal guidance needs."""
        return self.network_spec.base_head_depth is not None

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def save_pretrained(self, path: str | Path) -> Path:
        """Write an artefact folder that `from_pretrained` reads."""
        return save_artefact(path, kind="generator", config=self.config(), tensors=self.state_dict())

    def config(self) -> dict[str, Any]:
        """What config.json of the artefact says about this generator."""
        return {
            "network": self.network_spec.model_dump(mode="json"),
            "condition": self.condition_spec.model_dump(mode="json"),
            "flow": self.flow.model_dump(mode="json"),
            "latent_shape": list(self.latent_shape),
            "extra": self.extra,
        }

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, condition_types: Sequence[type[ConditionSpec]] = ()
    ) -> Generator:
        """Load an artefact folder or hub repository; `condition_types` are kinds of condition from plugins."""
        config, tensors, path = load_artefact(path_or_hub_id, kind="generator")
        with damaged(f"{path}/config.json"):
            network = TypeAdapter(NetworkSpec).validate_python(config["network"])
            condition = condition_spec(config["condition"], condition_types)
            flow, shape, extra = FlowSpec.model_validate(config["flow"]), config["latent_shape"], config.get("extra")
            build = partial(cls, network, condition, flow, tuple(shape), extra)
            return build_strict(build, tensors, str(path)).eval()

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload as a model repository of the Hugging Face hub; returns its address."""
        return push_to_hub(self.save_pretrained, repo_id, "generator", private=private)


CONDITION_TYPES: tuple[type[ConditionSpec], ...] = (NoCondition, LabelCondition, TextCondition, FramesCondition)


def condition_spec(data: Mapping[str, Any], extra_types: Sequence[type[ConditionSpec]] = ()) -> ConditionSpec:
    """The condition spec that a saved configuration describes; `extra_types` are kinds from outside the core."""
    types = {type_.model_fields["kind"].default: type_ for type_ in (*CONDITION_TYPES, *extra_types)}
    kind = data.get("kind")
    if kind not in types:
        raise SpecError(
            "condition.kind", "unknown condition", got=kind, expected=f"one of {', '.join(sorted(types))}",
            hint="Install the plugin that defines it and pass its class in `condition_types`.",
        )  # fmt: skip
    try:
        return types[kind].model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpecError(f"condition.{'.'.join(map(str, first['loc']))}", first["msg"], got=first["input"]) from error
