"""Test doubles, for our tests and those of plugins."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from raev2.batch import Cond, Denoiser, ModelOutput
from raev2.flow import prediction
from raev2.model.condition import Conditioner, LabelCondition
from raev2.shapes import Latents
from raev2.spec import DiTSpec, FlowSpec


class GaussianWorld(nn.Module):
    """A perfect generator for latents ~ N(mean, std^2), where everything is known in closed form.

        latents_pred = mean + (1 - t) std^2 / v * (z - (1 - t) mean)          v = (1 - t)^2 std^2 + t^2
        noise_pred   = t / v * (z - (1 - t) mean)

    The prediction is the target of its kind for these two. The exact end point of noise e is mean + std * e. Label y
    has the mean `means[y]`; the last entry of `means` is the unconditional one. Predictions are affine in the mean, so
    guidance with scale w between two labels is the world with the extrapolated mean. `base_means` gives it a base head
    with other means.
    """

    means: Tensor
    base_means: Tensor | None

    def __init__(
        self,
        means: tuple[float, ...] = (0.7, 0.0),
        std: float = 0.4,
        latent_shape: tuple[int, int, int] = (2, 3, 3),
        flow: FlowSpec | None = None,
        base_means: tuple[float, ...] | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        self.std = std
        self.latent_shape = latent_shape
        self.flow = flow or FlowSpec(time_shift=1.0)
        self.time_shift = self.flow.time_shift or 1.0
        self.has_base_head = base_means is not None
        self.register_buffer("means", torch.tensor(means, dtype=dtype))
        self.register_buffer("base_means", None if base_means is None else torch.tensor(base_means, dtype=dtype))
        network = DiTSpec(width=8, depth=1, num_heads=1, conditioning="adaln")
        self.conditioner: Conditioner = LabelCondition(num_classes=len(means) - 1).build(network, latent_shape)

    def forward(self, z_t: Latents, t: Float[Tensor, " B"], cond: Cond) -> ModelOutput:
        """The exact prediction."""
        base_pred = None if self.base_means is None else self._predict(z_t, t, self.base_means[cond["label"]])
        return ModelOutput(self._predict(z_t, t, self.means[cond["label"]]), base_pred)

    def exact(self, noise: Latents, cond: Cond) -> Latents:
        """Where the exact flow takes this noise."""
        return self.means[cond["label"]].view(-1, 1, 1, 1) + self.std * noise

    def prepare_cond(self, cond: Cond) -> Cond:
        """Nothing to prepare."""
        return cond

    def check_cond(self, cond: Cond) -> None:
        """Raise `SpecError` unless these are labels of this world."""
        self.conditioner.check(cond)

    @property
    def device(self) -> torch.device:
        """Device of the means."""
        return self.means.device

    def _predict(self, z_t: Tensor, t: Tensor, mean: Tensor) -> Tensor:
        mean, t = mean.view(-1, 1, 1, 1), t.to(mean.dtype).view(-1, 1, 1, 1)
        offset = (z_t - (1 - t) * mean) / ((1 - t) ** 2 * self.std**2 + t**2)
        latents = mean + (1 - t) * self.std**2 * offset
        return prediction(self.flow.prediction).target(latents, t * offset, t)


_double: type[Denoiser] = GaussianWorld  # for mypy
