import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

import raev2
from raev2.batch import Measurement
from raev2.command.cli import main
from raev2.errors import SpecError
from raev2.files.spec_base import Spec
from raev2.spec import DDTSpec, DecoderSpec, EncoderSpec, TokenizerSpec
from raev2.tokenizer.encoders import FrozenEncoder
from raev2_tasks.bench import cases, measure, older, reading, sampling, training
from raev2_tasks.bench.measure import Setting, Work, load_factory, timed

TINY = DDTSpec(width=32, depth=2, num_heads=2, head_width=32, head_depth=1, head_num_heads=2, base_head_depth=1)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training.SIZES, "small", (TINY, (4, 4, 4), 2))
    monkeypatch.setattr(sampling, "STEPS", 2)
    monkeypatch.setattr(Setting, "gemm", lambda self, dtype: 100.0)


def test_timed_takes_turns_and_leaves_out_the_warm_up():
    clock = iter([0.0, 9.0, 20.0, 21.0, 21.0, 23.0])  # two starts of the warm-up, then a: 1 s, b: 2 s
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = timed(functions, rounds=1, clock=lambda: next(clock))
    assert seconds == {"a": [1.0], "b": [2.0]}
    assert calls == ["a", "b", "a", "b"]


def test_arithmetic_and_differences_of_a_known_product_are_counted(tiny, monkeypatch):
    """A product of 10 x 10 matrices is 2,000 operations; the other subject is twice as slow, and 10 % off."""
    seconds = {"ours": [1.0, 2.0, 3.0], "other": [2.0, 4.0, 9.0]}
    monkeypatch.setattr(measure, "timed", lambda functions, rounds, clock: seconds)
    matrix = torch.ones(10, 10)
    work = Work("product", 8, "images", 1.0, lambda factor: lambda: [matrix @ matrix * factor])
    row = measure.measure(work, Setting(device=torch.device("cpu"), other=lambda factor: 0.9 * factor))
    assert (row.value, row.unit, row.low, row.high) == (4.0, "images/s", 1.0, 3.0)
    assert row.gflop_per_s == pytest.approx(1e-6) and row.gemm_share == pytest.approx(1e-8)
    assert row.faster == (2.0, 2.0, 3.0) and row.difference == pytest.approx(1 / 9)
    assert row.peak_gib > 0
    assert "2.00x (2.00 to 3.00) as fast as the other, 1.1e-01 apart" in row.note


COMPILED = """
import torch
from torch import nn
from raev2.spec import DDTSpec
from raev2_tasks.bench import measure, training
from raev2_tasks.bench.measure import Setting

real, compiled = nn.Module.compile, []
nn.Module.compile = lambda self: compiled.append(self) or real(self, backend="eager")
network = DDTSpec(width=32, depth=2, num_heads=2, head_width=32, head_depth=1, head_num_heads=2, base_head_depth=1)
training.SIZES["small"] = (network, (4, 4, 4), 2)
Setting.gemm = lambda self, dtype: 100.0
cpu = torch.device("cpu")
eager = Setting(rounds=1, device=cpu)
setting = Setting(rounds=1, device=cpu, compiled=True, other=lambda ours: training.build_generator(eager))
row = measure.measure(next(training.train_step(setting)), setting)
assert len(compiled) == 3 and row.difference < 0.02, row
without = measure.measure(next(training.train_step(eager)), eager)
assert abs(row.gflop_per_s * row.seconds / (without.gflop_per_s * without.seconds) - 1) < 1e-9
"""


