"""Packed weights that are never stale.

A graph that was rewritten has an input for each of its packed weights, with a recipe (:mod:`fxfuse.packing.recipe`).
The tensor behind that input is computed here, once, and anew when a weight changes. Packs belong to parameters, not to
graphs: prefill, decode and recompilations share one, and a graph that serves many layers (``layer.compile()``) has one
for each.

A change shows in the next call as another object, another address or another version. Addresses are safe to compare
because each pack holds on to the memory it was made from, so that nothing else can come to lie there. Writes through
``p.data``, numpy and inference tensors change none of the three, and show in samples of the values
(:mod:`fxfuse.packing.fingerprint`). Single values can escape those: so, now and then, a part of a pack is compared as a
whole with what it should be (:class:`fxfuse.packing.packs.Audit`).

Threads may call one graph while another thread changes weights: each call reads packs of the old weights or of the new
ones. A pack is written in place only where nobody is reading it, and moves to other memory else; what it is made from
is noted before it is made, so that a weight that changes meanwhile shows in the next call. (On GPUs a call is over when
its kernels are queued: threads that use streams of their own have to order them with updates themselves.)

No weak reference points to a parameter: ``torch.utils.swap_tensors`` would refuse it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fxfuse.graph.blocks import blocks_of, is_quantized
from fxfuse.packing.fingerprint import Watch, watches
from fxfuse.packing.packs import Audit, Pack, Stamp, plain, plain_tensors, stamp
from fxfuse.packing.recipe import Recipe
from fxfuse.packing.strategy import Weights

AUDIT_SHARE = 0.0005
"""The share of the time that goes into comparing whole parts of packs."""


class _Turn:
    """Who packs: one thread at a time, and in a forked process not one that stayed behind."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._begin)

    def _begin(self) -> None:
        self.lock = threading.RLock()


_TURN = _Turn()


def _life(member: Tensor) -> set[None]:
    """An object that dies with ``member``, and can be watched by a weak reference where the tensor itself must not."""
    life: set[None] = member.__dict__.setdefault("_fxfuse_life", set())
    return life


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


def _pack(recipe: Recipe, members: Sequence[Tensor], weights: Weights) -> Pack:
    """The one pack of these members by this recipe; made if no graph has it yet."""
    kinds = tuple((id(m), m.dtype, m.device, tuple(m.shape), m.stride(), _blocks(m)) for m in members)
    key = (recipe.key, kinds, weights)
    pack = _PACKS.get(key)
    if pack is None:
        pack = _PACKS[key] = Pack(recipe, members, weights)
    else:
        pack.sync(members)
    return pack


def _blocks(member: Tensor) -> Hashable:
    return blocks_of(member) if is_quantized(member) else None


def refresh(model: nn.Module) -> int:
    """Let the next call pack every weight of ``model`` anew, whatever changed; how many packs it has.

    Only a write that leaves no trace and changes a few values of a large weight can need this: it is noticed by itself,
    but not at once.
    """
    own = {id(weight) for weight in [*model.parameters(), *model.buffers()]}
    with _TURN.lock:
        packs = [pack for pack in list(_PACKS.values()) if not pack.ids.isdisjoint(own)]
        for pack in packs:
            pack.expire()
    return len(packs)


def _count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Let the versions of packed weights tell of a step: fused optimizers write them and leave their versions alone."""
    packed = {identity for pack in list(_PACKS.values()) for identity in pack.ids}
    stepped = [weight for group in optimizer.param_groups for weight in group["params"] if id(weight) in packed]
    torch.autograd.graph.increment_version(stepped)


@cache
def _watch_optimizers() -> None:
    """Hear of every optimizer's steps from now on: called when there are packed weights, once in a process."""
    register_optimizer_step_post_hook(_count_step)


@dataclass(eq=False)
class _Bound:
    """The packs of one set of weights, the stamp under which they are true, and the calls that are reading them."""

    packs: tuple[Pack, ...]
    tensors: tuple[Tensor, ...]
    stamp: Stamp | None
    watches: tuple[Watch, ...]
    audit: Audit
    alive: tuple[weakref.ref[set[None]], ...]  # their callbacks forget this binding when a member dies
    running: set[object] = field(default_factory=set)

    def holds(self, members: Sequence[Tensor], share: float) -> bool:
        """Whether the members' values are those that were packed, as far as can be seen in passing."""
        for watch in self.watches:
            if not watch.same():
                return False
        if self.audit.passes(members, share):
            return True
        with _TURN.lock:
            for pack in self.packs:  # what escaped once may have escaped elsewhere
                pack.expire()
        return False


