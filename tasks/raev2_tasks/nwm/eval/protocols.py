"""Evaluation protocols of this task; every name is a complete recipe for numbers. Read `PredictionEvaluator` first.

A protocol predicts the frames seen from a fixed list of places of the validation split, whose hash stands in its
result file, and compares them with the true frames: at each horizon a distance in encoder features or LPIPS, PSNR, a
distance of latents and a Fréchet distance. Names are `metric@horizon`, and `metric@horizon_baseline` for the baselines
of `BASELINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from raev2.batch import Better, MetricResult
from raev2.eval.distances import squared_mmd
from raev2.eval.features import FeatureExtractor, build_extractor, extractor_needs, frechet_about, frechet_name
from raev2.eval.generate import collect
from raev2.eval.image_pairs import build_pair_distance, lpips_available, pair_needs, psnr
from raev2.eval.protocols import ReconstructionEvaluator
from raev2.eval.sets import set_features, split_pictures
from raev2.files.assets import Asset
from raev2.spec import RunSpec
from raev2.task import EvalContext, Evaluator
from raev2.training import dist
from raev2_tasks.nwm.data.dataset import as_trajectories
from raev2_tasks.nwm.data.places import Places
from raev2_tasks.nwm.data.video import contact_sheet
from raev2_tasks.nwm.eval.action_following import ActionFollowing
from raev2_tasks.nwm.eval.metrics import clip_features, frechet, latent_distance, mean
from raev2_tasks.nwm.eval.predict import Predictor
from raev2_tasks.nwm.spec import task_spec

CHUNK_SIZE = 16  # places a chunk; fixed, so that no result depends on a batch size
NUM_PICTURED = 4  # places in the picture of a protocol
QUICK_PLACES = 32
BASELINES = {
    "copy": "The last context frame in place of the predicted one: as if nothing moved.",
    "nearest": "The training frame nearest to the true one in features: the best that copying can do.",
    "no_action": "The same model without the command: what past and time alone tell.",
    "reconstruction": "The true frame after the tokenizer: no prediction can be expected to be better.",
}
ABOUT: dict[str, tuple[Better, str]] = {
    "psnr": ("higher", "Peak signal-to-noise ratio of predicted and true frames in dB, mean over places."),
    "latent_distance": ("lower", "1 - cosine of predicted and true latents, mean over positions; 0 is equal."),
}
PREDICTED = ""  # name of the model's own rows


def protocols(spec: RunSpec) -> list[Evaluator]:
    """Tokenizer, single jumps, rollouts at 4 and 1 frames a second, and whether commands are followed."""
    task = task_spec(spec)
    blind = ("no_action",) if task.condition_form == "block_causal" and task.action_drop_prob > 0 else ()
    jumps, places = task.jump_horizons_s, spec.evaluation.num_samples
    found: list[Evaluator] = []
    for features in ("micro", "inception"):
        found.append(ReconstructionEvaluator(f"reconstruction-{features}", (features,), max_images=places))
        found.append(
            PredictionEvaluator(
                f"single-step-{features}", features, horizons_s=jumps, num_places=places,
                baselines=("copy", "nearest", *blind, "reconstruction"),
            )
        )  # fmt: skip
        middle = jumps[len(jumps) // 2]
        found.append(
            PredictionEvaluator(
                f"single-step-quick-{features}", features, horizons_s=(middle,),
                num_places=min(places, QUICK_PLACES), baselines=("copy",),
            )
        )  # fmt: skip
        for fps in (4, 1):
            found.append(
                PredictionEvaluator(
                    f"rollout-{fps}fps-{features}", features, step_s=1 / fps, num_places=task.num_rollouts,
                    horizons_s=[horizon for horizon in task.horizons_s if horizon * fps == int(horizon * fps)],
                    baselines=("copy", "nearest", "reconstruction"),
                )
            )  # fmt: skip
    return [*found, ActionFollowing(task, num_places=places, blind=bool(blind))]


class PredictionEvaluator(Evaluator):
    """Predicted frames against the true ones at several horizons, by single jumps or by rollouts.

    Rollouts also give `fvd_enc_<encoder>`, the Fréchet distance of whole clips, and `kvd_enc_<encoder>`, the unbiased
    kernel distance of the same (`clip_features`). They are not FVD, which looks through a video network.
    """

    needs_generator = True

    def __init__(
        self,
        protocol: str,
        features: str,
        *,
        horizons_s: Sequence[float],
        num_places: int,
        step_s: float | None = None,
        baselines: Sequence[str] = (),
        build: Callable[[str, torch.device], FeatureExtractor] = build_extractor,
    ) -> None:
        """Name a protocol.

        features    feature network of the Fréchet distances
        step_s      None: one jump to each horizon. Else rollouts whose frames are so many seconds apart
        baselines   names of `BASELINES`
        """
        self.protocol, self.features, self.step_s, self.build = protocol, features, step_s, build
        self.horizons_s, self.num_places, self.baselines = tuple(horizons_s), num_places, tuple(baselines)
        with_lpips = features == "inception" and lpips_available("alex")
        self.perceptual = "lpips_alex" if with_lpips else "feature_distance_micro"
        how = "one jump to each horizon" if step_s is None else f"rollouts of {1 / step_s:g} frames a second"
        self.description = f"{how} from {num_places:,} places of 'val', against the true frames"

    def needs(self) -> list[Asset]:
        """Weights of the feature network and of the perceptual distance."""
        return [*extractor_needs(self.features), *pair_needs(self.perceptual)]

    @property
    def times_s(self) -> tuple[float, ...]:
        """Times of the frames that are predicted."""
        if self.step_s is None:
            return self.horizons_s
        return tuple(self.step_s * (number + 1) for number in range(round(max(self.horizons_s) / self.step_s)))

    def describe(self, context: EvalContext) -> dict[str, Any]:
        """What the numbers depend on, for the result file."""
        places = self._places(context)
        found = {
            "label_policy": "the true motions, each seen from the frame that was reached",
            "places": places.identity,
            "coverage": places.coverage,
            "horizons_s": list(self.horizons_s),
            "perceptual": self.perceptual,
            "features": self.features,
            "noise": "keyed by (evaluation.seed, number of the place, number of the step)",
            "picture": "Predictions and true frames, from the last context frame on.",
        }
        if self.step_s is not None:
            found["clips"] = f"{len(self.times_s)} frames, {self.step_s:g} s apart, without the context"
        return found

    def run(self, context: EvalContext) -> Iterator[MetricResult]:
        """Numbers of every horizon, then those of the clips."""
        places = self._places(context)
        extractor = self.build(self.features, context.device)
        distance = build_pair_distance(self.perceptual, context.device)
        nearest = _NearestFrame(context, extractor) if "nearest" in self.baselines else None
        predictor = Predictor(context, places)

        def rows(indices: Sequence[int]) -> dict[str, Tensor]:
            frames = {PREDICTED: self._predict(predictor, indices)}
            if "no_action" in self.baselines:
                frames["no_action"] = self._predict(predictor, indices, use_action=False)
            now = places.images(indices, 0.0)
            values: dict[str, Tensor] = {}
            for time in self.times_s:
                true = places.images(indices, time)
                true_latents = context.encode(true)
                latents = {name: found[time] for name, found in frames.items()}
                images = {name: context.decode(maps) for name, maps in latents.items()}
                if "reconstruction" in self.baselines:
                    images["reconstruction"] = context.decode(true_latents)
                features = {"true": extractor(true)} | {name: extractor(pixels) for name, pixels in images.items()}
                values |= {f"features/{name}/{time:g}": vectors for name, vectors in features.items()}
                if time not in self.horizons_s:
                    continue
                if "copy" in self.baselines:
                    images["copy"], latents["copy"] = now, context.encode(now)
                if nearest is not None:
                    images["nearest"] = nearest(features["true"])
                for name, pixels in images.items():
                    values[f"psnr/{name}/{time:g}"] = psnr(pixels, true)
                    values[f"{distance.name}/{name}/{time:g}"] = distance(pixels, true)
                for name, maps in latents.items():
                    values[f"latent_distance/{name}/{time:g}"] = latent_distance(maps.cpu(), true_latents.cpu())
            return values

        found = collect(len(places), CHUNK_SIZE, rows, "places")
        for time in self.horizons_s:
            yield from self._horizon(
                found, f"{time:g}", extractor.name, {distance.name: ("lower", distance.about), **ABOUT}
            )
        if self.step_s is not None:
            yield from self._clips(found, extractor.name)
        self._picture(context, predictor, places)

    def _horizon(
        self, found: Mapping[str, Tensor], time: str, net: str, abouts: Mapping[str, tuple[Better, str]]
    ) -> Iterator[MetricResult]:
        names = (PREDICTED, *self.baselines)
        for metric, (better, about) in abouts.items():
            of = f"{metric}@{time}s"
            for name in names:
                if f"{metric}/{name}/{time}" in found:
                    numbers = mean(_name(of, name), found[f"{metric}/{name}/{time}"])
                    yield MetricResult(*numbers, **_meaning(of, name, better, about, f"{time}s"))
        of, about = f"{frechet_name(net)}@{time}s", frechet_about(net, "predicted and true frames")
        for name in names:
            if f"features/{name}/{time}" in found:
                features, true = found[f"features/{name}/{time}"], found[f"features/true/{time}"]
                numbers = frechet(_name(of, name), features, true)
                yield MetricResult(*numbers, **_meaning(of, name, "lower", about, f"{time}s"))

    def _clips(self, found: Mapping[str, Tensor], net: str) -> Iterator[MetricResult]:
        if len(self.times_s) < 3:
            return
        clips = {
            name: clip_features(torch.stack([found[f"features/{name}/{time:g}"] for time in self.times_s], 1))
            for name in (PREDICTED, "reconstruction", "true")
            if f"features/{name}/{self.times_s[0]:g}" in found
        }
        true = clips.pop("true")
        about = f"distance of predicted and true clips, by features of '{net}' and how they change; it is not FVD."
        for name, features in clips.items():
            of = f"fvd_enc_{net}"
            yield MetricResult(
                *frechet(_name(of, name), features, true), **_meaning(of, name, "lower", f"Fréchet {about}")
            )
            of, value = f"kvd_enc_{net}", squared_mmd(features, true)
            meaning = _meaning(of, name, "lower", f"Unbiased kernel {about}")
            yield MetricResult(_name(of, name), value, len(true), note="compare at equal n only", **meaning)

    def _predict(self, predictor: Predictor, indices: Sequence[int], use_action: bool = True) -> dict[float, Tensor]:
        """Latents (B, C, H, W) by time."""
        if self.step_s is None:
            return predictor.jumps(indices, self.times_s, use_action)
        frames = predictor.rollout(indices, self.step_s, len(self.times_s), use_action)
        return dict(zip(self.times_s, frames, strict=True))

    def _picture(self, context: EvalContext, predictor: Predictor, places: Places) -> None:
        """The first places once more, as a picture for the report."""
        if context.picture is None or not dist.is_main():
            return
        shown = list(range(0, len(places), max(1, len(places) // NUM_PICTURED)))[:NUM_PICTURED]
        predicted = self._predict(predictor, shown)
        now = places.images(shown, 0.0)
        clips = torch.stack([now, *(context.decode(predicted[time]) for time in self.times_s)], 1)
        true = torch.stack([now, *(places.images(shown, time) for time in self.times_s)], 1)
        rows = [row for i in range(len(shown)) for row in (("model", clips[i]), ("true", true[i]))]
        contact_sheet(rows, ["now", *(f"+{time:g} s" for time in self.times_s)], context.picture)

    def _places(self, context: EvalContext) -> Places:
        val, index = as_trajectories(context.dataset("val")), task_spec(context.spec).index
        return Places(val, self.num_places, max(self.horizons_s), index)


class _NearestFrame:
    """The training frames whose features are nearest to given ones. Searches at most `MANIFOLD_IMAGES` of them."""

    def __init__(self, context: EvalContext, extractor: FeatureExtractor) -> None:
        self.train = context.dataset("train")
        workers = context.spec.data.num_workers
        rows = set_features(split_pictures(self.train), extractor, context.cache_dir, workers).rows
        assert rows is not None
        self.rows = rows

    def __call__(self, features: Tensor) -> Tensor:
        """8-bit images (B, 3, Hpx, Wpx) for features (B, D)."""
        found = torch.cdist(features.double(), self.rows.double()).argmin(1).tolist()
        return torch.stack([self.train.image(self.train.subset()[number]) for number in found])


def _name(metric: str, baseline: str) -> str:
    return f"{metric}_{baseline}" if baseline else metric


def _meaning(metric: str, baseline: str, better: Better, about: str, point: str | None = None) -> dict[str, Any]:
    """What a row of a metric means, or the row of a baseline of it."""
    found: dict[str, Any] = {"better": better, "point": point, "role": "headline", "about": about}
    return found | {"role": "scale", "of": metric, "about": BASELINES[baseline]} if baseline else found
