"""Kinds of guidance and prediction: each found by its name, those of plugins too, and none taken for another."""

from __future__ import annotations

import sys
import types
from typing import Literal

import pytest
import torch
from pydantic import ValidationError

from raev2.batch import CondRules, Denoiser, ModelOutput
from raev2.command.cli import main
from raev2.errors import CheckpointError, SpecError, TaskError
from raev2.files import plugins
from raev2.files.plugins import GUIDANCE, PREDICTIONS, installed
from raev2.flow import (
    Prediction,
    flow_error,
    interpolate,
    prediction,
    to_latents,
    to_velocity,
    training_loss,
)
from raev2.guidance import build_guidance, guided
from raev2.interop.generators import generator_config
from raev2.model.condition import LabelCondition, NoCondition, TextCondition
from raev2.model.frames import FramesCondition
from raev2.model.generator import Generator
from raev2.sampler import sample_latents
from raev2.spec import CFG, DiTSpec, FlowSpec, Guidance, SamplingSpec
from raev2.spec_io import apply_overrides, load_spec, save_spec
from raev2.task import get_recipe, get_task
from raev2.testing import GaussianWorld

DIT = DiTSpec(width=16, depth=1, num_heads=2, base_head_depth=1)


class Half(Guidance):
    """Half of the prediction."""

    needs = frozenset({"base head"})

    kind: Literal["half"] = "half"
    scale: float = 1.0


@guided.register(Half)
def half(spec, branches, z_t, t, cond):
    return branches.full(z_t, t, cond).pred / 2


class Mute(Guidance):
    kind: Literal["mute"] = "mute"


class Scaled(Prediction):
    """Three times the velocity."""

    def target(self, latents, noise, t):
        return 3 * (noise - latents)

    def velocity(self, pred, z_t, t, flow):
        return pred / 3


@pytest.fixture
def plugin(monkeypatch, install):
    """A module of a plugin; its guidance `half` and its prediction `scaled` are installed."""
    module = types.ModuleType("kinds_plugin")
    for thing in (Half, Mute, Scaled):
        setattr(module, thing.__name__, thing)
    monkeypatch.setitem(sys.modules, "kinds_plugin", module)
    install(GUIDANCE, "half", "kinds_plugin:Half")
    install(PREDICTIONS, "scaled", "kinds_plugin:Scaled")
    prediction.cache_clear()
    yield module
    prediction.cache_clear()


def world(**options):
    return GaussianWorld(base_means=(0.5, -0.1), **options)


def prepared(count=4):
    torch.manual_seed(0)
    latents, noise = torch.randn(2, count, 2, 3, 3, dtype=torch.float64)
    return latents, noise, interpolate(latents, noise, torch.linspace(0.06, 1, count, dtype=torch.float64))


# What can be sampled.


@pytest.mark.parametrize(
    "condition",
    [NoCondition(), LabelCondition(num_classes=3), TextCondition(dim=4), FramesCondition(form="in_context"),
     FramesCondition()],
    ids=lambda condition: condition.kind + getattr(condition, "form", ""),
)  # fmt: skip
def test_a_generator_is_a_denoiser(condition):
    generator = Generator(DIT, condition, FlowSpec(), (3, 2, 2))
    assert isinstance(generator, Denoiser) and isinstance(generator.conditioner, CondRules)


def test_the_double_is_a_denoiser_and_something_less_is_not():
    assert isinstance(GaussianWorld(), Denoiser) and isinstance(GaussianWorld().conditioner, CondRules)
    assert not isinstance(torch.nn.Identity(), Denoiser) and not isinstance(torch.nn.Identity(), CondRules)


# Guidance.


@pytest.mark.parametrize("name", sorted(installed(GUIDANCE)))
def test_every_installed_guidance_has_its_name_and_a_formula(name):
    kind = installed(GUIDANCE)[name].load()
    assert issubclass(kind, Guidance) and kind.model_fields["kind"].default == name
    assert guided.dispatch(kind) is not guided.dispatch(object)


