"""Learning: what one call of a model teaches about a module, so that another can stand in its place.

Which argument its output is like, how the output is laid out, whether it feeds a KV cache, and which modules its last
projection hands its result to. Nothing here knows a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fxfuse._torch.pytree import tree_leaves, tree_map
from fxfuse.errors import FxfuseError, PruneError
from fxfuse.model.force import uncompiled

Example: TypeAlias = tuple[Sequence[object], Mapping[str, object]]
"""The arguments of one call."""

_Lengths: TypeAlias = list[list[tuple[type, int]]]
"""Of each KV cache, each layer's kind and how many tokens it holds."""


@dataclass(frozen=True)
class Source:
    """Where, among the arguments of a module, something is: position or keyword."""

    key: int | str

    def __call__(self, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        return args[self.key] if isinstance(self.key, int) else kwargs[self.key]


@dataclass(frozen=True)
class Seen:
    """What one call of a module taught.

    Attributes:
        hidden: the argument that has the shape of the output.
        layout: the output, with True for the contribution, a ``Source`` for an argument handed through, else None.
        dtype: of the contribution, if it is not that of ``hidden``.
        first: the module writes the first layer of its kind in a KV cache, which carries the sequence's length; or it
            is given a cache that nobody here can read.
        ends: the paths, from the module, of the parts that make its contribution, from the projection that was asked
            for on; empty if none was.
    """

    hidden: Source
    layout: object
    dtype: torch.dtype | None
    first: bool
    ends: tuple[str, ...] = ()

    def input(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
        """What the module is given of the stream."""
        hidden = self.hidden(args, kwargs)
        assert isinstance(hidden, Tensor)
        return hidden

    def output(self, args: Sequence[object], kwargs: Mapping[str, object], contribution: Tensor) -> object:
        """What the module returned, with another contribution."""

        def fill(spot: object) -> object:
            if spot is True:
                return contribution
            return spot(args, kwargs) if isinstance(spot, Source) else spot

        return tree_map(fill, self.layout)


@dataclass(frozen=True)
class _PartCall:
    """One call of a part of a module, with one tensor given and one returned."""

    path: str
    given: Tensor
    returned: Tensor


def learn(
    model: nn.Module, targets: Mapping[str, nn.Module], example: Example, projections: Mapping[str, str]
) -> dict[str, Seen]:
    """Call the model once and watch ``targets``.

    Args:
        model: the model.
        targets: its modules, by name.
        example: the arguments of the call.
        projections: of some targets, the path of the weights of the projection that they end in.

    Raises:
        PruneError: the call fails; a target is not called once, or returns nothing like its input; or nobody can tell
            what becomes of the projection's output.
    """
    seen: dict[str, list[Seen]] = {name: [] for name in targets}
    with ExitStack() as watching:
        for name, module in targets.items():
            watching.enter_context(_watched(name, module, projections.get(name), seen[name]))
        with blaming("the model, with the example given,"):
            call(model, example)
    for name, calls in seen.items():
        if len(calls) != 1:
            raise PruneError(
                f"{name!r} was called {len(calls)} times in one call of the model; it leaves only if called once"
            )
    return {name: calls[0] for name, calls in seen.items()}


def call(model: nn.Module, example: Example) -> object:
    """What the model's own code returns, in eval mode and without gradients."""
    with trial(model):
        return model(*example[0], **example[1])


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """For calls that leave no trace: the model's own code, in eval mode, and no random numbers used up."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        for module in training:
            module.training = False  # not .eval(), which models override, and which knows no way back to mixed modes
        with uncompiled(model), torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Say of an error what could not be called; those of this library say enough."""
    try:
        yield
    except FxfuseError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise PruneError(f"{what} cannot be called: {type(error).__name__}: {first}") from error


@contextmanager
def _watched(name: str, module: nn.Module, projection: str | None, seen: list[Seen]) -> Iterator[None]:
    """Let each call of ``module`` add to ``seen`` what it taught: of its ``forward``, which some models call by name.

    No hook would see those calls.
    """
    own, forward = vars(module).get("forward"), module.forward

    def watch(*args: object, **kwargs: object) -> object:
        before = _lengths(args, kwargs)
        with ExitStack() as watching:
            parts = None if projection is None else watching.enter_context(_parts_of(module))
            output = forward(*args, **kwargs)
        contribution = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if contribution is None:
            raise PruneError(f"{name!r} returns no tensor")
        ends = () if parts is None or projection is None else _ends(name, contribution, parts, projection)
        first = _is_first(before, _lengths(args, kwargs))
        seen.append(_observe(name, args, kwargs, output, contribution, first, ends))
        return output

    try:
        module.forward = watch
        yield
    finally:
        vars(module).pop("forward", None)
        if own is not None:
            module.forward = own


def _observe(
    name: str,
    args: Sequence[object],
    kwargs: Mapping[str, object],
    output: object,
    contribution: Tensor,
    first: bool,
    ends: tuple[str, ...],
) -> Seen:
    given: list[tuple[Source, object]] = [(Source(index), value) for index, value in enumerate(args)]
    given += [(Source(key), value) for key, value in kwargs.items()]
    alike = [source for source, value in given if isinstance(value, Tensor) and value.shape == contribution.shape]
    if not alike:
        raise PruneError(f"{name!r} returns {tuple(contribution.shape)}, which is the shape of none of its inputs")
    hidden = alike[0](args, kwargs)
    assert isinstance(hidden, Tensor)

    def place(leaf: object) -> object:
        if leaf is contribution:
            return True
        return next((source for source, value in given if value is leaf and leaf is not None), None)

    dtype = contribution.dtype if contribution.dtype != hidden.dtype else None
    return Seen(alike[0], tree_map(place, output), dtype, first, ends)


@contextmanager
def _parts_of(module: nn.Module) -> Iterator[list[_PartCall]]:
    """The calls of the parts of ``module``, in the order in which they return. They keep their tensors alive."""
    calls: list[_PartCall] = []
    handles = []
    for path, part in module.named_modules():

        def note(_: nn.Module, given: Sequence[object], returned: object, path: str = path) -> None:
            first = next((value for value in given if isinstance(value, Tensor)), None)
            if first is not None and isinstance(returned, Tensor):
                calls.append(_PartCall(path, first, returned))

        if part is not module:
            handles.append(part.register_forward_hook(note))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _ends(name: str, contribution: Tensor, calls: Sequence[_PartCall], weights: str) -> tuple[str, ...]:
    """The paths of the parts that make the contribution, from the one that holds ``weights`` on, a path as well.

    The way back leads from what a part returned to what it was given; a view, or idle dropout, is the same tensor.
    """
    path, current = [], contribution
    holding = {each.path for each in calls if f"{weights}.".startswith(f"{each.path}.")}
    projection = max(holding, key=len, default="")
    for each in reversed(calls):
        if not _same(each.returned, current) or (each.path in holding and each.path != projection):
            continue  # a module around the projection has returned what its last part did
        path.append(each.path)
        if each.path == projection:
            return tuple(reversed(path))
        current = each.given
    raise PruneError(
        f"{name!r} cannot be a linear map of its own: its output projection, {weights!r}, is no module that is called, "
        "or more than modules follow it there. torch.compile with this plan makes it linear in the graph"
    )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory, perhaps under other sizes."""
    return one is other or (
        one.numel() == other.numel() > 0
        and one.dtype == other.dtype
        and one.device.type != "meta"
        and one.data_ptr() == other.data_ptr()
    )


def _lengths(args: Sequence[object], kwargs: Mapping[str, object]) -> _Lengths | None:
    """Of the KV caches among a module's arguments, which can tell the length of the sequence; None if one says no more.

    An encoder-decoder's cache has no layers: it holds two caches that have.
    """
    lengths: _Lengths = []
    for value in (*args, *kwargs.values()):
        if not hasattr(value, "get_seq_length"):
            continue
        parts = (value, *getattr(value, "__dict__", {}).values())
        held = [getattr(each, "layers", None) for each in parts if hasattr(each, "get_seq_length")]
        caches = [list(layers) for layers in held if isinstance(layers, Iterable)]
        if not caches or not all(hasattr(layer, "get_seq_length") for layers in caches for layer in layers):
            return None
        lengths += [[(type(layer), int(layer.get_seq_length())) for layer in layers] for layers in caches]
    return lengths


def _is_first(before: _Lengths | None, after: _Lengths | None) -> bool:
    """Whether what was written meanwhile is the first layer of its kind in its cache, or nobody can tell."""
    if before is None or after is None or len(before) != len(after):
        return True
    return any(
        [layer] != old[index : index + 1] and all(kind is not layer[0] for kind, _ in new[:index])
        for old, new in zip(before, after, strict=True)
        for index, layer in enumerate(new)
    )
