"""Run folder -> report.html, one self-contained page, and report.json with the same numbers.

Read `write_report` first. Everything comes from files of the run folder; a part that is missing is left out with a
sentence, and no number is computed here except the point where a metric reached a value (`ep_fid`).
"""

from __future__ import annotations

import base64
import json
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from raev2 import __version__
from raev2.errors import CheckpointError
from raev2.eval.protocols import ep_fid
from raev2.files.artefact import write_json
from raev2.files.replace import write_text
from raev2.report.chart import Series, line_chart, number, smooth
from raev2.report.published import published, published_results

REPORT_FORMAT_VERSION = 1
STAGES = {"tokenizer": "Tokenizer (stage 1)", "generator": "Generator (stage 2)"}
MAX_STRIP = 8  # grids a strip: the first, the last, and evenly spread ones between
MAX_EVENTS = 50
PAUSE_SECONDS = 1800
LEARNING_RATE, IMAGES_PER_S = "Learning rate", "Speed, images/s"  # always on a linear scale
NOT_NUMBERS = {"stage", "kind", "images", "step", "time", "time_s", "rank", "event", "protocol"}
SPEED = ("images_per_s", "data_wait")
COUNTS = ("skipped_images",)
HEADLINES = ("fid", "fd_", "precision_", "recall_", "rfid", "rfd_", "psnr", "ssim", "lpips_", "feature_distance_")
SCALE_NOTE = "scale:"


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` and `report.json` of a run folder; returns the path of the page."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir() or not any((run_dir / name).exists() for name in ("spec.yaml", "metrics.jsonl", "eval")):
        raise CheckpointError(str(run_dir), "not a run folder", expected="a folder with spec.yaml and metrics.jsonl")
    warnings: list[str] = []
    spec_text = _read_text(run_dir / "spec.yaml")
    spec = (yaml.safe_load(spec_text) if spec_text else None) or {}
    provenance = _read_json(run_dir / "provenance.json", warnings) or {}
    lines = _log_lines(run_dir / "metrics.jsonl", warnings)
    files = [_read_json(file, warnings) for file in sorted((run_dir / "eval").glob("*.json"), key=lambda f: f.stem)]
    results = [result for result in files if result and "results" in result]
    data = provenance.get("data") or {}

    history = _history(lines, results)
    ep_rows = _ep_rows(history, results, _train_samples(data))
    header = _header(run_dir, spec, provenance, lines)
    summary = _summary(spec, provenance, lines, results, data)
    warnings += _health(lines)
    names = sorted({entry["name"] for result in results for entry in result["results"]} | {name for _, name in history})
    samples = {
        "generator": _grids(run_dir / "samples", "generator"),
        "tokenizer": _grids(run_dir / "samples", "tokenizer"),
        "guidance": [
            {"data": _base64(file), "label": file.stem.removeprefix("guidance-").replace("_", " ")}
            for file in sorted((run_dir / "samples").glob("guidance-*.png"))
        ],
    }
    guidance_names, guidance_rows = _guidance_table(results)
    date = time.strftime("%Y-%m-%d %H:%M")
    page = {
        "header": header, "summary": summary, "warnings": warnings, "samples": samples,
        "big_width": 720, "guidance_names": guidance_names, "guidance_rows": guidance_rows,
        "evaluations": [_evaluation(result, run_dir) for result in results],
        "history_charts": _history_charts(history, results), "ep_rows": ep_rows,
        "ep_text": "EP_<metric>@k: where the metric first falls to k, linear between evaluations, with the sampling "
        "settings of the protocol. For FID k is 2, as published. Elsewhere k comes from the scale: the value of "
        "block-shuffled pictures, and the geometric mean of theirs and that of real pictures.",
        "published": _published(spec), "stages": _stages(lines),
        "events": _events(lines), "data": _flat(data), "provenance": _provenance(provenance),
        "spec_text": spec_text, "glossary": _glossary(names), "version": __version__, "date": date,
    }  # fmt: skip
    template = (resources.files("raev2") / "assets" / "report.html.j2").read_text()
    html = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(page)
    file = run_dir / "report.html"
    write_text(file, html)
    write_json(
        run_dir / "report.json",
        _plain({
            "format_version": REPORT_FORMAT_VERSION, "date": date, "title": header["title"],
            "facts": dict(header["facts"]), "sentences": summary["sentences"], "warnings": warnings,
            "training": {stage: _last_values(lines, stage) for stage in STAGES if _of(lines, stage, "train")},
            "evaluations": results, "ep": ep_rows,
            "history": [
                {"protocol": key[0], "metric": key[1], "images": [at for at, _ in rows], "values": [v for _, v in rows]}
                for key, rows in history.items()
            ],
            "data": data, "provenance": provenance,
        }),
    )  # fmt: skip
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Header and summary


def _header(run_dir: Path, spec: Mapping, provenance: Mapping, lines: Sequence[Mapping]) -> dict[str, Any]:
    task = (spec.get("task") or {}).get("name")
    recipe = spec.get("recipe")
    machine = [provenance.get("machine"), provenance.get("device"), provenance.get("platform")]
    threads, processes = provenance.get("num_threads"), provenance.get("processes")
    if threads:
        machine.append(f"{threads} threads")
    if processes:
        machine.append(f"{processes} process{'es' if processes > 1 else ''}")
    seconds = _wall_seconds(lines)
    facts = [
        ("Task", task), ("Recipe", recipe), ("Started", provenance.get("started")),
        ("Machine", ", ".join(str(part) for part in machine if part)),
        ("Code revision", provenance.get("git_revision") or provenance.get("git")),
        ("Spec fingerprint", spec.get("fingerprint") or provenance.get("spec_fingerprint")),
        ("Wall time, from the log", _duration(seconds) if seconds else None), ("Run folder", run_dir.name),
    ]  # fmt: skip
    title = f"{task}: {recipe}" if task and recipe else run_dir.name
    return {"title": title, "summary": spec.get("summary"), "facts": [(k, str(v)) for k, v in facts if v]}


def _summary(
    spec: Mapping, provenance: Mapping, lines: Sequence[Mapping], results: Sequence[Mapping], data: Mapping
) -> dict[str, Any]:
    sentences, train_samples = [], _train_samples(data)
    done = []
    for stage in STAGES:
        trained = _of(lines, stage, "train")
        if trained:
            images = int(trained[-1]["images"])
            epochs = f" ({images / train_samples:.1f} epochs)" if train_samples else ""
            planned = ((spec.get(f"{stage}_training") or {}).get("images")) or images
            part = f", {images / planned:.0%} of the plan" if images < planned else ""
            done.append(f"the {stage} saw {images:,} images{epochs}{part}")
    if done:
        on = f" on {provenance['device']}" if provenance.get("device") else ""
        sentences.append(f"In this run {' and '.join(done)}{on}.")
    for result in results:
        sentences += _in_words(result)
    if not results:
        sentences.append("Nothing was evaluated yet, so there are no metrics.")

    tiles, seen = [], set()
    entries = [(result, entry) for result in results for entry in result["results"]]
    for headline in HEADLINES:
        for result, entry in entries:
            name = entry["name"]
            if name.startswith(headline) and not _is_scale(entry) and name not in seen:
                seen.add(name)
                error = f"± {number(entry['stderr'])}, " if entry.get("stderr") else ""
                text = f"{error}n = {entry['num_samples']:,}, protocol {result['protocol']}"
                tiles.append({"name": name, "value": number(entry["value"]), "text": text})
    return {"sentences": sentences, "tiles": tiles[:8]}


def _in_words(result: Mapping) -> list[str]:
    """One sentence for each Fréchet distance, and each score with a ceiling, that has its scale beside it."""
    values = {entry["name"]: entry for entry in result["results"]}
    sentences = []
    for name, entry in values.items():
        shuffled, ceiling = values.get(f"{name}_shuffled"), values.get(f"{name}_ceiling")
        if shuffled is None:
            continue
        start = f"Protocol {result['protocol']}: {entry['num_samples']:,} generated pictures have {name} = "
        start += f"{number(entry['value'])}. On the same scale "
        if ceiling is not None:
            sentences.append(
                f"{start}they have {number(shuffled['value'])} when judged by other prompts, and true pictures after "
                f"the tokenizer {number(ceiling['value'])}; higher is better."
            )
        elif re.match("fid|fd_", name):
            real_name = next((n for n in values if n.startswith(f"{name}_") and n != f"{name}_shuffled"), None)
            if real_name is not None:
                sentences.append(
                    f"{start}real pictures of {real_name.removeprefix(f'{name}_')!r} have "
                    f"{number(values[real_name]['value'])} and their block-shuffled copies "
                    f"{number(shuffled['value'])}; lower is better."
                )
    return sentences


def _health(lines: Sequence[Mapping]) -> list[str]:
    skipped = sum(line.get("event") == "non_finite" for line in lines)
    found = [f"Training steps skipped because loss or gradient was not finite: {skipped}."] if skipped else []
    unreadable = max((line.get("skipped_images", 0) for line in lines), default=0)
    if unreadable:
        found.append(f"Unreadable images replaced while training: {unreadable}.")
    return found


def _wall_seconds(lines: Sequence[Mapping]) -> float:
    """From first to last log line, without pauses of more than half an hour."""
    times = [line["time"] for line in lines if isinstance(line.get("time"), int | float)]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    if times:
        return float(sum(gap for gap in gaps if 0 < gap < PAUSE_SECONDS))
    return 0.0 + sum(
        max((float(line["time_s"]) for line in _of(lines, s) if "time_s" in line), default=0.0) for s in STAGES
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training curves


def _stages(lines: Sequence[Mapping]) -> list[dict[str, Any]]:
    stages = []
    for stage, title in STAGES.items():
        logged = _of(lines, stage, "train")
        if not logged:
            continue
        names = [n for n in _number_names(logged) if n not in (*SPEED, *COUNTS)]
        rates = [name for name in names if name == "lr" or name.startswith("lr_")]
        norms = [name for name in names if name.startswith("grad_norm")]
        weights = [name for name in names if name.endswith("weight")]
        adversarial = [name for name in names if name.startswith(("gan", "disc"))]
        losses = [name for name in names if name not in (*rates, *norms, *weights, *adversarial)]
        window = max(1, len(logged) // 25)
        how = f"mean of the last {window} log lines (bold) and the log lines themselves (thin)" if window > 1 else ""
        charts = [
            _train_chart(logged, losses, "Losses", window, how),
            _train_chart(logged, adversarial, "Adversarial losses", window, how),
            _train_chart(logged, rates, LEARNING_RATE, 1, "as used in the step"),
            _train_chart(logged, norms, "Gradient norm", window, f"before clipping; {how}".rstrip("; ")),
            _train_chart(logged, weights, "Adaptive weight", window, how),
            _train_chart(logged, ["images_per_s"], IMAGES_PER_S, window, how),
        ]
        last = logged[-1]
        text = f"{int(last['images']):,} images in {int(last.get('step', 0)):,} steps, {len(logged):,} log lines."
        if "data_wait" in last:
            waits = [line["data_wait"] for line in logged if "data_wait" in line]
            text += f" Waiting for data took {sum(waits) / len(waits):.0%} of the time."
        stages.append({"title": title, "text": text, "charts": [chart for chart in charts if chart]})
    return stages


def _train_chart(
    logged: Sequence[Mapping], names: Sequence[str], title: str, window: int, how: str
) -> dict[str, str] | None:
    series = []
    for name in names:
        points = [(line["images"], float(line[name])) for line in logged if name in line]
        if points:
            xs, ys = [x for x, _ in points], [y for _, y in points]
            series.append(Series(name, xs, smooth(ys, window), raw=ys if window > 1 else ()))
    values = [y for line in series for y in line.ys if math.isfinite(y)]
    if not values:
        return None
    log = min(values) > 0 and max(values) / min(values) > 5 and title not in (LEARNING_RATE, IMAGES_PER_S)
    svg = line_chart(series, title=title, x_label="images seen", log=log)
    caption = f"{how[:1].upper()}{how[1:]}" + ("." if how else "") + (" Logarithmic scale." if log else "")
    return {"title": title, "svg": svg, "caption": caption.strip()} if svg else None


def _events(lines: Sequence[Mapping]) -> list[dict[str, Any]]:
    events = [line for line in lines if line.get("kind") == "event"]
    shown = events[:MAX_EVENTS]
    rows: list[dict[str, Any]] = [
        {
            "stage": line.get("stage", ""), "images": f"{line.get('images', 0):,}",
            "name": str(line.get("event") or line.get("name") or "event").replace("_", " "),
            "details": ", ".join(
                f"{k} {v}" for k, v in line.items() if k not in ("stage", "kind", "images", "event", "name", "time")
            ),
        }
        for line in shown
    ]  # fmt: skip
    if len(events) > len(shown):
        rows.append({"stage": "", "images": "", "name": f"and {len(events) - len(shown)} more", "details": ""})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

History = dict[tuple[str, str], list[tuple[float, float]]]


def _history(lines: Sequence[Mapping], results: Sequence[Mapping]) -> History:
    """(protocol, metric) -> (images seen, value) in order; the last evaluation is taken from its result file."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for line in lines:
        if line.get("kind") == "eval":
            for name, value in (line.get("metrics") or {}).items():
                if isinstance(value, int | float) and math.isfinite(value):
                    found.setdefault((line.get("protocol", ""), name), {})[float(line["images"])] = float(value)
    for result in results:
        for entry in result["results"]:
            key = (result["protocol"], entry["name"])
            if key in found and result.get("images_seen") is not None:
                found[key][float(result["images_seen"])] = float(entry["value"])
    return {key: sorted(points.items()) for key, points in found.items()}


def _history_charts(history: History, results: Sequence[Mapping]) -> list[dict[str, str]]:
    charts = []
    for (protocol, name), points in history.items():
        scale = _scale_of(name, protocol, history, results)
        is_scale_row = name.endswith("_shuffled") or any(name.startswith(f"{other}_") for _, other in history)
        if len(points) < 2 or is_scale_row:
            continue
        series = [Series(name, [x for x, _ in points], [y for _, y in points], points=True)]
        series += [Series(other, [0], [value], constant=True) for other, value in scale.items()]
        values = [y for line in series for y in line.ys]
        log = min(values) > 0 and max(values) / min(values) > 5
        svg = line_chart(series, title=name, x_label="images seen", log=log)
        caption = f"Protocol {protocol}." + (" Dashed: the scale." if scale else "")
        charts.append({"title": name, "svg": svg, "caption": caption + (" Logarithmic scale." if log else "")})
    return charts


def _ep_rows(history: History, results: Sequence[Mapping], train_samples: int | None) -> list[dict[str, Any]]:
    rows = []
    for (protocol, name), points in history.items():
        if name != "fid" and (not name.startswith("fd_") or name.startswith("fd_ratio_")):
            continue
        if name.endswith("_shuffled") or any(name.startswith(f"{other}_") for _, other in history) or len(points) < 2:
            continue
        levels = [2.0] if name == "fid" else []
        scale = _scale_of(name, protocol, history, results)
        shuffled = scale.get(f"{name}_shuffled")
        real = next((value for other, value in scale.items() if other != f"{name}_shuffled"), None)
        if shuffled and real:
            levels += [shuffled, math.sqrt(shuffled * real)]
        for level in levels:
            k = float(f"{level:.3g}")
            images = ep_fid(points, k)
            last = f"not within {points[-1][0]:,.0f}"
            epochs = f"{images / train_samples:.1f}" if images is not None and train_samples else ""
            rows.append(
                {
                    "name": f"EP_{'FID' if name == 'fid' else name}@{number(k)}", "protocol": protocol, "k": k,
                    "images": f"{images:,.0f}" if images is not None else last, "epochs": epochs,
                    "images_exact": images,
                }
            )  # fmt: skip
    return rows


def _scale_of(name: str, protocol: str, history: History, results: Sequence[Mapping]) -> dict[str, float]:
    """Values of the scale rows that belong to a metric of a protocol, by name."""
    found = {
        entry["name"]: float(entry["value"])
        for result in results
        if result["protocol"] == protocol
        for entry in result["results"]
        if _is_scale(entry)
    }
    found |= {other: points[-1][1] for (p, other), points in history.items() if p == protocol and other not in found}
    return {other: value for other, value in found.items() if other.startswith(f"{name}_")}


def _evaluation(result: Mapping, run_dir: Path) -> dict[str, Any]:
    reference = result.get("reference") or {}
    parts = [str(result.get("description", "")).strip().capitalize()]
    if result.get("images_seen") is not None:
        ema = f", averaged with decay {result['ema_decay']}" if result.get("ema_decay") else ""
        parts.append(f"Weights after {result['images_seen']:,} images{ema}")
    if result.get("sampling"):
        parts.append(f"Sampling: {_sampler(result['sampling'])}, guidance {_guidance(result['sampling'])}")
    if result.get("label_policy"):
        parts.append(f"Conditions: {result['label_policy']}")
    if reference.get("fingerprint"):
        parts.append(f"Reference {reference['fingerprint'][:12]}")
    if result.get("date"):
        parts.append(str(result["date"]))
    rows = [
        {
            "name": entry["name"], "value": number(entry["value"]), "num_samples": f"{entry['num_samples']:,}",
            "stderr": number(entry["stderr"]) if entry.get("stderr") is not None else "",
            "note": entry.get("note", ""), "scale": _is_scale(entry),
        }
        for entry in result["results"]
    ]  # fmt: skip
    details = {name: value for name, value in result.items() if name not in ("results", "spec")}
    picture = run_dir / "eval" / f"{result['protocol']}.png"
    points, point_rows = _by_point(result["results"])
    return {
        "protocol": result["protocol"], "text": ". ".join(part for part in parts if part) + ".", "rows": rows,
        "points": points, "point_rows": point_rows,
        "picture": {"data": _base64(picture), "label": result.get("picture", "")} if picture.is_file() else None,
        "details": yaml.safe_dump(_plain(details), sort_keys=False, allow_unicode=True),
    }  # fmt: skip


def _by_point(entries: Sequence[Mapping]) -> tuple[list[str], list[dict[str, Any]]]:
    """Results named `metric@point` or `metric@point_scale` as a table, a column for each point (such as a horizon)."""
    points: dict[str, None] = {}
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries:
        match = re.fullmatch(r"(?P<metric>[^@]+)@(?P<point>[^@_]+)(?P<scale>_.+)?", entry["name"])
        if match:
            points[match["point"]] = None
            name = match["metric"] + (match["scale"] or "")
            row = rows.setdefault(name, {"name": name, "scale": _is_scale(entry), "cells": {}})
            error = f" ± {number(entry['stderr'])}" if entry.get("stderr") is not None else ""
            row["cells"][match["point"]] = f"{number(entry['value'])}{error}"
    table = [{**row, "cells": [row["cells"].get(point, "") for point in points]} for row in rows.values()]
    return list(points), table


def _guidance_table(results: Sequence[Mapping]) -> tuple[list[str], list[dict[str, Any]]]:
    """Results of the same metrics under different guidance; empty where only one setting was evaluated."""
    sampled = [result for result in results if result.get("sampling")]
    if len({json.dumps(result["sampling"].get("guidance"), sort_keys=True) for result in sampled}) < 2:
        return [], []
    names: list[str] = []
    for result in sampled:
        names += [e["name"] for e in result["results"] if not _is_scale(e) and e["name"] not in names]
    rows = []
    for result in sampled:
        values = {entry["name"]: number(entry["value"]) for entry in result["results"]}
        rows.append(
            {
                "protocol": result["protocol"], "guidance": _guidance(result["sampling"]),
                "sampler": _sampler(result["sampling"]), "cells": [values.get(name, "") for name in names],
            }
        )  # fmt: skip
    return names, rows


def _guidance(sampling: Mapping) -> str:
    guidance = dict(sampling.get("guidance") or {"kind": "none"})
    kind = guidance.pop("kind", "none")
    return ", ".join([str(kind), *(f"{name.replace('_', ' ')} {value}" for name, value in guidance.items())])


def _sampler(sampling: Mapping) -> str:
    return f"{sampling.get('solver', '?')}, {sampling.get('steps', '?')} steps"


def _is_scale(entry: Mapping) -> bool:
    return str(entry.get("note", "")).startswith(SCALE_NOTE)


GLOSSARY = (
    (r"fid", "Fréchet Inception Distance of generated pictures to the reference split; lower is better. Only "
     "comparable with the same reference, number of samples and preparation."),
    (r"fd_ratio_(?P<net>.+)|fid_ratio", "Distance of generated pictures over the distance of as many real held-out "
     "pictures, to the same reference. 1 means: as close as real pictures."),
    (r"r(fid|fd_.+)", "Fréchet distance of reconstructions to their own originals: a score of the tokenizer, never of "
     "the generator. Lower is better."),
    (r"(fid|fd_.+)_shuffled", "Scale: the same distance for real pictures cut into 4 x 4 blocks and shuffled. Right "
     "colours and textures, no shapes."),
    (r"(fid|fd_.+)_val", "Scale: the same distance for real held-out pictures. About as good as it gets."),
    (r"fd_(?P<net>.+)", "Fréchet distance between generated pictures and the reference split in the feature space of "
     "the encoder '{net}' (mean patch token). Lower is better. It is not FID: FID uses Inception features, and the two "
     "scales have nothing to do with each other."),
    (r"precision_.+_val|recall_.+_val", "Scale: precision or recall of real held-out pictures."),
    (r"precision_(?P<net>.+)", "Share of generated pictures that lie near a real one in the feature space '{net}' "
     "(k-nearest-neighbour manifold, k = 3): do samples look right? Higher is better."),
    (r"recall_(?P<net>.+)", "Share of real pictures that lie near a generated one in the feature space '{net}': is the "
     "variety covered? Higher is better, and it grows with the number of generated pictures."),
    (r"psnr", "Peak signal-to-noise ratio in dB of 8-bit pictures, mean over pictures. Higher is better."),
    (r"ssim", "Structural similarity (Gaussian window, 11 px), mean over pictures; 1 is identical."),
    (r"lpips_(?P<net>.+)", "LPIPS with the {net} backbone, mean over pictures; 0 is identical. Backbones differ "
     "several-fold."),
    (r"feature_distance_(?P<net>.+)", "Mean squared distance of unit-normalised tokens of the encoder '{net}', over "
     "four of its layers; 0 is identical. It stands in where LPIPS weights are missing and is not comparable with it."),
)  # fmt: skip


def _glossary(names: Iterable[str]) -> list[tuple[str, str]]:
    found = []
    for name in names:
        for pattern, text in GLOSSARY:
            match = re.fullmatch(pattern, name)
            if match:
                found.append((name, text.format(**match.groupdict())))
                break
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _log_lines(file: Path, warnings: list[str]) -> list[dict[str, Any]]:
    lines, broken = [], 0
    for text in (_read_text(file) or "").splitlines():
        try:
            line = json.loads(text)
            lines.append({"images": 0, **line})
        except (ValueError, TypeError):
            broken += 1
    if broken:
        warnings.append(f"Damaged lines of metrics.jsonl that were left out: {broken}.")
    return lines


def _grids(folder: Path, stage: str) -> list[dict[str, Any]]:
    """Grids `<stage>-<images seen>.png` in order, at most `MAX_STRIP` of them."""
    files = {int(m[1]): f for f in folder.glob(f"{stage}-*.png") if (m := re.fullmatch(rf"{stage}-(\d+)", f.stem))}
    places = sorted(files)
    if len(places) > MAX_STRIP:
        places = sorted({places[round(i * (len(places) - 1) / (MAX_STRIP - 1))] for i in range(MAX_STRIP)})
    return [{"images": n, "label": f"{n:,} images", "data": _base64(files[n])} for n in places]


def _train_samples(data: Mapping) -> int | None:
    train = (data.get("splits") or {}).get("train") or {}
    return train.get("num_samples") if isinstance(train, Mapping) else None


def _provenance(provenance: Mapping) -> list[tuple[str, str]]:
    return _flat({name: value for name, value in provenance.items() if name != "data"})


def _published(spec: Mapping) -> list[dict[str, Any]]:
    """Published numbers of the system that a run's recipe describes."""
    task, recipe = (spec.get("task") or {}).get("name"), spec.get("recipe")
    sources = published()["sources"]
    return [
        {**row, "value": number(row["value"]), "source": sources[row["source"]]}
        for row in published_results(recipe) if recipe and row["task"] == task
    ]  # fmt: skip


def _flat(values: Mapping, prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list | tuple):
            shown = " ".join(map(str, value)) if name == "command" else ", ".join(map(str, value))
            rows.append((f"{prefix}{name}".replace("_", " "), shown if len(shown) < 400 else f"{len(value)} entries"))
        elif value is not None and value != "":
            rows.append((f"{prefix}{name}".replace("_", " "), str(value)))
    return rows


def _of(lines: Sequence[Mapping], stage: str, kind: str | None = None) -> list[Mapping]:
    return [line for line in lines if line.get("stage") == stage and (kind is None or line.get("kind") == kind)]


def _number_names(logged: Sequence[Mapping]) -> list[str]:
    names: dict[str, None] = {}
    for line in logged:
        names |= {n: None for n, v in line.items() if n not in NOT_NUMBERS and type(v) in (int, float)}
    return list(names)


def _last_values(lines: Sequence[Mapping], stage: str) -> dict[str, Any]:
    last = _of(lines, stage, "train")[-1]
    return {name: value for name, value in last.items() if name not in ("stage", "kind", "time")}


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


def _plain(value: Any) -> Any:
    """JSON types without NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _read_text(file: Path) -> str | None:
    return file.read_text(errors="replace") if file.is_file() else None


def _read_json(file: Path, warnings: list[str]) -> dict[str, Any] | None:
    text = _read_text(file)
    try:
        return dict(json.loads(text)) if text is not None else None
    except (TypeError, ValueError):
        warnings.append(f"{file.name} is damaged and was left out.")
        return None


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
