from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from raev2.errors import SpecError
from raev2.guidance import build_guidance
from raev2.model.condition import LabelCondition, NoCondition
from raev2.model.generator import Generator
from raev2.spec import CFG, AutoGuidance, DDTSpec, FlowSpec, InternalCFG, InternalGuidance, NoGuidance


def build(seed=0, base_head_depth=1, condition=None, flow=None):
    torch.manual_seed(seed)
    spec = DDTSpec(
        width=16, depth=2, num_heads=2, head_width=16, head_depth=1, head_num_heads=2, base_head_depth=base_head_depth
    )
    generator = Generator(spec, condition or LabelCondition(num_classes=4), flow or FlowSpec(), (3, 2, 2))
    for parameter in generator.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return generator.eval()


@contextmanager
def counted_rows(generator):
    """Rows of each forward of a generator."""
    rows = []
    hook = generator.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    yield rows
    hook.remove()


GENERATOR, WEAK = build(), build(seed=1)
Z_T, COND = torch.randn(3, 3, 2, 2), {"label": torch.tensor([0, 1, 2])}
KINDS = {
    "cfg": lambda scale, interval: CFG(scale=scale, interval=interval),
    "internal": lambda scale, interval: InternalGuidance(scale=scale, interval=interval),
    "auto": lambda scale, interval: AutoGuidance(scale=scale, interval=interval, weak="-"),
    "internal+cfg": lambda scale, interval: InternalCFG(
        internal_scale=scale, internal_interval=interval, scale=scale, interval=interval
    ),
}


@torch.no_grad()
def predict(spec, t=0.5, generator=GENERATOR):
    weak = WEAK if isinstance(spec, AutoGuidance) else None
    return build_guidance(spec, generator, weak)(Z_T, t, COND)


@torch.no_grad()
def outputs(t=0.5, generator=GENERATOR):
    times = torch.full((3,), t)
    return generator(Z_T, times, COND), generator(Z_T, times, generator.null_cond(COND))


@pytest.mark.parametrize("kind", KINDS)
def test_scale_one_is_the_conditional_prediction_bit_for_bit(kind):
    assert torch.equal(predict(KINDS[kind](1.0, (0.0, 1.0))), predict(NoGuidance()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("t", "inside"), [(0.2, True), (0.8, True), (0.5, True), (0.1999, False), (0.8001, False)])
def test_intervals_are_closed_and_change_nothing_outside(kind, t, inside):
    guided, plain = predict(KINDS[kind](2.0, (0.2, 0.8)), t), predict(NoGuidance(), t)
    assert torch.equal(guided, plain) != inside


def test_formulas():
    """cfg: null + w (cond - null); internal: base + w (full - base); auto; internal on both branches, then cfg."""
    cond, null = outputs()
    weak, _ = outputs(generator=WEAK)
    close = torch.testing.assert_close
    close(predict(CFG(scale=2.5)), null.pred + 2.5 * (cond.pred - null.pred))
    close(predict(InternalGuidance(scale=1.78)), cond.base_pred + 1.78 * (cond.pred - cond.base_pred))
    close(predict(AutoGuidance(scale=1.42, weak="-")), weak.pred + 1.42 * (cond.pred - weak.pred))
    a_cond = cond.base_pred + 1.5 * (cond.pred - cond.base_pred)
    a_null = null.base_pred + 1.5 * (null.pred - null.base_pred)
    close(predict(InternalCFG(internal_scale=1.5, scale=2.0)), a_null + 2.0 * (a_cond - a_null))


def test_intervals_of_internal_cfg_are_independent():
    cond, null = outputs()
    spec = InternalCFG(internal_scale=1.5, internal_interval=(0.6, 1.0), scale=2.0, interval=(0.0, 0.5))
    torch.testing.assert_close(predict(spec), null.pred + 2.0 * (cond.pred - null.pred))
    cond, _ = outputs(0.7)
    torch.testing.assert_close(predict(spec, 0.7), cond.base_pred + 1.5 * (cond.pred - cond.base_pred))


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [("cfg", [6], [3]), ("internal", [3], [3]), ("internal+cfg", [6], [3]), ("auto", [3], [3])],
)
def test_unneeded_branches_are_not_computed(kind, inside, outside):
    for t, rows in ((0.5, inside), (0.9, outside)):
        with counted_rows(GENERATOR) as found:
            predict(KINDS[kind](2.0, (0.2, 0.8)), t)
        assert found == rows


def test_guiding_velocity_equals_guiding_clean_latents():
    """Velocity is affine in the clean latents at the same point, so both give the same result."""
    cond, null = outputs()
    velocity = [(Z_T - output.pred) / 0.5 for output in (cond, null)]
    guided = velocity[1] + 3.0 * (velocity[0] - velocity[1])
    torch.testing.assert_close((Z_T - predict(CFG(scale=3.0))) / 0.5, guided)


@pytest.mark.parametrize(
    ("spec", "weak", "generator", "message"),
    [
        (
            InternalGuidance(),
            None,
            build(base_head_depth=None),
            "guidance internal: needs a base head, there is none. Use another kind.",
        ),
        (InternalCFG(scale=2.0), None, build(base_head_depth=None), "guidance internal.cfg: needs a base head"),
        (CFG(scale=2.0), None, build(condition=NoCondition()), "guidance cfg: needs a condition, there is none"),
        (AutoGuidance(weak="-"), None, GENERATOR, "guidance auto: needs a weak generator, there is none"),
        (CFG(scale=2.0), WEAK, GENERATOR, "guidance cfg: a weak generator has no effect here"),
        (AutoGuidance(weak="-"), build(flow=FlowSpec(prediction="velocity")), GENERATOR, "predicts something else"),
    ],
)
def test_guidance_without_effect_is_an_error(spec, weak, generator, message):
    with pytest.raises(SpecError, match=message):
        build_guidance(spec, generator, weak)