def test_a_guidance_of_a_plugin_works_everywhere(plugin, tiny_spec, tmp_path, capsys):
    spec = apply_overrides(tiny_spec, ["sampling.guidance.kind=half", "evaluation.compare_guidance=[{kind: half}]"])
    assert spec.sampling.guidance == spec.evaluation.compare_guidance[0] == Half()
    save_spec(spec, tmp_path / "spec.yaml")
    assert load_spec(tmp_path / "spec.yaml") == spec
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    assert "{auto,cfg,half,internal,internal+cfg,none}" in "".join(capsys.readouterr().out.split())

    _, _, point = prepared()
    cond = {"label": torch.zeros(4, dtype=torch.int64)}
    plain, halved = (build_guidance(SamplingSpec(guidance=g).guidance, world()) for g in ({"kind": "none"}, Half()))
    assert torch.equal(halved(point.z_t, 0.5, cond), plain(point.z_t, 0.5, cond) / 2)


def test_what_a_guidance_of_a_plugin_needs_is_checked(plugin, tiny_spec):
    with pytest.raises(SpecError, match="spec: this guidance needs a base head; got sampling.guidance.kind=half and"):
        apply_overrides(tiny_spec, ["sampling.guidance.kind=half", "generator.base_head_depth=null"])
    with pytest.raises(SpecError, match="guidance half: needs a base head, there is none. Use another kind"):
        build_guidance(Half(), GaussianWorld())


def test_an_unknown_guidance_is_named(tiny_spec):
    known = "expected one of auto, cfg, internal, internal\\+cfg, none"
    with pytest.raises(SpecError, match=f"spec.sampling.guidance: unknown guidance; got 'cgf'; {known}. Did you mean"):
        apply_overrides(tiny_spec, ["sampling.guidance.kind=cgf"])
    with pytest.raises(SpecError, match=f"spec.evaluation.compare_guidance.0: unknown guidance; got 'half'; {known}."):
        apply_overrides(tiny_spec, ["evaluation.compare_guidance=[{kind: half}]"])
    with pytest.raises(ValidationError, match="unknown guidance; got None"):
        SamplingSpec(guidance={"scale": 2.0})


def test_a_guidance_that_no_package_brings_is_not_sampled():
    with pytest.raises(
        TaskError, match=r"guidance mute: .*test_kinds.Mute has no formula; expected .*@guided.register"
    ):
        build_guidance(Mute(), world())


def test_a_guidance_that_clashes_with_one_of_the_core_names_both(install, tiny_spec, capsys):
    install(GUIDANCE, "cfg", "kinds_plugin:Half")
    text = (
        "guidance cfg: installed twice; got raev2.spec:CFG and kinds_plugin:Half; expected one entry point for each "
        "name. Rename one of the two, or uninstall its package."
    )
    with pytest.raises(TaskError) as caught:
        apply_overrides(tiny_spec, ["sampling.guidance.kind=cfg"])
    assert str(caught.value) == text
    assert main(["sample", "--help"]) == TaskError.exit_code and capsys.readouterr().err == f"error: {text}\n"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("gone", "no_such_module:X", r"guidance gone: no_such_module:X cannot be loaded; got ModuleNotFoundError"),
        ("odd", "kinds_plugin:Scaled", r"guidance odd: kinds_plugin:Scaled is not a Guidance; got <class"),
        ("other", "kinds_plugin:Half", r"guidance other: kinds_plugin:Half says another kind; got 'half'"),
    ],
)  # fmt: skip
def test_a_broken_guidance_names_its_owner(plugin, install, tiny_spec, name, value, text):
    install(GUIDANCE, name, value)
    with pytest.raises(TaskError, match=text):
        apply_overrides(tiny_spec, [f"sampling.guidance.kind={name}"])
    assert SamplingSpec(guidance={"kind": "cfg", "scale": 2.0}).guidance == CFG(scale=2.0), "others still work"


def test_a_recipe_with_an_unknown_kind_names_its_task(monkeypatch):
    task = get_task("imagenet")
    recipes = {"magic": lambda: SamplingSpec(guidance={"kind": "magic"}), "odd": lambda: FlowSpec(prediction="odd")}
    monkeypatch.setattr(task, "recipes", lambda: recipes)
    for name, text in (("magic", "unknown guidance; got 'magic'"), ("odd", "unknown prediction; got 'odd'")):
        with pytest.raises(TaskError, match=f"task imagenet: its recipe {name} is not valid; got .*{text}"):
            get_recipe(task, name)


def test_an_installation_without_entry_points_says_so(monkeypatch):
    monkeypatch.setattr(plugins, "entry_points", lambda group: ())
    text = "unknown guidance; got 'cfg'; expected one of none. Install raev2 again, its entry points are missing."
    with pytest.raises(ValidationError, match=text):
        SamplingSpec(guidance={"kind": "cfg", "scale": 2.0})


