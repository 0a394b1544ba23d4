from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from raev2 import Pipeline
from raev2.command.cli import main
from raev2.errors import SpecError
from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.spec import DDTSpec, FlowSpec, ParallelSpec
from raev2.spec_io import apply_overrides, load_spec, save_spec
from raev2.training.parallel import compiled, gradient_sync, is_plain, parallelise


def tiny() -> Generator:
    torch.manual_seed(0)
    spec = DDTSpec(width=16, depth=2, num_heads=2, head_width=24, head_depth=1, head_num_heads=2)
    generator = Generator(spec, LabelCondition(num_classes=4), FlowSpec(), (3, 2, 2))
    for parameter in generator.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return generator


def gradients(generator: nn.Module, network: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    output = network(torch.randn(3, 3, 2, 2), torch.rand(3), {"label": torch.tensor([0, 1, 4])})
    output.pred.square().mean().backward()
    return [parameter.grad for parameter in generator.parameters() if parameter.grad is not None]


def test_one_process_is_not_wrapped():
    model = nn.Linear(2, 2)
    for strategy in ("ddp", "fsdp", "hsdp"):
        assert parallelise(model, ParallelSpec(strategy=strategy)) is model
    with gradient_sync(model, False):
        pass
    assert is_plain(model)


def test_recomputed_blocks_have_the_same_gradients_and_names():
    plain, recomputed = tiny(), tiny()
    network = parallelise(recomputed, ParallelSpec(activation_checkpointing=True), recomputed.blocks())
    assert recomputed.state_dict().keys() == plain.state_dict().keys()
    expected = gradients(plain, plain)
    for ours, theirs in zip(gradients(recomputed, network), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(recomputed.blocks()) == 3


COMPILED = """
import torch
from torch import nn
from raev2.spec import ParallelSpec
from raev2.training.parallel import is_plain, parallelise
from test_parallel import gradients, tiny

real = nn.Module.compile
nn.Module.compile = lambda self: real(self, backend="aot_eager", fullgraph=True)
plain, compiled = tiny(), tiny()
network = parallelise(compiled, ParallelSpec(compile=True), compiled.blocks())
assert not is_plain(compiled) and compiled.state_dict().keys() == plain.state_dict().keys()
for ours, theirs in zip(gradients(compiled, network), gradients(plain, plain), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
"""


LIMIT = """
import torch
torch._dynamo.config.recompile_limit = 1
"""


def test_blocks_compile_without_a_graph_break():
    """Each block is one graph, which `fullgraph` checks; a cheap backend, and no type checks by the test session."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parent)


def test_more_shapes_than_torch_compiles_do_not_end_a_run():
    """Trunk and head are two shapes of one block, and its limit is set to one: the other runs as written."""
    limited = COMPILED.replace(", fullgraph=True", "").replace("import torch\n", LIMIT, 1)
    found = subprocess.run(
        [sys.executable, "-c", limited], cwd=Path(__file__).parent, capture_output=True, encoding="utf-8"
    )
    assert found.returncode == 0, found.stderr
    assert "hit config.recompile_limit (1)" in found.stderr


WHOLE = """
import torch
from raev2.model.condition import LabelCondition, TextCondition
from raev2.model.frames import FramesCondition
from raev2.model.generator import Generator
from raev2.spec import DDTSpec, FlowSpec

network = DDTSpec(width=32, depth=1, num_heads=2, head_width=32, head_depth=1, head_num_heads=2, base_head_depth=1)
for condition in (LabelCondition(num_classes=3), TextCondition(dim=8), FramesCondition(num_frames=2)):
    torch.manual_seed(0)
    generator = Generator(network, condition, FlowSpec(), (4, 4, 4))
    for value in generator.parameters():
        torch.nn.init.normal_(value, std=0.1) if not value.any() else None
    cond = generator.prepare_cond(generator.conditioner.example_cond(2))
    if "text_mask" in cond:
        cond["text_mask"][:, :3] = True
    inputs = torch.randn(2, 4, 4, 4), torch.rand(2), {name: value.detach() for name, value in cond.items()}
    compiled = torch.compile(generator, backend="eager", fullgraph=True)
    ours, theirs = compiled(*inputs), generator(*inputs)
    assert theirs.pred.std() > 0.1
    torch.testing.assert_close(ours.pred, theirs.pred, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.base_pred, theirs.base_pred, rtol=1e-4, atol=1e-5)
"""


def test_the_whole_generator_is_one_graph_for_labels_text_and_frames():
    """`fullgraph` raises at a graph break; a cheap backend, and no type checks by the test session."""
    subprocess.run([sys.executable, "-c", WHOLE], check=True)


TWIN = """
import torch
from torch import nn
from raev2.sampler import noise_for, sample_latents
from raev2.spec import CFG, SamplingSpec
from raev2.training.parallel import compiled, is_plain
from test_parallel import tiny

real = nn.Module.compile
nn.Module.compile = lambda self: real(self, backend="aot_eager", fullgraph=True)
generator = tiny().eval()
twin = compiled(generator)
assert is_plain(generator) and not is_plain(twin) and not twin.training
with torch.no_grad():
    for value in generator.parameters():
        value.mul_(0.9)
sampling, cond = SamplingSpec(steps=2, guidance=CFG(scale=2.0)), {"label": torch.arange(4)}
noise = noise_for(0, range(4), generator.latent_shape)
ours, theirs = (sample_latents(network, cond, noise, sampling) for network in (twin, generator))
assert theirs.std() > 0.03
torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
"""


def test_a_compiled_twin_samples_with_the_weights_of_its_generator():
    """Weights that change after it was made too; a cheap backend, and no type checks by the test session."""
    subprocess.run([sys.executable, "-c", TWIN], check=True, cwd=Path(__file__).parent)


@pytest.mark.parametrize("argv", [["sample", "--n", "1"], ["eval", "--protocol", "generation-micro"]])
def test_commands_sample_from_compiled_blocks_where_asked(argv, trained_run, monkeypatch, tmp_path):
    blocks: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: blocks.append(self))
    run = shutil.copytree(trained_run, tmp_path / "run")
    argv = [*argv, "--run", str(run)]
    assert main(argv) == 0 and not blocks
    assert main([*argv, "--compile", *(["--overwrite"] if argv[0] == "sample" else [])]) == 0
    assert {type(block).__name__ for block in blocks} == {"Block"}
    written = {"sample": "samples/seed-0/plan.json", "eval": "eval/generation-micro.json"}[argv[0]]
    assert '"compile": true' in (run / written).read_text(encoding="utf-8")


def test_a_run_that_asks_for_compiled_blocks_can_be_used_without(trained_run, monkeypatch, tmp_path):
    blocks: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: blocks.append(self))
    run = shutil.copytree(trained_run, tmp_path / "run")
    save_spec(apply_overrides(load_spec(run / "spec.yaml"), ["sampling.compile=true"]), run / "spec.yaml")
    Pipeline.from_pretrained(run).save_pretrained(tmp_path / "saved", licence="mit")
    blocks.clear()
    for name, option in {"run": ["--no-compile"], "saved": []}.items():
        assert (
            main(["sample", "--run", str(tmp_path / name), "--n", "1", "--out", str(tmp_path / "out" / name), *option])
            == 0
        )
    assert not blocks
    assert (
        main(["sample", "--run", str(run), "--n", "1", "--out", str(tmp_path / "out" / "as it says")]) == 0 and blocks
    )


def test_compiling_without_a_compiler_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    generator = tiny()
    with pytest.raises(SpecError, match=r"parallel.compile: torch.compile needs a C\+\+ compiler; got none on PATH"):
        parallelise(generator, ParallelSpec(compile=True), generator.blocks())
    with pytest.raises(
        SpecError, match=r"sampling.compile: torch.compile needs a C\+\+.*or set sampling.compile=false"
    ):
        compiled(generator)


@pytest.mark.parametrize("part", ["parallel", "sampling"])
def test_compiling_without_headers_is_refused_before_any_training(part, monkeypatch, tmp_path, capsys):
    """A Python of Debian has none without python3-dev; stage 1 would be trained first, and then lost to a traceback."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    argv = ["train", "--task", "imagenet", "--recipe", "selftest", "--run", str(tmp_path / "run")]
    assert main([*argv, "--set", f"{part}.compile=true"]) == 2
    assert "torch.compile needs the headers of Python; got no" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tokenizer").exists()


@pytest.mark.parametrize("name", ["cuda:99", "toaster"])
def test_a_device_that_is_not_here_is_one_line_wherever_it_is_named(trained_run, monkeypatch, capsys, name):
    expected = f"not usable here; got {name}; expected cpu, cuda, cuda:1, ..."
    with pytest.raises(SpecError) as error:
        Pipeline.from_pretrained(trained_run, device=name)
    assert str(error.value) == f"device: {expected}"
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", name)
    for command in (["eval"], ["sample"], ["train", "--task", "imagenet"]):
        assert main([*command, "--run", str(trained_run)]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: ACCELERATE_TORCH_DEVICE: {expected}"
