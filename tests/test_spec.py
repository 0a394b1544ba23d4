from __future__ import annotations

import pytest
from pydantic import ValidationError

from raev2.spec import (
    CFG,
    AdamWSpec,
    DDTSpec,
    DecoderSpec,
    DiTSpec,
    EncoderSpec,
    LoopSpec,
    RunSpec,
    TokenizerSpec,
)
from raev2.tokenizer.decoder_table import decoder_size


def loop(**fields) -> LoopSpec:
    return LoopSpec(**{"images": 100, "batch_size": 8, "sample_every_images": 50, "save_every_images": 50, **fields})


def test_a_spec_is_frozen(tiny_spec):
    with pytest.raises(ValidationError, match="Instance is frozen"):
        tiny_spec.seed = 1
    with pytest.raises(ValidationError, match="Instance is frozen"):
        tiny_spec.data.dir = "elsewhere"


def test_a_spec_refuses_a_misspelt_field(tiny_spec):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        tiny_spec.replace(sead=1)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        DecoderSpec(width=32, depth=1, num_heads=2, mlp_dim=64, patch_size=8, heads=2)


def test_replace_changes_a_copy_and_validates_it_again(tiny_spec):
    changed = tiny_spec.replace(seed=3)
    assert (changed.seed, tiny_spec.seed) == (3, 0)
    assert changed.replace(seed=0) == tiny_spec
    with pytest.raises(ValidationError, match="greater than 0"):
        tiny_spec.sampling.replace(steps=0)
    with pytest.raises(ValidationError, match="width must be divisible by num_heads"):
        tiny_spec.generator.replace(width=33)


def test_replace_keeps_the_fields_of_the_task(tiny_spec):
    task = tiny_spec.task.replace(num_classes=7)
    changed = tiny_spec.replace(task=task).replace(seed=1)
    assert type(changed.task) is type(tiny_spec.task) and changed.task.num_classes == 7


@pytest.mark.parametrize(("width", "advice"), [(1000, "Try 992 or 1008"), (8, "Try 16 or 16")])
def test_heads_that_do_not_divide_the_width_are_answered_with_widths_that_fit(width, advice):
    with pytest.raises(ValidationError, match=f"got width={width}, num_heads=16; expected a multiple of 16. {advice}"):
        DiTSpec(width=width, depth=1, num_heads=16)


def test_rules_between_fields_of_the_generator():
    sizes = {"width": 32, "depth": 2, "num_heads": 2, "head_width": 64, "head_num_heads": 2}
    with pytest.raises(ValidationError, match="must be a multiple of 4 for 2-D RoPE; got 18"):
        DDTSpec(**{**sizes, "width": 36})
    with pytest.raises(ValidationError, match="base_head_depth counts blocks of the trunk; got 3 with depth=2"):
        DDTSpec(**sizes, base_head_depth=3)
    with pytest.raises(ValidationError, match="repa_depth and repa_dim belong together"):
        DDTSpec(**sizes, repa_depth=1)
    with pytest.raises(ValidationError, match="generator.head.width must be divisible by num_heads"):
        DDTSpec(**{**sizes, "head_num_heads": 3})
    with pytest.raises(ValidationError, match="width must be a multiple of 4 for the sin-cos positions; got width=34"):
        DecoderSpec(width=34, depth=1, num_heads=2, mlp_dim=64, patch_size=8)


@pytest.mark.parametrize("layers", [(3, 1), (1, 1), (-1,)])
def test_encoder_layers_ascend_from_0(layers):
    with pytest.raises(ValidationError, match="layers must be ascending block indices from 0 without repeats"):
        EncoderSpec(name="micro", layers=layers)


def test_an_interval_lies_in_the_unit_interval():
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        CFG(scale=2, interval=(0.1, 1.5))


def test_derived_numbers():
    assert (loop().num_steps, loop().final_images) == (13, 104)
    assert (loop(images=96).num_steps, loop(images=96).final_images) == (12, 96)
    spec = TokenizerSpec(encoder=EncoderSpec(name="micro"), decoder=decoder_size("micro", 8), grid=(8, 6))
    assert spec.image_size == (64, 48)


def test_published_decoder_sizes():
    assert [decoder_size(size).width for size in ("B", "L", "XL")] == [768, 1024, 1152]
    assert decoder_size("XL").depth == 28


def test_every_field_of_a_run_has_a_description_or_a_plain_name(tiny_spec):
    """The reference page is generated from these; the texts must be one line."""
    for name, field in RunSpec.model_fields.items():
        assert "\n" not in (field.description or ""), name


def test_a_choice_is_told_by_its_kind(tiny_spec):
    assert isinstance(tiny_spec.generator, DDTSpec)
    training = tiny_spec.generator_training.replace(optimizer={"kind": "adamw", "weight_decay": 0.1})
    assert training.optimizer == AdamWSpec(weight_decay=0.1)
    with pytest.raises(ValidationError, match="does not match any of the expected tags: 'adamw', 'muon'"):
        tiny_spec.generator_training.replace(optimizer={"kind": "sgd"})


def test_options_of_a_data_recipe_may_be_written_as_numbers(tiny_spec):
    assert tiny_spec.data.replace(options={"size": 128, "val_fraction": 0.1}).options == {
        "size": "128",
        "val_fraction": "0.1",
    }
