"""Triton is optional: CPUs compute without it."""

from __future__ import annotations

from fxfuse.errors import MissingDependencyError


def require_triton() -> None:
    """Raise a `MissingDependencyError` that says what to install, if Triton is not there."""
    try:
        import triton  # noqa: F401  # only whether it is there
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingDependencyError(
            "fxfuse's kernels for GPUs are written in Triton: pip install 'fxfuse[gpu]'"
        ) from error
