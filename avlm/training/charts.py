"""What a run's page is made of beside what all pages share: line charts as plain SVG, and media inside the page.

The charts have no fixed width. Lines are drawn in a square that stretches with the page while strokes keep their
width; everything with letters is placed by percentages. So one drawing serves a desktop and a phone, without a script.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

from PIL import Image

from avlm.data.showing.page import PAGE_STYLE, esc, note

STYLE = (
    PAGE_STYLE
    + """
.text { display: inline-block; max-width: 19rem; white-space: pre-wrap; overflow-wrap: break-word; }
.mark { font-weight: 700; } .right .mark { color: var(--good); } .wrong .mark { color: var(--bad); }
.answer { display: flex; gap: 0.375rem; } .wrong .text { color: var(--quiet); }
.text.long { max-width: 30rem; }
.score { display: inline-block; min-width: 3.75rem; text-align: right; }
.bar { width: 9rem; height: 0.75rem; vertical-align: -0.05rem; margin-left: 0.75rem; overflow: visible; }
.bar rect { fill: var(--soft); } .bar rect + rect { fill: var(--line); }
.bar line { stroke: var(--paper); stroke-width: 5; } .bar line + line { stroke: var(--ink); stroke-width: 2; }
.name { white-space: nowrap; } .whole { display: inline-block; overflow-wrap: anywhere; }
figure { margin: 0; min-width: 0; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem 2.5rem; margin-top: 2.5rem; }
.charts b { color: var(--ink); font-weight: 600; }
.plot { display: block; overflow: visible; margin: 1.5rem 0 1.75rem 3rem; width: calc(100% - 3rem); height: 7.5rem; }
.plot.tall { height: 17rem; }
.plot text { fill: var(--quiet); font-size: 0.6875rem; font-variant-numeric: tabular-nums; }
.plot .grid { stroke: var(--rule); stroke-width: 1; }
.plot .band { fill: transparent; } .plot .band.odd { fill: var(--soft); }
.plot path { fill: none; stroke-linecap: round; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
.plot .raw { stroke: var(--faint); stroke-width: 1; } .plot .smooth { stroke: var(--line); stroke-width: 1.75; }
.prompt { display: grid; grid-template-columns: 15rem minmax(0, 1fr); gap: 0.5rem 2rem; padding: 1.25rem 0;
  border-bottom: 1px solid var(--rule); }
.prompt:last-child { border-bottom: 0; }
.prompt td, .prompt th { border-bottom: 0; padding-top: 0.125rem; padding-bottom: 0.125rem; }
.prompt thead th { border-bottom: 1px solid var(--rule); }
.media { display: flex; flex-wrap: wrap; gap: 0.75rem; align-content: flex-start; }
.media figcaption { overflow-wrap: anywhere; max-width: 15rem; }
.media img, .media video { display: block; background: var(--soft); max-width: 100%; }
.media audio { display: block; width: 15rem; max-width: 100%; height: 2.25rem; }
.pixels { image-rendering: pixelated; }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 4rem; } .wide { display: none; } .bar { width: 4rem; }
  .charts, .prompt { grid-template-columns: minmax(0, 1fr); } .plot { margin-left: 2.5rem; width: calc(100% - 2.5rem); }
  .text { max-width: 10rem; } .text.long { max-width: 16rem; } .plot.tall { height: 13rem; }
  .prompt tbody th { white-space: normal; } .prompt th, .prompt td { padding-right: 0.5rem; }
  .scroll tbody th, .scroll thead th:first-child { position: sticky; left: 0; background: var(--paper); } }
