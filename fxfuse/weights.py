"""Packed weights that are never stale.

A graph that was rewritten has an input for each of its packed weights, with a recipe (:mod:`fxfuse.recipe`). The tensor
behind that input is computed here, once, and anew when a weight changes. Packs belong to parameters, not to graphs:
prefill, decode and recompilations share one, and a graph that serves many layers (``layer.compile()``) has one for
each.

A change shows as another object, another address, or another version. Addresses are safe to compare because each pack
holds on to the memory it was made from, so that nothing else can come to lie there. ``p.data.copy_()`` changes none of
the three; after that, call :func:`refresh`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxfuse.errors import OptionError
from fxfuse.recipe import Part, Recipe

Mode: TypeAlias = Literal["copy", "share"]


_Stamp: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
_address = Tensor.data_ptr
_version: Callable[[Tensor], int] = attrgetter("_version")


def _stamp(members: Sequence[Tensor]) -> _Stamp:
    """What changes when a member does: addresses and versions. Inference tensors have no version."""
    try:
        return tuple(map(_address, members)), tuple(map(_version, members))
    except RuntimeError:
        return tuple(map(_address, members)), tuple(map(_version_if_any, members))


def _version_if_any(member: Tensor) -> int:
    try:
        return _version(member)
    except RuntimeError:
        return -1  # is_inference() does not tell: it is False once .data was set to an ordinary tensor


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Packs outlive the call that makes them, so they are made as ordinary tensors, without gradients."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class Pack:
    """A packed tensor and the weights that it is made of.

    Attributes:
        tensor: the packed values; always the same memory, as long as the members keep their dtypes and devices.
    """

    def __init__(self, recipe: Recipe, members: Sequence[Tensor], mode: Mode) -> None:
        self.recipe, self.mode = recipe, mode
        self._members = tuple(weakref.ref(member) for member in members)
        with _plain_tensors():
            made = [part.compute(members).detach() for part in recipe.parts]
            sizes = [part.shape[recipe.dim] if part.dim() else 1 for part in made]
            self.tensor = recipe.join(made)
            self._regions = torch.split(self.tensor, sizes, recipe.dim) if len(made) > 1 else (self.tensor,)
        torch._dynamo.mark_static_address(self.tensor)
        self._settle(members)

    def holds(self, members: Sequence[Tensor]) -> bool:
        return all(ref() is member for ref, member in zip(self._members, members, strict=True))

    @property
    def members(self) -> tuple[Tensor, ...]:
        return tuple(member for ref in self._members if (member := ref()) is not None)

    def sync(self, members: Sequence[Tensor]) -> None:
        """Take over what changed in the members since the last time."""
        if _stamp(members) != self._stamped:
            self.repack(members)

    def repack(self, members: Sequence[Tensor]) -> None:
        """Compute the packed values anew, in place."""
        with _plain_tensors():
            for part, region in zip(self.recipe.parts, self._regions, strict=True):
                if not self._shares(part, region, members):
                    region.copy_(part.compute(members))
        self._settle(members)

    def _shares(self, part: Part, region: Tensor, members: Sequence[Tensor]) -> bool:
        return part.member is not None and members[part.member].data_ptr() == region.data_ptr() and self.mode == "share"

    def _settle(self, members: Sequence[Tensor]) -> None:
        if self.mode == "share":
            for part, region in zip(self.recipe.parts, self._regions, strict=True):
                if part.member is not None and not self._shares(part, region, members):
                    if members[part.member].is_inference():
                        raise OptionError(
                            "weights='share' cannot take the memory of weights that were made in inference_mode: "
                            "load the model outside of it, or use weights='copy'"
                        )
                    members[part.member].data = region
        self._stamped = _stamp(members)
        self._memory = [member.detach() for member in members]  # so that no other tensor can come to lie there

    def gradients(self, members: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """The gradient of the packed tensor, taken apart into those of the members that need one."""
        found: list[Tensor | None] = [None] * len(members)
        sizes = [region.shape[self.recipe.dim] for region in self._regions] if gradient.dim() else [1]
        for part, own in zip(self.recipe.parts, torch.split(gradient, sizes, self.recipe.dim), strict=True):
            if part.member is not None:
                found[part.member] = _plus(found[part.member], own) if needed[part.member] else None
                continue
            with torch.enable_grad():
                leaves = [member.detach().requires_grad_(need) for member, need in zip(members, needed, strict=True)]
                value = part.compute(leaves)
            if not value.requires_grad:
                continue
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            for leaf, grad in zip(wanted, torch.autograd.grad(value, wanted, own, allow_unused=True), strict=True):
                index = next(i for i, each in enumerate(leaves) if each is leaf)
                if grad is not None:
                    found[index] = _plus(found[index], grad)
        return found


def _plus(sum_: Tensor | None, more: Tensor) -> Tensor:
    return more if sum_ is None else sum_ + more


class _Split(torch.autograd.Function):
    """The packed tensor as a function of its members: nothing to compute forwards, slices of the gradient backwards."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, pack: Pack, *members: Tensor) -> Tensor:
        ctx.pack = pack  # type: ignore[attr-defined]  # autograd's convention
        ctx.save_for_backward(*members)
        return pack.tensor.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        members = ctx.saved_tensors  # type: ignore[attr-defined]  # autograd's convention
        pack: Pack = ctx.pack  # type: ignore[attr-defined]
        return None, *pack.gradients(members, gradient, ctx.needs_input_grad[1:])  # type: ignore[attr-defined]


