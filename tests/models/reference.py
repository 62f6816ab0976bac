"""What a plan means, told by running a model's own modules one sum at a time. Never imports fxfuse.

The semantics, in the words of the design: a group stands where the member that comes first in the stream stands; all
its members read the stream there and the sum of what they contribute is added there. A member that is a list of
branches runs in order on its own copy of the stream and contributes what it added. An attention that is linear
contributes what its output projection makes of its norm's output. Of an FFN that is narrowed the hidden units that it
does not keep are zero where its down projection reads them. Every other reader sees the stream as the plan leaves
it. Where the model multiplies its stream, a contribution is scaled by every factor that comes after
the place where it is added: the sums keep their factors, whatever leaves or joins them, and a private copy has none.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.models import spec as s
from tests.models.edits import edited
from tests.models.model import ResidualLayer, ResidualModel

Member = str | Sequence[str]
Parallel = Sequence[Sequence[Member]]


@dataclass(frozen=True)
class Step:
    """One branch of a model and the sum it stands in; ``linear`` if the plan makes it that, ``units`` that it keeps."""

    layer: ResidualLayer
    sum: s.Sum
    branch: s.Branch
    linear: bool
    units: tuple[int, ...] | None

    def __call__(self, h: Tensor, mask: Tensor) -> Tensor:
        """What the branch adds to a stream of value ``h``."""
        owner = self.sum.branches[0] if self.sum.shared_norm else self.branch
        x = getattr(self.layer, f"{owner.attribute}_norm")(h)
        body = getattr(self.layer, self.branch.attribute)
        if self.layer.cast != "none":
            x = x.to(next(p for p in reversed(list(body.parameters())) if p.ndim == 2).dtype)
        body = body.o if self.linear else body
        with only(body, self.units):
            f = body(x, mask) if isinstance(self.branch.body, s.Attention) and not self.linear else body(x)
        if self.branch.post_norm:
            f = getattr(self.layer, f"{self.branch.attribute}_post_norm")(f)
        if self.branch.gain != "none":
            f = f * getattr(self.layer, f"{self.branch.attribute}_gain")
        f = f if self.branch.scale is None else f * self.branch.scale
        f = edited(self.branch.edit, f)
        f = f if self.sum.scale is None else f * self.sum.scale
        return f.to(h.dtype)


@contextmanager
def only(body: nn.Module, units: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, the down projection of an FFN reads zeros for all hidden units but these."""

    def masked(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        kept = torch.zeros(args[0].shape[-1], dtype=torch.bool)
        kept[list(units or ())] = True
        return torch.where(kept, args[0], torch.zeros_like(args[0]))

    if units is None:
        yield
        return
    hook = body.get_submodule("down").register_forward_pre_hook(masked)
    try:
        yield
    finally:
        hook.remove()


def reference(
    model: ResidualModel,
    x: Tensor,
    drop: Collection[str] = (),
    parallel: Parallel = (),
    linear: Collection[str] = (),
    narrow: Sequence[tuple[str, tuple[int, ...]]] = (),
) -> tuple[Tensor, ...]:
    """The outputs of ``model`` under a plan, as a tuple: the output and then the taps."""
    steps: dict[str, Step] = {}
    sums: list[tuple[int, ResidualLayer, s.Sum, list[str]]] = []
    for i, _, item in model.spec.sums():
        layer = model.layers[i]
        assert isinstance(layer, ResidualLayer)
        names = [f"layers.{i}.{branch.attribute}" for branch in item.branches]
        pairs = zip(names, item.branches, strict=True)
        steps.update({n: Step(layer, item, b, n in linear, dict(narrow).get(n)) for n, b in pairs})
        sums.append((i, layer, item, names))

    position = {name: k for k, (_, _, _, names) in enumerate(sums) for name in names}
    groups = [[[member] if isinstance(member, str) else list(member) for member in group] for group in parallel]
    moved = {name for group in groups for member in group for name in member}
    stands_at = [min(position[name] for member in group for name in member) for group in groups]

    h = model.embed(x)
    mask = model.causal_mask(x.shape[1], x.device)
    taps = [h]
    for k, (i, layer, item, names) in enumerate(sums):
        added = [steps[name](h, mask) for name in names if name not in moved and name not in drop]
        for group, place in zip(groups, stands_at, strict=True):
            if place == k:
                for member in group:
                    added += run([steps[name] for name in member], [position[name] for name in member], h, mask)
        h = layer.scaled(item, "before", h)
        for f in added:
            h = h + f
        h = layer.scaled(item, "after", h)
        last_of_layer = k + 1 == len(sums) or sums[k + 1][0] != i
        if last_of_layer or model.spec.taps == "sums":
            taps.append(h)
    out = model.finish(h)
    match model.spec.taps:
        case "none":
            return (out,)
        case "pooled":
            return (out, *(tap.mean(1) for tap in taps))
        case _:
            return (out, *taps)


def run(sequence: list[Step], positions: list[int], h: Tensor, mask: Tensor) -> list[Tensor]:
    """A private sequence: what each of its branches adds to their own copy of the stream.

    Branches that the model itself computes from one point (a sum of several) do so on the copy too.
    """
    added: list[Tensor] = []
    for i, step in enumerate(sequence):
        own = h
        for f, position in zip(added, positions, strict=False):
            if position != positions[i]:
                own = own + f
        added.append(step(own, mask))
    return added
