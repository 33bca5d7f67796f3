"""One self-contained HTML page (plot, table, how it was measured) and the plot alone. No script, nothing fetched, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tersor.report.plot import Point, pareto_svg

_COLOURS = """
:root { --ink: #1b1f24; --soft: #5b6570; --line: #e3e7eb; --major: #c4ccd4; --paper: #ffffff; --tint: #f6f8fa;
        --k0: #1769aa; --k1: #c2571a; --k2: #2e7d4f; --k3: #7a4fa3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #2b3138; --major: #46505a; --paper: #14171a; --tint: #1c2025;
          --k0: #6cb4ee; --k1: #f0995c; --k2: #6cc492; --k3: #bd97e0; } }
"""

_PAGE = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 24px 64px; background: var(--paper); color: var(--ink);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
.lead { color: var(--soft); margin: 0 0 28px; }
svg { width: 100%; height: auto; display: block; }
"""

_PLOT = """
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink); }
svg .tick { fill: var(--soft); } svg .axis { font-size: 13px; fill: var(--soft); }
svg .grid { stroke: var(--line); } svg .major { stroke: var(--major); }
svg .label { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
svg .frontier { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .dot { stroke: var(--paper); stroke-width: 1.5; } svg .bar { stroke-width: 2; opacity: .55; }
.k0 { fill: var(--k0); stroke: var(--k0); } .k1 { fill: var(--k1); stroke: var(--k1); }
.k2 { fill: var(--k2); stroke: var(--k2); } .k3 { fill: var(--k3); stroke: var(--k3); }
"""

_TABLE = """
.wide { overflow-x: auto; margin: 28px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: 7px 10px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-bottom-color: var(--major); }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
tbody tr:hover { background: var(--tint); }
tr.first td { color: var(--soft); }
ul { color: var(--soft); padding-left: 20px; font-size: 14px; } li { margin: 4px 0; }
"""


_AXES = ("file size, MB", "KL divergence from the original, nats per token (lower is better)")


def comparison_plot(points: Sequence[Point]) -> str:
    """Returns the page's plot as an SVG file of its own, with its colours inside; "" when no point can be shown."""
    plot = pareto_svg(points, *_AXES)
    style = f'<style>{_COLOURS}{_PLOT}</style>\n<rect width="100%" height="100%" fill="var(--paper)"/>'
    return plot.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace("\n", f"\n{style}\n", 1)


def comparison_page(
    title: str,
    lead: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    points: Sequence[Point],
    notes: Sequence[str],
) -> str:
    """Returns the page. rows: the first is the original, shown subdued; notes: protocol and caveats, one item each."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join(_row(row, i == 0) for i, row in enumerate(rows))
    items = "\n".join(f"<li>{escape(note)}</li>" for note in notes)
    plot = pareto_svg(points, *_AXES)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_COLOURS}{_PAGE}{_PLOT}{_TABLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
{plot}
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<ul>
{items}
</ul>
</body></html>
"""


def _row(cells: Sequence[str], first: bool) -> str:
    start = '<tr class="first">' if first else "<tr>"
    return start + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
