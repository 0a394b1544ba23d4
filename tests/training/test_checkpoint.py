from __future__ import annotations

import errno
import json
import logging
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from raev2.errors import CheckpointError, FileError
from raev2.spec import AdamWSpec, MuonSpec
from raev2.training import checkpoint
from raev2.training.checkpoint import (
    Checkpoint,
    all_finite,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from raev2.training.ema import EMA
from raev2.training.optim import build_optimizer
from raev2.training.run import TrainingState

OPTIMIZERS = [AdamWSpec(weight_decay=0.1), MuonSpec(weight_decay=0.1), MuonSpec(routing="all_matrices")]


class Network(nn.Module):
    """Matrices inside blocks, a matrix outside, vectors and a buffer: every route of the optimizers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 6, bias=False)])
        self.norm = nn.LayerNorm(6)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x).tanh()
        return self.norm(x)


class Training:
    """A network in training; the batch of a step is a function of its number."""

    def __init__(self, spec, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.network = Network()
        self.optimizer = build_optimizer(self.network, spec, 1e-2)
        self.ema = EMA(self.network, (0.5, 0.9))

    def steps(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
            self.network(x).square().sum(1).mean().mul(step + 1).sin().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.network.steps += 1
            self.ema.update(self.network, step)

    def kept(self, folder: Path) -> TrainingState:
        return TrainingState(folder, "generator", {"model": self.network}, self.ema, {"optimizer": self.optimizer})

    def save(self, folder: Path, images: int, keep: int = 2) -> None:
        assert self.kept(folder).save(images, keep)

    def restore(self, folder: Path) -> int:
        return self.kept(folder).restore()

    def state(self) -> dict[str, torch.Tensor]:
        names = {parameter: name for name, parameter in self.network.named_parameters()}
        state = {f"model/{name}": value for name, value in self.network.state_dict().items()}
        state |= {f"ema/{d}/{name}": value for d in self.ema.decays for name, value in self.ema.state_dict(d).items()}
        return {**state, **optimizer_tensors(self.optimizer, names)}


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


def simple(value: float = 1.0) -> Checkpoint:
    return Checkpoint({"model": {"weight": torch.full((3,), value)}}, {"note": "x"})


# Round trip.


@pytest.mark.parametrize("spec", OPTIMIZERS, ids=["adamw", "muon", "muon on all matrices"])
@pytest.mark.parametrize("stop", [1, 4])
def test_training_goes_on_bit_for_bit(tmp_path, spec, stop):
    whole = Training(spec)
    whole.steps(0, 7)
    first = Training(spec)
    first.steps(0, stop)
    first.save(tmp_path, stop)
    second = Training(spec, seed=99)
    assert second.restore(tmp_path) == stop
    assert_identical(second.state(), first.state())
    second.steps(stop, 7)
    assert_identical(second.state(), whole.state())


@pytest.mark.parametrize("spec", OPTIMIZERS[:2], ids=["adamw", "muon"])
def test_optimizer_state_covers_every_parameter(spec):
    training = Training(spec)
    training.steps(0, 1)
    names = {parameter: name for name, parameter in training.network.named_parameters()}
    saved = optimizer_tensors(training.optimizer, names)
    assert {key.rpartition("/")[0] for key in saved} == set(names.values())


def test_an_optimizer_that_has_not_stepped_yet_is_saved_too(tmp_path):
    """A discriminator that starts later."""
    Training(AdamWSpec()).save(tmp_path, 0)
    second = Training(AdamWSpec(), seed=1)
    assert second.restore(tmp_path) == 0
    assert_identical(second.state(), Training(AdamWSpec()).state())


def test_without_a_checkpoint_training_starts_at_0(tmp_path):
    training = Training(AdamWSpec())
    before = {name: value.clone() for name, value in training.state().items()}
    assert training.restore(tmp_path / "none") == 0
    assert_identical(training.state(), before)


def test_values_and_layout_on_disk(tmp_path):
    path = save_checkpoint(tmp_path, 12_800, simple(), keep=2)
    assert path == tmp_path / "000012800"
    assert sorted(file.name for file in path.iterdir()) == ["MANIFEST.json", "model.safetensors", "state.json"]
    assert sorted(json.loads((path / "MANIFEST.json").read_text())) == ["model.safetensors", "state.json"]
    loaded = load_checkpoint(path)
    assert loaded.state == {"images": 12_800, "note": "x"} and loaded.path == path
    assert torch.equal(loaded.tensors["model"]["weight"], torch.ones(3))


def test_tensors_that_are_not_contiguous_are_saved(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3).T
    path = save_checkpoint(tmp_path, 1, Checkpoint({"model": {"weight": weight}}, {}), keep=1)
    assert torch.equal(load_checkpoint(path).tensors["model"]["weight"], weight)


def test_saving_again_replaces_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 8, simple(1), keep=2)
    save_checkpoint(tmp_path, 8, simple(2), keep=2)
    assert float(latest_checkpoint(tmp_path).tensors["model"]["weight"][0]) == 2


def names_in(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    """Also past a billion images, where names of nine digits sort behind those of ten."""
    for images in (8, 999_999_992, 1_000_000_000, 1_000_000_008):
        save_checkpoint(tmp_path, images, simple(images), keep=keep)
        assert names_in(tmp_path)[-1] == f"{images:09d}", "what was just written"
        assert latest_checkpoint(tmp_path).state["images"] == images
    assert names_in(tmp_path) == ["999999992", "1000000000", "1000000008"][-keep:]


@pytest.mark.parametrize("keep", [1, 2])
def test_what_training_went_back_behind_never_pushes_a_good_one_out(tmp_path, keep):
    """The newest one is damaged: training goes on from the one before, and saves again in between."""
    for images in (8, 16):
        save_checkpoint(tmp_path, images, simple(images), keep=2)
    truncate(tmp_path / "000000016")
    save_checkpoint(tmp_path, 12, simple(12), keep=keep)
    assert names_in(tmp_path) == ["000000008", "000000012"][-keep:]
    assert latest_checkpoint(tmp_path).state["images"] == 12


def test_the_best_checkpoint_is_kept_besides_the_newest_ones(tmp_path):
    for images in (8, 16, 24, 32):
        save_checkpoint(tmp_path, images, simple(images), keep=1, best=8)
    assert names_in(tmp_path) == ["000000008", "000000032"]
    save_checkpoint(tmp_path, 40, simple(40), keep=1, best=32)
    assert names_in(tmp_path) == ["000000032", "000000040"]


def test_a_folder_that_only_begins_like_a_number_is_no_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 8, simple(), keep=1)
    (tmp_path / "000000016 copy").mkdir()
    save_checkpoint(tmp_path, 16, simple(), keep=1)
    assert names_in(tmp_path) == ["000000016"] and (tmp_path / "000000016 copy").is_dir()


def test_files_and_folder_are_on_the_disk_before_the_checkpoint_has_its_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace

    def note_fsync(number):
        order.append(os.readlink(f"/proc/self/fd/{number}"))
        fsync(number)

    def note_replace(source, target):
        if Path(source).is_dir():
            order.append("renamed")
        replace(source, target)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc to know what was brought to the disk")
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save_checkpoint(tmp_path, 8, simple(), keep=1)
    names = [Path(name).name for name in order]
    assert sorted(names[:4]) == [".000000008.partial", "MANIFEST.json", "model.safetensors", "state.json"]
    assert names[4:] == ["renamed", tmp_path.name], "and the name itself last"


# Values that are not finite.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "average", "optimizer"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, caplog, value, where):
    training = Training(AdamWSpec())
    training.steps(0, 1)
    training.save(tmp_path, 8, keep=1)
    tensor = {
        "weight": training.network.blocks[0].weight.data,
        "average": training.ema.state_dict(0.9)["blocks.0.weight"],
        "optimizer": training.optimizer.state[training.network.norm.weight]["exp_avg"],
    }[where]
    tensor.view(-1)[-1] = value
    assert not training.kept(tmp_path).save(16, 1)
    assert "generator: weights are not finite after 16 images, no checkpoint" in caplog.text
    assert names_in(tmp_path / "checkpoints/generator") == ["000000008"]
    with pytest.raises(
        CheckpointError, match="the weights of the generator are not finite at the end. The last checkp"
    ):
        training.kept(tmp_path).require_finite()
    assert training.restore(tmp_path) == 8
    training.kept(tmp_path).require_finite()


def test_a_checkpoint_that_is_not_finite_is_skipped(tmp_path):
    """An older version may have left one."""
    save_checkpoint(tmp_path, 8, simple(1), keep=2)
    newest = save_checkpoint(tmp_path, 16, simple(math.nan), keep=2)
    assert latest_checkpoint(tmp_path).state["images"] == 8
    with pytest.raises(CheckpointError, match="000000016: holds values that are not finite. Use an earlier checkpoint"):
        load_checkpoint(newest)


@pytest.mark.parametrize("tensor", [torch.tensor([3e38, -3e38]), torch.tensor([1, 2]), torch.zeros(0), torch.ones(())])
def test_large_values_counts_and_nothing_at_all_are_finite(tensor):
    assert all_finite([tensor, torch.ones(2, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.float64)])
    assert not all_finite([tensor, torch.tensor([0.0, math.nan], dtype=torch.bfloat16)])


# Damage.


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def remove_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def empty_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_text("")


def half_state(path: Path) -> None:
    (path / "state.json").write_text('{"images": 1')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors: damaged; got .{12}; expected SHA-256 .{12}. Use an earlier checkpoint."),
        (flip_a_bit, "model.safetensors: damaged"),
        (remove_weights, "model.safetensors: damaged; got no file"),
        (remove_manifest, "000000016: not a checkpoint, MANIFEST.json is missing; expected checkpoints/<images>"),
        (empty_manifest, "MANIFEST.json: damaged, not JSON"),
        (half_state, "state.json: damaged"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, caplog, damage, message):
    save_checkpoint(tmp_path, 8, simple(1), keep=2)
    newest = save_checkpoint(tmp_path, 16, simple(2), keep=2)
    damage(newest)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(newest)
    with caplog.at_level(logging.WARNING, logger="raev2.training.checkpoint"):
        found = latest_checkpoint(tmp_path)
    assert found.state["images"] == 8
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith(f"skipped: {newest}")


def test_nothing_but_damage_is_no_checkpoint(tmp_path):
    truncate(save_checkpoint(tmp_path, 8, simple(), keep=2))
    assert latest_checkpoint(tmp_path) is None


def test_a_checkpoint_that_was_being_written_is_not_seen(tmp_path, monkeypatch):
    """Killed before the rename: the half-written folder is ignored, and cleaned up by the next save."""
    save_checkpoint(tmp_path, 8, simple(1), keep=2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 16, simple(2), keep=2)
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["000000008"]
    assert latest_checkpoint(tmp_path).state["images"] == 8
    save_checkpoint(tmp_path, 16, simple(2), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000008", "000000016"]


# Full disk.


@pytest.mark.parametrize("where", ["weights", "state", "rename"])
def test_a_full_disk_leaves_earlier_checkpoints_intact(tmp_path, monkeypatch, where):
    save_checkpoint(tmp_path, 8, simple(1), keep=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        raise full

    target = {"weights": "save_file", "state": "write_json", "rename": "os.replace"}[where]
    if where == "rename":
        replace = os.replace

        def fail_for_folders(source, target):
            if Path(source).is_dir():
                raise full
            replace(source, target)

        monkeypatch.setattr(os, "replace", fail_for_folders)
    else:
        monkeypatch.setattr(checkpoint, target, fail)
    with pytest.raises(
        FileError,
        match=r"000000016: could not be saved; got \[Errno 28\] No space left on device. "
        "Nothing was changed; free some space.",
    ):
        save_checkpoint(tmp_path, 16, simple(2), keep=1)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["000000008"], "nothing half-written is left"
    assert float(latest_checkpoint(tmp_path).tensors["model"]["weight"][0]) == 1


def test_the_error_of_safetensors_itself_is_understood(tmp_path, monkeypatch):
    """A file that may not grow: the write inside safetensors fails, as on a full disk."""
    resource = pytest.importorskip("resource", reason="POSIX only")
    save_file, limits = checkpoint.save_file, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_with_a_limit(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            save_file(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    save_checkpoint(tmp_path, 8, simple(), keep=1)
    monkeypatch.setattr(checkpoint, "save_file", save_with_a_limit)
    with pytest.raises(FileError, match="could not be saved; got .*Nothing was changed"):
        save_checkpoint(tmp_path, 16, Checkpoint({"model": {"weight": torch.zeros(10_000)}}, {}), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000000008"]


# State of another model.


def test_optimizer_state_of_another_model_is_refused():
    training = Training(AdamWSpec())
    training.steps(0, 1)
    names = {parameter: name for name, parameter in training.network.named_parameters()}
    with pytest.raises(CheckpointError, match="optimizer state: names a parameter that the model has not: old.weight"):
        load_optimizer_tensors(training.optimizer, names, {"old.weight/exp_avg": torch.zeros(3)})


def test_weights_of_another_model_are_refused(tmp_path):
    Training(AdamWSpec()).save(tmp_path, 8)
    other = Training(AdamWSpec())
    other.network.extra = nn.Linear(2, 2)
    with pytest.raises(
        CheckpointError, match="000000008/model: the weights do not fit the configuration; got missing 2"
    ):
        other.restore(tmp_path)
