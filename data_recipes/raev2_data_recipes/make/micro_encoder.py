"""Makes the encoder that is embedded in the package: a small ViT distilled from DINOv2-S/14 on emoji pictures.

    python -m raev2_data_recipes.make.micro_encoder --teacher FILE --data data/emoji --out raev2/assets/micro_encoder

Three steps, in this order in ``main``:

1. ``make_pictures``: 64 px pictures from the training split (never val). About half are as used downstream, one emoji
   on white; the others are scenes: several emojis, other backgrounds, other sizes, mild changes of colour, some blur
   and noise. Background and emoji are composited again from the transparent originals.
2. ``teacher_features``: the teacher sees the same picture enlarged to 112 px, so both have 8 x 8 tokens. Its blocks
   4, 8 and 12 are stored, the last one after the final LayerNorm. Every channel is standardised over the pictures,
   because a few channels of DINOv2 are a hundred times larger than the others.
3. ``train``: linear predictors from the student's blocks 2, 4 and 6 to the teacher's blocks 4, 8 and 12. Also the
   early blocks are predicted, so that sums over the last layers carry information, not only the last layer.

The weights of the teacher are a local file in timm names (``vit_small_patch14_dinov2``). What the result is for, and
its numbers, are in the card: ``raev2/assets/micro_encoder/README.md``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageEnhance, ImageFilter
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed, set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from raev2.errors import DataError
from raev2.files.images import read_rgb
from raev2_data_recipes.base import verify_dataset
from raev2_data_recipes.pictures.emoji import picture_dir

STUDENT_KWARGS: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
    "num_classes": 0,
    "global_pool": "token",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for images in [0, 1]; as for the teacher
IMAGE_PX, TEACHER_PX, TEACHER_DIM = 64, 112, 384
STUDENT_BLOCKS, TEACHER_BLOCKS = (2, 4, 6), (4, 8, 12)  # counted from 1
NUM_TOKENS = 65  # class token and 8 x 8 patches
RIDGE = 1e-2

log = logging.getLogger("micro_encoder")


# Pictures.


def read_index(data_dir: Path, split: str) -> list[dict[str, Any]]:
    """The lines of one split of an emoji dataset folder."""
    return [json.loads(line) for line in (data_dir / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def read_images(data_dir: Path, lines: Sequence[Mapping[str, Any]]) -> Float[Tensor, "B 3 64 64"]:
    """The pictures of ``lines`` in [0, 1], resized from 72 to 64 px (antialiased bicubic)."""
    pixels = []
    for line in lines:
        image = read_rgb(data_dir / line["file"], f"data {data_dir / line['file']}")
        pixels.append(np.asarray(image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


def make_pictures(lines: Sequence[Mapping[str, Any]], num_scenes: int, seed: int) -> UInt8[np.ndarray, "P 64 64 3"]:
    """Two pictures on white for every line, then ``num_scenes`` scenes, in this order.

    Scenes draw the group first, so that people, three fifths of the data, do not fill them.
    """
    rng = np.random.default_rng(seed)
    sprites = []
    for line in lines:
        with (picture_dir() / f"{line['code']}.png").open("rb") as file, Image.open(file) as image:
            sprites.append(image.convert("RGBA"))
    by_group: dict[str, list[Image.Image]] = {}
    for line, sprite in zip(lines, sprites, strict=True):
        by_group.setdefault(line["group"], []).append(sprite)
    groups = list(by_group.values())
    pictures = [_plain(sprite) for sprite in sprites] + [_shifted(sprite, rng) for sprite in sprites]
    for _ in range(num_scenes):
        pictures.append(_scene(groups, rng))
    return np.stack([np.asarray(picture) for picture in pictures])


def _plain(sprite: Image.Image) -> Image.Image:
    white = Image.new("RGBA", sprite.size, "white")
    return Image.alpha_composite(white, sprite).convert("RGB").resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)


def _shifted(sprite: Image.Image, rng: np.random.Generator) -> Image.Image:
    """On white, 80 to 115 % of the size, moved by up to 6 px."""
    canvas = Image.new("RGB", (IMAGE_PX, IMAGE_PX), "white")
    _paste(canvas, sprite, round(rng.uniform(0.8, 1.15) * IMAGE_PX), rng.uniform(-6, 6, size=2) + IMAGE_PX / 2, 0.0)
    return canvas


def _scene(groups: Sequence[Sequence[Image.Image]], rng: np.random.Generator) -> Image.Image:
    canvas = _background(rng)
    num = int(rng.choice([1, 2, 3, 4], p=[0.45, 0.25, 0.15, 0.15]))
    for _ in range(num):
        group = groups[rng.integers(len(groups))]
        sprite = group[rng.integers(len(group))]
        size_px = rng.uniform(36, 100) if num == 1 else rng.uniform(18, 46)
        angle_deg = rng.uniform(-20, 20) if rng.random() < 0.3 else 0.0
        spread = 0.2 if num == 1 else 0.4
        centre = IMAGE_PX * (0.5 + rng.uniform(-spread, spread, size=2))
        _paste(canvas, sprite, round(size_px), centre, angle_deg)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        canvas = enhance(canvas).enhance(rng.uniform(0.8, 1.2))
    if rng.random() < 0.1:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.5)))
    if rng.random() < 0.1:
        noise = rng.normal(0, rng.uniform(4, 16), size=(IMAGE_PX, IMAGE_PX, 3))
        canvas = Image.fromarray((np.asarray(canvas) + noise).clip(0, 255).astype(np.uint8))
    return canvas


def _background(rng: np.random.Generator) -> Image.Image:
    """One colour, a linear gradient, or soft blobs."""
    kind = rng.choice(["plain", "gradient", "blobs"], p=[0.5, 0.3, 0.2])
    colours = rng.integers(0, 256, size=(2, 3))
    if kind == "plain":
        return Image.new("RGB", (IMAGE_PX, IMAGE_PX), tuple(int(c) for c in colours[0]))
    if kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        y, x = np.mgrid[0:IMAGE_PX, 0:IMAGE_PX] / (IMAGE_PX - 1) - 0.5
        share = ((math.cos(angle) * x + math.sin(angle) * y) / math.sqrt(2) + 0.5)[..., None]
        return Image.fromarray((colours[0] * (1 - share) + colours[1] * share).round().astype(np.uint8))
    coarse = Image.fromarray(rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8))
    return coarse.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC)


def _paste(canvas: Image.Image, sprite: Image.Image, size_px: int, centre: np.ndarray, angle_deg: float) -> None:
    sprite = sprite.resize((size_px, size_px), Image.Resampling.BICUBIC)
    if angle_deg:
        sprite = sprite.rotate(angle_deg, resample=Image.Resampling.BICUBIC, expand=True)
    left, top = round(centre[0] - sprite.width / 2), round(centre[1] - sprite.height / 2)
    canvas.paste(sprite, (left, top), sprite)


# Networks.


def normalise(images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """(images - MEAN) / STD per channel; ``images`` in [0, 1]."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def make_student() -> VisionTransformer:
    """The student with random weights: 2.7 million parameters, 8 x 8 tokens of width 192."""
    return VisionTransformer(**STUDENT_KWARGS)


