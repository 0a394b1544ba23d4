"""A place in which the commands of README and docs run: small data, recipes and runs under the names of the pages."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from clips import Clip, write_clip
from PIL import Image
from published import DINOV2, WORDS, timm_weights, write_tokenizer
from safetensors.torch import save_file
from test_autoencoders import autoencoder
from test_bags import Messages, drive, write_ros2
from test_plans import REQUEST, WRITING, poses, tar

from raev2.command.cli import main
from raev2.interop import export_decoder, export_generator, generator_config
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.spec import (
    DataSpec,
    DDTSpec,
    DecoderSpec,
    DiTSpec,
    EncoderSpec,
    FeatureLoss,
    FlowSpec,
    RunSpec,
    ScheduleSpec,
)
from raev2.task import get_recipe, get_task
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.encoders import ASSETS, build_encoder
from raev2_tasks.t2i.benchmark.g60 import geneval_rows

SHORT: Mapping[str, Any] = {
    "batch_size": 8, "schedule": ScheduleSpec(lr=1e-3), "log_every_steps": 1, "sample_every_images": 16,
}  # fmt: skip
DATA = {"imagenet": "data/emoji", "t2i": "data/scenes", "nwm": "data/mazes"}
PROTOCOLS = {"imagenet": "generation-micro", "t2i": "reconstruction-micro", "nwm": "rollout-4fps-micro"}
MINILM = "here/models/all-MiniLM-L6-v2"


def small(task: str, recipe: str, root: Path) -> RunSpec:
    """The quickstart of a task with tiny networks and one or two steps a stage, on data that is made below.

    Recipes after a published system get what those have: data of 1,000 classes, a frozen text encoder.
    """
    base = get_recipe(get_task(task), "quickstart")
    sizes: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 2, "base_head_depth": 1}
    head = {"head_width": 32, "head_depth": 1, "head_num_heads": 1}
    own: dict[str, Any] = {"horizons_s": (0.5,), "max_offset_s": 1.0, "num_rollouts": 2} if task == "nwm" else {}
    if task == "t2i":
        encoder = {"name": "scratch", "max_tokens": 64, "scratch": {"width": 32, "depth": 1, "num_heads": 1}}
        frozen = {"name": str(root / MINILM), "max_tokens": 16}
        own = {"weights": {}, "text_encoder": frozen if recipe.startswith("raev2") else encoder}
    data = "data/imagenet" if task == "imagenet" and recipe.startswith("rae") else DATA[task]
    return base.replace(
        recipe=recipe,
        task=base.task.replace(**own),
        data=DataSpec(dir=str(root / data)),
        tokenizer=base.tokenizer.replace(
            encoder=base.tokenizer.encoder.replace(layers=(0,)), noise_tau=0.0,
            decoder=DecoderSpec(width=32, depth=1, num_heads=1, mlp_dim=32, patch_size=8),
        ),
        tokenizer_training=base.tokenizer_training.replace(
            **SHORT, images=8, save_every_images=8, adversarial=None, perceptual=FeatureLoss(layers=(0,)),
            stats_images=8, ema_decay=0.5,
        ),
        generator=DiTSpec(**sizes) if task == "nwm" else DDTSpec(**sizes, **head),
        generator_training=base.generator_training.replace(
            **SHORT, images=16, save_every_images=8, eval_every_images=None, latent_cache=False
        ),
        sampling=base.sampling.replace(steps=2, batch_size=16),
        evaluation=base.evaluation.replace(
            protocols=(PROTOCOLS[task],), in_training=(), num_samples=4, compare_guidance=(),
            expected=get_recipe(get_task(task), recipe).evaluation.expected,
        ),
        precision="fp32",
    )  # fmt: skip


# Data


def draw(file: Path, number: int, side: int = 64) -> Path:
    """A picture of blocks, another one for every number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((side, side), Image.Resampling.NEAREST).save(file)
    return file


