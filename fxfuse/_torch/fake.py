"""Tensors without values, and the modes that make them. Seen on torch 2.11.0 and 2.13.0.

There is no public class of them, and graphs are full of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_traceable_wrapper_subclass


def mode_of(values: Sequence[object]) -> FakeTensorMode | None:
    """The fake mode of what a backend is given: new values must be made under the same one."""
    return detect_fake_mode(values)


def with_inner(like: Tensor, inner: Mapping[str, Tensor], settings: object, sizes: Sequence[int]) -> Tensor:
    """A tensor of the class of ``like``, a traceable wrapper, of ``sizes``, that is made of the tensors ``inner``."""
    strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    made: Tensor = type(like).__tensor_unflatten__(  # type: ignore[attr-defined]  # traceable wrappers have it
        dict(inner), settings, torch.Size(sizes), tuple(strides)
    )
    return made


@contextmanager
def computing_sizes(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, ops make tensors of ``mode``, whose sizes may be symbols, as where Dynamo traces.

    Without the dispatcher that is written in Python, torch 2.11 asks a matmul's operands for their numel, a number.
    """
    with torch.no_grad(), enable_python_dispatcher(), mode:
        yield


@contextmanager
def real_tensors() -> Iterator[None]:
    """Inside, ops make tensors with values, though a graph is being compiled, under modes that make fake ones."""
    with torch.no_grad(), _disable_current_modes():
        yield


@contextmanager
def tracing_nothing() -> Iterator[None]:
    """Inside, the graph that is being compiled is not to be seen: another one can be traced and compiled."""
    with real_tensors(), torch._guards.tracing(None):
        yield
