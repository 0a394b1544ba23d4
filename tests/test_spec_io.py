from __future__ import annotations

import re
from typing import ClassVar

import pytest
import yaml

from raev2.errors import CheckpointError, SpecError, TaskError
from raev2.spec import CFG, AdamWSpec, DiTSpec, InternalGuidance, TaskSpec
from raev2.spec_io import (
    FREE_FIELDS,
    apply_overrides,
    fingerprint,
    load_spec,
    override_spec,
    save_spec,
    spec_differences,
    spec_from_dict,
    spec_to_dict,
)


def refuse(spec, override: str, text: str, error: type[Exception] = SpecError) -> None:
    with pytest.raises(error, match=re.escape(text)) as caught:
        apply_overrides(spec, [override])
    assert "\n" not in str(caught.value)


# Overrides.


def test_overrides_set_fields_at_any_depth(tiny_spec):
    spec = apply_overrides(
        tiny_spec,
        ["seed=7", "data.dir=elsewhere", "tokenizer.encoder.layers=[1, 3]", "generator_training.schedule.lr=1e-4",
         "tokenizer_training.adversarial=null", "task.num_classes=9", "data.options.size=128"],
    )  # fmt: skip
    assert (spec.seed, spec.data.dir, spec.tokenizer.encoder.layers) == (7, "elsewhere", (1, 3))
    assert spec.generator_training.schedule.lr == 1e-4
    assert spec.tokenizer_training.adversarial is None
    assert spec.task.num_classes == 9
    assert spec.data.options["size"] == "128"


def test_no_override_changes_nothing(tiny_spec):
    assert apply_overrides(tiny_spec, []) == tiny_spec


def test_a_part_of_a_spec_is_set_the_same_way():
    assert override_spec(AdamWSpec(), ["betas=[0.8, 0.9]"]).betas == (0.8, 0.9)
    with pytest.raises(SpecError, match="spec.beta: unknown field. Did you mean 'betas'?"):
        override_spec(AdamWSpec(), ["beta=1"])


def test_a_value_may_contain_an_equals_sign(tiny_spec):
    assert apply_overrides(tiny_spec, ["data.dir=a=b"]).data.dir == "a=b"


def test_another_kind_starts_from_its_defaults(tiny_spec):
    assert tiny_spec.sampling.guidance == InternalGuidance(scale=1.5)
    spec = apply_overrides(tiny_spec, ["sampling.guidance.kind=cfg", "sampling.guidance.scale=2"])
    assert spec.sampling.guidance == CFG(scale=2)
    assert apply_overrides(tiny_spec, ["generator_training.optimizer.kind=adamw"]).generator_training.optimizer == (
        AdamWSpec()
    )
    sizes = [f"generator.{name}=32" for name in ("width", "depth")] + ["generator.num_heads=2"]
    unguided = apply_overrides(tiny_spec, ["sampling.guidance.kind=none"])
    assert isinstance(apply_overrides(unguided, ["generator.kind=dit", *sizes]).generator, DiTSpec)


def test_the_same_kind_keeps_the_other_fields(tiny_spec):
    spec = apply_overrides(tiny_spec, ["sampling.guidance.kind=internal"])
    assert spec == tiny_spec


def test_a_part_that_is_off_can_be_set_by_its_fields(tiny_spec):
    assert tiny_spec.generator_training.repa is None
    settings = ["generator_training.repa.weight=0.1", "generator_training.repa.encoder.name=micro"]
    projector = ["generator.repa_depth=1", "generator.repa_dim=192"]
    for overrides in (settings, settings[::-1]):
        repa = apply_overrides(tiny_spec, [*projector, *overrides]).generator_training.repa
        assert (repa.encoder.name, repa.weight) == ("micro", 0.1)


# Messages.


def test_an_unknown_field_names_the_closest_one(tiny_spec):
    refuse(tiny_spec, "generator.widht=3", "spec.generator.widht: unknown field. Did you mean 'width'?")
    refuse(tiny_spec, "sampling.guidance.scal=3", "spec.sampling.guidance.scal: unknown field. Did you mean 'scale'?")
    refuse(tiny_spec, "task.num_clases=3", "spec.task.num_clases: unknown field. Did you mean 'num_classes'?")
    refuse(tiny_spec, "generatr.width=3", "spec.generatr: unknown field. Did you mean 'generator'?")
    refuse(tiny_spec, "seeed=3", "spec.seeed: unknown field. Did you mean 'seed'?")


