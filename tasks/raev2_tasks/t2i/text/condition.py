"""The text encoder that is trained with the generator: a small bidirectional transformer over caption pieces.

Nothing is downloaded, so the embedded recipes use it. A frozen pretrained encoder is `TextCondition` of the core.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import override

from raev2.batch import Cond, CondTokens
from raev2.errors import SpecError
from raev2.model.condition import CondField, Conditioner, ConditionSpec, need_tokens, visible
from raev2.nn import Block, RMSNorm, Rope
from raev2.shapes import LatentShape
from raev2.spec import TrunkSpec


class ScratchTextCondition(ConditionSpec):
    """{"token_ids": (B, M) int64, "token_mask": (B, M) bool}; M may differ from batch to batch.

    The unconditional caption is one token of its own, number `vocab_size`: what it becomes is learned.
    """

    kind: Literal["scratch_text"] = "scratch_text"
    vocab_size: int = Field(gt=0)
    max_tokens: int = Field(64, gt=0, description="longest caption; used for estimates")
    width: int = Field(192, gt=0)
    depth: int = Field(3, ge=1)
    num_heads: int = Field(3, gt=0)

    @override
    def build(self, network: TrunkSpec, latent_shape: LatentShape) -> Conditioner:
        need_tokens(network, "text")
        return ScratchTextConditioner(self, network.width)


class ScratchTextConditioner(Conditioner):
    """Linear(norm(blocks(table[token_ids]))): one token per text token.

    Positions are rotary, 1-D. Table N(0, 0.02); the blocks are those of the trunk, without dropout.
    """

    def __init__(self, spec: ScratchTextCondition, width: int) -> None:
        fields = {"token_ids": CondField((None,), torch.int64), "token_mask": CondField((None,), torch.bool)}
        super().__init__(fields, spec.max_tokens)
        self.null_id = spec.vocab_size
        self.head_dim = spec.width // spec.num_heads
        self.table = nn.Embedding(spec.vocab_size + 1, spec.width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.blocks = nn.ModuleList(
            Block(spec.width, spec.num_heads, mlp_ratio=4.0, qk_norm=True) for _ in range(spec.depth)
        )
        self.norm = RMSNorm(spec.width)
        self.proj = nn.Linear(spec.width, width)

    @override
    def forward(self, cond: Cond) -> CondTokens:
        """What stands in padding has no influence."""
        present = cond["token_mask"].bool()
        mask = visible(present)
        x = self.table(cond["token_ids"].masked_fill(~present, 0))
        rope = rope_1d(self.head_dim, x.shape[1], x.device)
        attended = None if mask is None else mask[:, None, None]
        for block in self.blocks:
            x = block(x, rope, attended)
        return CondTokens(self.proj(self.norm(x)), mask)

    @override
    def null_cond(self, cond: Cond) -> dict[str, Tensor]:
        ids, mask = torch.zeros_like(cond["token_ids"]), torch.zeros_like(cond["token_mask"])
        ids[:, 0], mask[:, 0] = self.null_id, 1
        return {"token_ids": ids, "token_mask": mask}

    @override
    def example_cond(self, batch_size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Every token is there."""
        cond = super().example_cond(batch_size, device)
        return cond | {"token_mask": torch.ones_like(cond["token_mask"])}

    @override
    def check(self, cond: Cond) -> None:
        super().check(cond)
        if not bool(cond["token_mask"].any(1).all()):
            raise SpecError("cond.token_mask", "a caption without tokens", hint="Use the null condition for it.")
        ids = cond["token_ids"]
        bad = ids[(ids < 0) | (ids > self.null_id)]
        if len(bad):
            raise SpecError(
                "cond.token_ids", "out of range", got=bad[:5].tolist(), expected=f"0 to {self.null_id - 1}",
                hint="The captions were cut into pieces by another text tokenizer.",
            )  # fmt: skip


def rope_1d(head_dim: int, length: int, device: torch.device) -> Rope:
    """Rotary tables for positions 0 .. length - 1: angle k of position n is n * 10000^(-2k / head_dim)."""
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequencies  # (M, head_dim / 2)
    return angles.cos(), angles.sin()
