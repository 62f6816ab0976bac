"""Memory that nobody has written yet, poisoned: a result that is not wholly written shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Let ``new_empty`` give NaN, or a large integer, and not by luck what is wanted."""
    stock = Tensor.new_empty

    def new_empty(self: Tensor, *size: object, **options: object) -> Tensor:
        empty = stock(self, *size, **options)
        return empty.fill_(float("nan") if empty.is_floating_point() else torch.iinfo(empty.dtype).max // 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "new_empty", new_empty)
        yield
