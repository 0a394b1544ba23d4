"""What a GPU must give: the numbers of the CPU, of the reference and of itself. Needs a CUDA device.

python -m pytest -o addopts= -m gpu tests/gpu                       # on a GPU, about 4 minutes
python -m pytest -o addopts= -m gpu tests/gpu --gpu-device cpu      # the same tests on a CPU, to try them
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as torch_dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from raev2 import RAE, Generator, pipeline, sample
from raev2.batch import cond_map
from raev2.flow import interpolate, training_loss
from raev2.interop import import_generator
from raev2.model.condition import LabelCondition, TextCondition
from raev2.model.frames import FramesCondition
from raev2.spec import AdamWSpec, DDTSpec, FlowSpec, InternalGuidance, MuonSpec
from raev2.training.optim import build_optimizer
from raev2.training.run import make_accelerator

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:FSDP2-wrapped module", "ignore::DeprecationWarning")]
FIXTURES = sorted((Path(__file__).parents[1] / "parity" / "fixtures").glob("*_*_*.safetensors"))
LATENTS = (192, 8, 8)
CONDITIONS = {
    "label": LabelCondition(num_classes=10),
    "text": TextCondition(dim=64, max_tokens=16),
    "frames": FramesCondition(num_frames=4, at_image=True),
}
NETWORK = DDTSpec(width=96, depth=2, num_heads=3, head_width=192, head_depth=1, head_num_heads=6, base_head_depth=1)


@pytest.fixture
def device(request) -> Iterator[torch.device]:
    """The device under test, without TF32; the settings of before afterwards."""
    name = request.config.getoption("--gpu-device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    make_accelerator("fp32")
    yield torch.device(name)
    make_accelerator("bf16")


def generator_on(device: torch.device, condition: str) -> Generator:
    """A generator whose output layers are not zero, as they are at the start: they would hide all behind them."""
    torch.manual_seed(0)
    generator = Generator(NETWORK, CONDITIONS[condition], FlowSpec(), LATENTS)
    for parameter in generator.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return generator.to(device)


def inputs(generator: Generator, seed: int = 0, num: int = 8):
    """Latents, noise, times and condition, the same on every device."""
    random = torch.Generator().manual_seed(seed)
    latents, noise = torch.randn(2, num, *LATENTS, generator=random).unbind()
    cond = {
        name: torch.rand(value.shape, generator=random) if value.is_floating_point() and name != "rel_time" else value
        for name, value in generator.conditioner.example_cond(num).items()
    }
    if "text_mask" in cond:
        cond["text_mask"] = torch.arange(cond["text_mask"].shape[1])[None] <= torch.arange(num)[:, None] % 8
    place = lambda value: value.to(generator.device)  # noqa: E731
    return place(latents), place(noise), place(torch.rand(num, generator=random)), cond_map(cond, place)


def losses(generator: Generator, optimizer_spec, *, net=None, bf16: bool = False, steps: int = 3) -> list[float]:
    """Losses of training steps of `net`, which wraps the generator."""
    net, optimizer, found = generator if net is None else net, build_optimizer(generator, optimizer_spec, 1e-3), []
    for step in range(steps):
        latents, noise, t, cond = inputs(generator, step)
        point = interpolate(latents, noise, t)
        with torch.autocast(generator.device.type, torch.bfloat16, enabled=bf16):
            output = net(point.z_t, point.t, cond)
        loss = training_loss(output, point, latents, generator.flow).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("file", FIXTURES, ids=lambda file: file.stem)
@torch.no_grad()
def test_networks_equal_the_stored_outputs_of_the_reference(device, file):
    with safe_open(file, "pt") as stored:
        config = json.loads(stored.metadata()["config"])
        read = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    part = {
        group: {key.partition(".")[2]: value for key, value in read.items() if key.startswith(f"{group}.")}
        for group in ("weights", "inputs", "outputs")
    }
    given = cond_map(part["inputs"], lambda value: value.to(device))
    cond = {"label": given.pop("y")} if "y" in given else {k: v for k, v in given.items() if k not in ("x", "t")}
    output = import_generator(part["weights"], config).to(device)(given["x"], given["t"], cond)
    for name, ours in (("full", output.pred), ("base", output.base_pred), ("repa", output.hidden)):
        if name in part["outputs"]:
            torch.testing.assert_close(ours.cpu(), part["outputs"][name], rtol=0, atol=1e-5)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((ours.cpu() - theirs.cpu()).norm() / theirs.cpu().norm())


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-5), (True, 0.03)])
def test_predictions_and_gradients_are_those_of_the_cpu_in_fp32(device, condition, bf16, tolerance):
    ours = generator_on(device, condition)
    theirs = copy.deepcopy(ours).cpu()

    def run(generator: Generator, autocast: bool) -> tuple[torch.Tensor, torch.Tensor]:
        latents, _, t, cond = inputs(generator)
        with torch.autocast(generator.device.type, torch.bfloat16, enabled=autocast):
            pred = generator(latents, t, cond).pred
        pred.float().square().mean().backward()
        gradients = [p.grad.flatten() for p in generator.parameters() if p.grad is not None]
        return pred.detach(), torch.cat(gradients)

    for got, expected in zip(run(ours, bf16), run(theirs, False), strict=True):
        assert relative(got.float(), expected) < tolerance


@pytest.mark.parametrize("condition", CONDITIONS)
def test_training_in_bf16_follows_training_in_fp32(device, condition):
    for optimizer in (MuonSpec(), AdamWSpec()):
        exact = losses(generator_on(device, condition), optimizer)
        assert losses(generator_on(device, condition), optimizer, bf16=True) == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("condition", ["label", "text"])
def test_a_compiled_network_trains_like_the_eager_one(device, condition):
    generator = generator_on(device, condition)
    net = torch.compile(generator, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    eager = losses(generator_on(device, condition), AdamWSpec(), bf16=True)
    assert losses(generator, AdamWSpec(), net=net, bf16=True) == pytest.approx(eager, rel=1e-2)


def test_one_process_of_ddp_and_of_fsdp2_trains_as_the_bare_module(device):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        bare = losses(generator_on(device, "label"), AdamWSpec())
        replica, shard = generator_on(device, "label"), generator_on(device, "label")
        ids = [0] if device.type == "cuda" else None
        wrapped = DistributedDataParallel(replica, device_ids=ids)
        assert losses(replica, AdamWSpec(), net=wrapped) == pytest.approx(bare, rel=1e-6)
        mesh = init_device_mesh(device.type, (1,))
        for block in (*shard.network.trunk.blocks, *shard.network.head_blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(shard, mesh=mesh)
        assert losses(shard, AdamWSpec()) == pytest.approx(bare, rel=1e-4)
    finally:
        torch_dist.destroy_process_group()


def test_a_run_trains_is_resumed_to_the_same_bits_and_samples(device, tiny_spec, tmp_path, monkeypatch):
    """The whole of `raev2 train` on the device; then again from the checkpoint in the middle of stage 2."""
    if device.type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    spec = tiny_spec.replace(precision="bf16")
    run = pipeline.train(spec, tmp_path / "run")
    again = Path(shutil.copytree(run, tmp_path / "again"))
    shutil.rmtree(again / "generator")
    shutil.rmtree(again / "checkpoints" / "generator" / "000000064")
    pipeline.train(spec, again)
    first, second = (load_file(folder / "generator" / "model.safetensors") for folder in (run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)

    rae = RAE.from_pretrained(run / "tokenizer").to(device)
    generator = Generator.from_pretrained(run / "generator").to(device)
    settings = {"steps": 5, "guidance": InternalGuidance(scale=1.5), "seed": 1}
    cond = {"label": torch.arange(16, device=device) % 4}
    by_batch = {size: sample(generator, rae, cond, batch_size=size, **settings) for size in (1, 3, 16)}
    assert torch.equal(by_batch[16], sample(generator, rae, cond, batch_size=16, **settings)), "equal batches"
    apart = max(float((by_batch[16] - images).abs().max()) for images in by_batch.values())
    print(f"\nsamples of batches of 1, 3 and 16 differ by at most {apart:.2g} in fp32 on {device}")
    assert apart < 1 / 255


def test_cached_latents_train_like_encoding_online(device, tiny_spec, tmp_path, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    quick = tiny_spec.evaluation.replace(protocols=(), in_training=())
    online = pipeline.train(tiny_spec.replace(evaluation=quick), tmp_path / "online")
    cached = tiny_spec.replace(
        evaluation=quick,
        tokenizer_from=str(online / "tokenizer"),
        generator_training=tiny_spec.generator_training.replace(latent_cache=True),
    )
    folder = pipeline.train(cached, tmp_path / "from-cache")
    ours, theirs = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()
         if json.loads(line)["stage"] == "generator" and json.loads(line)["kind"] == "train"]
        for run in (folder, online)
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-4)
