"""The trunk that both networks share; DiT (LightningDiT), the trunk and a final layer; DDT (DiT^DH), with a wide head.

The trunk sees [image tokens; time tokens; condition tokens] as one sequence (`conditioning="in_context"`, RAEv2) or
image tokens modulated in every block by time + condition (`"adaln"`, RAE v1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from raev2.batch import CondTokens, FrameCache, ModelOutput
from raev2.errors import SpecError
from raev2.nn import (
    AgeRope,
    Block,
    FinalLayer,
    FourierEmbed,
    FusedLinear,
    PatchEmbed,
    Rope2D,
    patchify,
    rotate,
    sincos_2d,
    turn,
    unpatchify,
    with_even_rows,
)
from raev2.shapes import Latents, LatentShape, Patches, Times, Tokens, Vectors
from raev2.spec import DDTSpec, DiTSpec, TrunkSpec


@dataclass(frozen=True)
class TrunkOutput:
    """Image tokens after the last block and after the base head's block, the time embedding, the REPA projection."""

    tokens: Tokens
    base_tokens: Tokens | None
    time: Vectors
    hidden: Float[Tensor, "B N Z"] | None
    final_modulation: Float[Tensor, "B 1 D2"] | None


class Trunk(nn.Module):
    """Transformer over latent patches, time and condition.

    latent_shape      C, H, W
    silu_cond         adaLN only: pass time + condition through SiLU once more (as DiT^DH of RAE v1 does)
    final_modulation  adaLN only: also compute the modulation of a final layer
    """

    def __init__(
        self, spec: TrunkSpec, latent_shape: LatentShape, *, silu_cond: bool = False, final_modulation: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.silu_cond, self.final_modulation = spec, silu_cond, final_modulation
        channels, rows, cols = self.grid = _grid(spec, latent_shape)
        self.patch_embed = PatchEmbed(channels, spec.width, spec.patch_size)
        self.time_embed = FourierEmbed(spec.width)
        # Fixed. A parameter and not a buffer because published parameter counts include it.
        positions = nn.Parameter(sincos_2d(spec.width, rows, cols), requires_grad=False)
        self.pos_embed = positions if spec.abs_pos_embed else None
        self.rope = Rope2D(spec.width // spec.num_heads, rows, cols)
        self.age_rope = AgeRope(spec.width // spec.num_heads)
        self.blocks = nn.ModuleList(
            Block(spec.width, spec.num_heads, spec.mlp_ratio, spec.qk_norm) for _ in range(spec.depth)
        )
        if spec.conditioning == "in_context":
            self.time_tokens = nn.Parameter(torch.empty(spec.num_time_tokens, spec.width))
        else:  # every block's modulation depends on the same vector: one product
            self.modulation = FusedLinear(
                spec.width, [6 * spec.width] * spec.depth + [2 * spec.width] * final_modulation
            )
        self.repa_proj = None if spec.repa_dim is None else _repa_projector(spec.width, spec.repa_dim, spec.repa_hidden)

    def forward(
        self, patches: Patches, t: Times, cond_tokens: CondTokens | None, cond_vector: Vectors | None
    ) -> TrunkOutput:
        """Run the blocks over patches (in-context: and time and condition tokens)."""
        num_patches = patches.shape[1]
        time = self.time_embed(t)
        x = self.patch_embed(patches)
        if self.pos_embed is not None:
            x = x + self.pos_embed

        # The sequence, or the modulation of every block.
        mask = past = None
        modulations: tuple[Tensor | None, ...] = (None,) * (self.spec.depth + 1)
        if self.spec.conditioning == "in_context":
            sequence = [x, time[:, None] + self.time_tokens]
            if cond_tokens is not None:
                if cond_tokens.at_image is not None:
                    sequence[0] = x + cond_tokens.at_image
                sequence.append(cond_tokens.tokens)
                past, mask = cond_tokens.past, _mask(cond_tokens, num_patches + len(self.time_tokens))
            x = torch.cat(sequence, dim=1)
        else:
            c = time if cond_vector is None else time + cond_vector
            c = F.silu(c) if self.silu_cond else c
            modulations = with_even_rows(self.modulation, F.silu(c))[:, None].split(self.modulation.splits, dim=-1)
            modulations = modulations if self.final_modulation else (*modulations, None)

        # The blocks, and what is read on the way.
        rope = self.rope(x.shape[1])
        if past is not None:
            rope = turn(rope, self.age_rope(past.age[:, None]))
        base_tokens = hidden = None
        for depth, (block, modulation) in enumerate(zip(self.blocks, modulations[:-1], strict=True), start=1):
            x = block(x, rope, mask, modulation, past and (past.keys[:, depth - 1], past.values[:, depth - 1]))
            if depth == self.spec.base_head_depth:
                base_tokens = x[:, :num_patches]
            if depth == self.spec.repa_depth and self.repa_proj is not None:
                hidden = self.repa_proj(x[:, :num_patches])
        return TrunkOutput(x[:, :num_patches], base_tokens, time, hidden, modulations[-1])

    def encode_frames(self, tokens: Float[Tensor, "U N D"]) -> FrameCache:
        """Keys and values of frames in every block. The tokens of a frame attend to nothing but that frame."""
        x, rope = tokens, self.rope(tokens.shape[1])
        keys, values = [], []
        for depth, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            q, k, v = block.attn.project(block.norm1(x), rope)
            keys.append(k)
            values.append(v)
            if depth < len(self.blocks):  # nothing reads the frames after the last block
                x = x + block.attn.attend(q, k, v)
                x = x + block.mlp(block.norm2(x))
        return FrameCache(torch.stack(keys, dim=1), torch.stack(values, dim=1), tokens)

    def place_frames(
        self, frames: FrameCache, index: Int[Tensor, "B K"], age: Float[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B L heads M d"], Float[Tensor, "B L heads M d"]]:
        """Keys and values of the frames `index` at their age, in frame periods; M = K * N."""
        keys, values = frames.keys[index], frames.values[index]  # (B, K, L, heads, N, d)
        turned = rotate(keys.flatten(2, 4), self.age_rope(age)).to(keys.dtype).view_as(keys)
        keys, values = (x.permute(0, 2, 3, 1, 4, 5).flatten(3, 4) for x in (turned, values))
        return keys, values

    def init_weights(self) -> None:
        """Initial values of the trunk. The condition module has its own table.

        patch_embed      Xavier uniform, bias 0        time_embed     W N(0, 1), weights N(0, 0.02)
        time_tokens      N(0, 1/sqrt(width))           modulation     0
        all other linear layers as PyTorch (uniform, +-1/sqrt(fan_in)), gains 1
        """
        self.patch_embed.init_weights()
        self.time_embed.init_weights()
        if self.spec.conditioning == "in_context":
            nn.init.normal_(self.time_tokens, std=self.spec.width**-0.5)
        else:
            zero_init(self.modulation)


def _mask(cond: CondTokens, num_before: int) -> Bool[Tensor, "B 1 1 NM"] | None:
    """Which keys are seen: `num_before` tokens, those of the condition, those of past frames. None: all."""
    if cond.mask is None and cond.past is None:
        return None
    own = cond.tokens.new_ones(cond.tokens.shape[:2], dtype=torch.bool) if cond.mask is None else cond.mask
    mask = F.pad(own, (num_before, 0), value=True)
    return (mask if cond.past is None else torch.cat([mask, cond.past.mask], dim=1))[:, None, None]


def _repa_projector(width: int, target_width: int, hidden: int | None) -> nn.Module:
    """One linear map, or the three layers of REPA (arXiv 2410.06940, appendix)."""
    if hidden is None:
        return nn.Linear(width, target_width)
    layers = (nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
    return nn.Sequential(*layers, nn.Linear(hidden, target_width))


def zero_init(*layers: nn.Linear) -> None:
    """Weight and bias 0: output and modulation layers start from an exact zero."""
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        nn.init.zeros_(parameter)


class Network(nn.Module, ABC):
    """A trunk, and what makes a prediction of its tokens: `DiT` or `DDT`."""

    def __init__(self, spec: TrunkSpec, trunk: Trunk) -> None:
        super().__init__()
        channels, rows, cols = trunk.grid
        self.patch_size, self.out_dim = spec.patch_size, channels * spec.patch_size**2
        self._unpatchify = partial(unpatchify, patch_size=spec.patch_size, rows=rows, cols=cols)
        self.trunk = trunk

    def forward(
        self, z_t: Latents, t: Times, cond_tokens: CondTokens | None, cond_vector: Vectors | None
    ) -> ModelOutput:
        """Predict from noisy latents, time and the condition in the form that `spec.conditioning` asks for."""
        patches = patchify(z_t, self.patch_size)
        trunk = self.trunk(patches, t, cond_tokens, cond_vector)
        pred = self._unpatchify(self.predict(patches, trunk))
        base_pred = None if trunk.base_tokens is None else self._unpatchify(self.predict_base(trunk))
        return ModelOutput(pred, base_pred, trunk.hidden)

    @abstractmethod
    def predict(self, patches: Patches, trunk: TrunkOutput) -> Patches:
        """The prediction, by patches."""

    @abstractmethod
    def predict_base(self, trunk: TrunkOutput) -> Patches:
        """That of the base head."""


class DiT(Network):
    """LightningDiT: the trunk and a final layer, modulated in the adaLN variant. Optional base head and REPA."""

    def __init__(self, spec: DiTSpec, latent_shape: LatentShape) -> None:
        super().__init__(spec, Trunk(spec, latent_shape, final_modulation=spec.conditioning == "adaln"))
        self.final = FinalLayer(spec.width, self.out_dim)
        self.base_final = None if spec.base_head_depth is None else FinalLayer(spec.width, self.out_dim)
        self.init_weights()

    @override
    def predict(self, patches: Patches, trunk: TrunkOutput) -> Patches:
        return self.final(trunk.tokens, trunk.final_modulation)

    @override
    def predict_base(self, trunk: TrunkOutput) -> Patches:
        assert self.base_final is not None
        return self.base_final(trunk.base_tokens)

    def init_weights(self) -> None:
        """The trunk by its own table; final and base_final linear 0, so the first prediction is exactly 0.

        The adaLN variant (RAE v1) starts the linear layers of its blocks Xavier uniform with bias 0; DiT^DH does not.
        """
        self.trunk.init_weights()
        if self.trunk.spec.conditioning == "adaln":
            for layer in self.trunk.blocks.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    nn.init.zeros_(layer.bias)
        zero_init(*(final.linear for final in (self.final, self.base_final) if final is not None))


class DDT(Network):
    """DiT^DH: a deep narrow trunk produces a condition for every token of a shallow wide head.

        c = Linear(SiLU(time + trunk tokens))                     one condition vector per image token
        x = PatchEmbed(z_t), then head blocks modulated by c, then the final layer modulated by c

    The base head (internal guidance) reads the trunk early: u = SiLU(time + tokens after `base_head_depth` blocks),
    then a final layer of u, modulated by u. Gradients of both outputs flow into the trunk.

    Source: RAE (arXiv 2510.11690) section on the wide head; RAEv2 (arXiv 2605.18324).
    """

    def __init__(self, spec: DDTSpec, latent_shape: LatentShape) -> None:
        super().__init__(spec, Trunk(spec, latent_shape, silu_cond=True))
        channels, rows, cols = self.trunk.grid
        self.join = nn.Identity() if spec.width == spec.head_width else nn.Linear(spec.width, spec.head_width)
        self.head_embed = PatchEmbed(channels, spec.head_width, spec.patch_size)
        self.head_rope = Rope2D(spec.head_width // spec.head_num_heads, rows, cols)
        self.head_blocks = nn.ModuleList(
            Block(spec.head_width, spec.head_num_heads, spec.mlp_ratio, spec.qk_norm) for _ in range(spec.head_depth)
        )
        # Modulation of all head blocks and of the final layer depends on c alone: one product.
        self.modulation = FusedLinear(spec.head_width, [6 * spec.head_width] * spec.head_depth + [2 * spec.head_width])
        self.final = FinalLayer(spec.head_width, self.out_dim)

        self.base_modulation = self.base_final = None
        if spec.base_head_depth is not None:
            self.base_modulation = nn.Linear(spec.width, 2 * spec.width)
            self.base_final = FinalLayer(spec.width, self.out_dim)
        self.init_weights()

    @override
    def predict(self, patches: Patches, trunk: TrunkOutput) -> Patches:
        c = self.join(F.silu(trunk.time[:, None] + trunk.tokens))
        *modulations, final_modulation = self.modulation(F.silu(c)).split(self.modulation.splits, dim=-1)
        x = self.head_embed(patches)
        rope = self.head_rope(x.shape[1])
        for block, modulation in zip(self.head_blocks, modulations, strict=True):
            x = block(x, rope, modulation=modulation)
        return self.final(x, final_modulation)

    @override
    def predict_base(self, trunk: TrunkOutput) -> Patches:
        assert self.base_final is not None and self.base_modulation is not None and trunk.base_tokens is not None
        u = F.silu(trunk.time[:, None] + trunk.base_tokens)
        return self.base_final(u, self.base_modulation(F.silu(u)))

    def init_weights(self) -> None:
        """Initial values of DiT^DH; consequence: the first prediction of both heads is exactly 0.

        trunk                          its own table
        head_embed                     Xavier uniform, bias 0
        modulation, base_modulation    0
        final, base_final linear       0
        all other linear layers        as PyTorch, gains 1
        """
        self.trunk.init_weights()
        self.head_embed.init_weights()
        zero_init(self.modulation, self.final.linear)
        if self.base_final is not None and self.base_modulation is not None:
            zero_init(self.base_modulation, self.base_final.linear)


def _grid(spec: TrunkSpec, latent_shape: LatentShape) -> tuple[int, int, int]:
    """Channels, and rows and columns of patches."""
    channels, height, width = latent_shape
    if height % spec.patch_size or width % spec.patch_size:
        raise SpecError(
            "generator.patch_size", "must divide the latent rows and columns", got=spec.patch_size,
            expected=f"a divisor of {height} and {width}",
        )  # fmt: skip
    return channels, height // spec.patch_size, width // spec.patch_size
