"""Pictures and pages of what was recorded."""

from fxfuse.report.heatmap import save_heatmap

__all__ = ["save_heatmap"]