@media print { body { max-width: none; } .prompt, figure { break-inside: avoid; } }
"""
)

RAW_POINTS, SMOOTH_POINTS = 600, 400
"""A longer line is thinned to about so many points; the raw one keeps the extremes of what it joins."""

LOG_FROM = 8.0
"""An axis of kind `auto` is logarithmic when the largest value is so many times the smallest."""

MAX_FILE = 2_000_000
"""Bytes of one media file; a larger one is only named."""
MAX_EMBEDDED = 6_000_000
"""Characters that all embedded media may take on the page."""
THUMB_PX = 96

TYPES = {
    "image": {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".gif": "gif", ".webp": "webp", ".bmp": "bmp"},
    "audio": {".wav": "wav", ".mp3": "mpeg", ".flac": "flac", ".ogg": "ogg", ".opus": "ogg", ".m4a": "mp4"},
    "video": {".mp4": "mp4", ".m4v": "mp4", ".webm": "webm", ".mov": "quicktime"},
}
"""Files that browsers show, by kind."""

Axis = Literal["auto", "zero", "share"]
Point = tuple[float, float]


def bar(share: float, guess: float | None) -> str:
    """A small bar from 0 to 1 with a tick at the score of guessing. The numbers stand beside it."""
    width = 100 * min(1.0, max(0.0, share))
    at = None if guess is None else 100 * min(1.0, max(0.0, guess))
    tick = "" if at is None else 2 * f'<line x1="{at:.1f}%" x2="{at:.1f}%" y1="-3" y2="15"/>'
    return (
        '<svg class="bar" aria-hidden="true"><rect width="100%" height="100%"/>'
        f'<rect width="{width:.1f}%" height="100%"/>{tick}</svg>'
    )


@dataclass(frozen=True, slots=True)
class Band:
    """One stage on the step axis, both ends included."""

    number: int
    name: str
    first: int
    last: int


def line_chart(
    steps: Sequence[int], values: Sequence[float], bands: Sequence[Band], *, label: str, axis: Axis, size: str = ""
) -> str:
    """One value over all steps: every step as a light line, a smoothed one above it, stages as bands.

    Lines break between stages, whose values are not comparable, and where a value is not a finite number.

    Args:
        label: The whole chart in words.
        axis: `auto` is logarithmic where the range is large, `zero` begins at zero, `share` is 0 to 100 %.
        size: `tall`, with the stages' names above, or nothing.
    """
    low, high, ticks = _scale([v for v in values if math.isfinite(v)], axis)
    log = axis == "auto" and low > 0
    first, last = min(steps) - 0.5, max(steps) + 0.5

    def place(step: float, value: float) -> Point:
        x = (step - first) / (last - first)
        y = (math.log(value / low) / math.log(high / low)) if log else (value - low) / (high - low)
        return 100 * x, 100 * (1 - y)

    segments = _segments(steps, values, bands)
    raw = "".join(_path([place(*p) for p in _thin(segment)]) for segment in segments)
    smooth = "".join(_path([place(*p) for p in _smooth(segment)]) for segment in segments)
    parts = [_band(b, place(b.first - 0.5, high)[0], place(b.last + 0.5, high)[0], size) for b in bands]
    for value, text in ticks:
        y = place(first, value)[1]
        parts.append(f'<line class="grid" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>')
        parts.append(f'<text x="-8" y="{y:.2f}%" dy="4" text-anchor="end">{text}</text>')
    for i, step in enumerate(_step_ticks(min(steps), max(steps))):
        x, unit = place(step, high)[0], "" if i else "step "
        parts.append(f'<text x="{x:.2f}%" y="100%" dy="17" text-anchor="middle">{unit}{step:,}</text>')
    lines = f'<path class="raw" d="{raw}"/><path class="smooth" d="{smooth}"/>'
    return (
        f'<svg class="plot {size}" role="img" aria-label="{esc(label)}">{"".join(parts)}'
        '<svg viewBox="0 0 100 100" preserveAspectRatio="none" width="100%" height="100%" overflow="visible">'
        f"{lines}</svg></svg>"
    )


def _band(band: Band, left: float, right: float, size: str) -> str:
    """A stage's ground, with its number above it and its name where there is room."""
    width = right - left
    odd = " odd" if band.number % 2 else ""
    says = f"stage {band.number}, {band.name}: steps {band.first:,} to {band.last:,}"
    ground = (
        f'<rect class="band{odd}" x="{left:.2f}%" width="{width:.2f}%" height="100%"><title>{esc(says)}</title></rect>'
    )
    if width < (1.2 if size else 4):
        return ground
    name, letters = "", len(band.name) + len(str(band.number)) + 1
    if size and width > 0.75 * letters:
        fits_a_phone = width > 2.2 * letters
        name = f'<tspan class="{"" if fits_a_phone else "wide"}"> {esc(band.name)}</tspan>'
    return f'{ground}<text x="{left:.2f}%" dx="2" y="-7">{band.number}{name}</text>'


def _scale(values: Sequence[float], axis: Axis) -> tuple[float, float, list[tuple[float, str]]]:
    """Both ends of the value axis and its ticks. A lower end above zero means a logarithmic axis."""
    if axis == "share":
        return 0.0, 1.0, [(0.0, "0 %"), (0.5, "50 %"), (1.0, "100 %")]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if axis == "auto" and low > 0 and high / low >= LOG_FROM:
        ends = low / (high / low) ** 0.04, high * (high / low) ** 0.04
        steps = (1, 2, 5) if high / low < 1e3 else (1,)
        decades = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])))
        ticks = [factor * 10.0**power for power in decades for factor in steps]
        return *ends, [(t, _number(t)) for t in ticks if ends[0] <= t <= ends[1]]
    low, high = min(low, 0.0), high if high > min(low, 0.0) else 1.0
    step = _nice((high - low) / 4)
    low = step * math.floor(low / step)
    count = math.ceil(round((high - low) / step, 6))
    return low, low + step * count, [(low + step * i, _number(low + step * i)) for i in range(count + 1)]


