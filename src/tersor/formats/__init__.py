"""The number formats. FORMATS maps each family to its file; `get_format` turns a name into a Format.

Adding a format is one new file and one line in _FAMILIES; the conformance suite picks it up by itself.
"""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache

from tersor.errors import FormatError, unknown
from tersor.formats import affine, float_zero, floats, fp8, ggml, int8, lookup, nvfp4, ordered, outliers, signs
from tersor.formats.format import Format, as_rows

# Each family has `parse(name) -> Format | None` and `EXAMPLES`, the names that docs and conformance tests go through.
_FAMILIES = (floats, ggml, affine, float_zero, ordered, signs, int8, outliers, lookup, fp8, nvfp4)

FORMATS: dict[str, Format] = {}
for _family in _FAMILIES:
    for _name in _family.EXAMPLES:
        _format = _family.parse(_name)
        assert _format is not None and _format.name == _name, _name
        FORMATS[_name] = _format


@lru_cache(maxsize=512)
def get_format(name: str) -> Format:
    """Returns the format of this name (any case). Raises FormatError, listing the known ones, for an unknown name."""
    for family in _FAMILIES:
        found: Format | None = family.parse(name.lower())
        if found is not None:
            return found
    like = [known for known in FORMATS if name and known.startswith(name.lower())][:6] or get_close_matches(name.lower(), FORMATS, 3)
    if like:
        raise FormatError(f"unknown format {name!r}; perhaps {', '.join(like)}; docs/formats.md names all")
    families = "intB_gN[s|m|z|o|so], intB_c[s|m|z], intB_t[s|m], binary_gN, ternary_gN for B in 1..6, 8 and N in 16..256, int8_row_xN;"
    families += " f after s, m, z or nothing: float32 scales"
    raise FormatError(f"{unknown('format', name, FORMATS)}; and {families}")


__all__ = ["FORMATS", "Format", "as_rows", "get_format"]