def make_pictures() -> None:
    """`photos` of two classes, with captions beside them and in a table; `scans` of none; ImageNet: pictures of 8."""
    for number, name in enumerate(["heart", "face-smiling", *(f"group-{n:02d}" for n in range(68))]):
        for folder in ("here/data/imagenet", "here/few")[: 1 + (number < 8)]:
            for split in ("train", "val"):
                draw(Path(folder, split, name, "0.png"), number)
    rows = []
    for number in range(40):
        file = draw(Path("photos", "cat" if number % 2 else "dog", f"{number}.jpg"), number, 80)
        draw(Path("scans", f"{number}.jpg"), number)
        file.with_suffix(".txt").write_text(f"a picture of blocks, number {number}", encoding="utf-8")
        rows.append([str(file.relative_to("photos")), f"a picture of blocks, number {number}", "blocks"])
    with open("photos/metadata.csv", "w", encoding="utf-8", newline="") as table:
        csv.writer(table).writerows([["file", "caption", "title"], *rows])
    for source, out in (("here/data/imagenet", "data/emoji"), ("here/few", "data/imagenet")):
        assert main(["data", "build", "image-folder", "--set", f"src={source}", "--out", out]) == 0
    manifest = Path("data/imagenet/manifest.json")
    values = json.loads(manifest.read_text(encoding="utf-8"))
    values["classes"] += [f"class {number}" for number in range(len(values["classes"]), 1000)]
    manifest.write_text(json.dumps(values), encoding="utf-8")
    for file in ("street.jpg", "here.jpg", "there.jpg"):
        draw(Path(file), 1)