def _watches(packs: Sequence[Pack], before: _Bound | None) -> tuple[Watch, ...]:
    """Watches over all members; those from before, if they watch the same memory."""
    by_member = {member: fingerprint for pack in packs for member, fingerprint in pack.fingerprints.items()}
    if before is not None and {f for watch in before.watches for f in watch.fingerprints} == {*by_member.values()}:
        return before.watches
    return watches(by_member.values())


class PackedCall:
    """A compiled graph together with the packs that its last inputs stand for: call it as Dynamo calls the graph.

    One call checks the identity, address and version of every member, and looks at samples of their values.
    """

    def __init__(self, recipes: Sequence[Recipe], weights: Weights) -> None:
        _watch_optimizers()
        self._recipes, self._weights = tuple(recipes), weights
        self._inputs = tuple(dict.fromkeys(index for recipe in recipes for index in recipe.inputs))
        self._places = [tuple(map(self._inputs.index, recipe.inputs)) for recipe in recipes]
        take = itemgetter(*self._inputs)
        self._take: Callable[[Sequence[Tensor]], tuple[Tensor, ...]] = (
            take if len(self._inputs) > 1 else lambda args: (take(args),)
        )
        self._bounds: dict[tuple[int, ...], _Bound] = {}
        self._plain = True  # no member is made of other tensors
        self.compiled: Callable[..., object] | None = None

    def tensors(self, args: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The packed tensors for these inputs of the graph, true to them and joined to them for autograd."""
        with self._reading(self._take(args)) as tensors:
            return tensors

    @contextmanager
    def _reading(self, members: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        """The packed tensors of these members; nobody writes there until the block ends."""
        call = object()
        bound = self._bound(members, call)
        try:
            yield self._tensors(bound, members)
        finally:
            bound.running.discard(call)

    def _tensors(self, bound: _Bound, members: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled():
            return tuple(
                self._with_gradient(pack, [members[place] for place in places])
                for pack, places in zip(bound.packs, self._places, strict=True)
            )
        return bound.tensors

    def _bound(self, members: tuple[Tensor, ...], call: object) -> _Bound:
        """The packs of these members, true to them; ``call`` reads them from now on."""
        identity = tuple(map(id, members))
        bound = self._bounds.get(identity)
        if bound is not None:
            bound.running.add(call)  # before the look: from then on nobody writes there
            if bound.stamp == self._now(members) and bound.holds(members, AUDIT_SHARE / len(self._bounds)):
                return bound
            bound.running.discard(call)
        with _TURN.lock:
            latest = self._bounds.get(identity)
            if latest is None or latest is bound or latest.stamp != self._now(members):
                latest = self._bounds[identity] = self._bind(identity, members)
            latest.running.add(call)
        return latest

    def _now(self, members: Sequence[Tensor]) -> Stamp:
        return stamp(members if self._plain else plain(members))

    @staticmethod
    def _with_gradient(pack: Pack, members: Sequence[Tensor]) -> Tensor:
        if not any(member.requires_grad for member in members):
            return pack.tensor
        joined = _Split.apply(pack, *members)  # type: ignore[no-untyped-call]  # torch does not annotate it
        assert isinstance(joined, Tensor)
        return joined

    def _bind(self, identity: tuple[int, ...], members: tuple[Tensor, ...]) -> _Bound:
        self._plain = self._plain and not any(map(is_quantized, members))
        before = self._bounds.get(identity)
        with plain_tensors(members[0].device):
            for watch in before.watches if before is not None else ():
                watch.take()
            own = [[members[place] for place in places] for places in self._places]
            packs = tuple(_pack(*each, self._weights) for each in zip(self._recipes, own, strict=True))
            looks = _watches(packs, before)
        now = self._now(members)  # a weight that has changed since its pack was made leaves no stamp that holds
        true = all(pack.holds(its) for pack, its in zip(packs, own, strict=True))
        bounds = self._bounds
        alive = tuple(weakref.ref(_life(member), lambda _: bounds.pop(identity, None)) for member in members)
        tensors = tuple(pack.tensor for pack in packs)
        bound = _Bound(packs, tensors, now if true else None, looks, Audit(packs, self._places), alive)
        for pack in packs:
            pack.serve(bound)
        return bound

    def __call__(self, *args: Tensor) -> object:
        assert self.compiled is not None
        with self._reading(self._take(args)) as tensors:
            return self.compiled(*args, *tensors)
