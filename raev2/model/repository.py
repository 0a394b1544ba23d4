"""One repository = one model: tokenizer, generator, class names, default sampling, numbers, pictures and card.

pipe = Pipeline.from_pretrained("OWNER/NAME")                # or a pipeline folder, or a run folder
images = pipe(label=["cat"], n=4, seed=0)                    # PIL images, those of `raev2 sample`
pipe.push_to_hub("OWNER/NAME", licence="cc-by-4.0")
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from raev2.files.artefact import FORMAT_VERSION, PIPELINE, local_folder, push_to_hub, write_json
from raev2.files.card import card_text
from raev2.files.damage import read_json
from raev2.files.hashes import folder_sha256
from raev2.files.replace import PIPELINES, new_folder, write_text
from raev2.model.opened import GENERATOR, STAGES, TOKENIZER, Source, open_trained
from raev2.pipeline import EVAL, Samples, weights_of
from raev2.spec import Guidance, NoGuidance, RunSpec, SamplingSpec
from raev2.spec_io import spec_to_dict, validated
from raev2.task import check_known

logger = logging.getLogger(__name__)
PRECISIONS = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
PICTURES = ("samples.png", "samples/generator-*.png", "samples/*/grid.png")


class Pipeline:
    """A model with all that it needs to make pictures; `trained` are its parts, `source` is where they lie."""

    def __init__(self, source: Source, device: str | None = None) -> None:
        self.source, self.trained = source, open_trained(source, device)
        self.trained.need_generator()

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, *, revision: str | None = None, subfolder: str = "", token: str | None = None,
        local_files_only: bool = False, device: str | None = None, dtype: torch.dtype | None = None,
        ema: float | None = None,
    ) -> Pipeline:  # fmt: skip
        """Open a run folder, a pipeline folder or a hub repository.

        device   such as 'cpu' or 'cuda:1'; by default an accelerator if there is one
        dtype    of the generator's matrix products: torch.float32 or torch.bfloat16; by default that of its training.
                 Weights and tokenizer are float32
        ema      decay of the averaged weights, of a run folder; by default the first that the run kept
        """
        hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
        source = replace(Source.of(path_or_hub_id, local_folder(path_or_hub_id, subfolder, **hub)), ema=ema)
        if dtype is not None:
            check_known("dtype", "not usable", str(dtype), PRECISIONS)
            source = replace(source, spec=source.spec.replace(precision=PRECISIONS[str(dtype)]))
        return cls(source, device)

    def __call__(
        self, *, n: int | None = None, seed: int = 0, guidance: Guidance | Mapping[str, Any] | None = None,
        steps: int | None = None, **conditions: Any,
    ) -> list[Image.Image]:  # fmt: skip
        """Pictures, by default with the sampling settings of the model.

        n            their number; by default one for each condition that was given
        guidance     a spec of raev2.spec, or its fields: {"kind": "cfg", "scale": 2}
        conditions   what the task offers, as options of `raev2 sample`: label=, prompt=, ...; one or a list

        Raises SpecError for a condition that the task does not know.
        """
        task, sampling = self.trained.task, dict(self.trained.run.spec.sampling)
        known = {name.lstrip("-").replace("-", "_"): option for name, option in task.sample_options().items()}
        for name in conditions:
            check_known("Pipeline", f"no condition of task {task.name}", name, known)
        several = {name for name, option in known.items() if "nargs" in option}
        options = {k: [v] if k in several and isinstance(v, str | int) else v for k, v in conditions.items()}
        options["n"] = n or max([len(value) for name, value in options.items() if name in several], default=1)
        sampling |= {name: value for name, value in {"guidance": guidance, "steps": steps}.items() if value is not None}
        samples = Samples(self.trained, options, validated(SamplingSpec, sampling, "sampling."), seed)
        return [Image.fromarray(pixels) for chunk in samples.chunks() for pixels in chunk]

    def save_pretrained(self, path: str | Path, *, licence: str = "") -> Path:
        """Write a pipeline folder; an older one there is replaced.

        licence   of the weights, as the hub names it: 'apache-2.0', 'cc-by-nc-4.0', ...; by default as it was
        """
        licence = licence or self.source.licence
        with new_folder(Path(path), PIPELINES) as folder:
            self.trained.rae.save_pretrained(folder / TOKENIZER)
            self.trained.need_generator().save_pretrained(folder / GENERATOR)
            results = self._copy_results(folder / EVAL)
            found = [file for pattern in PICTURES for file in sorted(self.source.dir.glob(pattern))[-1:]]
            for picture in found[:1]:
                shutil.copy(picture, folder / PICTURES[0])
            described = {
                "format_version": FORMAT_VERSION, "kind": "pipeline", "licence": licence,
                "conditions": [name.lstrip("-") for name in self.trained.task.sample_options()],
                "classes": self.trained.names().classes, "spec": spec_to_dict(_portable(self.trained.run.spec)),
                "parts": {part: folder_sha256(folder / part) for part in STAGES},
            }  # fmt: skip
            parts = {part: read_json(folder / part / "config.json") for part in STAGES}
            card = card_text({**described, **parts}, results, licence=licence, picture=PICTURES[0] if found else "")
            write_text(folder / "README.md", card)
            write_json(folder / PIPELINE, described)
        return Path(path)

    def push_to_hub(self, repo_id: str, *, licence: str = "", private: bool = False, token: str | None = None) -> str:
        """Upload the pipeline folder as a model repository of the Hugging Face hub; returns the URL of the commit."""
        save = partial(self.save_pretrained, licence=licence)
        return push_to_hub(save, repo_id, "pipeline", private=private, token=token)

    def _copy_results(self, folder: Path) -> list[dict[str, Any]]:
        """Result files of these very weights, without names of folders of this machine."""
        folder.mkdir()
        now, kept = weights_of(self.trained), []
        for file in sorted((self.source.dir / EVAL).glob("*.json")):
            result = read_json(file)
            if not (said := result.get("weights")) or not said.items() <= now.items():
                logger.info("left out, not measured on these weights: %s", file)
                continue
            result["run"] = Path(result["run"]).name
            result["spec"]["data"]["dir"] = Path(result["spec"]["data"]["dir"]).name
            write_json(folder / file.name, result)
            kept.append(result)
        return kept


def _portable(spec: RunSpec) -> RunSpec:
    """The spec as it goes to other machines: it names no folder of this one, and asks for no compiler."""
    sampling = spec.sampling.replace(compile=False)
    if getattr(sampling.guidance, "weak", None):
        logger.warning("the second generator of guidance %s stays here; saved as unguided", sampling.guidance.kind)
        sampling = sampling.replace(guidance=NoGuidance())
    data = spec.data.replace(dir=Path(spec.data.dir).name)
    return spec.replace(tokenizer_from=None, decoder_from=None, generator_from=None, data=data, sampling=sampling)
