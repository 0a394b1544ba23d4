"""From a sample of the data to what a generator takes: frames become latents, motions the generator's units."""

from __future__ import annotations

import torch

from raev2.batch import Cond
from raev2.model.frames import FramesCondition
from raev2.task import EncodeImages

PUBLISHED_TIME_SCALE = 128  # frames; what NWM and RAEv2 divide the offset by
IN_CONTEXT_FIELDS = ("context_latents", "action", "rel_time")


def encode_context(raw: Cond, encode: EncodeImages) -> dict[str, torch.Tensor]:
    """Raw conditions with latents in the place of images; a frame that occurs several times is encoded once.

    raw      context_images (B, K, 3, Hpx, Wpx) uint8, context_keys (B, K) their indices in the split, and the rest
    encode   (8-bit images, keys) -> latents

    `context_keys` become `context_id`, so that the trunk computes such a frame once too.
    """
    keys, images = raw["context_keys"], raw["context_images"]
    distinct, rows = keys.cpu().unique(return_inverse=True)
    number = torch.arange(keys.numel())
    first = number.new_full(distinct.shape, len(number)).scatter_reduce(0, rows.flatten(), number, "amin")
    latents = encode(images.flatten(0, 1)[first.to(images.device)], distinct)
    rest = {name: value for name, value in raw.items() if name not in ("context_images", "context_keys")}
    return {**rest, "context_latents": latents[rows.to(latents.device)], "context_id": keys}


def model_cond(spec: FramesCondition, cond: Cond) -> dict[str, torch.Tensor]:
    """The tensors of a condition that a generator takes, in its units.

    Motions of one robot among several ("spacing_m", metres between two of its frames) are scaled to the mean spacing of
    all, which the generator divides by: a step of the usual length is the same number for each of them.

    Metres, radians and seconds are what `block_causal` takes. `in_context` takes numbers as they come, so motions are
    given in spacings over the longest offset and times in frames over 128, the scales of published models.
    """
    cond = dict(cond)
    spacing = cond.pop("spacing_m", None)  # (B, 1)
    if spacing is not None:
        move, yaw = cond["action"].split([2, 1], dim=1)
        cond["action"] = torch.cat([move * (spec.spacing / spacing), yaw], dim=1)
    if spec.form == "block_causal":
        return cond
    cond = {name: cond[name] for name in IN_CONTEXT_FIELDS}
    most_frames = spec.max_time / spec.frame_period
    scale = cond["action"].new_tensor([spec.spacing * most_frames, spec.spacing * most_frames, 1.0])
    return cond | {
        "action": cond["action"] / scale,
        "rel_time": cond["rel_time"] / spec.frame_period / PUBLISHED_TIME_SCALE,
    }
