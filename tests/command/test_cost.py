"""What `raev2 show` says about arithmetic, against the papers, and about memory (see training/test_memory.py)."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from raev2.spec import ParallelSpec
from raev2.spec_io import apply_overrides
from raev2.task import get_recipe, get_task
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.decoder_table import decoder_size
from raev2.training.preflight import StepMemory, run_sizes, state_bytes
from raev2_tasks.listings import cost, counts
from raev2_tasks.listings.cost import arithmetic, cost_rows

IMAGENET = get_task("imagenet")


@pytest.mark.parametrize(("size", "published"), [("B", 22.2), ("L", 78.1), ("XL", 106.7)])
def test_decoders_have_the_arithmetic_that_the_papers_print(size, published):
    """They leave attention out, and say GFLOPs for multiply-accumulates."""
    with torch.device("meta"):
        decoder = ViTDecoder(768, decoder_size(size), (16, 16))
        found = arithmetic(lambda: decoder(torch.zeros(1, 256, 768)))
    assert (found.macs - found.attention) / 1e9 == pytest.approx(published, rel=0.005)
    width, depth = decoder.spec.width, decoder.spec.depth
    assert found.attention == 2 * 257**2 * width * depth, "query-key and attention-value products"


def test_show_plans_a_published_system_for_one_gpu_and_many():
    spec = get_recipe(IMAGENET, "raev2-dinov3l-k7")
    rows = dict(cost_rows(IMAGENET, spec))
    assert rows["generator forward"].startswith("237.50 GMAC = 475.00 GFLOPs an image"), "core-method 5.4"
    assert rows["decoder forward"].startswith("110.90 GMAC")
    encoder = float(rows["encoder forward"].split()[0]) - float(rows["encoder forward"].split()[-5])
    assert encoder == pytest.approx(12 * 24 * 1024**2 * 261e-9 + 3 * 16**2 * 1024 * 256e-9, rel=1e-3)
    assert rows["sampling an image"] == "at most 47.50 TFLOPs: 100 evaluations of 1 forward(s)"
    for name in ("1 GPU of 80 GiB", "8 GPUs of 80 GiB", "64 GPUs of 80 GiB"):
        micro, needed = (float(rows[name].split(sep)[1].split()[0].rstrip(":")) for sep in ("batch ", "about "))
        assert needed < 0.9 * 80 and math.log2(micro).is_integer()
    assert counts.counts(IMAGENET, spec) == {"size": dict(run_sizes(IMAGENET, spec)), "cost": rows}, (
        "what is remembered"
    )


@pytest.mark.parametrize("task", ["t2i", "nwm"])
def test_every_task_is_counted(task):
    task = get_task(task)
    spec = get_recipe(task, "quickstart")
    rows = dict(cost_rows(task, spec))
    assert {"encoder forward", "decoder forward", "generator forward", "activations", "8 GPUs of 80 GiB"} <= rows.keys()
    assert counts.counts(task, spec) == {"size": dict(run_sizes(task, spec)), "cost": rows}, "what is remembered"


def test_a_recipe_as_it_is_is_shown_without_arrays():
    show = "from raev2.command.cli import main; main(['show', 'quickstart', '--task', 'imagenet'])"
    code = f"import sys; {show}; print([name for name in ('torch', 'numpy', 'PIL') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "activations" in shown and shown.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("change", "counted"),
    [
        ("cost=cheap", False), ("evaluation.protocols=[]", False), ("sampling.steps=3", True), ("precision=fp32", True),
        ("parallel.activation_checkpointing=true", True), ("generator_training.micro_batch_size=2", True),
    ],
)  # fmt: skip
def test_a_change_of_what_is_counted_is_counted_anew(monkeypatch, change, counted):
    monkeypatch.setattr(counts, "count", lambda *_: {"size": {}, "cost": {}})
    spec = apply_overrides(get_recipe(IMAGENET, "quickstart"), [change])
    assert (not counts.counts(IMAGENET, spec)["cost"]) == counted


def test_a_micro_batch_is_halved_until_it_fits(tiny_spec):
    spec = tiny_spec.replace(generator_training=tiny_spec.generator_training.replace(batch_size=96))
    gib, step = 2**30, StepMemory(2**30, 0)
    small, large = (state * gib // state_bytes(1, spec.generator_training) for state in (8, 80))
    assert cost._plan(spec, 1, 0, small, step) == "micro batch 48: about 56.0 GiB each (8.0 of it training state)"
    assert cost._plan(spec, 8, 0, small, step).startswith("micro batch 12: about 20.0 GiB")
    assert cost._plan(spec, 8, 0, large, step) == "does not fit: 81.0 GiB for 1 at once; set parallel.strategy=fsdp"
    sharded = spec.replace(parallel=ParallelSpec(strategy="fsdp"))
    assert cost._plan(sharded, 8, 0, large, step).startswith("micro batch 12: about 22.0 GiB")
    chosen = apply_overrides(spec, ["generator_training.micro_batch_size=3"])
    assert cost._plan(chosen, 1, 0, small, step).startswith("micro batch 3: about 11.0 GiB"), "what the recipe says"


def test_recomputed_activations_are_counted(tiny_spec):
    again = apply_overrides(tiny_spec, ["parallel.activation_checkpointing=true"])
    kept, recomputed = (float(dict(cost_rows(IMAGENET, s))["activations"].split()[0]) for s in (tiny_spec, again))
    assert 0 < recomputed < kept
