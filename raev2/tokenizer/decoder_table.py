"""Sizes of decoders by name: read `decoder_size`. No torch."""

from raev2.spec import DecoderSpec

DECODER_SIZES = {  # width, depth, heads, mlp_dim. B, L, XL as published; micro is ours, for the embedded data.
    "micro": (256, 6, 4, 1024),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "XL": (1152, 28, 16, 4096),
}


def decoder_size(size: str, patch_size: int = 16) -> DecoderSpec:
    """The decoder of a published size ('B', 'L', 'XL') or 'micro'."""
    width, depth, num_heads, mlp_dim = DECODER_SIZES[size]
    return DecoderSpec(width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim, patch_size=patch_size)
