"""Exponential moving averages of the trained weights, several decays at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raev2.training.parallel import local, shard_like, whole


class EMA:
    """ema <- d * ema + (1 - d) * weight after every step n = 0, 1, ..., with d = min(decay, (1 + n) / (10 + n)).

    The smaller d of the first steps forgets the random initial weights; without it, as in the reference code, a share
    decay^n of them is still there after n steps, which only long runs do not notice.

    Only parameters that are trained are averaged; frozen ones and buffers are those of the model. Pass the bare model,
    not a wrapper of it, so that names match.

    ema = EMA(model, decays=(0.9995, 0.999))
    ema.update(model, step)                      # after every optimizer step
    with ema.applied(model, 0.9995): ...         # evaluate with averaged weights
    tensors = ema.state_dict(0.9995)             # save;  ema.load_state_dict(0.9995, tensors)
    """

    def __init__(self, model: nn.Module, decays: Sequence[float]) -> None:
        self.decays = tuple(decays)
        self._weights = {
            decay: {name: parameter.detach().clone() for name, parameter in _trained(model)} for decay in self.decays
        }
        self._own = {decay: [local(one) for one in averages.values()] for decay, averages in self._weights.items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move every average towards the current weights, after step number `step` (from 0)."""
        weights = [local(parameter) for _, parameter in _trained(model)]
        for decay, averages in self._own.items():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + step) / (10 + step)))

    def state_dict(self, decay: float) -> dict[str, Tensor]:
        """The averaged weights by parameter name (the tensors themselves, not copies)."""
        return dict(self._weights[decay])

    def load_state_dict(self, decay: float, tensors: Mapping[str, Tensor]) -> None:
        """Restore one average; names must match exactly."""
        averages = self._weights[decay]
        if averages.keys() != tensors.keys():
            raise KeyError(f"EMA names differ: {sorted(averages.keys() ^ tensors.keys())[:4]}")
        for name, average in averages.items():
            average.copy_(shard_like(tensors[name], average))

    @contextmanager
    def applied(self, model: nn.Module, decay: float) -> Iterator[None]:
        """Inside the `with`, the model (not a sharded one) has the averaged weights; afterwards its own again."""
        averages = self._weights[decay]
        trained = {name: parameter.data for name, parameter in _trained(model)}
        try:
            for name, parameter in _trained(model):
                parameter.data = whole(averages[name])
            yield
        finally:
            for name, parameter in _trained(model):
                parameter.data = trained[name]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def profile(decay: float, updates: int, length: int) -> NDArray[np.float64]:
    """Shares of the initial weights and of those after each of `length` updates in an average after `updates` of them.

    A decay of 0 is the weights themselves.
    """
    number = np.arange(updates)
    decays = np.concatenate([[0.0], np.minimum(decay, (1 + number) / (10 + number))])
    later = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)
    return np.pad((1 - decays) * later, (0, length - updates))


def mix(decay: float, updates: int, kept: Sequence[tuple[float, int]]) -> tuple[NDArray[np.float64], float]:
    """Coefficients of kept averages (decay, updates), sum 1, whose sum is closest to another one; the share it misses.

    Closest: least squares over the shares that `profile` gives, relative to those of the wanted average.

    Source: EDM2, Karras et al. 2024, section 3.2, there for averages with shares that are powers of time
    """
    wanted = profile(decay, updates, updates)
    first, *others = (profile(*one, updates) for one in kept)
    away = np.reshape([other - first for other in others], (-1, updates + 1))
    rest = np.linalg.lstsq(away.T, wanted - first, rcond=None)[0]
    coefficients = np.array([1 - rest.sum(), *rest])
    missed = wanted - sum(share * profile(*one, updates) for share, one in zip(coefficients, kept, strict=True))
    return coefficients, float(np.linalg.norm(missed) / np.linalg.norm(wanted))