def _nice(size: float) -> float:
    """The next of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= size * 0.999)


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _step_ticks(first: int, last: int) -> list[int]:
    every = max(1, int(_nice(max(1, last - first) / 5)))
    found = list(range(every * math.ceil(first / every), last + 1, every))
    return found or [first]


def _segments(steps: Sequence[int], values: Sequence[float], bands: Sequence[Band]) -> list[list[Point]]:
    starts = {band.first for band in bands}
    found: list[list[Point]] = [[]]
    for step, value in zip(steps, values, strict=True):
        if step in starts or not math.isfinite(value):
            found.append([])
        if math.isfinite(value):
            found[-1].append((step, value))
    return [segment for segment in found if segment]


def _thin(points: Sequence[Point]) -> list[Point]:
    """Fewer points with the same outline: of each bundle the lowest and the highest, in their order."""
    size = math.ceil(2 * len(points) / RAW_POINTS)
    if size <= 2:
        return list(points)
    found = []
    for start in range(0, len(points), size):
        bundle = points[start : start + size]
        ends = {min(bundle, key=lambda p: p[1]), max(bundle, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def _smooth(points: Sequence[Point]) -> list[Point]:
    """The mean over each point's neighbourhood, 5 % of the stage wide, narrower at the ends."""
    reach = max(2, len(points) // 40) if len(points) >= 8 else 0
    values, last = [value for _, value in points], len(points) - 1
    shown = [*range(0, last, math.ceil(len(points) / SMOOTH_POINTS)), last]
    near = [min(reach, i, last - i) for i in shown]
    return [(points[i][0], fmean(values[i - n : i + n + 1])) for i, n in zip(shown, near, strict=True)]


def _path(points: Sequence[Point]) -> str:
    """SVG path data; a lone point becomes a dot."""
    places = [f"{x:.2f} {y:.2f}" for x, y in points]
    return f"M{places[0]}h0" if len(places) == 1 else "M" + "L".join(places)


class Shelf:
    """Puts media files into the page until it is full."""

    def __init__(self) -> None:
        self.left = MAX_EMBEDDED
        self.named = 0

    def told(self) -> str:
        """The line that says how many were only named, or nothing."""
        what = "1 media file is" if self.named == 1 else f"{self.named} media files are"
        return note(f"{what} only named, with the reason beside the name.") if self.named else ""

    def figure(self, kind: str, path: str, sample_id: str) -> str:
        """One media item with its name, or its name and why it is not shown."""
        file = Path(path)
        reason, data = self._load(kind, file)
        if data is None:
            self.named += 1
            return f"<figure><figcaption>{esc(kind)}: <code>{esc(path)}</code> ({reason})</figcaption></figure>"
        label = f'{kind} "{file.name}" of prompt {sample_id}'
        return f"<figure>{_element(kind, file, data, label)}<figcaption>{esc(file.name)}</figcaption></figure>"

    def _load(self, kind: str, file: Path) -> tuple[str, str | None]:
        """A file as a data: URI, or the reason why not."""
        subtype = TYPES.get(kind, {}).get(file.suffix.lower())
        try:
            if not file.is_file():
                return "the file is missing", None
            if subtype is None:
                return "browsers do not show such files", None
            size = file.stat().st_size
            if size > MAX_FILE:
                return f"{size / 1e6:.1f} MB, more than the {MAX_FILE / 1e6:g} MB that one file may take", None
            if kind == "image":
                Image.open(file).close()
            uri = f"data:{kind}/{subtype};base64,{base64.b64encode(file.read_bytes()).decode()}"
        except (OSError, ValueError, Image.DecompressionBombError):
            return "the file cannot be read", None
        if len(uri) > self.left:
            return f"no room is left in the page's {MAX_EMBEDDED / 1e6:g} MB of media", None
        self.left -= len(uri)
        return "", uri


def _element(kind: str, file: Path, uri: str, label: str) -> str:
    if kind == "audio":
        return f'<audio controls preload="metadata" aria-label="{esc(label)}" src="{uri}"></audio>'
    if kind == "video":
        return (
            f'<video controls preload="metadata" width="{2 * THUMB_PX}" aria-label="{esc(label)}" src="{uri}"></video>'
        )
    with Image.open(file) as picture:
        width, height = picture.size
    scale = THUMB_PX / max(width, height)
    pixels = ' class="pixels"' if scale > 1 else ""
    size = f'width="{max(1, round(width * scale))}" height="{max(1, round(height * scale))}"'
    return f'<img alt="{esc(label)}" {size}{pixels} src="{uri}">'
