"""The ``fxfuse`` command: where it starts, and what its errors look like.

The commands themselves are in `fxfuse.cli.commands`, which needs typer and rich; this module only needs them to run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fxfuse.errors import FxfuseError


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 an error of the input (one line on stderr), 2 bad usage.

    Args:
        args: what follows ``fxfuse``; ``sys.argv[1:]`` by default.
    """
    try:
        from fxfuse.cli.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit(f"fxfuse: the command line needs {error.name}: pip install 'fxfuse[cli]'")
    sys.path.insert(0, os.getcwd())  # so that module:function finds a module that lies here
    try:
        app(args)
    except FxfuseError as error:
        sys.exit(f"fxfuse: {' '.join(str(error).split())}")
    except OSError as error:  # a full disk, a folder that went away: nothing that a stack of calls could explain
        sys.exit(f"fxfuse: {' '.join(str(error).split())}")
