"""Shape aliases and the legend of axis letters.

B batch   N image tokens   M condition tokens   D width   C latent channels
H, W latent rows and columns   Hpx, Wpx pixels   K context frames   L layers   S samples

Tests run with jaxtyping's runtime checker switched on for the whole package, so every test is a shape test;
users pay nothing.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, UInt8
from torch import Tensor

Images = Float[Tensor, "B 3 Hpx Wpx"]  # float RGB in [0, 1]
ImagesU8 = UInt8[Tensor, "B 3 Hpx Wpx"]
Tokens = Float[Tensor, "B N D"]
Latents = Float[Tensor, "B C H W"]  # normalised: zero mean, unit variance per element
Patches = Float[Tensor, "B N P"]  # of latents: the values of a patch in a row
Vectors = Float[Tensor, "B D"]
Times = Float[Tensor, " B"]  # 0 = data, 1 = noise
Mask = Bool[Tensor, "B M"]  # True = attend
LatentShape = tuple[int, int, int]  # C, H, W
