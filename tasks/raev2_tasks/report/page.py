"""Run folders -> one self-contained page, with the same numbers as JSON beside it. One run is a comparison of one.

Read `write_report` first. Everything comes from files of the run folders; a part that is missing is left out with a
sentence, and no number is computed here except the point where a metric reached a value (`ep_fid`).
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment

from raev2 import __version__
from raev2.eval.protocols import direction, ep_fid, glossary
from raev2.files.artefact import write_json
from raev2.files.images import read_rgb
from raev2.files.replace import write_text
from raev2_tasks.report.chart import Series, line_chart, number, smooth
from raev2_tasks.report.published import published, published_results
from raev2_tasks.report.read import NO_MEANING, RunFiles, flat, picture, read_runs

REPORT_FORMAT_VERSION = 2
STAGES = {"tokenizer": "Tokenizer (stage 1)", "generator": "Generator (stage 2)"}
MAX_TILES = 8
LEARNING_RATE, IMAGES_PER_S = "Learning rate", "Speed, images/s"  # always on a linear scale
CURVES = {  # charts of a training: names of their values, and what these are
    "Losses": (r"(?!lr$|lr_|grad_norm|gan|disc|images_per_s).*(?<!weight)", ""),
    "Adversarial losses": ("(gan|disc).*", ""),
    LEARNING_RATE: ("lr|lr_.*", "as used in the step"),
    "Gradient norm": ("grad_norm.*", "before clipping"),
    "Adaptive weight": (".*weight", ""),
    IMAGES_PER_S: ("images_per_s", ""),
}
PNG = re.compile(r"data:image/png;base64,([\w+/=]+)")
NO_LOSS = {"stage", "kind", "images", "step", "time", "data_wait", "skipped_images"}  # of a log line
Runs = Sequence[RunFiles]


def write_report(*run_dirs: str | Path, out: str | Path | None = None, small: bool = False) -> Path:
    """Write the page about some runs, `report.html` in the folder of a single one, and its JSON; the page's path.

    small   pictures at half size and lossy
    """
    runs = read_runs([Path(run_dir) for run_dir in run_dirs])
    file, date = Path(out or runs[0].dir / "report.html"), time.strftime("%Y-%m-%d %H:%M")
    views = [_view(run) for run in runs]
    titles = [view["title" if len(runs) == 1 else "name"] for view in views]
    page = {
        "runs": views, "title": " and ".join(titles), "stages": STAGES, "tiles": _tiles(runs),
        "guided_names": _guided_names(views), "fact_names": list(dict.fromkeys(chain(*(v["facts"] for v in views)))),
        "several": len(runs) > 1, "differences": _differences(runs),
        "evaluations": _evaluations(runs), "history_charts": _history_charts(runs), "curves": _curves(runs),
        "published": _published(runs), "sources": published()["sources"],
        "glossary": glossary(chain(*(run.meanings.values() for run in runs))), "version": __version__, "date": date,
    }  # fmt: skip
    template = (resources.files("raev2_tasks.report") / "report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": number, "direction": direction, "guidance": _guidance, "sampler": _sampler, "in_yaml": _in_yaml,
        "count_of": "{:,}".format,
    }  # fmt: skip
    html = environment.from_string(template).render(page)
    write_text(file, PNG.sub(_smaller, html) if small else html)
    told = {"format_version": REPORT_FORMAT_VERSION, "date": date, "differences": page["differences"]}
    write_json(file.with_suffix(".json"), _plain({**told, "runs": list(map(_numbers, runs, views))}))
    return file


def _smaller(png: re.Match[str]) -> str:
    """A picture of the page as a WebP of half its size."""
    half = read_rgb(base64.b64decode(png[1]), "a picture of the report").reduce(2)
    encoded = io.BytesIO()
    half.save(encoded, "WEBP", quality=50)
    return f"data:image/webp;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _numbers(run: RunFiles, view: Mapping) -> dict[str, Any]:
    """What the JSON file says of a run."""
    return {
        "run": run.name, **{name: view[name] for name in ("title", "facts", "sentences", "warnings", "ep")},
        "training": {stage: run.trained(stage)[-1] for stage in STAGES if run.trained(stage)},
        "evaluations": run.results, "data": run.data, "provenance": run.provenance,
        "history": [
            {"protocol": key[0], "metric": key[1], "images": [x for x, _ in at], "values": [y for _, y in at]}
            for key, at in run.history.items()
        ],
    }  # fmt: skip


# What is said of each run


def _view(run: RunFiles) -> dict[str, Any]:
    """What the page shows of a run alone."""
    task, recipe = (run.spec.get("task") or {}).get("name"), run.spec.get("recipe")
    facts = {
        "Task": task, "Recipe": recipe, "Started": run.provenance.get("started"), "Machine": _machine(run.provenance),
        "Code revision": run.provenance.get("git_revision") or run.provenance.get("git"),
        "Spec fingerprint": run.spec.get("fingerprint") or run.provenance.get("spec_fingerprint"),
        "Wall time, from the log": _duration(run.wall_seconds) if run.wall_seconds else None,
        "Run folder": run.dir.resolve().name,
    }  # fmt: skip
    guided = sorted((run.dir / "samples").glob("guidance-*.png"))
    sampled = [result for result in run.results if result.get("sampling")]
    settings = {json.dumps(result["sampling"].get("guidance"), sort_keys=True) for result in sampled}
    return {
        "name": run.name, "title": f"{task}: {recipe}" if task and recipe else run.dir.name, 
        "sentences": _sentences(run),
        "facts": {name: str(value) for name, value in facts.items() if value}, "splits": run.data.get("splits") or {},
        "samples": {stage: run.grids(stage) for stage in STAGES}, "sampling": run.spec.get("sampling"),
        "guided": [picture(f, f.stem.removeprefix("guidance-").replace("_", " ")) for f in guided],
        "compared": [(r, {e["name"]: e for e in r["results"]}) for r in sampled] if len(settings) > 1 else [],
        "ep": _ep_rows(run), "data": dict(run.data),
        "trained": {stage: _trained(run.trained(stage)) for stage in STAGES}, "data_rows": list(flat(run.data)),
        "events": [line for line in run.lines if line.get("kind") == "event"], "spec_text": run.spec_text,
        "provenance": list(flat({**run.provenance, "data": None})),
        "warnings": [*run.warnings, *_health(run)],
    }  # fmt: skip


def _machine(provenance: Mapping) -> str:
    threads, processes = provenance.get("num_threads"), provenance.get("processes")
    parts = [
        *(provenance.get(name) for name in ("machine", "device", "platform")), threads and f"{threads} threads",
        processes and f"{processes} process{'es' if processes > 1 else ''}",
    ]  # fmt: skip
    return ", ".join(str(part) for part in parts if part)


def _sentences(run: RunFiles) -> list[str]:
    done = []
    for stage in STAGES:
        if trained := run.trained(stage):
            images = int(trained[-1]["images"])
            epochs = f" ({images / run.train_samples:.1f} epochs)" if run.train_samples else ""
            planned = ((run.spec.get(f"{stage}_training") or {}).get("images")) or images
            part = f", {images / planned:.0%} of the plan" if images < planned else ""
            done.append(f"the {stage} saw {images:,} images{epochs}{part}")
    on = f" on {run.provenance['device']}" if run.provenance.get("device") else ""
    sentences = [f"In this run {' and '.join(done)}{on}."] if done else []
    sentences += [sentence for result in run.results for sentence in _in_words(result)]
    return sentences if run.results else [*sentences, "Nothing was evaluated yet, so there are no metrics."]


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


def _health(run: RunFiles) -> list[str]:
    skipped = sum(line.get("event") == "non_finite" for line in run.lines)
    unreadable = max((line.get("skipped_images", 0) for line in run.lines), default=0)
    steps = "Training steps skipped because loss or gradient was not finite"
    counts = {steps: skipped, "Unreadable images replaced while training": unreadable}
    found = [f"{line['stage']}, step {line['step']}: {line['finding']}" for line in run.lines if "finding" in line]
    said = [f"{result['protocol']}: {text}." for result in run.results for text in result.get("warnings", ())]
    return [*(f"{what}: {count}." for what, count in counts.items() if count), *found, *said]


def _trained(logged: Sequence[Mapping]) -> str:
    """How much of a stage there is."""
    if not logged:
        return ""
    last, waits = logged[-1], [line["data_wait"] for line in logged if "data_wait" in line]
    text = f"{int(last['images']):,} images in {int(last.get('step', 0)):,} steps, {len(logged):,} log lines."
    return text + (f" Waiting for data took {sum(waits) / len(waits):.0%} of the time." if waits else "")


def _ep_rows(run: RunFiles) -> list[dict[str, Any]]:
    rows = []
    for (protocol, name), points in run.history.items():
        for level in _levels(run, protocol, name) if len(points) > 1 else ():
            k = float(f"{level:.3g}")
            images = ep_fid(points, k)
            last = f"not within {points[-1][0]:,.0f}"
            epochs = f"{images / run.train_samples:.1f}" if images is not None and run.train_samples else ""
            rows.append(
                {
                    "name": f"EP_{name}@{number(k)}", "protocol": protocol, "k": k,
                    "images": f"{images:,.0f}" if images is not None else last, "epochs": epochs,
                    "images_exact": images,
                }
            )  # fmt: skip
    return rows


def _levels(run: RunFiles, protocol: str, name: str) -> list[float]:
    """Values of a headline worth reaching: published ones, the worst of its scale, the middle of worst and best."""
    meaning = run.meanings.get((protocol, name), NO_MEANING)
    if meaning["role"] != "headline" or meaning["better"] != "lower":
        return []
    scale = sorted(row["value"] for row in run.scale_of(protocol, name) if row["value"] > 0)
    return [*meaning["levels"], *scale[-1:], *([math.sqrt(scale[0] * scale[-1])] if len(scale) > 1 else [])]


def _published(runs: Runs) -> list[Mapping]:
    """Published numbers of the systems that the recipes of the runs describe."""
    systems = dict.fromkeys(((run.spec.get("task") or {}).get("name"), run.spec.get("recipe")) for run in runs)
    return [row for task, recipe in systems if recipe for row in published_results(recipe) if row["task"] == task]


# Side by side


def _differences(runs: Runs) -> list[tuple[str, list[str]]]:
    """Fields of the specs that are not the same in all runs, with the value of each."""
    specs = [dict(flat({**run.spec, "fingerprint": None, "summary": None})) for run in runs]
    rows = [(name, [spec.get(name, "") for spec in specs]) for name in dict.fromkeys(chain(*specs))]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _rows(runs: Runs, protocol: str) -> list[tuple[Mapping, list[Mapping | None]]]:
    """Metrics of a protocol: what one says of itself, and the row that each run has of it."""
    found = {e["name"]: e for run in runs for (owner, _), e in run.meanings.items() if owner == protocol}
    return [(entry, [run.meanings.get((protocol, name)) for run in runs]) for name, entry in found.items()]


def _guided_names(views: Sequence[Mapping]) -> list[str]:
    """Metrics of the results under several settings of guidance."""
    rows = chain(*(found.values() for view in views for _, found in view["compared"]))
    return list(dict.fromkeys(entry["name"] for entry in rows if entry["role"] != "scale"))


def _protocols(runs: Runs) -> list[str]:
    return sorted({result["protocol"] for run in runs for result in run.results})


def _tiles(runs: Runs) -> list[tuple[str, Mapping, list[Mapping | None]]]:
    """Headlines by protocol: the first of each one, then the second, and so on; a name once."""
    of_protocols = [
        [(protocol, *row) for row in _rows(runs, protocol) if row[0]["role"] == "headline"]
        for protocol in _protocols(runs)
    ]  # fmt: skip
    found = {tile[1]["name"]: tile for tile in reversed([*filter(None, chain(*zip_longest(*of_protocols)))])}
    return list(reversed(found.values()))[:MAX_TILES]


def _evaluations(runs: Runs) -> list[dict[str, Any]]:
    tables = []
    for protocol in _protocols(runs):
        rows, results = _rows(runs, protocol), []
        for run in runs:
            file = run.dir / "eval" / f"{protocol}.png"
            for result in run.results:
                if result["protocol"] == protocol:
                    shown = picture(file, result.get("picture", "")) if file.is_file() else None
                    results.append((run.name, result, shown))
        references = {str((result.get("reference") or {}).get("fingerprint")) for _, result, _ in results}
        points = list(dict.fromkeys(entry["point"] for entry, _ in rows if entry["point"]))
        tables.append({
            "protocol": protocol, "results": results, "rows": rows, "points": points, "differ": len(references) > 1,
            "point_rows": _by_point(runs, rows, points), "no_meaning": any(not entry["about"] for entry, _ in rows),
        })  # fmt: skip
    return tables


def _by_point(
    runs: Runs, rows: Sequence[tuple[Mapping, list]], points: Sequence[str]
) -> list[tuple[str, str, Mapping, dict]]:
    """Results at a point, such as a horizon: a row for each metric and run, its results by point."""
    found: dict[tuple[str, str], tuple[str, str, Mapping, dict]] = {}
    for entry, cells in rows:
        for run, cell in zip(runs, cells, strict=True):
            if cell and cell["point"]:
                name = entry["name"].replace(f"@{entry['point']}", "")
                found.setdefault((name, run.name), (name, run.name, entry, {}))[3][cell["point"]] = cell
    return list(found.values())


def _history_charts(runs: Runs) -> list[dict[str, Any]]:
    """A chart for each metric that was measured more than once, with a line for each run."""
    charts = []
    for protocol, name in dict.fromkeys(chain(*(run.history for run in runs))):
        owner = next((run for run in runs if (protocol, name) in run.meanings), runs[0])
        meaning = owner.meanings.get((protocol, name), NO_MEANING)
        points = [run.history.get((protocol, name), []) for run in runs]
        if max(map(len, points)) < 2 or meaning["role"] == "scale":
            continue
        scale = owner.scale_of(protocol, name)
        labels = [run.name if len(runs) > 1 else name for run in runs]
        series = [Series(label, *_columns(at), points=True) for label, at in zip(labels, points, strict=True)]
        series += [Series(row["name"], [0], [row["value"]], constant=True) for row in scale]
        caption = f"Protocol {protocol}." + (f" Better: {meaning['better']}." if meaning["better"] else "")
        if chart := _chart(name, series, caption + " Dashed: the scale." * bool(scale)):
            charts.append({**chart, "headline": meaning["role"] == "headline"})
    return charts


def _curves(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Charts by stage. Lines of one run share those of `CURVES`; of several runs, each value has its own."""
    charts: dict[str, list[dict[str, Any]]] = {}
    for stage in STAGES:
        logged = [run.trained(stage) for run in runs]
        numbers = (n for line in chain(*logged) for n, value in line.items() if type(value) in (int, float))
        names = [name for name in dict.fromkeys(numbers) if name not in NO_LOSS]
        for kind, (pattern, about) in CURVES.items():
            own = [name for name in names if re.fullmatch(pattern, name)]
            for title, group in [(name, [name]) for name in own] if len(runs) > 1 else [(kind, own)]:
                lines = [
                    (run.name if len(runs) > 1 else name, [(at["images"], float(at[name])) for at in of if name in at])
                    for name in group for run, of in zip(runs, logged, strict=True)
                ]  # fmt: skip
                if chart := _train_chart(title, lines, about, linear=kind in (LEARNING_RATE, IMAGES_PER_S)):
                    charts.setdefault(stage, []).append(chart)
    return charts