def test_what_is_installed_while_a_process_runs_is_found(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    assert "late" not in installed(GUIDANCE)
    info = tmp_path / "late-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[raev2.guidance]\nlate = late:Late\n")
    assert installed(GUIDANCE)["late"].value == "late:Late"


# Predictions.


@pytest.mark.parametrize("name", [*sorted(installed(PREDICTIONS)), "scaled"])
def test_a_perfect_prediction_converts_to_velocity_and_latents(plugin, name):
    latents, noise, point = prepared()
    flow = FlowSpec(prediction=name)
    pred = prediction(name).target(latents, noise, point.t)
    torch.testing.assert_close(to_velocity(pred, point.z_t, point.t, flow), point.velocity)
    torch.testing.assert_close(to_latents(pred, point.z_t, point.t, flow), latents)
    assert flow_error(pred, point, latents, flow).max() < 1e-9


@pytest.mark.parametrize("name", [*sorted(installed(PREDICTIONS)), "scaled"])
def test_a_network_that_is_off_has_the_error_of_its_velocity(plugin, name):
    latents, noise, point = prepared()
    flow = FlowSpec(prediction=name)
    pred = prediction(name).target(latents, noise, point.t) + 0.1
    off = to_velocity(pred, point.z_t, point.t, flow) - point.velocity
    torch.testing.assert_close(flow_error(pred, point, latents, flow), off.square(), rtol=1e-4, atol=1e-6)


def test_a_third_prediction_is_sampled_as_what_it_is(plugin):
    flow = FlowSpec(prediction="scaled", time_shift=1.0)
    cond = {"label": torch.zeros(4, dtype=torch.int64)}
    noise = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for solver in ("euler", "heun"):
        found, same = (
            sample_latents(GaussianWorld(flow=f), cond, noise, SamplingSpec(solver=solver, steps=40))
            for f in (flow, flow.replace(prediction="velocity"))
        )
        torch.testing.assert_close(found, same)


def test_an_unknown_prediction_is_named(tiny_spec, tmp_path):
    text = "unknown prediction; got 'noise'; expected one of velocity, x. Install the package that brings it."
    with pytest.raises(SpecError, match=f"spec.flow.prediction: {text}"):
        apply_overrides(tiny_spec, ["flow.prediction=noise"])
    flow = FlowSpec().model_copy(update={"prediction": "noise"})
    latents, _, point = prepared()
    uses = {
        "solver": lambda: to_velocity(latents, point.z_t, 0.5, flow),
        "last step": lambda: to_latents(latents, point.z_t, 0.5, flow),
        "loss": lambda: training_loss(ModelOutput(latents), point, latents, flow),
        "double": lambda: GaussianWorld(flow=flow)(point.z_t, point.t, {"label": torch.zeros(4, dtype=torch.int64)}),
    }
    for use in uses.values():
        with pytest.raises(TaskError, match=f"prediction: {text}"):
            use()
    generator = Generator(DIT, NoCondition(), flow, (3, 2, 2))
    generator.save_pretrained(tmp_path / "g")
    with pytest.raises(CheckpointError, match=f"g/config.json: damaged, or of another kind; got .*{text}"):
        Generator.from_pretrained(tmp_path / "g")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("x", "kinds_plugin:Scaled", "prediction x: installed twice; got raev2.flow:CleanLatents and kinds_plugin:Sc"),
        ("gone", "no_such_module:X", "prediction gone: no_such_module:X cannot be loaded; got ModuleNotFoundError"),
        ("odd", "kinds_plugin:Half", "prediction odd: kinds_plugin:Half is not a Prediction; got <class"),
    ],
)  # fmt: skip
def test_a_broken_prediction_names_its_owner(plugin, install, name, value, text):
    install(PREDICTIONS, name, value)
    with pytest.raises(TaskError, match=text):
        prediction(FlowSpec(prediction=name).prediction)


def test_export_has_no_word_for_a_third_prediction(plugin):
    generator = Generator(DIT, LabelCondition(num_classes=3), FlowSpec(prediction="scaled"), (3, 2, 2))
    with pytest.raises(CheckpointError, match="no word for this prediction; got scaled$"):
        generator_config(generator)
