"""The page of `raev2 demo`: a class or a prompt in, pictures out, as they come out of the noise.

The pictures are those of `raev2 sample --n 4` with the same settings and seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio
import torch
from PIL import Image
from torch import Tensor

from raev2.batch import cond_map
from raev2.data import to_uint8
from raev2.errors import RaeError, SpecError
from raev2.files.plugins import GUIDANCE, installed
from raev2.guidance import build_guidance
from raev2.pipeline import TrainedRun
from raev2.sampler import CPU_CHUNK, noise_for, sample_path
from raev2.spec import Guidance, SamplingSpec
from raev2.spec_io import validated

NUM_PICTURES = CPU_CHUNK  # computed at once on a CPU, as `raev2 sample` does
MAX_STEPS, MAX_SCALE, STRIP = 200, 8.0, 8
Shown = list[tuple[Image.Image, str]]  # pictures with captions


class Demo:
    """A trained run to be sampled by hand."""

    def __init__(self, trained: TrainedRun) -> None:
        self.trained, self.generator = trained, trained.need_generator()
        spec = trained.run.spec
        self.title, self.sampling = f"{spec.task.name}: {spec.recipe}", spec.sampling
        self.data = trained.names()
        self.option = next(iter(trained.task.sample_options()), "").removeprefix("--")
        self.encode_cond = trained.task.cond_encoder(spec, trained.context().encode, trained.run.device)

    @property
    def names(self) -> Sequence[str]:
        """Classes of the data; none where the condition is a text."""
        return self.data.classes if self.option == "label" else ()

    def guidance(self, kind: str, scale: float) -> Guidance:
        """The run's own settings where they are of this kind, with another scale."""
        own = self.sampling.guidance
        fields = own.model_dump() if own.kind == kind else {"kind": kind}
        return validated(Guidance, fields if kind == "none" else {**fields, "scale": scale}, "guidance.")

    def kinds(self) -> list[str]:
        """Kinds of guidance that this generator can do."""
        usable = []
        for kind in sorted(installed(GUIDANCE)):
            try:
                build_guidance(self.guidance(kind, 1.5), self.generator, self.trained.context().weak)
                usable.append(kind)
            except RaeError:
                continue
        return usable

    def steps(self, wanted: str, kind: str, scale: float, steps: int, seed: int) -> Iterator[tuple[float, Tensor]]:
        """(t, 8-bit images (4, 3, Hpx, Wpx)) after each step."""
        if not 0 <= int(seed) < 2**63:
            raise SpecError("seed", "not usable", got=seed, expected="a number >= 0")
        sampling = self.sampling.replace(guidance=self.guidance(kind, scale), steps=int(steps))
        context = self.trained.context(sampling, int(seed))
        given = {self.option: [wanted]} if self.option and wanted else {}
        raw, _ = self.trained.task.sample_cond(context.spec, self.data, {"n": NUM_PICTURES, **given})
        device = self.trained.run.device
        cond = self.encode_cond(cond_map(raw, lambda value: value.to(device)))
        self.generator.check_cond(cond)
        yield from self._path(cond, sampling, int(seed), context.weak)

    def _path(self, cond: Any, sampling: SamplingSpec, seed: int, weak: Any) -> Iterator[tuple[float, Tensor]]:
        noise = noise_for(seed, range(NUM_PICTURES), self.generator.latent_shape).to(self.trained.run.device)
        points = iter(sample_path(self.generator, cond, noise, sampling, weak=weak))
        while True:
            with torch.no_grad(), self.trained.run.autocast():  # entered for each step: a generator must not hold it
                point = next(points, None)
            if point is None:
                return
            with torch.no_grad():
                yield point[0], to_uint8(self.trained.rae.decode(point[1].float()))

    def show(self, wanted: str, kind: str, scale: float, steps: int, seed: int) -> Iterator[tuple[Shown, Shown, str]]:
        """For the page: the pictures now, the first of them at some steps, and what is going on."""
        strip: Shown = []
        looks = {max(1, round(int(steps) * i / STRIP)) for i in range(1, STRIP + 1)}
        try:
            for number, (t, images) in enumerate(self.steps(wanted, kind, scale, steps, seed), 1):
                pictures = [Image.fromarray(pixels) for pixels in images.permute(0, 2, 3, 1).cpu().numpy()]
                if number in looks:
                    strip = [*strip, (pictures[0], f"step {number}")]
                yield (
                    [(picture, wanted or "") for picture in pictures],
                    strip,
                    f"step {number} of {int(steps)}, t = {t:.3f}",
                )
        except RaeError as error:
            raise gradio.Error(str(error)) from error


def make_page(demo: Demo) -> gradio.Blocks:
    """The page; nothing is asked of other machines."""
    guidance = demo.sampling.guidance
    with gradio.Blocks(title=demo.title, analytics_enabled=False) as page:
        gradio.Markdown(f"# {demo.title}")
        with gradio.Row():
            with gradio.Column(scale=1):
                name = demo.option or "condition"
                wanted = (
                    gradio.Dropdown(list(demo.names), value=demo.names[0], label=name)
                    if demo.names
                    else gradio.Textbox(label=name, visible=bool(demo.option))
                )
                kind = gradio.Dropdown(demo.kinds(), value=guidance.kind, label="guidance")
                scale = gradio.Slider(1, MAX_SCALE, getattr(guidance, "scale", 1.5), step=0.01, label="scale; 1 is off")
                steps = gradio.Slider(1, MAX_STEPS, demo.sampling.steps, step=1, label="steps")
                seed = gradio.Number(0, precision=0, label="seed")
                button = gradio.Button("Sample", variant="primary")
                said = gradio.Markdown()
            with gradio.Column(scale=3):
                shown = gradio.Gallery(label="pictures", columns=NUM_PICTURES, height="auto", format="png")
                strip = gradio.Gallery(label="the first one, step by step", columns=STRIP, height="auto", format="png")
        button.click(demo.show, [wanted, kind, scale, steps, seed], [shown, strip, said], api_name="sample")
    return page
