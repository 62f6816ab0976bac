"""Pictures and pages of what was recorded."""

from fxfuse.report.heatmap import save_heatmap
from fxfuse.report.page import save_report

__all__ = ["save_heatmap", "save_report"]
