"""All commands of ``fxfuse``.

torch takes seconds to import, so the functions import what they use: ``fxfuse --help`` answers at once.
"""

from fxfuse.cli import evaluation, export, healing, kernels, look, measure, report, simulate
from fxfuse.cli.shared import app

__all__ = ["app", "evaluation", "export", "healing", "kernels", "look", "measure", "report", "simulate"]
