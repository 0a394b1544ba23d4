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
from importlib.metadata import version
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from raev2.errors import CheckpointError
from raev2.eval.protocols import ep_fid
from raev2.files.artefact import write_json
from raev2.files.damage import json_lines
from raev2.files.replace import write_text
from raev2.report.chart import Series, line_chart, number, smooth
from raev2.report.published import published, published_results

REPORT_FORMAT_VERSION = 1
STAGES = {"tokenizer": "Tokenizer (stage 1)", "generator": "Generator (stage 2)"}
MAX_STRIP = 8  # grids a strip: the first, the last, and evenly spread ones between
MAX_TILES = 8
MAX_EVENTS = 50
PAUSE_SECONDS = 1800
LEARNING_RATE, IMAGES_PER_S = "Learning rate", "Speed, images/s"  # always on a linear scale
CURVES = {  # charts of a training: names of their values, and what these are
    "Losses": (r"(?!lr$|lr_|grad_norm|gan|disc|images_per_s).*(?<!weight)", ""),
    "Adversarial losses": ("(gan|disc).*", ""),
    LEARNING_RATE: ("lr|lr_.*", "as used in the step"),
    "Gradient norm": ("grad_norm.*", "before clipping"),
    "Adaptive weight": (".*weight", ""),
    IMAGES_PER_S: ("images_per_s", ""),
}
NO_LOSS = {"stage", "kind", "images", "step", "time", "data_wait", "skipped_images"}  # of a log line
NO_MEANING = {"better": "", "role": "detail", "about": "", "of": None, "point": None, "levels": (), "warning": ""}


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
    results = [
        {**result, "results": [{**NO_MEANING, **entry} for entry in result["results"]]}
        for result in files if result and "results" in result
    ]  # fmt: skip
    data = provenance.get("data") or {}

    history = _history(lines, results)
    meanings = {(result["protocol"], entry["name"]): entry for result in results for entry in result["results"]}
    ep_rows = _ep_rows(history, meanings, _train_samples(data))
    header = _header(run_dir, spec, provenance, lines)
    summary = _summary(spec, provenance, lines, results, data)
    warnings += _health(lines)
    warnings += [f"{result['protocol']}: {text}." for result in results for text in result.get("warnings", ())]
    samples = {stage: _grids(run_dir / "samples", stage) for stage in STAGES} | {
        "guidance": [
            {"data": _base64(file), "label": file.stem.removeprefix("guidance-").replace("_", " ")}
            for file in sorted((run_dir / "samples").glob("guidance-*.png"))
        ],
    }
    guidance_names, compared = _compared(results)
    date = time.strftime("%Y-%m-%d %H:%M")
    page = {
        "header": header, "summary": summary, "warnings": warnings, "samples": samples,
        "big_width": 720, "max_events": MAX_EVENTS, "guidance_names": guidance_names, "compared": compared,
        "evaluations": [_evaluation(result, run_dir) for result in results],
        "history_charts": _history_charts(history, meanings), "ep_rows": ep_rows,
        "published": _published(spec), "sources": published()["sources"], "stages": _stages(lines), "data": _flat(data),
        "events": [line for line in lines if line.get("kind") == "event"],
        "provenance": _flat({**provenance, "data": None}),
        "spec_text": spec_text, "glossary": glossary(meanings.values()), "version": version("raev2"), "date": date,
    }  # fmt: skip
    template = (resources.files("raev2") / "assets" / "report.html.j2").read_text()
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "direction": direction, "guidance": _guidance, "sampler": _sampler}
    file = run_dir / "report.html"
    write_text(file, environment.from_string(template).render(page))
    write_json(
        run_dir / "report.json",
        _plain({
            "format_version": REPORT_FORMAT_VERSION, "date": date, "title": header["title"],
            "facts": dict(header["facts"]), "sentences": summary["sentences"], "warnings": warnings,
            "training": {stage: trained[-1] for stage in STAGES if (trained := _of(lines, stage, "train"))},
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
    threads, processes = provenance.get("num_threads"), provenance.get("processes")
    machine = [
        *(provenance.get(name) for name in ("machine", "device", "platform")), threads and f"{threads} threads",
        processes and f"{processes} process{'es' if processes > 1 else ''}",
    ]  # fmt: skip
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
    sentences += [sentence for result in results for sentence in _in_words(result)]
    if not results:
        sentences.append("Nothing was evaluated yet, so there are no metrics.")
    return {"sentences": sentences, "tiles": _tiles(results)}


def _tiles(results: Sequence[Mapping]) -> list[tuple[Mapping, Mapping]]:
    """Headlines with their results: the first of every protocol, then the second, and so on; a name once."""
    tiles: dict[str, tuple[Mapping, Mapping]] = {}
    of_protocols = [[(result, e) for e in result["results"] if e["role"] == "headline"] for result in results]
    for result, entry in filter(None, chain(*zip_longest(*of_protocols))):
        tiles.setdefault(entry["name"], (result, entry))
    return list(tiles.values())[:MAX_TILES]


def direction(entry: Mapping) -> str:
    """'lower' or 'higher' is better, or what a row is the scale of; empty for results of old files."""
    return f"scale of {entry['of']}" if entry.get("of") else entry.get("better", "")


def _in_words(result: Mapping) -> list[str]:
    """The first headline of a protocol that has a scale, beside it."""
    for entry in result["results"]:
        scale = [row for row in result["results"] if row["of"] == entry["name"]]
        if entry["role"] == "headline" and scale:
            beside = "; ".join(f"{row['name']} {number(row['value'])} ({row['about'].rstrip('.')})" for row in scale)
            return [
                f"Protocol {result['protocol']}: {entry['name']} is {number(entry['value'])}, n = "
                f"{entry['num_samples']:,}; {entry['warning'] or f'{direction(entry)} is better'}. "
                f"On the same scale: {beside}."
            ]
    return []


def _health(lines: Sequence[Mapping]) -> list[str]:
    skipped = sum(line.get("event") == "non_finite" for line in lines)
    unreadable = max((line.get("skipped_images", 0) for line in lines), default=0)
    steps = "Training steps skipped because loss or gradient was not finite"
    counts = {steps: skipped, "Unreadable images replaced while training": unreadable}
    found = [f"{line['stage']}, step {line['step']}: {line['finding']}" for line in lines if "finding" in line]
    return [*(f"{what}: {count}." for what, count in counts.items() if count), *found]


def _wall_seconds(lines: Sequence[Mapping]) -> float:
    """From first to last log line, without pauses of more than half an hour."""
    times = [line["time"] for line in lines if "time" in line]
    gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
    return float(sum(gap for gap in gaps if 0 < gap < PAUSE_SECONDS))


# ---------------------------------------------------------------------------------------------------------------------
# Training curves


def _stages(lines: Sequence[Mapping]) -> list[dict[str, Any]]:
    stages = []
    for stage, title in STAGES.items():
        logged = _of(lines, stage, "train")
        if not logged:
            continue
        numbers = (n for line in logged for n, value in line.items() if type(value) in (int, float))
        names = [name for name in dict.fromkeys(numbers) if name not in NO_LOSS]
        charts = [_train_chart(logged, names, chart) for chart in CURVES]
        last = logged[-1]
        text = f"{int(last['images']):,} images in {int(last.get('step', 0)):,} steps, {len(logged):,} log lines."
        if "data_wait" in last:
            waits = [line["data_wait"] for line in logged if "data_wait" in line]
            text += f" Waiting for data took {sum(waits) / len(waits):.0%} of the time."
        stages.append({"title": title, "text": text, "charts": [chart for chart in charts if chart]})
    return stages


def _train_chart(logged: Sequence[Mapping], names: Sequence[str], title: str) -> dict[str, str] | None:
    pattern, about = CURVES[title]
    window = max(1, len(logged) // 25) if title != LEARNING_RATE else 1
    how = f"mean of the last {window} log lines (bold) and the log lines themselves (thin)" if window > 1 else ""
    series = []
    for name in names:
        if re.fullmatch(pattern, name):
            points = [(line["images"], float(line[name])) for line in logged if name in line]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            series.append(Series(name, xs, smooth(ys, window), raw=ys if window > 1 else ()))
    caption = "; ".join(filter(None, (about, how)))
    caption = f"{caption[:1].upper()}{caption[1:]}" + "." * bool(caption)
    return _chart(title, series, caption, linear=title in (LEARNING_RATE, IMAGES_PER_S))


def _chart(title: str, series: Sequence[Series], caption: str, linear: bool = False) -> dict[str, Any] | None:
    """Lines over images seen, on a logarithmic scale where they span a factor of 5; None without a finite value."""
    values = [y for line in series for y in line.ys if math.isfinite(y)]
    log = bool(values) and not linear and min(values) > 0 and max(values) / min(values) > 5
    svg = line_chart(series, title=title, x_label="images seen", log=log)
    return {"title": title, "svg": svg, "caption": (caption + " Logarithmic scale." * log).strip()} if svg else None


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

History = dict[tuple[str, str], list[tuple[float, float]]]  # (protocol, metric) -> (images seen, value)
Meanings = dict[tuple[str, str], Mapping]  # (protocol, metric) -> its last result, which says what it means


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


def _history_charts(history: History, meanings: Meanings) -> list[dict[str, Any]]:
    charts = []
    for (protocol, name), points in history.items():
        meaning = meanings.get((protocol, name), NO_MEANING)
        if len(points) < 2 or meaning["role"] == "scale":
            continue
        scale = _scale_of(protocol, name, meanings)
        series = [Series(name, [x for x, _ in points], [y for _, y in points], points=True)]
        series += [Series(row["name"], [0], [row["value"]], constant=True) for row in scale]
        caption = f"Protocol {protocol}." + (f" Better: {meaning['better']}." if meaning["better"] else "")
        chart = _chart(name, series, caption + " Dashed: the scale." * bool(scale))
        if chart:
            charts.append({**chart, "headline": meaning["role"] == "headline"})
    return charts


def _ep_rows(history: History, meanings: Meanings, train_samples: int | None) -> list[dict[str, Any]]:
    rows = []
    for (protocol, name), points in history.items():
        for level in _levels(protocol, name, meanings) if len(points) > 1 else ():
            k = float(f"{level:.3g}")
            images = ep_fid(points, k)
            last = f"not within {points[-1][0]:,.0f}"
            epochs = f"{images / train_samples:.1f}" if images is not None and train_samples else ""
            rows.append(
                {
                    "name": f"EP_{name}@{number(k)}", "protocol": protocol, "k": k,
                    "images": f"{images:,.0f}" if images is not None else last, "epochs": epochs,
                    "images_exact": images,
                }
            )  # fmt: skip
    return rows


def _levels(protocol: str, name: str, meanings: Meanings) -> list[float]:
    """Values of a headline worth reaching: published ones, the worst of its scale, the middle of worst and best."""
    meaning = meanings.get((protocol, name), NO_MEANING)
    if meaning["role"] != "headline" or meaning["better"] != "lower":
        return []
    scale = sorted(row["value"] for row in _scale_of(protocol, name, meanings) if row["value"] > 0)
    return [*meaning["levels"], *scale[-1:], *([math.sqrt(scale[0] * scale[-1])] if len(scale) > 1 else [])]


def _scale_of(protocol: str, name: str, meanings: Meanings) -> list[Mapping]:
    return [entry for (owner, _), entry in meanings.items() if owner == protocol and entry["of"] == name]


def _evaluation(result: Mapping, run_dir: Path) -> dict[str, Any]:
    reference, sampling = result.get("reference") or {}, result.get("sampling")
    seen, decay = result.get("images_seen"), result.get("ema_decay")
    parts = [
        str(result.get("description", "")).strip().capitalize(),
        f"Weights after {seen:,} images{f', averaged with decay {decay}' if decay else ''}" if seen is not None else "",
        f"Sampling: {_sampler(sampling)}, guidance {_guidance(sampling)}" if sampling else "",
        f"Conditions: {result['label_policy']}" if result.get("label_policy") else "",
        f"Reference {reference['fingerprint'][:12]}" if reference.get("fingerprint") else "",
        str(result.get("date") or ""),
    ]
    details = {name: value for name, value in result.items() if name not in ("results", "spec")}
    picture = run_dir / "eval" / f"{result['protocol']}.png"
    points, point_rows = _by_point(result["results"])
    return {
        "protocol": result["protocol"], "text": ". ".join(part for part in parts if part) + ".",
        "results": result["results"], "points": points, "point_rows": point_rows,
        "no_meaning": any(not row["about"] for row in result["results"]),
        "picture": {"data": _base64(picture), "label": result.get("picture", "")} if picture.is_file() else None,
        "details": yaml.safe_dump(_plain(details), sort_keys=False, allow_unicode=True),
    }  # fmt: skip


def _by_point(entries: Sequence[Mapping]) -> tuple[list[str], list[dict[str, Any]]]:
    """Results at a point, such as a horizon, as a table: a column for each point, a row for each metric."""
    at_points = [entry for entry in entries if entry["point"]]
    points = list(dict.fromkeys(entry["point"] for entry in at_points))
    rows: dict[str, dict[str, Any]] = {}
    for entry in at_points:
        name = entry["name"].replace(f"@{entry['point']}", "")
        new = {"name": name, "role": entry["role"], "better": entry["better"], "cells": [""] * len(points)}
        error = f" ± {number(entry['stderr'])}" if entry["stderr"] is not None else ""
        rows.setdefault(name, new)["cells"][points.index(entry["point"])] = f"{number(entry['value'])}{error}"
    return points, list(rows.values())


def _compared(results: Sequence[Mapping]) -> tuple[list[str], list[tuple[Mapping, dict[str, float]]]]:
    """Metrics, and their values under different guidance; empty where only one setting was evaluated."""
    sampled = [result for result in results if result.get("sampling")]
    if len({json.dumps(result["sampling"].get("guidance"), sort_keys=True) for result in sampled}) < 2:
        return [], []
    names = dict.fromkeys(e["name"] for result in sampled for e in result["results"] if e["role"] != "scale")
    return [*names], [(result, {e["name"]: e["value"] for e in result["results"]}) for result in sampled]


def _guidance(sampling: Mapping) -> str:
    guidance = dict(sampling.get("guidance") or {"kind": "none"})
    kind = guidance.pop("kind", "none")
    return ", ".join([str(kind), *(f"{name.replace('_', ' ')} {value}" for name, value in guidance.items())])


def _sampler(sampling: Mapping) -> str:
    return f"{sampling.get('solver', '?')}, {sampling.get('steps', '?')} steps"


def glossary(entries: Iterable[Mapping]) -> list[tuple[str, str]]:
    """(names, what they mean); names with one meaning together."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        if entry.get("about"):
            better = " A scale row." if entry["of"] else f" {entry['better'].capitalize()} is better."
            found.setdefault(entry["about"] + better, {})[entry["name"]] = None
    return [(", ".join(names), text) for text, names in found.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Files


def _log_lines(file: Path, warnings: list[str]) -> list[dict[str, Any]]:
    lines = json_lines(file)
    if broken := lines.count(None):
        warnings.append(f"Damaged lines of metrics.jsonl that were left out: {broken}.")
    return [{"images": 0, **line} for line in lines if line is not None]


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


def _published(spec: Mapping) -> list[Mapping]:
    """Published numbers of the system that a run's recipe describes."""
    task, recipe = (spec.get("task") or {}).get("name"), spec.get("recipe")
    return [row for row in published_results(recipe) if row["task"] == task] if recipe else []


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


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _plain(value: Any) -> Any:
    """JSON types without NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def _read_text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _read_json(file: Path, warnings: list[str]) -> dict[str, Any] | None:
    text = _read_text(file)
    try:
        return dict(json.loads(text)) if text is not None else None
    except (TypeError, ValueError):
        warnings.append(f"{file.name} is damaged and was left out.")
        return None


def _base64(file: Path) -> str:
    return base64.b64encode(file.read_bytes()).decode()
