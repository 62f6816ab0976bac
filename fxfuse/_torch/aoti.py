"""AOTInductor: graphs compiled ahead of time into a package that torch runs by itself. Seen on torch 2.13.0.

The public ``aoti_compile_and_package`` takes an ExportedProgram, which nobody may edit, and packages one graph alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.package.package import package_aoti

Files = list[Any]
"""What a compiled graph consists of, as torch hands it on."""


def compile_ahead(gm: fx.GraphModule, inputs: Sequence[object], metadata: Mapping[str, str]) -> Files:
    """Compile a graph that torch.export made, edited or not, without its weights. Returns the files of a package.

    Args:
        gm: the unlifted graph; its weights are attributes, and the package will ask for them by their names.
        inputs: the example that the graph was exported with.
        metadata: what whoever loads the package can read in it.
    """
    options = {
        "aot_inductor.package": True,
        "aot_inductor.package_constants_in_so": False,
        "aot_inductor.metadata": dict(metadata),
    }
    with torch.no_grad():
        files = torch._inductor.aot_compile(gm, tuple(inputs), options=options)
    assert isinstance(files, list)
    return files


def write_package(path: Path, compiled: Mapping[str, Files]) -> None:
    """Write a ``.pt2`` archive that holds these compiled graphs by name."""
    package_aoti(str(path), dict(compiled))
