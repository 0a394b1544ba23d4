"""Guidance: how the predictions of one step are combined. Read `guided`, the formulas.

Every formula has one form, out = weak + scale * (strong - weak), on raw predictions; because velocity is affine in the
clean latents at the same z_t and t, this is the same for x- and velocity-prediction. It holds for t inside a closed
interval (of the shifted time that the sampler uses); outside, the strong prediction is used and the weak one is not
computed. Scale 1 is the strong prediction, bit for bit. How to add one: docs/how_to/new_guidance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, singledispatch

import torch
from torch import Tensor

from raev2.batch import Cond, Denoiser, ModelOutput
from raev2.errors import SpecError, TaskError
from raev2.spec import CFG, AutoGuidance, Guidance, InternalCFG, InternalGuidance, NoGuidance

Predictor = Callable[[Tensor, float, Cond], Tensor]
"""(z_t, t, cond) -> prediction; all samples of a batch are at the same time while sampling."""


def build_guidance(spec: Guidance, generator: Denoiser, weak: Denoiser | None = None) -> Predictor:
    """The guided predictor of a generator; `weak` is the second generator of auto guidance."""
    _check(spec, generator, weak)
    return partial(guided, spec, Branches(generator, weak))


class Branches:
    """The predictions that a formula may ask for; each call is one forward.

    What depends on the condition alone is computed once for all steps that pass the same one.
    """

    def __init__(self, generator: Denoiser, weak: Denoiser | None) -> None:
        self._generator, self._weak = generator, weak
        self._prepare = _remembered(generator.prepare_cond)
        self._prepare_weak = None if weak is None else _remembered(weak.prepare_cond)
        self._pairs: dict[tuple[str, ...], Callable[[Cond], Cond]] = {}

    def full(self, z_t: Tensor, t: float, cond: Cond) -> ModelOutput:
        """The conditional prediction."""
        return _forward(self._generator, z_t, t, self._prepare(cond))

    def both(self, z_t: Tensor, t: float, cond: Cond, drop: tuple[str, ...] = ()) -> ModelOutput:
        """One forward of [conditional; unconditional]. The second half lacks the parts `drop`; by default all."""
        pair = self._pairs.setdefault(drop, _remembered(lambda cond: _pair(self._generator, self._prepare(cond), drop)))
        return _forward(self._generator, torch.cat([z_t, z_t]), t, pair(cond))

    def weak(self, z_t: Tensor, t: float, cond: Cond) -> Tensor:
        """The conditional prediction of the weak generator."""
        assert self._weak is not None and self._prepare_weak is not None
        if self._weak.conditioner.is_prepared(cond):
            raise SpecError(
                "guidance.weak", "the condition is already prepared for the other generator",
                hint="Pass the condition as it was before prepare_cond.",
            )  # fmt: skip
        return _forward(self._weak, z_t, t, self._prepare_weak(cond)).pred


@singledispatch
def guided(spec: Guidance, branches: Branches, z_t: Tensor, t: float, cond: Cond) -> Tensor:
    """The guided prediction: a formula for each kind of guidance."""
    raise NotImplementedError


@guided.register(NoGuidance)
def _none(spec: NoGuidance, branches: Branches, z_t: Tensor, t: float, cond: Cond) -> Tensor:
    """full"""
    return branches.full(z_t, t, cond).pred


@guided.register(CFG)
def _cfg(spec: CFG, branches: Branches, z_t: Tensor, t: float, cond: Cond) -> Tensor:
    """null + scale * (cond - null), both branches in one forward"""
    if not is_active(spec.scale, spec.interval, t):
        return branches.full(z_t, t, cond).pred
    pred, null_pred = branches.both(z_t, t, cond, spec.drop).pred.chunk(2)
    return extrapolate(null_pred, pred, spec.scale)


@guided.register(InternalGuidance)
def _internal(spec: InternalGuidance, branches: Branches, z_t: Tensor, t: float, cond: Cond) -> Tensor:
    """base + scale * (full - base), one forward"""
    return _from_base(branches.full(z_t, t, cond), spec.scale, spec.interval, t)


@guided.register(AutoGuidance)
def _auto(spec: AutoGuidance, branches: Branches, z_t: Tensor, t: float, cond: Cond) -> Tensor:
    """weak + scale * (full - weak)"""
    pred = branches.full(z_t, t, cond).pred
    if not is_active(spec.scale, spec.interval, t):
        return pred
    return extrapolate(branches.weak(z_t, t, cond), pred, spec.scale)


@guided.register(InternalCFG)
def _internal_cfg(spec: InternalCFG, branches: Branches, z_t: Tensor, t: float, cond: Cond) -> Tensor:
    """internal guidance on both branches, then cfg between them"""
    internal = partial(_from_base, scale=spec.internal_scale, interval=spec.internal_interval, t=t)
    if not is_active(spec.scale, spec.interval, t):
        return internal(branches.full(z_t, t, cond))
    pred, null_pred = internal(branches.both(z_t, t, cond, spec.drop)).chunk(2)
    return extrapolate(null_pred, pred, spec.scale)


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """weak + scale * (strong - weak)."""
    return weak + scale * (strong - weak)


def is_active(scale: float, interval: tuple[float, float], t: float) -> bool:
    """Whether guidance changes the prediction at time t; the interval is closed."""
    return scale != 1 and interval[0] <= t <= interval[1]


def _from_base(output: ModelOutput, scale: float, interval: tuple[float, float], t: float) -> Tensor:
    if not is_active(scale, interval, t):
        return output.pred
    assert output.base_pred is not None
    return extrapolate(output.base_pred, output.pred, scale)


def _forward(generator: Denoiser, z_t: Tensor, t: float, cond: Cond) -> ModelOutput:
    """One forward with all samples at time t; predictions in the dtype of `z_t`, also under autocast."""
    output = generator(z_t, z_t.new_full((len(z_t),), t), cond)
    base_pred = None if output.base_pred is None else output.base_pred.to(z_t.dtype)
    return ModelOutput(output.pred.to(z_t.dtype), base_pred)


def _pair(generator: Denoiser, cond: Cond, drop: tuple[str, ...]) -> Cond:
    """The rows of a condition, then the same rows without it."""
    null_cond = generator.conditioner.without(cond, drop)
    return {name: torch.cat([value, null_cond[name]]) for name, value in cond.items()}


def _remembered(function: Callable[[Cond], Cond]) -> Callable[[Cond], Cond]:
    """`function` with its last result kept: a sampler passes one and the same condition at every step."""
    last: list[tuple[Cond, Cond]] = []

    def remembered(cond: Cond) -> Cond:
        if not last or last[0][0] is not cond:
            last[:] = [(cond, function(cond))]
        return last[0][1]

    return remembered


def _check(spec: Guidance, generator: Denoiser, weak: Denoiser | None) -> None:
    if guided.dispatch(type(spec)) is guided.dispatch(object):
        raise TaskError(
            f"guidance {spec.kind}", f"{type(spec).__module__}.{type(spec).__qualname__} has no formula",
            expected="a function with @guided.register",
        )  # fmt: skip
    found = {
        "base head": generator.has_base_head,
        "condition": bool(generator.conditioner.fields),
        "weak generator": weak is not None,
    }
    for need in sorted(spec.needs):
        if not found.get(need):
            raise SpecError(f"guidance {spec.kind}", f"needs a {need}, there is none", hint="Use another kind.")
    if "condition" in spec.needs:
        generator.conditioner.check_parts(getattr(spec, "drop", ()))
    if weak is None:
        return
    if "weak generator" not in spec.needs:
        raise SpecError(f"guidance {spec.kind}", "a weak generator has no effect here")
    got, expected = (f"{model.flow.prediction} {model.latent_shape}" for model in (weak, generator))
    if got != expected:
        raise SpecError("guidance.weak", "the weak generator predicts something else", got=got, expected=expected)