def test_an_unknown_field_that_is_like_none_lists_those_that_are_there(tiny_spec):
    refuse(tiny_spec, "data.zzz=3", "spec.data.zzz: unknown field. Known: cache, dir,")
    refuse(tiny_spec, "zzz.width=3", "spec.zzz: unknown field. Known: cost, data, decoder_from, evaluation,")


def test_a_wrong_type_says_what_came_and_what_was_expected(tiny_spec):
    refuse(
        tiny_spec, "generator.width=wide",
        "spec.generator.width: not valid; got 'wide'; expected input should be a valid integer",
    )  # fmt: skip
    refuse(tiny_spec, "data.cache=7", "spec.data.cache: not valid; got 7; expected input should be a valid boolean")
    refuse(tiny_spec, "precision=fp16", "spec.precision: not valid; got 'fp16'; expected input should be 'fp32' or")
    refuse(tiny_spec, "task.num_classes=many", "spec.task.num_classes: not valid; got 'many'; expected input should be")


def test_a_value_out_of_range_says_the_range(tiny_spec):
    refuse(tiny_spec, "sampling.steps=0", "spec.sampling.steps: not valid; got 0; expected input should be greater")
    refuse(
        tiny_spec, "generator_training.cond_drop_prob=1.5",
        "spec.generator_training.cond_drop_prob: not valid; got 1.5; expected input should be less than or equal to 1",
    )  # fmt: skip


def test_a_rule_between_fields_keeps_its_own_text(tiny_spec):
    refuse(
        tiny_spec, "generator.width=36",
        "spec.generator: width / num_heads must be a multiple of 4 for 2-D RoPE; got 18",
    )  # fmt: skip


def test_a_rule_between_parts_says_which_fields(tiny_spec):
    refuse(
        tiny_spec, "generator_training.repa.encoder.name=micro",
        "spec: the alignment loss and the network's projector belong together; set generator_training.repa with",
    )  # fmt: skip
    refuse(tiny_spec, "generator.base_head_depth=null", "spec: this guidance needs a base head; got sampling.guid")
    flipped = apply_overrides(tiny_spec, ["data.horizontal_flip=true"])
    refuse(flipped, "generator_training.latent_cache=true", "spec: cached latents cannot be flipped; got generator_tr")


def test_an_unknown_kind_lists_the_kinds(tiny_spec):
    refuse(tiny_spec, "sampling.guidance.kind=free", "spec.sampling.guidance")
    refuse(
        tiny_spec,
        "sampling.guidance.kind=free",
        "unknown guidance; got 'free'; expected one of auto, cfg, internal, internal+cfg, none. Install the package",
    )


def test_a_missing_field_is_named(tiny_spec):
    refuse(tiny_spec, "sampling.guidance.kind=cfg", "spec.sampling.guidance.scale: missing field; expected a value")


def test_several_errors_are_counted(tiny_spec):
    refuse(tiny_spec, "generator.kind=dit", "(2 more errors)")


def test_settings_that_cannot_be_read(tiny_spec):
    refuse(tiny_spec, "seed", "--set: cannot be read; got 'seed'; expected path.to.field=value")
    refuse(tiny_spec, "=3", "--set: cannot be read; got '=3'; expected path.to.field=value")
    refuse(tiny_spec, "seed=[", "--set: the value is not YAML; got 'seed=['")
    refuse(tiny_spec, "seed.x=3", "spec.seed.x: seed has no fields; got 0")


def test_a_spec_names_its_task(tiny_spec):
    values = spec_to_dict(tiny_spec)
    with pytest.raises(SpecError, match="spec.task: a run spec names its task; got imagenet; expected a mapping"):
        spec_from_dict({**values, "task": "imagenet"})
    with pytest.raises(TaskError, match="unknown task; got 'imagnet'.*Did you mean 'imagenet'?"):
        spec_from_dict({**values, "task": {"name": "imagnet"}})


