import math

import pytest
import torch
from torch.nn import functional as F

from raev2.errors import SpecError
from raev2.nn import unpatchify_overlapping
from raev2.spec import DecoderSpec
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.decoder_table import decoder_size

SPEC = DecoderSpec(width=16, depth=2, num_heads=2, mlp_dim=24, patch_size=4)


def tokens(num_tokens=12, width=6):
    return torch.randn(2, num_tokens, width, generator=torch.Generator().manual_seed(0))


def decoder(grid=(3, 4)):
    torch.manual_seed(0)
    return ViTDecoder(6, SPEC, grid).eval()


@pytest.mark.parametrize(
    ("size", "latent_dim", "num_values"),
    [("XL", 1024, 415_647_616), ("XL", 768, 415_352_704), ("L", 768, 304.15e6), ("B", 384, 86.14e6)],
)
def test_size_equals_the_published_one(size, latent_dim, num_values):
    with torch.device("meta"):
        model = ViTDecoder(latent_dim, decoder_size(size), (16, 16))
    found = sum(value.numel() for value in model.state_dict().values())  # the position table counts
    assert found == pytest.approx(num_values, abs=0 if isinstance(num_values, int) else 5e3)


def test_forward_equals_attention_written_out():
    model = decoder()
    x = torch.cat([model.cls_token.expand(2, -1, -1), model.embed(tokens())], 1) + model.pos_embed
    for block in model.blocks:
        q, k, v = block.qkv(block.norm1(x)).chunk(3, dim=-1)
        heads = []
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)).softmax(-1)
            heads.append(weights @ v[..., part])
        x = x + block.proj(torch.cat(heads, -1))
        y = block.fc1(block.norm2(x))
        x = x + block.fc2(0.5 * y * (1 + torch.erf(y / math.sqrt(2))))
    patches = model.pred(model.norm(x))[:, 1:]
    images = model(tokens())
    assert images.shape == (2, 3, 12, 16)
    for row in range(3):
        for column in range(4):
            patch = images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            expected = patches[:, 4 * row + column].view(2, 4, 4, 3).permute(0, 3, 1, 2)
            torch.testing.assert_close(patch, expected)


@pytest.mark.parametrize("patch", [1, 2, 7, 8])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 5)])
def test_overlapping_squares_of_one_value_are_interpolated_bilinearly(patch, grid):
    values = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0))
    squares = values.flatten(2).mT[..., None].expand(-1, -1, -1, (2 * patch) ** 2).flatten(2)
    expected = F.interpolate(values, scale_factor=patch, mode="bilinear", align_corners=False)
    torch.testing.assert_close(unpatchify_overlapping(squares, patch, *grid), expected, atol=1e-5, rtol=0)


def test_an_overlapping_square_lies_centred_on_its_patch():
    """One square alone, of three channels: where it is, and in which order its values are."""
    square = torch.arange(3 * 8 * 8.0).view(3, 8, 8)
    squares = torch.zeros(1, 15, 192)
    squares[0, 7] = square.flatten()  # row 1, column 2 of 3 x 5
    image = unpatchify_overlapping(squares, 4, 3, 5)[0]
    weight = torch.tensor([1, 3, 5, 7, 7, 5, 3, 1]) / 8
    inside = image[:, 2:10, 6:14].clone()
    torch.testing.assert_close(inside, square * weight[:, None] * weight)
    image[:, 2:10, 6:14] = 0
    assert not image.any()


def test_a_decoder_with_overlap_shows_no_step_where_its_tokens_differ():
    """Each square of one colour: side by side they step at their borders, overlapping by at most 1/8 of that."""
    steps = {}
    for overlap in (False, True):
        torch.manual_seed(0)
        model = ViTDecoder(6, SPEC.replace(patch_size=8, overlap=overlap), (3, 4)).eval()
        model.pred.weight.data[:] = model.pred.weight.data[:1]
        model.pred.bias.data[:] = 0
        images = model(tokens())
        assert images.shape == (2, 3, 24, 32)
        steps[overlap] = images.diff(dim=3).abs().amax().item()
    assert 0 < steps[True] < steps[False] / 8 + 1e-6


def test_positions_encode_the_column_then_the_row():
    table = ViTDecoder(6, DecoderSpec(width=8, depth=1, num_heads=2, mlp_dim=8, patch_size=4), (2, 3)).pos_embed[0]
    assert table.shape == (7, 8)
    assert torch.equal(table[0], torch.zeros(8))
    row, column = 1, 2
    angles = [column, column / 100, row, row / 100]  # omega = 1, 10000^(-1/2)
    expected = [math.sin(a) for a in angles[:2]] + [math.cos(a) for a in angles[:2]]
    expected += [math.sin(a) for a in angles[2:]] + [math.cos(a) for a in angles[2:]]
    torch.testing.assert_close(table[1 + row * 3 + column], torch.tensor(expected))


def test_positions_are_saved_and_not_trained():
    model = decoder()
    assert "pos_embed" in model.state_dict()
    assert "pos_embed" not in dict(model.named_parameters())
    assert model.last_layer is model.pred.weight
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "embed", "cls_token", "pos_embed", "blocks", "norm", "pred"
    }  # fmt: skip
    assert {name.split(".")[2] for name in model.state_dict() if name.startswith("blocks")} == {
        "norm1", "qkv", "proj", "norm2", "fc1", "fc2"
    }  # fmt: skip


def test_tokens_of_another_grid_are_interpolated():
    model = decoder()
    coarse, fine = tokens(12), tokens(48)
    resized = F.interpolate(model.embed(fine).view(2, 6, 8, 16).permute(0, 3, 1, 2), (3, 4), mode="bilinear")
    torch.testing.assert_close(model._resample(model.embed(fine)), resized.flatten(2).transpose(1, 2))
    assert model(fine).shape == model(coarse).shape
    with pytest.raises(SpecError, match="the token count does not fit the grid; got 13; expected 3 x 4 tokens"):
        model(tokens(13))


def test_gradient_reaches_every_parameter():
    model = decoder()
    model(tokens()).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
