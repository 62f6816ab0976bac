"""What one call of a model tells of its modules: which compute a branch, and how the layer calls them.

Between the stream and a branch stand a norm, perhaps, and after it another one. They are told by the tensors that are
handed on: what a module returned is what the next one is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxfuse.errors import ExportError
from fxfuse.exporting.units import Unit
from fxfuse.model.learning import call


@dataclass(frozen=True)
class Site:
    """How a layer computes one branch.

    Attributes:
        before: paths of the modules through which the stream reaches the branch, in order.
        after: paths of those through which its output reaches the stream.
        takes: where its module is given its input: a position, or a keyword.
        others: whether it is given anything else.
        picks: which entry of the tuple that it returns is its contribution; None if it returns that alone.
        returns: the length of that tuple, or None.
        caches: whether it is given a KV cache.
        output: what comes out of the last module, on the example.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    takes: int | str
    others: bool
    picks: int | None
    returns: int | None
    caches: bool
    output: Tensor


@dataclass(frozen=True)
class _Call:
    path: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any

    @property
    def given(self) -> Tensor | None:
        return next((value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)), None)


def sites_of(model: nn.Module, units: Sequence[Unit], example: Mapping[str, object]) -> dict[str, Site]:
    """How each unit is called, by its path; the model is called once, with a cache.

    Raises:
        ExportError: a unit is not called once, or nobody can tell its input.
        PruneError: the call fails.
    """
    with _watched(model, [unit.layer for unit in units]) as calls:
        call(model, ((), {**example, "use_cache": True}))
    return {unit.path: _site(unit, calls.get(unit.layer, [])) for unit in units}


@contextmanager
def _watched(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[_Call]]]:
    """The calls of all parts of layers, in the order in which they return. They keep their tensors alive."""
    calls: dict[str, list[_Call]] = {layer: [] for layer in layers}
    handles = []
    for layer in calls:
        for path, part in model.get_submodule(layer).named_modules(prefix=layer):

            def note(_: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path, layer: str = layer) -> None:
                calls[layer].append(_Call(path, args, kwargs, output))

            if path != layer:
                handles.append(part.register_forward_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _site(unit: Unit, calls: Sequence[_Call]) -> Site:
    own = [each for each in calls if each.path == unit.path]
    if len(own) != 1:
        raise ExportError(f"{unit.path!r} is called {len(own)} times in one call of the model, and not once")
    made = own[0]
    output, picks, returns = _contribution(made.output, unit.path)
    given: list[tuple[int | str, Any]] = [*enumerate(made.args), *made.kwargs.items()]
    takes = next((key for key, value in given if isinstance(value, Tensor) and value.shape == output.shape), None)
    if takes is None:
        raise ExportError(f"{unit.path!r} is given nothing of the shape that it returns")
    hidden: Tensor | None = made.args[takes] if isinstance(takes, int) else made.kwargs[takes]
    around = [each for each in calls if not _within(each.path, unit.path) and not _within(unit.path, each.path)]
    before, after = list[str](), list[str]()
    while (earlier := _outermost([c for c in around if _is(c.output, hidden) and c.path not in before])) is not None:
        before.insert(0, earlier.path)
        hidden = earlier.given
    while (later := _outermost([c for c in around if _is(c.given, output) and c.path not in after])) is not None:
        if not isinstance(later.output, Tensor) or later.output.shape != output.shape:
            break
        after.append(later.path)
        output = later.output
    others = [value for key, value in given if key != takes and value is not None]
    caches = any(hasattr(value, "get_seq_length") for value in others)
    return Site(tuple(before), tuple(after), takes, bool(others), picks, returns, caches, output)


def _contribution(output: Any, path: str) -> tuple[Tensor, int | None, int | None]:
    if isinstance(output, Tensor):
        return output, None, None
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0], 0, len(output)
    raise ExportError(f"{path!r} returns neither a tensor nor a tuple that begins with one")


def _outermost(calls: Sequence[_Call]) -> _Call | None:
    return min(calls, key=lambda each: len(each.path), default=None)


def _within(path: str, other: str) -> bool:
    return f"{path}.".startswith(f"{other}.")


def _is(value: object, other: Tensor | None) -> bool:
    """Whether two tensors are the same memory: what one module returned, and another was given."""
    if not isinstance(value, Tensor) or other is None:
        return False
    same = value.numel() == other.numel() and value.dtype == other.dtype and value.data_ptr() == other.data_ptr()
    return value is other or same
