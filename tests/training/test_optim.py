from __future__ import annotations

import copy
import math

import pytest
import torch

from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.spec import AdamWSpec, DDTSpec, FlowSpec, MuonSpec, ScheduleSpec
from raev2.training.optim import Muon, build_optimizer, learning_rate, muon_routing, orthogonalise, set_learning_rate

EPOCH = 1_281_167


def build():
    torch.manual_seed(0)
    spec = DDTSpec(width=16, depth=2, num_heads=2, head_width=24, head_depth=1, head_num_heads=2)
    return Generator(spec, LabelCondition(num_classes=4), FlowSpec(), (3, 2, 2))


def fill_gradients(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


# Learning rate


def test_published_stage_2_schedule():
    """Factor 1, 1, 0.55, 0.1, 0.1 at epochs 0, 25, 37.5, 50, 80 (12.10)."""
    schedule = ScheduleSpec(
        lr=2e-4, final_lr=2e-5, decay="linear", decay_start_images=25 * EPOCH, decay_end_images=50 * EPOCH
    )
    factors = [learning_rate(schedule, int(epoch * EPOCH), 80 * EPOCH) / 2e-4 for epoch in (0, 25, 37.5, 50, 80)]
    assert factors == pytest.approx([1, 1, 0.55, 0.1, 0.1], abs=1e-6)


def test_published_stage_1_schedule():
    """One epoch of warm-up, factor (step + 1) / warm-up steps, then a cosine to a tenth at epoch 16."""
    steps = 2502
    schedule = ScheduleSpec(lr=2e-4, final_lr=2e-5, warmup_images=steps * 512, decay="cosine")

    def factor(step):
        return learning_rate(schedule, step * 512, 16 * steps * 512, batch_size=512) / 2e-4

    assert factor(0) == pytest.approx(1 / steps)
    assert factor(99) == pytest.approx(100 / steps)
    assert factor(steps - 1) == factor(steps) == 1
    for step in (2 * steps, 8 * steps, 15 * steps):
        progress = (step - steps) / (15 * steps)
        assert factor(step) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert factor(16 * steps) == factor(20 * steps) == pytest.approx(0.1)


# Orthogonalisation


@pytest.mark.parametrize("shape", [(64, 64), (64, 200), (200, 64)])
def test_singular_values_end_near_one(shape):
    """Relative singular values in [0.003, 1] go to [0.846, 1.124], 1e-3 to 0.73, 1e-4 to 0.08 (12.8)."""
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    singular = torch.logspace(math.log10(0.003), -1, 64, dtype=torch.float64)
    singular[-1] = (1 - singular[:-1].square().sum()).sqrt()  # Frobenius norm 1
    for dtype, slack in ((torch.float32, 0.001), (torch.bfloat16, 0.1)):
        out = torch.linalg.svdvals(orthogonalise(((u * singular) @ v)[None], dtype).double())
        assert out.min() > 0.846 - slack and out.max() < 1.124 + slack

    for value, expected in ((1e-3, 0.73), (1e-4, 0.08)):
        one = torch.zeros(64, dtype=torch.float64)
        one[0], one[1] = math.sqrt(1 - value**2), value
        out = torch.linalg.svdvals(orthogonalise(((u * one) @ v)[None])[0].double())
        assert out[1].item() == pytest.approx(expected, abs=0.01)


def test_stacked_matrices_are_independent():
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 20)
    stacked = orthogonalise(matrices)
    for matrix, result in zip(matrices, stacked, strict=True):
        torch.testing.assert_close(orthogonalise(matrix[None])[0], result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32)])
def test_size_of_a_muon_update(shape):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape)
    Muon([(parameter, (shape[0],))], [], MuonSpec(), lr=1e-3).step()
    assert 0.17e-3 < parameter.detach().square().mean().sqrt() < 0.225e-3
    assert (parameter.detach() * parameter.grad).sum() < 0


# Optimizers


def test_fused_matrices_are_updated_as_separate_ones():
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(30, 10))
    parts = [torch.nn.Parameter(part.clone()) for part in fused.detach().split((10, 10, 10))]
    fused.grad = torch.randn(30, 10)
    for part, gradient in zip(parts, fused.grad.split(10), strict=True):
        part.grad = gradient
    Muon([(fused, (10, 10, 10))], [], MuonSpec(), lr=0.1).step()
    Muon([(part, (10,)) for part in parts], [], MuonSpec(), lr=0.1).step()
    torch.testing.assert_close(fused, torch.cat(parts), rtol=0, atol=1e-3)  # bfloat16 iterations; lr 0.1


