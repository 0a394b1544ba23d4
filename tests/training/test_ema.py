from __future__ import annotations

import pytest
import torch

from raev2.errors import CheckpointError
from raev2.training.checkpoint import MAX_MISSED, Checkpoint, averaged_weights, save_checkpoint
from raev2.training.ema import EMA, mix, profile


def build():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model


def set_weights(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_average_of_a_constant_is_the_constant():
    model = build()
    set_weights(model, 3.0)
    ema = EMA(model, (0.9,))
    for step in range(5):
        ema.update(model, step)
    assert all((value == 3.0).all() for value in ema.state_dict(0.9).values())


def test_average_of_a_step_is_the_power_of_the_decay_once_warmed_up():
    model = build()
    set_weights(model, 1.0)
    ema = EMA(model, (0.9, 0.5))
    set_weights(model, 0.0)
    for step in range(1000, 1007):
        ema.update(model, step)
    for decay in (0.9, 0.5):
        for value in ema.state_dict(decay).values():
            torch.testing.assert_close(value, torch.full_like(value, decay**7))


def test_initial_weights_are_forgotten_early():
    model = build()
    set_weights(model, 1.0)
    ema = EMA(model, (0.9999,))
    set_weights(model, 0.0)
    expected = 1.0
    for step in range(20):
        ema.update(model, step)
        expected *= (1 + step) / (10 + step)
    for value in ema.state_dict(0.9999).values():
        torch.testing.assert_close(value, torch.full_like(value, expected))
    assert expected < 1e-6


def test_only_trained_parameters_are_averaged():
    names = set(EMA(build(), (0.9,)).state_dict(0.9))
    assert names == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"}


def test_averages_are_applied_and_taken_back():
    model = build()
    ema = EMA(model, (0.9,))
    own = {name: value.clone() for name, value in model.state_dict().items()}
    set_weights(model, 5.0)
    with ema.applied(model, 0.9):
        assert torch.equal(model[0].weight, own["0.weight"])
        assert (model[0].bias == 5.0).all()  # frozen: the model's own
    assert all((parameter == 5.0).all() for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="inside"), ema.applied(model, 0.9):
        raise RuntimeError("inside")
    assert (model[0].weight == 5.0).all()


def test_averages_are_saved_and_restored():
    model = build()
    ema, other = EMA(model, (0.9,)), EMA(build(), (0.9,))
    set_weights(model, 2.0)
    ema.update(model, 0)
    other.load_state_dict(0.9, ema.state_dict(0.9))
    assert all(torch.equal(value, other.state_dict(0.9)[name]) for name, value in ema.state_dict(0.9).items())
    with pytest.raises(KeyError, match="EMA names differ: .*2.bias"):
        other.load_state_dict(0.9, {name: v for name, v in ema.state_dict(0.9).items() if name != "2.bias"})


# Averages that nobody kept


def track(decays, weights):
    """Averages of one vector that goes through the rows of `weights`; yields them after every update."""
    model = torch.nn.Linear(weights.shape[1], 1, bias=False).double()
    model.weight.data = weights[:1].clone()
    ema = EMA(model, decays)
    for step, row in enumerate(weights[1:]):
        model.weight.data = row[None].clone()
        ema.update(model, step)
        yield {decay: ema.state_dict(decay)["weight"].clone() for decay in decays}


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_a_profile_is_what_the_averages_make_of_a_unit_for_each_update(decay):
    (*_, kept) = track((decay,), torch.eye(31).double())
    torch.testing.assert_close(torch.from_numpy(profile(decay, 30, 30)), kept[decay][0])
    assert profile(decay, 10, 30)[11:].tolist() == [0] * 20


@pytest.fixture
def walk():
    """A path of weights as training makes them: drawn to a target, with noise."""
    steps = torch.randn(1001, 16, generator=torch.Generator().manual_seed(0)).double()
    weights = [steps[0]]
    for step in steps[1:]:
        weights.append(0.98 * weights[-1] + 0.2 * step)
    return torch.stack(weights)


def test_a_mixed_average_is_close_to_the_one_that_was_tracked(walk, tmp_path):
    for number, kept in enumerate(track((0.9, 0.95, 0.97), walk), start=1):
        if number in (950, 1000):
            tensors = {f"ema-{decay}": {"weight": kept[decay]} for decay in (0.9, 0.97)}
            save_checkpoint(tmp_path, 8 * number, Checkpoint(tensors, {}), keep=2)
    mixed = averaged_weights(tmp_path, 0.95, batch_size=8)["weight"]
    away = torch.dist(mixed, kept[0.95])
    assert away < MAX_MISSED * min(torch.dist(kept[decay], kept[0.95]) for decay in (0.9, 0.97))
    assert averaged_weights(tmp_path, 0.97, batch_size=8)["weight"].equal(kept[0.97]), "this one was kept"


def test_a_mixture_weighs_one_and_finds_what_was_kept():
    shares, missed = mix(0.97, 1000, [(0.9, 1000), (0.97, 1000), (0.99, 900)])
    assert shares.round(9).tolist() == [0, 1, 0] and missed < 1e-9
    shares, missed = mix(0.95, 1000, [(0.9, 1000), (0.99, 1000)])
    assert shares.sum() == pytest.approx(1) and 0.01 < missed < 0.3


@pytest.mark.parametrize("decay", [0.3, 0.75, 1.5, -1.0, float("nan")])
def test_an_average_that_cannot_be_mixed_is_refused(walk, tmp_path, decay):
    (*_, kept) = track((0.9, 0.97), walk[:301])
    save_checkpoint(tmp_path, 2400, Checkpoint({f"ema-{d}": {"weight": kept[d]} for d in kept}, {}), keep=1)
    message = f"no averaged weights of this decay, and none to mix it from; got {decay}; expected near 0.9, 0.97. "
    with pytest.raises(CheckpointError, match=message + "generator_training.ema_decays says which ones a run keeps."):
        averaged_weights(tmp_path, decay, batch_size=8)
