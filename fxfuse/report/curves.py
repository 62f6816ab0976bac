"""Modelled latency as a picture: over the batch, and over the context."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxfuse._common.files import write_atomically
from fxfuse.errors import MissingDependencyError


@dataclass(frozen=True)
class Curves:
    """Milliseconds a token of each model, where one size varies.

    Attributes:
        over: what varies, as the axis says it.
        sizes: its values.
        ms: for each model as many.
    """

    over: str
    sizes: tuple[int, ...]
    ms: Mapping[str, Sequence[float]]


def save_curves(panels: Sequence[Curves], title: str, path: str | os.PathLike[str]) -> None:
    """Write a PNG with a panel for each of ``panels``, side by side; sizes are logarithmic.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib draws the curves: pip install 'fxfuse[demo]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for name, ms in panel.ms.items():
            axis.plot(panel.sizes, ms, marker="o", markersize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(panel.sizes, map(str, panel.sizes), rotation=45, fontsize=7)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(panel.over)
        axis.set_ylabel("ms a token, modelled")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    pyplot.close(figure)
    write_atomically(path, drawn.getvalue())
