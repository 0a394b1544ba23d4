"""DiT^DH: a deep narrow trunk produces a condition for every token of a shallow wide head.

    c = Linear(SiLU(time + trunk tokens))                     one condition vector per image token
    x = PatchEmbed(z_t), then head blocks modulated by c, then the final layer modulated by c

The base head (internal guidance) reads the trunk early: u = SiLU(time + tokens after `base_head_depth` blocks), then a
final layer of u, modulated by u. Gradients of both outputs flow into the trunk.

Source: RAE (arXiv 2510.11690) section on the wide head; RAEv2 (arXiv 2605.18324).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from raev2.batch import CondTokens, ModelOutput
from raev2.model.dit import Trunk, zero_init
from raev2.model.embed import PatchEmbed, patchify, unpatchify
from raev2.model.layers import Block, FinalLayer, FusedLinear, Rope2D
from raev2.spec import DDTSpec


class DDT(nn.Module):
    """Trunk, wide head, optional base head and REPA projector."""

    def __init__(self, spec: DDTSpec, latent_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = latent_shape
        self.trunk = Trunk(spec, latent_shape, silu_cond=True)
        self.patch_size = spec.patch_size
        self.rows, self.cols = height // spec.patch_size, width // spec.patch_size
        out_dim = channels * spec.patch_size**2

        self.join = nn.Identity() if spec.width == spec.head_width else nn.Linear(spec.width, spec.head_width)
        self.head_embed = PatchEmbed(channels, spec.head_width, spec.patch_size)
        self.head_rope = Rope2D(spec.head_width // spec.head_num_heads, self.rows, self.cols)
        self.head_blocks = nn.ModuleList(
            Block(spec.head_width, spec.head_num_heads, spec.mlp_ratio, spec.qk_norm) for _ in range(spec.head_depth)
        )
        # Modulation of all head blocks and of the final layer depends on c alone: one product.
        self.modulation = FusedLinear(spec.head_width, [6 * spec.head_width] * spec.head_depth + [2 * spec.head_width])
        self.final = FinalLayer(spec.head_width, out_dim)

        self.base_modulation = self.base_final = None
        if spec.base_head_depth is not None:
            self.base_modulation = nn.Linear(spec.width, 2 * spec.width)
            self.base_final = FinalLayer(spec.width, out_dim)
        self.init_weights()

    def forward(
        self,
        z_t: Float[Tensor, "B C H W"],
        t: Float[Tensor, "B"],
        cond_tokens: CondTokens | None,
        cond_vector: Float[Tensor, "B D"] | None,
    ) -> ModelOutput:
        """Predict from noisy latents, time and the condition in the form that `spec.conditioning` asks for."""
        patches = patchify(z_t, self.patch_size)
        trunk = self.trunk(patches, t, cond_tokens, cond_vector)
        time = trunk.time[:, None]

        # Head.
        c = self.join(F.silu(time + trunk.tokens))
        *modulations, final_modulation = self.modulation(F.silu(c)).split(self.modulation.splits, dim=-1)
        x = self.head_embed(patches)
        rope = self.head_rope(x.shape[1])
        for block, modulation in zip(self.head_blocks, modulations, strict=True):
            x = block(x, rope, modulation=modulation)
        pred = self._unpatchify(self.final(x, final_modulation))

        # Base head.
        base_pred = None
        if self.base_final is not None and self.base_modulation is not None:
            u = F.silu(time + trunk.base_tokens)
            base_pred = self._unpatchify(self.base_final(u, self.base_modulation(F.silu(u))))
        return ModelOutput(pred, base_pred, trunk.hidden)

    def _unpatchify(self, patches: Tensor) -> Tensor:
        return unpatchify(patches, self.patch_size, self.rows, self.cols)

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
        for layer in (self.modulation, self.base_modulation):
            if layer is not None:
                zero_init(layer)
        for final in (self.final, self.base_final):
            if final is not None:
                zero_init(final.linear)
