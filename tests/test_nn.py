import pytest
import torch
from torch.nn import functional as F

from raev2 import nn as layers
from raev2.nn import Rope2D, attention, rms_norm, rotate


def with_gradients(function, *inputs):
    output = function(*inputs)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return output.detach(), *torch.autograd.grad(output, inputs, weights)


def test_the_norm_and_its_gradients_are_those_of_torch():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    ours = with_gradients(rms_norm, x, weight)
    theirs = with_gradients(lambda x, weight: F.rms_norm(x, (16,), weight, 1e-6), x, weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rotation_and_its_gradient_are_those_of_complex_numbers():
    torch.manual_seed(0)
    cos, sin = Rope2D(16, 2, 2)(6)
    x = torch.randn(2, 6, 3, 16, requires_grad=True)

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        product = torch.complex(a, b) * torch.complex(cos, sin)[:, None]
        return torch.cat([product.real, product.imag], dim=-1)

    ours, theirs = with_gradients(lambda x: rotate(x, (cos, sin)), x), with_gradients(turned, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("limit", [0, layers.PLAIN_UP_TO])
def test_plain_and_fused_attention_agree(limit, monkeypatch):
    monkeypatch.setattr(layers, "PLAIN_UP_TO", limit)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 8).unbind()
    found = attention(*(x.bfloat16() for x in (q, k, v))).float()
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v), rtol=0.03, atol=0.03)
