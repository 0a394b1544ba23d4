from __future__ import annotations

import pytest
import torch

from raev2.training.ema import EMA


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
