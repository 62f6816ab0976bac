"""The colours of distances: a scale of even lightness, which the colour-blind can read, on light and on dark paper."""

from __future__ import annotations

import math

LOWEST, HIGHEST = 2.0**-9, 2.0**-1
"""The ends of the scale, as in figure 3 of FFN Fusion (arXiv 2503.18908); beyond, the colour stays."""

LEVELS = 24
"""Colours of the scale: three for each factor of two."""

_MAGMA = ("#000004", "#1d1147", "#51127c", "#832681", "#b73779", "#e75263", "#fc8961", "#fec488", "#fcfdbf")
"""Nine colours, evenly spaced, of matplotlib's magma (by N. Smith and S. van der Walt, CC0)."""


def level(distance: float) -> int:
    """The level of a distance on the logarithmic scale, 0 .. ``LEVELS`` - 1."""
    if distance <= LOWEST:
        return 0
    share = math.log(distance / LOWEST) / math.log(HIGHEST / LOWEST)
    return min(LEVELS - 1, int(share * LEVELS))


def palette(dark: bool) -> list[str]:
    """The colour of each level as ``#rrggbb``: large distances stand out from the paper, dark or light."""
    shades = [_between(level / (LEVELS - 1)) for level in range(LEVELS)]
    return shades if dark else shades[::-1]


def rules() -> str:
    """The scale as CSS: ``.q0`` .. ``.q23`` fill a shape."""
    light, dark = ("".join(f".q{i}{{fill:{shade}}}" for i, shade in enumerate(palette(d))) for d in (False, True))
    return f"{light}\n@media (prefers-color-scheme: dark) {{{dark}}}\n"


def _between(share: float) -> str:
    place = share * (len(_MAGMA) - 1)
    first = min(int(place), len(_MAGMA) - 2)
    pairs = zip(_channels(_MAGMA[first]), _channels(_MAGMA[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02x}" for a, b in pairs)


def _channels(shade: str) -> list[int]:
    return [int(shade[at : at + 2], 16) for at in (1, 3, 5)]