_PACKS: weakref.WeakValueDictionary[Hashable, Pack] = weakref.WeakValueDictionary()


def _pack(recipe: Recipe, members: Sequence[Tensor], mode: Mode) -> Pack:
    """The one pack of these members by this recipe; made if no graph has it yet."""
    kinds = tuple((id(m), m.dtype, m.device, tuple(m.shape)) for m in members)
    key = (recipe.key, kinds, mode)
    found = _PACKS.get(key)
    if found is None or not found.holds(members):
        found = _PACKS[key] = Pack(recipe, members, mode)
    else:
        found.sync(members)
    return found


def refresh(model: nn.Module) -> int:
    """Pack every weight of ``model`` anew after ``p.data.copy_()``, which leaves no trace; how many packs it has."""
    own = {id(parameter) for parameter in [*model.parameters(), *model.buffers()]}
    found = [pack for pack in list(_PACKS.values()) if any(id(member) in own for member in pack.members)]
    for pack in found:
        members = pack.members
        if len(members) == len(pack._members):
            pack.repack(members)
    return len(found)


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Let the versions of packed weights tell of a step: fused optimizers write them and leave their versions alone."""
    packed = {id(member) for pack in list(_PACKS.values()) for member in pack.members}
    stepped = [weight for group in optimizer.param_groups for weight in group["params"] if id(weight) in packed]
    torch.autograd.graph.increment_version(stepped)


register_optimizer_step_post_hook(_count_step)


@dataclass
class _Bound:
    """The packs of one set of weights, and the stamp under which they are true."""

    packs: tuple[Pack, ...]
    tensors: tuple[Tensor, ...]
    stamp: _Stamp
    alive: tuple[weakref.ref[Tensor], ...]  # their callbacks forget this binding when a member dies


class PackedCall:
    """A compiled graph together with the packs that its last inputs stand for: call it as Dynamo calls the graph.

    One call checks the identity, address and version of every member, 0.1 to 0.2 us each.
    """

    def __init__(self, recipes: Sequence[Recipe], mode: Mode) -> None:
        self._recipes, self._mode = tuple(recipes), mode
        self._inputs = tuple(dict.fromkeys(index for recipe in recipes for index in recipe.inputs))
        self._places = [tuple(map(self._inputs.index, recipe.inputs)) for recipe in recipes]
        take = itemgetter(*self._inputs)
        self._take: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = (
            take if len(self._inputs) > 1 else lambda args: (take(args),)
        )
        self._bounds: dict[tuple[int, ...], _Bound] = {}
        self.compiled: Callable[..., object] | None = None

    def tensors(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The packed tensors for these inputs of the graph, true to them and joined to them for autograd."""
        members = self._take(args)
        identity = tuple(map(id, members))
        bound = self._bounds.get(identity)
        if bound is None or bound.stamp != _stamp(members):
            bound = self._bounds[identity] = self._bind(identity, members)
        if torch.is_grad_enabled():
            return tuple(
                self._with_gradient(pack, [members[place] for place in places])
                for pack, places in zip(bound.packs, self._places, strict=True)
            )
        return bound.tensors

    @staticmethod
    def _with_gradient(pack: Pack, members: Sequence[Tensor]) -> Tensor:
        if not any(member.requires_grad for member in members):
            return pack.tensor
        joined = _Split.apply(pack, *members)  # type: ignore[no-untyped-call]  # torch does not annotate it
        assert isinstance(joined, Tensor)
        return joined

    def _bind(self, identity: tuple[int, ...], members: tuple[Tensor, ...]) -> _Bound:
        packs = tuple(
            _pack(recipe, [members[place] for place in places], self._mode)
            for recipe, places in zip(self._recipes, self._places, strict=True)
        )
        bounds = self._bounds
        alive = tuple(weakref.ref(member, lambda _: bounds.pop(identity, None)) for member in members)
        return _Bound(packs, tuple(pack.tensor for pack in packs), _stamp(members), alive)

    def __call__(self, *args: Tensor) -> object:
        assert self.compiled is not None
        return self.compiled(*args, *self.tensors(args))
