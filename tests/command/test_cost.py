"""What `raev2 show` says about arithmetic and memory: against the papers, and against what a real forward does."""

from __future__ import annotations

import math

import pytest
import torch

from raev2.model.condition import LabelCondition
from raev2.model.generator import Generator
from raev2.spec import DDTSpec, FlowSpec, ParallelSpec
from raev2.spec_io import apply_overrides
from raev2.task import get_recipe, get_task
from raev2.tokenizer.decoder import ViTDecoder
from raev2.tokenizer.decoder_table import decoder_size
from raev2_tasks.listings import cost
from raev2_tasks.listings.cost import Activations, activations, arithmetic, cost_rows

NETWORK = DDTSpec(width=64, depth=2, num_heads=2, head_width=64, head_depth=1, head_num_heads=2, base_head_depth=1)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_a_real_forward_saves(precision):
    """A network with values on the CPU, seen by autograd's own hooks; tables that are cached differ a little."""

    def generator() -> Generator:
        return Generator(NETWORK, LabelCondition(num_classes=3), FlowSpec(), (32, 4, 4))

    def saved(num: int) -> int:
        real, kept = generator(), {}
        weights = {parameter.untyped_storage().data_ptr() for parameter in real.parameters()}

        def keep(value):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage()
            return value

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"), hooks:
            output = cost._generate(real, num, "cpu")
        assert output.pred.requires_grad
        return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in weights)

    one, two = saved(1), saved(2)
    with torch.device("meta"):
        counted = generator()
    found = activations(counted, lambda num: cost._generate(counted, num, "cpu"), precision)
    assert found.sample == pytest.approx(two - one, rel=0.02)
    assert found.sample + found.fixed == pytest.approx(one, rel=0.05)


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


@pytest.mark.parametrize("task", ["t2i", "nwm"])
def test_every_task_is_counted(task):
    task = get_task(task)
    rows = dict(cost_rows(task, get_recipe(task, "quickstart")))
    assert {"encoder forward", "decoder forward", "generator forward", "activations", "8 GPUs of 80 GiB"} <= rows.keys()


def test_a_micro_batch_is_halved_until_it_fits(tiny_spec):
    spec = tiny_spec.replace(generator_training=tiny_spec.generator_training.replace(batch_size=96))
    gib = 2**30
    assert (
        cost._plan(spec, 1, 0, 8 * gib, Activations(gib, 0))
        == "micro batch 48: about 56.0 GiB each (8.0 of it training state)"
    )
    assert cost._plan(spec, 8, 0, 8 * gib, Activations(gib, 0)).startswith("micro batch 12: about 20.0 GiB")
    assert cost._plan(spec, 8, 0, 80 * gib, Activations(gib, 0)) == (
        "does not fit: 81.0 GiB for one image; set parallel.strategy=fsdp"
    )
    sharded = spec.replace(parallel=ParallelSpec(strategy="fsdp"))
    assert cost._plan(sharded, 8, 0, 80 * gib, Activations(gib, 0)).startswith("micro batch 12: about 22.0 GiB")
    with_checkpoints = apply_overrides(spec, ["parallel.activation_checkpointing=true"])
    assert dict(cost_rows(IMAGENET, with_checkpoints))["activations"] == "not counted with activation checkpointing"