def test_routing():
    model = build()
    parameters = dict(model.named_parameters())
    muon, adamw = muon_routing(parameters, "hidden")
    assert {name.split(".")[-2] for name in muon} == {"qkv", "proj", "w12", "w3"}
    assert all("blocks." in name for name in muon) and len(muon) == 3 * 4
    assert {"conditioner.table.weight", "network.modulation.weight", "network.final.linear.weight"} <= set(adamw)
    muon, adamw = muon_routing(parameters, "all_matrices")
    assert {"conditioner.table.weight", "conditioner.tokens", "network.modulation.weight"} <= set(muon)
    assert all(parameters[name].ndim != 2 for name in adamw)


def test_published_parameter_split():
    """All matrices to Muon: 871.05 M of the released size go there, 4.17 M to AdamW (8.2)."""
    spec = DDTSpec(width=1440, depth=28, num_heads=20, base_head_depth=8)
    with torch.device("meta"):
        model = Generator(spec, LabelCondition(num_classes=1000), FlowSpec(), (1024, 16, 16))
    parameters = dict(model.named_parameters())
    muon, adamw = muon_routing(parameters, "all_matrices")
    assert sum(parameters[name].numel() for name in muon) / 1e6 == pytest.approx(871.05, abs=0.01)
    assert sum(parameters[name].numel() for name in adamw) / 1e6 == pytest.approx(4.17, abs=0.01)


def test_the_adamw_part_equals_the_library():
    ours, library = build(), build()
    spec = MuonSpec(adamw=AdamWSpec(weight_decay=0.1))
    names = [name for name, _ in ours.named_parameters()]
    optimizer = Muon([], [parameter for _, parameter in ours.named_parameters()], spec, lr=1e-2)
    reference = torch.optim.AdamW(library.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
    for step in range(3):
        fill_gradients(ours, step)
        fill_gradients(library, step)
        optimizer.step()
        reference.step()
    for name, a, b in zip(names, ours.parameters(), library.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("spec", [AdamWSpec(), MuonSpec(), MuonSpec(routing="all_matrices", nesterov=False)])
def test_training_continues_from_a_state_dict(spec):
    straight = build()
    optimizer = build_optimizer(straight, spec, 1e-2)
    for step in range(4):
        if step == 2:
            resumed, state = copy.deepcopy(straight), copy.deepcopy(optimizer.state_dict())
        fill_gradients(straight, step)
        set_learning_rate(optimizer, 1e-2 / (step + 1))
        optimizer.step()
    resumed_optimizer = build_optimizer(resumed, spec, 123.0)
    resumed_optimizer.load_state_dict(state)
    for step in (2, 3):
        fill_gradients(resumed, step)
        set_learning_rate(resumed_optimizer, 1e-2 / (step + 1))
        resumed_optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_learning_rate_of_every_group_is_set_and_restored():
    """One list of groups: the reference resumes Muon with its initial rate."""
    optimizer = build_optimizer(build(), MuonSpec(), 2e-4)
    set_learning_rate(optimizer, 2e-5)
    other = build_optimizer(build(), MuonSpec(), 2e-4)
    other.load_state_dict(optimizer.state_dict())
    assert {group["lr"] for group in other.param_groups} == {2e-5}


def test_frozen_parameters_and_missing_gradients_are_left_alone():
    model = build()
    model.conditioner.table.weight.requires_grad_(False)
    optimizer = build_optimizer(model, MuonSpec(), 1.0)
    before = copy.deepcopy(model.state_dict())
    model.network.final.linear.bias.grad = torch.ones_like(model.network.final.linear.bias)
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["network.final.linear.bias"]


def test_muon_approaches_a_target():
    torch.manual_seed(0)
    target, parameter = torch.randn(12, 20), torch.nn.Parameter(torch.zeros(12, 20))
    optimizer = Muon([(parameter, (12,))], [], MuonSpec(), lr=0.05)
    distances = []
    for _ in range(60):
        loss = (parameter - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(loss.item())
    assert distances[-1] < 0.25 * distances[0]
