"""What a run begins with: a checkpoint of another one (`raev2 train --resume PATH`); inputs that must stay the same."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raev2.errors import CheckpointError, SpecError
from raev2.files.artefact import write_json
from raev2.files.damage import read_json
from raev2.files.hashes import folder_sha256
from raev2.files.replace import CHECKPOINT, new_folder
from raev2.spec import RunSpec
from raev2.spec_io import load_spec, spec_values
from raev2.training import dist
from raev2.training.checkpoint import MANIFEST, list_checkpoints, load_checkpoint
from raev2.training.run import Run, add_provenance

STAGES = ("tokenizer", "generator")
PROVENANCE = "resumed_from"


@dataclass(frozen=True)
class Origin:
    """A checkpoint RUN/checkpoints/STAGE/IMAGES and the spec of its run."""

    path: Path
    stage: str
    spec: RunSpec

    @property
    def run_dir(self) -> Path:
        """The run folder that the checkpoint lies in."""
        return self.path.parent.parent.parent

    @classmethod
    def open(cls, path: Path) -> Origin:
        """CheckpointError if there is no intact checkpoint of a run at `path`."""
        spec_file = path.parent.parent.parent / "spec.yaml"
        if not (path / MANIFEST).is_file() or path.parent.name not in STAGES or not spec_file.is_file():
            raise CheckpointError(
                f"--resume {path}", "not a checkpoint of a run", expected="auto, never or RUN/checkpoints/STAGE/IMAGES"
            )
        load_checkpoint(path)
        return cls(path, path.parent.name, load_spec(spec_file))

    def fitted(self, spec: RunSpec, run_dir: Path) -> RunSpec:
        """The spec of the new run `run_dir`, with the tokenizer of this one where the checkpoint is a generator's.

        Raises CheckpointError if the checkpoint is one of `run_dir` itself, and SpecError for a spec that cannot go on
        from here: optimizer state and averages are taken over as they are. (Networks of another shape are found when
        their weights are loaded.)
        """
        if run_dir.resolve() in self.path.resolve().parents:
            raise CheckpointError(
                str(run_dir), "holds the checkpoint that the new run should begin with", got=f"--resume {self.path}",
                hint="Choose another --run; this one is left as it is.",
            )  # fmt: skip
        loop = f"{self.stage}_training"
        for name in ("optimizer", "ema_decays", "ema_decay"):  # the last two belong to one stage each
            new, old = (getattr(getattr(one, loop), name, None) for one in (spec, self.spec))
            if new != old:
                raise SpecError(
                    f"{loop}.{name}", "differs from the checkpoint's", got=str(new), expected=str(old),
                    hint="`generator_from` takes over weights alone.",
                )  # fmt: skip
        if self.stage == "tokenizer":
            if spec.tokenizer_from is not None:
                raise SpecError("tokenizer_from", "leaves no tokenizer to train", got=spec.tokenizer_from)
            return spec
        own = self.spec.tokenizer_from or str(self.run_dir / "tokenizer")
        return spec.replace(tokenizer_from=spec.tokenizer_from or own)

    def copy_into(self, run: Run) -> None:
        """Give a new run this checkpoint as its own; a run that was begun with it before goes on as it is."""
        with dist.together():
            if dist.is_main():
                begun = read_json(run.dir / "provenance.json").get(PROVENANCE)
                folder = run.dir / "checkpoints" / self.stage
                if begun != str(self.path) and (begun or folder.exists() or (run.dir / "metrics.jsonl").exists()):
                    raise CheckpointError(
                        str(run.dir), f"exists and was not begun with --resume {self.path}",
                        got=begun or "a run of its own", hint="Choose another --run.",
                    )  # fmt: skip
                add_provenance(run, PROVENANCE, str(self.path))
                if not list_checkpoints(folder):
                    with new_folder(folder / self.path.name, CHECKPOINT) as partial:
                        shutil.copytree(self.path, partial, dirs_exist_ok=True)


def check_identity(run: Run, found: Mapping[str, str]) -> None:
    """Compare fingerprints of what a run reads with those of its first start, and keep new ones.

    Raises CheckpointError with both. A run of an older version has none yet.
    """
    with dist.together():
        if dist.is_main():
            file = run.dir / "identity.json"
            known = read_json(file) if file.is_file() else {}
            for name, value in found.items():
                if known.get(name, value) != value:
                    raise CheckpointError(
                        str(run.dir), f"{name} is not what the run began with", got=value[:12],
                        expected=str(known[name])[:12], hint="Bring it back as it was, or choose another --run.",
                    )  # fmt: skip
            write_json(file, {**known, **found})


def local_identity(spec: RunSpec) -> dict[str, str]:
    """Fingerprints of the local folders that a spec names: tokenizer, generators, encoders."""
    folders = [text for text in spec_values(spec) if (Path(text) / "config.json").is_file()]
    return {folder: folder_sha256(Path(folder)) for folder in folders}
