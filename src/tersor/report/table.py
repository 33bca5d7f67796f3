"""Plain text tables: aligned columns, one rule under the header, no colour, the same on a terminal and in a file."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an aligned table without a final newline; the first column stands to the left, all others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))).rstrip()

    return "\n".join([show(lines[0]), "  ".join("-" * width for width in widths), *map(show, lines[1:])])


def format_bytes(n: float) -> str:
    """Returns bytes in decimal units with three digits: 91.7 MB, 1.25 GB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{format_number(n / size)} {unit}"
    return f"{int(n)} B"


def format_number(x: float) -> str:
    """Returns x with three significant digits and no exponent: 1234, 123, 12.3, 1.23, 0.123, 0.0012."""
    if x == 0 or x != x or x in (float("inf"), float("-inf")):
        return f"{x:g}"
    size = abs(x)
    if size >= 99.95:
        return f"{x:.0f}"
    if size >= 9.995:
        return f"{x:.1f}"
    if size >= 0.9995:
        return f"{x:.2f}"
    return f"{x:.3f}" if size >= 0.0995 else f"{x:.4f}"


def format_error(value: float, error: float) -> str:
    """Returns `value ± error` with as many decimals as the error has meaning: 24.71 ± 0.53."""
    if not error or error != error or error == float("inf") or value != value:
        return format_number(value)
    decimals = 0
    while decimals < 6 and error * 10**decimals < 1:
        decimals += 1
    return f"{value:.{decimals + 1}f} ± {error:.{decimals + 1}f}"