def test_compiled_generators_are_timed_and_their_arithmetic_counted():
    """A cheap backend, and no type checks by the test session."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


@pytest.mark.parametrize("case", [training.train_step, training.optimizers])
def test_an_untouched_copy_of_this_code_computes_the_same(case, tiny, monkeypatch, tmp_path):
    """`older` finds networks, functions and specs by name: a copy of our own core is as good as an older one."""
    monkeypatch.setattr(older, "NAME", "raev2_copy")
    monkeypatch.setenv("RAEV2_OLDER", str(Path(raev2.__file__).parents[1]))
    setting = Setting(rounds=1, device=torch.device("cpu"), other=older.same)
    for row in cases.run_case(case, setting):
        assert row.value > 0 and row.faster[0] > 0
        assert row.difference < 1e-3, row.name


def test_stage1_of_code_without_a_shared_pass_gives_the_same_gradients(monkeypatch):
    """At 9c3efb4 tokens and perceptual loss each encoded the images; spectral norms advance on each side by itself."""
    monkeypatch.setattr(older, "NAME", "raev2_copy")
    monkeypatch.setenv("RAEV2_OLDER", str(Path(raev2.__file__).parents[1]))
    encoder = older.same(FrozenEncoder)
    one_pass = encoder.with_layers
    monkeypatch.setattr(encoder, "forward", lambda self, images: one_pass(self, images, ())[0])
    monkeypatch.delattr(encoder, "with_layers")
    monkeypatch.setattr(training, "IMAGES", 2)
    setting = Setting(rounds=1, device=torch.device("cpu"), other=older.same)
    for work in islice(training.stage1_step(setting), 2):
        assert measure.measure(work, setting).difference == 0, work.name


def test_an_older_spec_is_made_without_the_fields_that_came_later(monkeypatch):
    class OlderDecoder(Spec):
        width: int

    class OlderTokenizer(Spec):
        grid: tuple[int, int]
        decoder: OlderDecoder

    kinds = {DecoderSpec: OlderDecoder, TokenizerSpec: OlderTokenizer}
    monkeypatch.setattr(older, "_older", kinds.__getitem__)
    decoder = DecoderSpec(width=32, depth=2, num_heads=2, mlp_dim=64, patch_size=8)
    ours = TokenizerSpec(encoder=EncoderSpec(name="micro"), decoder=decoder, grid=(4, 6))
    assert older.same(ours) == OlderTokenizer(grid=(4, 6), decoder=OlderDecoder(width=32))


def test_every_case_of_the_networks_runs_at_a_tiny_size(tiny, monkeypatch):
    setting = Setting(rounds=1, device=torch.device("cpu"))
    for name in ("encode", "decode"):
        for row in cases.run_case(cases.CASES[name], setting):
            assert row.value > 0 and row.gflop_per_s > 0
    monkeypatch.setattr(training, "IMAGES", 2)
    for work in islice(cases.CASES["stage1-step"](setting), 2):
        assert measure.measure(work, setting).gflop_per_s > 0
    assert len(list(cases.CASES["growth"](setting))) == 12


def test_pictures_are_read_and_distances_computed(monkeypatch):
    monkeypatch.setattr(Setting, "gemm", lambda self, dtype: 100.0)
    monkeypatch.setattr(reading, "PICTURES", 2)
    setting = Setting(rounds=1, device=torch.device("cpu"))
    works = [work for work in reading.loader(setting)]
    assert [work.count for work in works] == [2, 2, 2]
    names = {row.name for row in cases.run_case(reading.frechet, setting)}
    assert names == {"distance, 512 features", "standard error, 512 features"}


def test_results_are_printed_and_written(monkeypatch, tmp_path, capsys):
    row = Measurement("step", 12.5, "images/s", "small")
    monkeypatch.setattr(cases, "benchmarks", lambda setting: {"one": lambda: [row]})
    assert main(["bench", "--json", str(tmp_path / "bench.json"), "--device", "cpu", "--cpu-time"]) == 0
    assert "one  step  12.5  images/s  small" in capsys.readouterr().out
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["benchmarks"]["one"][0]["value"] == 12.5
    assert main(["bench", "--json", str(tmp_path / "bench.json")]) == 2
    assert "--json: exists already" in capsys.readouterr().err
    assert written["machine"]["versions"]["torch"] and written["machine"]["clock"] == "process_time"


def test_tasks_add_their_benchmarks():
    assert {"imagenet", "nwm", "t2i"} < cases.benchmarks(Setting()).keys()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sampel"], r"unknown benchmark.*'sampel'.*sample"),
        (["--rounds", "0"], r"--rounds: nothing to time; got 0; expected at least 1"),
        (["--device", "toaster"], r"--device: not usable here; got toaster; expected cpu, cuda"),
        (["--against", "nowhere:it"], r"--against: cannot be loaded; got nowhere:it; expected MODULE:FACTORY"),
    ],
)
def test_options_that_cannot_be_are_named(words, message):
    with pytest.raises(SpecError, match=message):
        main(["--debug", "bench", *words])


def test_an_older_checkout_has_to_be_named(monkeypatch):
    monkeypatch.delenv("RAEV2_OLDER", raising=False)
    monkeypatch.setattr(older, "NAME", "raev2_missing")
    with pytest.raises(SpecError, match=r"RAEV2_OLDER: no checkout of this project; got None; expected a folder"):
        load_factory("raev2_tasks.bench.older:same")(DDTSpec)
