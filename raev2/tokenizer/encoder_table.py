"""The known vision encoders: plain data, no torch.

`encoders.py` builds them. A name that is not here still works as 'timm:ID', 'hf:ID' or a local folder; its facts
then come from the model. Widths, depths, patch sizes and prefix tokens are checked against timm by a test.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

from raev2.errors import SpecError
from raev2.files.assets import Asset

Triple = tuple[float, float, float]
Norm = Literal["plain", "affine", "none"]

RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
OPEN_LICENCES = ("Apache-2.0", "MIT")


@dataclass(frozen=True)
class EncoderInfo:
    """Facts about one encoder.

    route               who builds it: timm, transformers, or a folder in our format (see encoders.py)
    model_id            timm id, hub id, or the folder
    mean, std           pixel normalisation of images in [0, 1]
    num_prefix_tokens   class and register tokens in front of the patch tokens; they are dropped
    norm                default final norm per layer: without gain and bias (plain), with (affine), or none
    norm_eps            epsilon of that norm; None: the model's own
    gated               a licence must be accepted at the source before the weights may be used
    side                rows and columns of the usual token grid
    """

    name: str
    model_id: str
    width: int
    depth: int
    patch_size: int
    num_prefix_tokens: int
    norm: Norm
    norm_eps: float | None
    _: KW_ONLY
    route: Literal["timm", "transformers", "local"] = "timm"
    mean: Triple = RGB_MEAN
    std: Triple = RGB_STD
    licence: str = "Apache-2.0"
    gated: bool = False
    side: int = 16
    note: str = ""

    @property
    def input_size(self) -> int:
        """Pixels that give the usual token grid."""
        return self.side * self.patch_size


def _family(
    name: str, model_id: str, patch_size: int, num_prefix_tokens: int, norm: Norm, norm_eps: float | None,
    sizes: Iterable[tuple[str, str, int, int]], **facts: Any,
) -> list[EncoderInfo]:  # fmt: skip
    """An encoder for each size: (what stands in its name, what stands in the model's id, width, depth)."""
    fixed = (patch_size, num_prefix_tokens, norm, norm_eps)
    return [
        EncoderInfo(name.format(ours), model_id.format(theirs), width, depth, *fixed, **facts)
        for ours, theirs, width, depth in sizes
    ]


_DINOV2 = [("s", "small", 384, 12), ("b", "base", 768, 12), ("l", "large", 1024, 24), ("g", "giant", 1536, 40)]
_FAMILIES = [
    _family("dinov2-{}", "vit_{}_patch14_reg4_dinov2.lvd142m", 14, 5, "plain", 1e-5, _DINOV2),
    _family("dinov2-{}-woreg", "vit_{}_patch14_dinov2.lvd142m", 14, 1, "plain", 1e-5, _DINOV2),
    _family(
        "dinov3-{}", "vit_{}_patch16_dinov3.lvd1689m", 16, 5, "plain", 1e-5,
        [("s16", "small", 384, 12), ("s16plus", "small_plus", 384, 12), ("b16", "base", 768, 12),
         ("l16", "large", 1024, 24), ("h16plus", "huge_plus", 1280, 32), ("7b16", "7b", 4096, 40)],
        licence="DINOv3 License", gated=True,
        note="accept the licence at https://ai.meta.com/resources/models-and-libraries/dinov3-downloads",
    ),
    # mean = std = 0.5 is what the model was trained with. RAEv2 normalises with RGB_MEAN and RGB_STD, a defect.
    _family(
        "siglip2-{}", "vit_{}_patch16_siglip_256.v2_webli", 16, 0, "affine", 1e-6,
        [("b", "base", 768, 12), ("l", "large", 1024, 24), ("so400m", "so400m", 1152, 27),
         ("g", "giantopt", 1536, 40)],
        mean=HALF, std=HALF,
    ),
    # The published norm epsilon is 1e-12.
    _family(
        "mae-{}", "vit_{}_patch16_224.mae", 16, 1, "plain", 1e-12, [("b", "base", 768, 12), ("l", "large", 1024, 24)],
        licence="CC-BY-NC-4.0",
    ),
    # Sees 16 x 16 tokens at 224 px; RAEv2 gives it 256 px and breaks.
    _family("mae-{}", "vit_{}_patch14_224.mae", 14, 1, "plain", 1e-12, [("h", "huge", 1280, 32)],
            licence="CC-BY-NC-4.0"),
    _family(
        "webssl-{}", "facebook/webssl-dino{}", 14, 1, "affine", None,
        [("300m", "300m-full2b-224", 1024, 24), ("1b", "1b-full2b-224", 1536, 40), ("2b", "2b-full2b-224", 2688, 24),
         ("3b", "3b-full2b-224", 3072, 26), ("5b", "5b-full2b-224", 3584, 32), ("7b", "7b-full8b-224", 4096, 32)],
        route="transformers", licence="CC-BY-NC-4.0", note="width and depth from the paper",
    ),
    # Features are taken before ln_post, hence no norm. The giant models have no class token.
    *(
        _family("{}", "vit_pe_{}.fb", patch, prefix, "none", None, [(name, model, width, depth)], mean=HALF, std=HALF)
        for name, model, width, depth, patch, prefix in [
            ("pe-t", "core_tiny_patch16_384", 192, 12, 16, 1), ("pe-s", "core_small_patch16_384", 384, 12, 16, 1),
            ("pe-b", "core_base_patch16_224", 768, 12, 16, 1), ("pe-l", "core_large_patch14_336", 1024, 24, 14, 1),
            ("pe-g", "core_gigantic_patch14_448", 1536, 50, 14, 0),
            ("spatialpe-b", "spatial_base_patch16_512", 768, 12, 16, 1),
            ("spatialpe-l", "spatial_large_patch14_448", 1024, 24, 14, 1),
            ("spatialpe-g", "spatial_gigantic_patch14_448", 1536, 50, 14, 0),
            ("langpe-l", "lang_large_patch14_448", 1024, 23, 14, 1),
            ("langpe-g", "lang_gigantic_patch14_448", 1536, 47, 14, 0),
        ]
    ),
    _family(
        "eupe-{}16", "vit_{}_patch16_dinov3_qkvb.eupe_lvd1689m", 16, 5, "plain", 1e-5,
        [("t", "tiny", 192, 12), ("s", "small", 384, 12), ("b", "base", 768, 12)],
        licence="FAIR Noncommercial Research License", gated=True, note="research use only",
    ),
    _family(
        "tipsv2-{}", "vit_{}_patch14_reg1_tipsv2.webli", 14, 2, "plain", 1e-5,
        [("b14", "base", 768, 12), ("l14", "large", 1024, 24), ("so14", "so400m", 1152, 27),
         ("g14", "giant", 1536, 40)],
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    ),
    _family(
        "mocov3-{}", "mocov3-{}", 16, 1, "affine", 1e-6,
        [("s", "s", 384, 12), ("b", "b", 768, 12), ("l", "l", 1024, 24)], route="local", licence="CC-BY-NC-4.0",
        note="no maintained hub copy: convert the original file to a local folder in our format",
    ),
    _family(
        "micro", "micro_encoder", 8, 1, "plain", 1e-6, [("", "", 192, 6)], route="local", side=8,
        note="packaged with raev2, works offline; for trying things out, not for results",
    ),
    # timm's plain '..._clip_224.openai' has exact GELU and is another network.
    _family("clip-l", "vit_large_patch14_clip_quickgelu_224.openai", 14, 1, "none", None, [("", "", 1024, 24)],
            mean=CLIP_MEAN, std=CLIP_STD, licence="MIT"),
    # Through transformers because timm's id points to a pickle.
    _family("ijepa-h", "facebook/ijepa_vith14_1k", 14, 0, "affine", None, [("", "", 1280, 32)],
            route="transformers", licence="CC-BY-NC-4.0"),
    _family("dino-s8", "vit_small_patch8_224.dino", 8, 1, "plain", 1e-6, [("", "", 384, 12)],
            note="trunk of the published discriminators"),
]  # fmt: skip
ENCODERS: dict[str, EncoderInfo] = {info.name: info for family in _FAMILIES for info in family}


def encoder_info(name: str) -> EncoderInfo:
    """Facts about an encoder of the table. Raises SpecError with the closest name."""
    if name not in ENCODERS:
        close = difflib.get_close_matches(name, ENCODERS, n=1, cutoff=0.0)[0]
        raise SpecError(
            "encoder.name", "unknown encoder", got=repr(name),
            expected="a name from `raev2 encoders`, 'timm:ID', 'hf:ID' or a local folder",
            hint=f"Did you mean {close!r}?",
        )  # fmt: skip
    return ENCODERS[name]


def nearest_open_encoder(info: EncoderInfo) -> EncoderInfo:
    """The most similar encoder with an open licence and no gate: same width and depth first, then table order."""
    candidates = [
        other for other in ENCODERS.values()
        if not other.gated and other.licence in OPEN_LICENCES and other.route == "timm" and other.name != info.name
    ]  # fmt: skip
    return min(candidates, key=lambda o: abs(math.log(o.width / info.width)) + abs(math.log(o.depth / info.depth)))


def check_layers(name: str, depth: int, layers: Sequence[int]) -> None:
    """Raise SpecError unless an encoder has these blocks."""
    if not layers or min(layers) < 0 or max(layers) >= depth:
        expected = f"block indices from 0 to {depth - 1}"
        raise SpecError("encoder.layers", f"{name} has {depth} blocks", got=list(layers), expected=expected)


def encoder_asset(name: str) -> Asset:
    """The weights of an encoder, by any name that `build_encoder` takes. Raises SpecError for another one."""
    what, (route, _, model_id) = f"encoder {name}", name.partition(":")
    if name not in ENCODERS and route in ("timm", "hf"):
        return Asset(what, f"timm/{model_id}" if route == "timm" else model_id)
    if name not in ENCODERS and Path(name).is_dir():
        return Asset(what, name)
    info = encoder_info(name)
    if info.route == "local":
        return Asset(what, str(Path(__file__).parents[1] / "assets" / info.model_id), note=info.note)
    source = f"timm/{info.model_id}" if info.route == "timm" else info.model_id
    terms = f"Its licence ({info.licence}) must be accepted at https://huggingface.co/{source} ({info.note}). "
    note = f"The nearest encoder with an open licence is {nearest_open_encoder(info).name!r}"
    note = f"{terms * info.gated}A local folder is accepted in place of the name. {note}"
    return Asset(what, source, gated=info.gated, note=note)
