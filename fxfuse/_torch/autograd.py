"""Versions of tensors, which ops in place count up. Seen on torch 2.13.0."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


def same_version(tensor: Tensor) -> AbstractContextManager[None]:
    """Writes to ``tensor`` inside do not count: autograd must not refuse a graph whose values stayed right.

    The public way, ``tensor.data``, is one that inference tensors do not take.
    """
    return _unsafe_preserve_version_counter(tensor)