# Files and fingerprints.


def test_a_spec_survives_its_file(tiny_spec, tmp_path):
    save_spec(tiny_spec, tmp_path / "spec.yaml")
    assert load_spec(tmp_path / "spec.yaml") == tiny_spec
    text = (tmp_path / "spec.yaml").read_text()
    assert text.startswith(f"fingerprint: {fingerprint(tiny_spec)}\n")
    assert yaml.safe_load(text)["sampling"]["solver"] == "euler", "defaults are written out"
    assert [file.name for file in tmp_path.iterdir()] == ["spec.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "damaged; got NoneType; expected the mapping of a run spec"), ("a: [", "not readable as YAML; got while")],
)
def test_a_damaged_spec_file_is_a_checkpoint_error(tmp_path, text, message):
    (tmp_path / "spec.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load_spec(tmp_path / "spec.yaml")


def test_a_missing_spec_file_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError, match="spec.yaml: no spec here; expected spec.yaml of a run folder"):
        load_spec(tmp_path / "spec.yaml")


def test_free_fields_do_not_change_the_fingerprint(tiny_spec):
    spec = apply_overrides(
        tiny_spec,
        ["summary=other", "data.num_workers=3", "data.cache=false", "tokenizer_training.log_every_steps=7",
         "generator_training.save_every_images=7", "generator_training.eval_every_images=null",
         "generator_training.keep_checkpoints=5", "sampling.steps=9", "evaluation.num_samples=3"],
    )  # fmt: skip
    assert spec != tiny_spec
    assert fingerprint(spec) == fingerprint(tiny_spec)
    assert spec_differences(tiny_spec, spec) == []


@pytest.mark.parametrize(
    "override",
    ["seed=1", "precision=bf16", "data.dir=other", "tokenizer.noise_tau=0.5", "generator.depth=3",
     "generator_training.batch_size=16", "generator_training.schedule.lr=1", "task.num_classes=9", "flow.min_t=0.1",
     "tokenizer_training.adversarial=null"],
)  # fmt: skip
def test_all_other_fields_change_the_fingerprint(tiny_spec, override):
    spec = apply_overrides(tiny_spec, [override])
    assert fingerprint(spec) != fingerprint(tiny_spec)
    path = override.partition("=")[0]
    assert any(line.startswith(path) for line in spec_differences(tiny_spec, spec))


def test_a_free_field_frees_all_that_lies_in_it_and_no_field_with_a_longer_name(tiny_spec, monkeypatch):
    monkeypatch.setattr("raev2.spec_io.FREE_FIELDS", ("tokenizer",))
    inside = apply_overrides(tiny_spec, ["tokenizer.noise_tau=0.5"])
    assert fingerprint(inside) == fingerprint(tiny_spec) and spec_differences(tiny_spec, inside) == []
    beside = apply_overrides(tiny_spec, ["tokenizer_from=elsewhere"])
    assert fingerprint(beside) != fingerprint(tiny_spec)
    assert spec_differences(tiny_spec, beside) == ["tokenizer_from None -> elsewhere"]


def test_differences_name_field_and_values(tiny_spec):
    spec = apply_overrides(tiny_spec, ["generator.depth=3", "seed=1"])
    assert spec_differences(tiny_spec, spec) == ["generator.depth 2 -> 3", "seed 0 -> 1"]


def test_free_fields_exist(tiny_spec):
    values = spec_to_dict(tiny_spec)
    for field in FREE_FIELDS:
        node = values
        for part in field.split("."):
            assert part in node, field
            node = node[part]


def test_an_added_field_is_part_of_the_fingerprint_once_it_is_used(tiny_spec):
    class Grown(TaskSpec):
        added: ClassVar = {"colour": "grey"}

        colour: str = "grey"

    old, grown = (tiny_spec.replace(task=task) for task in (TaskSpec(name="imagenet"), Grown(name="imagenet")))
    assert fingerprint(grown) == fingerprint(old)
    assert fingerprint(tiny_spec.replace(task=Grown(name="imagenet", colour="red"))) != fingerprint(old)
