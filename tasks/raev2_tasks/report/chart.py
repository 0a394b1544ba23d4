"""Line charts as SVG text, without a plotting library: colours come from the page's style sheet, also in dark mode.

line_chart([Series("loss", xs, ys)], title="Loss", x_label="images seen", log=True)
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
MAX_POINTS, MAX_READINGS = 400, 60
Number = float | int
At = Callable[[Number], Number]
Point = TypeVar("Point")


@dataclass(frozen=True)
class Series:
    """One line. `raw` is drawn thin behind it; a `constant` is drawn dashed over the whole width."""

    name: str
    xs: Sequence[Number]
    ys: Sequence[Number]
    raw: Sequence[Number] = ()
    points: bool = False
    constant: bool = False


def line_chart(series: Sequence[Series], *, title: str, x_label: str, log: bool = False) -> str:
    """An SVG of all series in one frame, with a legend; values show under the pointer, those that are finite."""

    def drawn(y: Number) -> bool:
        return math.isfinite(y) and (y > 0 or not log)

    values = [y for line in series for y in (*line.ys, *line.raw) if drawn(y)]
    places = [x for line in series if not line.constant for x in line.xs]
    if not values or not places:
        return ""
    low, high, ticks = _log_range(values) if log else _linear_range(values)
    left, right = min(places), max(places)
    right = right if right > left else left + 1
    base, end = HEIGHT - BOTTOM, WIDTH - RIGHT

    def at_x(x: Number) -> Number:
        return LEFT + (x - left) / (right - left) * (end - LEFT)

    def at_y(y: Number) -> Number:
        return base - ((math.log10(y) if log else y) - low) / (high - low) * (base - TOP)

    def path(xs: Sequence[Number], ys: Sequence[Number], style: str) -> None:
        points = _thin(list(zip(xs, ys, strict=True)), MAX_POINTS)
        parts = [
            f"{'L' if i and drawn(points[i - 1][1]) else 'M'}{at_x(x):.1f},{at_y(y):.1f}"
            for i, (x, y) in enumerate(points)
            if drawn(y)
        ]
        out.extend([f'<path class="{style}" d="{"".join(parts)}"/>'] if parts else [])

    def text(x: Number, y: Number, anchor: str, content: str, style: str = "") -> None:
        out.append(f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>')

    out = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in ticks:
        y = at_y(tick)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        text(LEFT - 8, y + 4, "end", number(tick))
    for tick in _linear_range([left, right], 6)[2]:
        if left <= tick <= right:
            text(at_x(tick), base + 17, "end" if at_x(tick) > end - 20 else "middle", number(tick))
    out.append(f'<line class="axis" x1="{LEFT}" x2="{end}" y1="{base}" y2="{base}"/>')
    text((LEFT + end) / 2, HEIGHT - 4, "middle", escape(x_label), ' class="label"')
    keys = []
    for n, line in enumerate(series):
        colour, name = f"c{n % 8}", escape(line.name)
        keys.append(f'<span><i class="key {colour}{" dashed" * line.constant}"></i>{name}</span>')
        if line.constant:
            path([left, right], [line.ys[0]] * 2, f"line dashed {colour}")
            continue
        if line.raw:
            path(line.xs, line.raw, f"line raw {colour}")
        path(line.xs, line.ys, f"line {colour}")
        for x, y in zip(line.xs, line.ys, strict=True) if line.points or len(line.xs) == 1 else ():
            if drawn(y):
                out.append(f'<circle class="dot {colour}" cx="{at_x(x):.1f}" cy="{at_y(y):.1f}" r="3.2"/>')
    return "".join([*out, *_readings(series, x_label, at_x), "</svg>", '<div class="legend">', *keys, "</div>"])


def _readings(series: Sequence[Series], x_label: str, at_x: At) -> list[str]:
    """Columns over the frame; under the pointer one shows its place and the value that each line has there."""
    lines = [(n, line) for n, line in enumerate(series) if not line.constant]
    places = _thin(sorted({x for _, line in lines for x in line.xs}), MAX_READINGS)
    middles = [(at_x(a) + at_x(b)) / 2 for a, b in zip(places, places[1:], strict=False)]
    out = []
    for x, start, end in zip(places, [LEFT, *middles], [*middles, WIDTH - RIGHT], strict=True):
        told = [("", f"{number(x)} {x_label}")]
        for n, line in lines:
            last = bisect_right(line.xs, x) - 1
            if last >= 0 and math.isfinite(line.ys[last]):
                told.append((f"c{n % 8}", f"{line.name} {number(line.ys[last])}"))
        at, anchor, base = at_x(x), "start" if at_x(x) < WIDTH / 2 else "end", HEIGHT - BOTTOM
        beside = at + (6 if anchor == "start" else -6)
        text = "".join(f'<tspan class="{c}" x="{beside:.1f}" dy="15">{escape(t)}</tspan>' for c, t in told)
        out.append(
            f'<g class="at"><rect x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{base - TOP}"/>'
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{base}"/>'
            f'<text y="{TOP}" text-anchor="{anchor}">{text}</text></g>'
        )
    return out


COLOURS = ("#2a6fdb", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0b7285", "#e67700", "#495057")


def standalone(chart: str, series: Sequence[Series]) -> str:
    """A chart of `line_chart` as an SVG file of its own: colours inside, the legend at the top right."""
    svg = chart[: chart.index("</svg>")]
    css = "text{font:11.5px sans-serif;fill:#555}.grid{stroke:#e3e3e3}.axis{stroke:#888}"
    css += ".line{fill:none;stroke-width:2}.raw{opacity:.3}.dashed{stroke-dasharray:5 4}"
    css += ".at rect{fill:transparent}.at line{stroke:#888}.at line,.at text{visibility:hidden}"
    css += ".at:hover *{visibility:visible}.at text{paint-order:stroke;stroke:#fff;stroke-width:4px}"
    css += "".join(
        f".line.c{n}{{stroke:{colour}}}.dot.c{n}{{fill:{colour}}}tspan.c{n}{{fill:{colour}}}"
        for n, colour in enumerate(COLOURS)
    )
    legend = "".join(
        f'<text x="{WIDTH - RIGHT - 4}" y="{TOP + 12 + 14 * n}" text-anchor="end" style="fill:{COLOURS[n % 8]}">'
        f"{escape(line.name)}</text>"
        for n, line in enumerate(series)
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}"'
    return svg.replace("<svg", head, 1).replace(">", f"><style>{css}</style>", 1) + legend + "</svg>\n"


def smooth(ys: Sequence[Number], window: int) -> list[Number]:
    """Mean of the last `window` finite values."""
    out, recent = [], []  # type: list[Number], list[Number]
    for y in ys:
        if math.isfinite(y):
            recent = [*recent[-(window - 1) :], y] if window > 1 else [y]
        out.append(sum(recent) / len(recent) if recent else math.nan)
    return out


def number(value: Number) -> str:
    """Three or four significant digits, in the shortest common form: 12,800; 0.0312; 2e-05; 1.2M."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    if size >= 1000:
        return f"{value:,.0f}"
    if size == 0 or size >= 1e-3:
        return f"{value:.4g}"
    return f"{value:.3g}"


def _linear_range(values: Sequence[Number], num_ticks: int = 5) -> tuple[Number, Number, list[Number]]:
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal but for rounding
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    rough = (high - low) / num_ticks
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [round(i * step, 12) for i in range(first, last + 1)]


def _log_range(values: Sequence[Number]) -> tuple[Number, Number, list[Number]]:
    low, high = math.log10(min(values)), math.log10(max(values))
    pad = max(0.04 * (high - low), 0.02)
    low, high = low - pad, high + pad
    factors = (1, 2, 5) if high - low < 3 else (1,)
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in factors
        if low <= math.log10(factor * 10.0**power) <= high
    ]
    if len(ticks) < 2:  # less than a factor of two: ticks like those of a linear axis
        ticks = [tick for tick in _linear_range(values)[2] if tick > 0 and low <= math.log10(tick) <= high]
    return low, high, ticks


def _thin(points: list[Point], most: int) -> list[Point]:
    """Every n-th point, the last one included."""
    step = math.ceil(len(points) / most)
    return points if step <= 1 else [*points[:-1:step], points[-1]]