def load_teacher(path: Path) -> VisionTransformer:
    """DINOv2-S/14 for 112 px pictures; positions are interpolated to 8 x 8."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=TEACHER_PX, num_classes=0)
    state = {name: value.float() for name, value in load_file(path).items()}
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], [8, 8], num_prefix_tokens=1)
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def block_outputs(
    model: VisionTransformer, images: Float[Tensor, "B 3 H W"], blocks: Sequence[int]
) -> list[Float[Tensor, "B N D"]]:
    """Class and patch tokens after each of ``blocks`` (counted from 1); the last block after the final LayerNorm."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(normalise(images))))
    outputs = []
    for number, block in enumerate(model.blocks, start=1):
        x = block(x)
        if number in blocks:
            outputs.append(model.norm(x) if number == len(model.blocks) else x)
    return outputs


def teacher_features(teacher: VisionTransformer, pictures: np.ndarray, path: Path) -> np.ndarray:
    """Tokens of TEACHER_BLOCKS for all pictures, (P, 3, 65, 384) float16, in the file ``path``.

    Standardised per block and channel with the mean and deviation over the patch tokens of the first 2,048 of a
    shuffled order, then clipped to +-8.
    """
    shape = (len(pictures), len(TEACHER_BLOCKS), NUM_TOKENS, TEACHER_DIM)
    features = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)

    def run(rows: np.ndarray) -> Tensor:
        images = _to_images(pictures[rows])
        images = F.interpolate(images, size=TEACHER_PX, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return torch.stack([tokens.float() for tokens in block_outputs(teacher, images, TEACHER_BLOCKS)], dim=1)

    sample = np.random.default_rng(0).permutation(len(pictures))[:2048]
    patches = torch.cat([run(rows)[:, :, 1:] for rows in np.array_split(sample, max(1, len(sample) // 128))])
    mean, std = patches.mean((0, 2), keepdim=True), patches.std((0, 2), keepdim=True)
    started = time.monotonic()
    for start in range(0, len(pictures), 128):
        rows = np.arange(start, min(start + 128, len(pictures)))
        features[rows] = ((run(rows) - mean) / std).clamp(-8, 8).numpy().astype(np.float16)
        if start % 2560 == 0:
            log.info("teacher %d/%d %.0f s", start, len(pictures), time.monotonic() - started)
    return features


def _to_images(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


# Training.


def train(
    student: VisionTransformer,
    pictures: np.ndarray,
    features: np.ndarray,
    num_steps: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Distil ``features`` into ``student``, in place.

    Loss: sum over the three pairs of blocks, weights 0.25, 0.25 and 1, of smooth L1 + (1 - cosine) per token between
    the standardised teacher token and a linear prediction from the student token. The student's inner blocks go
    through a LayerNorm without parameters first. Half of the batches are mirrored, pictures and token grids.
    """
    rng = np.random.default_rng(seed)
    width = STUDENT_KWARGS["embed_dim"]
    predictors = nn.ModuleList(nn.Linear(width, TEACHER_DIM) for _ in STUDENT_BLOCKS)
    parameters = list(student.parameters()) + list(predictors.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    num_warmup = min(200, num_steps // 10 + 1)
    order = np.zeros(0, dtype=np.int64)
    started = time.monotonic()
    for step in range(num_steps):
        # Batch.
        if len(order) < batch_size:
            order = np.concatenate([order, rng.permutation(len(pictures))])
        rows, order = np.sort(order[:batch_size]), order[batch_size:]
        images = _to_images(pictures[rows])
        targets = torch.from_numpy(features[rows]).float()
        if rng.random() < 0.5:
            images, targets = images.flip(3), _mirror(targets)
        # Loss.
        with torch.autocast("cpu", torch.bfloat16):
            outputs = block_outputs(student, images, STUDENT_BLOCKS)
            outputs = [F.layer_norm(x, (width,)) for x in outputs[:-1]] + outputs[-1:]
            preds = [predict(x).float() for predict, x in zip(predictors, outputs, strict=True)]
        losses = torch.stack([_token_loss(pred, targets[:, i]) for i, pred in enumerate(preds)])
        loss = (losses * torch.tensor([0.25, 0.25, 1.0])).sum()
        # Update.
        done = (step + 1) / num_steps
        warm = min(1.0, (step + 1) / num_warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        # Report.
        if step % 25 == 0 or step == num_steps - 1:
            cosine = F.cosine_similarity(preds[-1], targets[:, -1], dim=-1).mean().item()
            std = F.layer_norm(outputs[-1].float(), (width,))[:, 1:].std((0, 1))
            rate = (step + 1) * batch_size / (time.monotonic() - started)
            log.info(
                "step %d/%d loss %.4f blocks %s cosine %.3f channel std %.2f to %.2f, %.0f images/s",
                step, num_steps, loss.item(), [round(x, 3) for x in losses.tolist()], cosine,
                std.min().item(), std.max().item(), rate,
            )  # fmt: skip


def _token_loss(pred: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(pred, target) + (1 - F.cosine_similarity(pred, target, dim=-1)).mean()


def _mirror(features: Float[Tensor, "B L 65 D"]) -> Float[Tensor, "B L 65 D"]:
    """Mirror the 8 x 8 grid left to right; the class token stays."""
    grid = features[:, :, 1:].unflatten(2, (8, 8)).flip(3).flatten(2, 3)
    return torch.cat([features[:, :, :1], grid], dim=2)


# Linear probe.


def pooled_features(tokens_of: Callable[[Tensor], Tensor], images: Float[Tensor, "B 3 64 64"]) -> Float[Tensor, "B D"]:
    """Mean over the patch tokens; ``tokens_of`` gives class and patch tokens for a batch of images in [0, 1]."""
    with torch.inference_mode():
        return torch.cat([tokens_of(batch)[:, 1:].float().mean(1) for batch in images.split(128)])


def linear_probe(
    train_features: Float[Tensor, "B D"],
    train_labels: Int[Tensor, "B"],
    val_features: Float[Tensor, "V D"],
    val_labels: Int[Tensor, "V"],
) -> dict[str, float]:
    """Ridge regression onto one-hot labels in closed form, float64; every class has the same total weight.

    Returns ``balanced_accuracy`` (mean of the recalls of the classes) and ``accuracy``, both in [0, 1], on val.
    """
    mean, std = train_features.mean(0), train_features.std(0).clamp_min(1e-6)

    def design(features: Tensor) -> Tensor:
        features = ((features - mean) / std).double()
        return torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)

    x, onehot = design(train_features), F.one_hot(train_labels).double()
    weight = (1 / (onehot.sum(0) * onehot.shape[1]))[train_labels]  # sums to 1
    penalty = RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0  # the constant
    solution = torch.linalg.solve(x.T @ (weight[:, None] * x) + penalty, x.T @ (weight[:, None] * onehot))
    hit = ((design(val_features) @ solution).argmax(1) == val_labels).double()
    recalls = [hit[val_labels == label].mean() for label in val_labels.unique()]
    return {"balanced_accuracy": float(torch.stack(recalls).mean()), "accuracy": float(hit.mean())}


def group_labels(lines: Sequence[Mapping[str, Any]]) -> Int[Tensor, "B"]:
    """Label of the Unicode group (9 of them) for every line."""
    groups = sorted({line["group"] for line in lines})
    return torch.tensor([groups.index(line["group"]) for line in lines])


def probe_all(student: VisionTransformer, teacher: VisionTransformer, data_dir: Path) -> dict[str, dict[str, float]]:
    """Linear probes of the Unicode group on the val split: student, random student, teacher, largest class."""
    torch.manual_seed(0)
    random_student = make_student().eval()
    lines = {split: read_index(data_dir, split) for split in ("train", "val")}
    images = {split: read_images(data_dir, lines[split]) for split in lines}
    labels = {split: group_labels(lines[split]) for split in lines}

    def enlarged(batch: Tensor) -> Tensor:
        batch = F.interpolate(batch, size=TEACHER_PX, mode="bicubic", antialias=True).clamp(0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            return teacher.forward_features(normalise(batch))

    tokens_of = {
        "micro": lambda batch: student.forward_features(normalise(batch)),
        "random weights": lambda batch: random_student.forward_features(normalise(batch)),
        "teacher DINOv2-S/14": enlarged,
    }
    results = {}
    for name, function in tokens_of.items():
        features = {split: pooled_features(function, images[split]) for split in lines}
        results[name] = linear_probe(features["train"], labels["train"], features["val"], labels["val"])
    largest = labels["train"].mode().values
    results["largest class"] = {
        "balanced_accuracy": 1 / len(labels["val"].unique()),
        "accuracy": float((labels["val"] == largest).double().mean()),
    }
    return results


# The command.


def main(argv: Sequence[str] | None = None) -> None:
    """Make the encoder and write ``config.json`` and ``model.safetensors`` to ``--out``."""
    parser = argparse.ArgumentParser(prog="python -m raev2_data_recipes.make.micro_encoder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--teacher", type=Path, required=True, help="DINOv2-S/14 weights, safetensors, timm names")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder of the recipe emoji")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--features", type=Path, help="keep the teacher's features here, 2.3 GB, and use them again")
    parser.add_argument("--steps", type=int, default=1300, help="optimizer updates (default 1300)")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per update (default 64)")
    parser.add_argument("--scenes", type=int, default=8000, help="pictures with other backgrounds (default 8000)")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    set_fused_attn(False)  # the backward pass of fused attention on CPU takes half of the step
    torch.manual_seed(args.seed)
    started = time.monotonic()

    manifest = verify_dataset(args.data)
    pictures = make_pictures(read_index(args.data, "train"), args.scenes, args.seed)
    log.info("%d pictures, %.0f s", len(pictures), time.monotonic() - started)
    teacher, student = load_teacher(args.teacher), make_student()
    with tempfile.TemporaryDirectory() as scratch:
        features_file = args.features or Path(scratch) / "features.npy"
        if features_file.exists():
            features = np.load(features_file, mmap_mode="r")
        else:
            features = teacher_features(teacher, pictures, features_file)
        if len(features) != len(pictures):
            raise DataError(str(features_file), "other pictures", got=len(features), expected=str(len(pictures)))
        training_started = time.monotonic()
        train(student, pictures, features, args.steps, args.batch_size, args.lr, args.seed)
        training_minutes = (time.monotonic() - training_started) / 60
    student.eval()
    weights = {name: value.detach().half().contiguous() for name, value in student.state_dict().items()}
    student.load_state_dict(weights)  # probe what is stored
    probes = probe_all(student, teacher, args.data)
    log.info("probes %s", json.dumps(probes))

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "format_version": 1,
        "name": "micro",
        "architecture": "vit",
        "kwargs": STUDENT_KWARGS,
        "layer_norm_eps": student.norm.eps,
        "input_range": [0, 1],
        "mean": list(MEAN),
        "std": list(STD),
        "weights": "model.safetensors",
        "weights_dtype": "float16",
        "weights_sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
        "licence": "Apache-2.0",
        "attribution": manifest["attribution"],
        "made_by": "data_recipes/raev2_data_recipes/make/micro_encoder.py",
        "options": {"steps": args.steps, "batch_size": args.batch_size, "scenes": args.scenes, "lr": args.lr}
        | {"seed": args.seed},
        "training_minutes": round(training_minutes, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} CPU cores, bfloat16 autocast",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
        "data": {"recipe": manifest["recipe"], "split": "train", "fingerprint": manifest["fingerprint"]},
        "teacher": {
            "name": "vit_small_patch14_dinov2",
            "licence": "Apache-2.0",
            "sha256": hashlib.sha256(args.teacher.read_bytes()).hexdigest(),
        },
        "probe": {
            "task": f"Unicode group, {manifest['splits']['val']['num_samples']} val pictures, mean patch token, ridge",
            "results": {name: {k: round(v, 4) for k, v in result.items()} for name, result in probes.items()},
        },
    }
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (args.out / "config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
