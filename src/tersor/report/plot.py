"""A Pareto plot as inline SVG: size to the right, divergence upwards on a log axis, the frontier drawn, labels that keep apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 920, 520  # viewBox units
LEFT, RIGHT, TOP, BOTTOM = 76, 28, 44, 58  # margins around the plotting area
LABEL_HEIGHT, LETTER_WIDTH = 15, 6.7  # of a label at 12 px


@dataclass(frozen=True)
class Point:
    """One model. x: megabytes; y > 0: what the log axis shows; error: standard error of y; kind: chooses colour and legend entry."""

    label: str
    x: float
    y: float
    error: float
    kind: str


def pareto_svg(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Returns the plot as an <svg> element; colours come from CSS variables of the page. Points with y <= 0 are left out."""
    shown = sorted((p for p in points if p.y > 0), key=lambda p: (p.x, p.y))
    if not shown:
        return ""
    axes = _Axes(shown)
    kinds = sorted({p.kind for p in shown})
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} over {escape(x_label)}">']
    parts += axes.grid(x_label, y_label)
    parts += _frontier(shown, axes)
    parts += [_marker(p, axes, kinds.index(p.kind)) for p in shown]
    parts += _labels(shown, axes)
    parts += _legend(kinds) if len(kinds) > 1 else []
    return "\n".join([*parts, "</svg>"])


def frontier(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other beats in both size and divergence, smallest first."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.x, p.y)):
        if not best or p.y < best[-1].y:
            best.append(p)
    return best


class _Axes:
    """Maps megabytes and divergences to viewBox units."""

    def __init__(self, points: Sequence[Point]) -> None:
        low, high = min(p.x for p in points), max(p.x for p in points)
        self.x_step = _nice_step((high - low) or high or 1.0)
        self.x_min = floor((low - 0.15 * self.x_step) / self.x_step) * self.x_step
        self.x_max = ceil((high + 0.35 * self.x_step) / self.x_step) * self.x_step
        logs = [log10(p.y) for p in points]
        self.y_min, self.y_max = floor(2 * min(logs) - 0.2) / 2, ceil(2 * max(logs) + 0.2) / 2

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_min) / (self.x_max - self.x_min) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (log10(value) - self.y_min) / (self.y_max - self.y_min)
        return HEIGHT - BOTTOM - min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)

    def grid(self, x_label: str, y_label: str) -> list[str]:
        """Returns grid lines, tick labels and axis titles."""
        parts = []
        for i in range(round((self.x_max - self.x_min) / self.x_step) + 1):
            value = self.x_min + i * self.x_step
            x = self.x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value:g}</text>')
        for exponent in range(floor(self.y_min), ceil(self.y_max) + 1):
            for digit in (1, 2, 5):
                value = digit * 10.0**exponent
                if not self.y_min - 1e-9 <= log10(value) <= self.y_max + 1e-9:
                    continue
                y = self.y(value)
                parts.append(
                    f'<line class="grid{" major" if digit == 1 else ""}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                )
                parts.append(f'<text class="tick" x="{LEFT - 9}" y="{y + 4:.1f}" text-anchor="end">{value:.6g}</text>')
        middle = (HEIGHT - BOTTOM + TOP) / 2
        parts.append(f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>')
        parts.append(f'<text class="axis" transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
        return parts


def _frontier(points: Sequence[Point], axes: _Axes) -> list[str]:
    best = frontier(points)
    line = " ".join(f"{axes.x(p.x):.1f},{axes.y(p.y):.1f}" for p in best)
    return [f'<polyline class="frontier" points="{line}"/>'] if len(best) > 1 else []


def _marker(p: Point, axes: _Axes, kind: int) -> str:
    x, y = axes.x(p.x), axes.y(p.y)
    bar = ""
    if 0 < p.error < p.y:
        bar = f'<line class="bar k{kind % 4}" x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(p.y - p.error):.1f}" y2="{axes.y(p.y + p.error):.1f}"/>'
    title = f"{p.label}: {p.x:.1f} MB, {p.y:.4g} ± {p.error:.2g}"
    return f'{bar}<circle class="dot k{kind % 4}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{escape(title)}</title></circle>'


def _labels(points: Sequence[Point], axes: _Axes) -> list[str]:
    """Returns the labels, each on the first side of its dot where it touches neither a dot nor an earlier label."""
    taken = [(axes.x(p.x) - 7, axes.y(p.y) - 7, axes.x(p.x) + 7, axes.y(p.y) + 7) for p in points]
    parts = []
    for p in points:
        x, y, width = axes.x(p.x), axes.y(p.y), LETTER_WIDTH * len(p.label)
        sides = [(x + 11, y + 4, "start"), (x - 11, y + 4, "end"), (x, y - 12, "middle"), (x, y + 21, "middle")]
        sides += [(x + 9, y - 9, "start"), (x + 9, y + 17, "start"), (x - 9, y - 9, "end"), (x - 9, y + 17, "end")]
        boxes = [_box(tx, ty, width, anchor) for tx, ty, anchor in sides]
        cost = [sum(_overlap(box, other) for other in taken) + 1e3 * _outside(box) for box in boxes]
        best = min(range(len(sides)), key=lambda i: (cost[i], i))
        taken.append(boxes[best])
        tx, ty, anchor = sides[best]
        parts.append(f'<text class="label" x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(p.label)}</text>')
    return parts


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _box(x: float, y: float, width: float, anchor: str) -> _Box:
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return left, y - LABEL_HEIGHT + 4, left + width, y + 4


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: _Box) -> float:
    return max(0.0, LEFT - box[0]) + max(0.0, box[2] - WIDTH + 4) + max(0.0, TOP - box[1]) + max(0.0, box[3] - HEIGHT + BOTTOM)


def _legend(kinds: Sequence[str]) -> list[str]:
    """Returns the kinds in a row above the plotting area."""
    parts, x = [], LEFT + 6.0
    for i, kind in enumerate(kinds):
        parts.append(f'<circle class="dot k{i % 4}" cx="{x:.1f}" cy="20" r="5.5"/>')
        parts.append(f'<text class="label" x="{x + 12:.1f}" y="24">{escape(kind)}</text>')
        x += 40 + LETTER_WIDTH * len(kind)
    return parts


def _nice_step(span: float) -> float:
    """Returns 1, 2 or 5 times a power of ten, so that five to ten steps cover the span."""
    raw = span / 7
    power = 10.0 ** floor(log10(raw))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= raw)