def _train_chart(title: str, lines: Sequence[tuple[str, list]], about: str, linear: bool) -> dict[str, Any] | None:
    longest = max((len(points) for _, points in lines), default=0)
    window = max(1, longest // 25) if about != CURVES[LEARNING_RATE][1] else 1
    how = f"mean of the last {window} log lines (bold) and the log lines themselves (thin)" if window > 1 else ""
    series = []
    for name, points in lines:
        xs, ys = _columns(points)
        series.append(Series(name, xs, smooth(ys, window), raw=ys if window > 1 else ()))
    caption = "; ".join(filter(None, (about, how)))
    return _chart(title, series, f"{caption[:1].upper()}{caption[1:]}" + "." * bool(caption), linear)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _chart(title: str, series: Sequence[Series], caption: str, linear: bool = False) -> dict[str, Any] | None:
    """Lines over images seen, on a logarithmic scale where they span a factor of 5; None without a finite value."""
    values = [y for line in series for y in line.ys if math.isfinite(y)]
    log = bool(values) and not linear and min(values) > 0 and max(values) / min(values) > 5
    svg = line_chart(series, title=title, x_label="images seen", log=log)
    return {"title": title, "svg": svg, "caption": (caption + " Logarithmic scale." * log).strip()} if svg else None


# Words


def _guidance(sampling: Mapping) -> str:
    guidance = dict(sampling.get("guidance") or {"kind": "none"})
    kind = guidance.pop("kind", "none")
    return ", ".join([str(kind), *(f"{name.replace('_', ' ')} {value}" for name, value in guidance.items())])


def _sampler(sampling: Mapping) -> str:
    return f"{sampling.get('solver', '?')}, {sampling.get('steps', '?')} steps"


def _in_yaml(result: Mapping) -> str:
    details = {name: value for name, value in result.items() if name not in ("results", "spec")}
    return yaml.safe_dump(_plain(details), sort_keys=False, allow_unicode=True)


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def _plain(value: Any) -> Any:
    """JSON types without NaN and infinity, which JSON does not have."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)
