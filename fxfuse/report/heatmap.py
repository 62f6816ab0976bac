"""The dependency matrix as a picture, as in figure 3 of FFN Fusion (arXiv 2503.18908): log scale, 2^-9 to 2^-1."""

from __future__ import annotations

import io
import os

import torch

from fxfuse._common.files import write_atomically
from fxfuse.errors import MissingDependencyError
from fxfuse.measure.recording import Recording

LOWEST, HIGHEST = 2.0**-9, 2.0**-1


def save_heatmap(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a PNG: row = dropped branch, column = measured branch, colour = mean cosine distance.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise MissingDependencyError("matplotlib draws the heatmap: pip install 'fxfuse[demo]'") from error
    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import LogNorm

    m = len(recording.branches)
    after = torch.triu(torch.ones(m, m, dtype=torch.bool), diagonal=1)
    values = torch.where(after, recording.mean.clamp_min(LOWEST), torch.nan)
    side = min(18.0, max(5.0, 0.16 * m + 2))
    figure, axes = pyplot.subplots(figsize=(side + 1, side), layout="constrained")
    image = axes.imshow(values.numpy(), norm=LogNorm(LOWEST, HIGHEST), cmap="magma_r", interpolation="nearest")
    labels = _short([branch.name for branch in recording.branches])
    axes.set_xticks(range(m), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(m), labels, fontsize=6)
    axes.set_xlabel("measured branch")
    axes.set_ylabel("dropped branch")
    axes.set_title(f"cosine distance of contributions, mean over {recording.tokens:,} tokens", fontsize=9)
    bar = figure.colorbar(image, ax=axes, shrink=0.7)
    ticks = [2.0**power for power in range(-9, 0)]
    bar.set_ticks(ticks, labels=[f"2^{power}" for power in range(-9, 0)])
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    pyplot.close(figure)
    write_atomically(path, drawn.getvalue())


def _short(names: list[str]) -> list[str]:
    """Names without the path that all of them share."""
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
        shared += 1
    return [".".join(path[shared:]) for path in paths]
