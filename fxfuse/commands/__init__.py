"""The commands of ``fxfuse``: what each takes, and how its result is shown.

torch takes seconds to import, so the functions import what they use: ``fxfuse --help`` answers at once.
"""

from fxfuse.commands import kernels, look, measure
from fxfuse.commands.shared import app

__all__ = ["app", "kernels", "look", "measure"]
