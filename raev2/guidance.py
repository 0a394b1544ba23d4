"""Guidance: how the predictions of one step are combined. Read `build_guidance`.

Every formula has one form, out = weak + scale * (strong - weak), on raw predictions; because velocity is affine in the
clean latents at the same z_t and t, this is the same for x- and velocity-prediction. It holds for t inside a closed
interval (of the shifted time that the sampler uses); outside, the strong prediction is used and the weak one is not
computed. Scale 1 is the strong prediction, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raev2.batch import Cond, ModelOutput
from raev2.errors import SpecError
from raev2.spec import CFG, AutoGuidance, InternalCFG, InternalGuidance, NoGuidance

Predictor = Callable[[Tensor, float, Cond], Tensor]
"""(z_t, t, cond) -> prediction; all samples of a batch are at the same time while sampling."""

Guidance = NoGuidance | CFG | InternalGuidance | AutoGuidance | InternalCFG


def build_guidance(spec: Guidance, generator: Any, weak: Any = None) -> Predictor:
    """The guided predictor of a generator; `weak` is the second generator of auto guidance.

    none            full
    cfg             null + scale * (cond - null), both branches in one forward
    internal        base + scale * (full - base), one forward
    auto            weak + scale * (full - weak)
    internal+cfg    internal guidance on both branches, then cfg between them

    The null branch lacks the whole condition, or the parts of it that `drop` names. What depends on the condition alone
    is computed once for all steps that pass the same one.
    """
    _check(spec, generator, weak)
    prepare = _remembered(generator.prepare_cond)
    prepare_weak = None if weak is None else _remembered(weak.prepare_cond)
    pair = _remembered(lambda cond: _pair(generator, prepare(cond), getattr(spec, "drop", ())))

    def plain(z_t: Tensor, t: float, cond: Cond) -> ModelOutput:
        return _forward(generator, z_t, t, prepare(cond))

    def both(z_t: Tensor, t: float, cond: Cond) -> ModelOutput:
        """One forward of [conditional; unconditional]."""
        return _forward(generator, torch.cat([z_t, z_t]), t, pair(cond))

    def full(z_t: Tensor, t: float, cond: Cond) -> Tensor:
        return plain(z_t, t, cond).pred

    def cfg(z_t: Tensor, t: float, cond: Cond) -> Tensor:
        assert isinstance(spec, CFG)
        if not is_active(spec.scale, spec.interval, t):
            return full(z_t, t, cond)
        pred, null_pred = both(z_t, t, cond).pred.chunk(2)
        return extrapolate(null_pred, pred, spec.scale)

    def internal(z_t: Tensor, t: float, cond: Cond) -> Tensor:
        assert isinstance(spec, InternalGuidance)
        return _internal(plain(z_t, t, cond), spec.scale, spec.interval, t)

    def auto(z_t: Tensor, t: float, cond: Cond) -> Tensor:
        assert isinstance(spec, AutoGuidance) and prepare_weak is not None
        if weak.conditioner.is_prepared(cond):
            raise SpecError(
                "guidance.weak", "the condition is already prepared for the other generator",
                hint="Pass the condition as it was before prepare_cond.",
            )  # fmt: skip
        pred = full(z_t, t, cond)
        if not is_active(spec.scale, spec.interval, t):
            return pred
        return extrapolate(_forward(weak, z_t, t, prepare_weak(cond)).pred, pred, spec.scale)

    def internal_cfg(z_t: Tensor, t: float, cond: Cond) -> Tensor:
        assert isinstance(spec, InternalCFG)
        if not is_active(spec.scale, spec.interval, t):
            return _internal(plain(z_t, t, cond), spec.internal_scale, spec.internal_interval, t)
        pred, null_pred = _internal(both(z_t, t, cond), spec.internal_scale, spec.internal_interval, t).chunk(2)
        return extrapolate(null_pred, pred, spec.scale)

    return {"none": full, "cfg": cfg, "internal": internal, "auto": auto, "internal+cfg": internal_cfg}[spec.kind]


def extrapolate(weak: Tensor, strong: Tensor, scale: float) -> Tensor:
    """weak + scale * (strong - weak)."""
    return weak + scale * (strong - weak)


def is_active(scale: float, interval: tuple[float, float], t: float) -> bool:
    """Whether guidance changes the prediction at time t; the interval is closed."""
    return scale != 1 and interval[0] <= t <= interval[1]


def _internal(output: ModelOutput, scale: float, interval: tuple[float, float], t: float) -> Tensor:
    if not is_active(scale, interval, t):
        return output.pred
    assert output.base_pred is not None
    return extrapolate(output.base_pred, output.pred, scale)


def _forward(generator: Any, z_t: Tensor, t: float, cond: Cond) -> ModelOutput:
    """One forward with all samples at time t; predictions in the dtype of `z_t`, also under autocast."""
    output = generator(z_t, z_t.new_full((len(z_t),), t), cond)
    base_pred = None if output.base_pred is None else output.base_pred.to(z_t.dtype)
    return ModelOutput(output.pred.to(z_t.dtype), base_pred)


def _pair(generator: Any, cond: Cond, drop: tuple[str, ...]) -> Cond:
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


def _check(spec: Guidance, generator: Any, weak: Any) -> None:
    intervals = [getattr(spec, name) for name in ("interval", "internal_interval") if hasattr(spec, name)]
    for low, high in intervals:
        if low >= high:
            raise SpecError("guidance.interval", "empty interval", got=[low, high], expected="low < high in [0, 1]")
    if isinstance(spec, InternalGuidance | InternalCFG) and not generator.has_base_head:
        raise SpecError(
            "guidance", "internal guidance needs a base head, this generator has none", got=spec.kind,
            hint="Use none, cfg or auto, or train with generator.base_head_depth set.",
        )  # fmt: skip
    if isinstance(spec, CFG | InternalCFG) and not generator.conditioner.fields:
        raise SpecError(
            "guidance", "classifier-free guidance needs a condition, this generator is unconditional", got=spec.kind,
            hint="Use none, internal or auto.",
        )  # fmt: skip
    if isinstance(spec, CFG | InternalCFG):
        generator.conditioner.check_parts(spec.drop)
    if isinstance(spec, AutoGuidance) and weak is None:
        raise SpecError("guidance.weak", "auto guidance needs a weak generator", hint="Pass `weak=Generator`.")
    if not isinstance(spec, AutoGuidance) and weak is not None:
        raise SpecError("guidance", "a weak generator has no effect here", got=spec.kind, expected="auto")
    if weak is not None and (weak.latent_shape, weak.flow.prediction) != (
        generator.latent_shape,
        generator.flow.prediction,
    ):
        raise SpecError(
            "guidance.weak", "the weak generator predicts something else",
            got=f"{weak.flow.prediction} {weak.latent_shape}",
            expected=f"{generator.flow.prediction} {generator.latent_shape}",
        )  # fmt: skip