def make_shards() -> None:
    """Folders of tars, as they are published, and one of captioned pictures that the recipes of t2i train on."""
    tar("downloads/long-caption/00000.tar", range(30))
    tar("downloads/journeydb/00000.tar", range(30))
    tar("downloads/rendered-text/00000.tar", range(20), json=WRITING)
    tar("downloads/scale-rae/00000.tar", range(20), json=REQUEST)
    tar("here/mnt/shards/train-0000.tar", range(40))
    tar("here/mnt/shards/validation-0000.tar", range(50, 62))
    tar("data/downloaded/00000.tar", range(30))
    build = ["data", "build", "captioned-folder", "--set", "src=photos", "--set", "size=64"]
    assert main([*build, "--out", "data/scenes"]) == 0
    Path("prompts.txt").write_text("a red circle\na blue star\n", encoding="utf-8")
    rows = [json.dumps(row.to_json()) for row in geneval_rows()[::80]]
    Path("evaluation_metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def make_drives() -> None:
    """Recordings as folders of frames, videos, bags and in KITTI's layout, and two dataset folders."""
    t = np.arange(72) / 4
    for room in range(4):
        for number in range(len(t)):
            draw(Path("recordings", f"room{room}", f"{number:04d}.jpg"), 100 * room + number)
        Path("recordings", f"room{room}", "poses.csv").write_text(poses(t), encoding="utf-8")
    clip = write_clip(Clip(".mp4", "libx264", options={"preset": "ultrafast"}), Path("clip.mp4"))
    events = [(at, {"/camera": "/image_raw/compressed"}.get(topic, topic), it) for at, topic, it in drive(Messages())]
    for folder in ("videos", "bags"):
        Path(folder).mkdir()
    for name in ("hall", "lab"):
        shutil.copy(clip, f"videos/{name}.mp4")
        Path(f"videos/{name}.csv").write_text(poses(np.arange(0, 4.5, 0.05)), encoding="utf-8")
        write_ros2(Path("bags", name), events)
    for sequence in ("00", "01"):
        for number in range(len(t)):
            draw(Path("dataset/sequences", sequence, "image_2", f"{number:06d}.png"), number)
        Path("dataset/sequences", sequence, "times.txt").write_text("\n".join(map(str, t)), encoding="utf-8")
        rows = [f"1 0 0 0 0 1 0 0 0 0 1 {z}" for z in t]  # straight ahead, along the axis of the camera
        Path("dataset/poses").mkdir(exist_ok=True)
        Path("dataset/poses", f"{sequence}.txt").write_text("\n".join(rows), encoding="utf-8")
    build = ["data", "build", "frames-poses", "--set", "src=recordings", "--out"]
    assert main([*build, "data/drives"]) == main([*build, "data/recon"]) == 0
    sizes = [f"--set={size}" for size in ("num_train=2", "num_val=2", "drives_per_maze=1", "num_frames=40")]
    assert main(["data", "build", "vizdoom", *sizes, "--out", "data/mazes"]) == 0
    Path("data_splits/recon/test").mkdir(parents=True)
    name = json.loads(Path("data/recon/val.jsonl").read_text(encoding="utf-8").splitlines()[0])["id"]
    Path("data_splits/recon/test/time.pkl").write_bytes(pickle.dumps([(name, 3, 8, 8)]))


# Weights


def make_weights() -> None:
    """Files of others with random weights: RAEv2 and RAE in their layouts, an autoencoder of diffusers, a BERT."""
    torch.manual_seed(0)
    spec = DDTSpec(width=16, depth=9, num_heads=2, head_width=32, head_depth=1, head_num_heads=2, base_head_depth=8)
    generator = Generator(spec, LabelCondition(num_classes=1000), FlowSpec(), (192, 8, 8))
    torch.save({"ema": export_generator(generator)}, "checkpoint.pt")
    stage_1 = {"encoder_name": "dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]", "decoder_num_attention_heads": 2}
    config = {"stage_1": stage_1, "stage_2": generator_config(generator)}
    Path("config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    sizes = DecoderSpec(width=16, depth=1, num_heads=2, mlp_dim=32, patch_size=8)
    for decoder, stats in (("decoder.pt", "stats.pt"), ("model.pt", "stat.pt")):
        torch.save(export_decoder(ViTDecoder(192, sizes, (8, 8))), decoder)
        torch.save({"mean": torch.randn(192, 8, 8), "var": torch.rand(192, 8, 8) + 0.1}, stats)
    encoder = build_encoder(EncoderSpec(name="micro"), (8, 8), pretrained=False)
    for folder in (Path("encoders/micro-random"), Path("encoders/dinov2-s")):
        folder.mkdir(parents=True)
    shutil.copy(ASSETS / "micro_encoder/config.json", "encoders/micro-random")
    save_file(encoder.trunk.model.state_dict(), "encoders/micro-random/model.safetensors")
    dinov2 = {"architecture": "vit_small_patch14_dinov2", "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    Path("encoders/dinov2-s/config.json").write_text(json.dumps(dinov2), encoding="utf-8")
    Path("encoders/dinov2-s/model.safetensors").write_bytes(timm_weights(DINOV2))
    autoencoder("dinov2", 4).save_pretrained("path/to/autoencoder")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    transformers.BertModel(transformers.BertConfig(**shape, vocab_size=len(WORDS))).save_pretrained(MINILM)
    write_tokenizer(MINILM)


def make_runs() -> None:
    """runs/TASK/quickstart, trained by the command of the README, and copies of them under other names."""
    for task, more in RUNS.items():
        assert main(["train", "--task", task]) == 0
        for name in more:
            shutil.copytree(f"runs/{task}/quickstart", f"runs/{task}/{name}")
    assert main(["train", "--task", "imagenet", "--recipe", "raev2-dinov3l-k7", "--run", "runs/published"]) == 0
    checkpoints = Path("runs/imagenet/quickstart/checkpoints/generator")
    shutil.copytree(checkpoints / "000000008", checkpoints / "000011200")


TINY = DDTSpec(width=32, depth=2, num_heads=2, head_width=32, head_depth=1, head_num_heads=2, base_head_depth=1)
RUNS = {"imagenet": ("a",), "t2i": (), "nwm": ()}
