"""All that a bug report on a model needs, as a folder of text files. No weights are in it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import fx, nn

from fxfuse._common.files import write_atomically
from fxfuse._torch.dynamo import graph_breaks
from fxfuse.backend.frontend import Captured, capture
from fxfuse.errors import FxfuseError
from fxfuse.graph.values import value
from fxfuse.plan import Plan
from fxfuse.report.explanation import explain
from fxfuse.stream.diagnosis import census


def write_trace(
    model: nn.Module, folder: str | os.PathLike[str], *args: object, plan: Plan | None = None, **kwargs: object
) -> tuple[str, ...]:
    """Trace ``model(*args, **kwargs)`` and write what fxfuse sees in it to ``folder``, which is made if need be.

    ``versions.txt``; ``model.txt``, its tree of modules; ``config.json``, if it has a configuration of Hugging Face's
    kind; ``graph_K.txt``, each graph's nodes with shapes and dtypes; ``graph_breaks.txt``, why Dynamo made several
    graphs, if it did; ``branches.txt`` and ``branches.json``, what :func:`fxfuse.explain` says; ``plan.json``, if there
    is one; ``error.txt``, if tracing or explaining failed.

    Returns:
        the names of the files written.

    Raises:
        OSError: the folder cannot be written.
    """
    files = {"versions.txt": _versions(), "model.txt": repr(model)}
    to_json = getattr(getattr(model, "config", None), "to_json_string", None)
    if callable(to_json):
        files["config.json"] = str(to_json())
    breaks = graph_breaks()
    try:
        graphs = capture(model, *args, **kwargs)
        if new := graph_breaks() - breaks:
            files["graph_breaks.txt"] = "\n\n".join(f"{count} x {reason}" for reason, count in new.most_common())
        files |= {f"graph_{index}.txt": _listing(captured) for index, captured in enumerate(graphs)}
        found = explain(model, *args, plan=plan, **kwargs)
        files |= {"branches.txt": "\n".join([str(found), *map(str, found.reports)]), "branches.json": found.to_json()}
    except FxfuseError as error:
        files["error.txt"] = f"{type(error).__name__}: {error}"
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_atomically(Path(folder) / name, (text + "\n").encode())
    if plan is None:
        return tuple(files)
    plan.save(Path(folder) / "plan.json")
    return (*files, "plan.json")


def _versions() -> str:
    lines = [f"python {platform.python_version()}", f"platform {platform.platform()}"]
    for name in ("fxfuse", "torch", "transformers", "triton", "peft", "accelerate"):
        try:
            lines.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name} is not installed")
    lines.append(f"gpu {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    return "\n".join(lines)


def _listing(captured: Captured) -> str:
    """The nodes of a graph, one a line: name, dtype, shape, call, and the name of a weight."""
    lines = [f"# {census(captured.gm).counts}"]
    for node in captured.gm.graph.nodes:
        made = value(node)
        kind = f"{str(made.dtype).removeprefix('torch.')}{list(made.shape)}" if made is not None else "?"
        name = captured.names.get(node, "")
        lines.append(f"{node.name}: {kind} = {_call(node)}{f'  # {name}' if name else ''}")
    return "\n".join(lines)


def _call(node: fx.Node) -> str:
    target = node.target if isinstance(node.target, str) else torch.typename(node.target)
    shown: Sequence[str] = [*map(repr, node.args), *(f"{key}={value!r}" for key, value in node.kwargs.items())]
    return node.op if node.op == "placeholder" else f"{node.op} {target}({', '.join(shown)})"
