"""What a recording has measured so far: of branches and of groups of them, added batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from fxfuse.errors import RecordError
from fxfuse.measure.provenance import provenance
from fxfuse.measure.recording import BranchRecord, GroupRecord, Recording
from fxfuse.measure.statistics import Tally
from fxfuse.plan import Plan


@dataclass
class Measurements:
    """Of m branches and of some groups.

    Attributes:
        places: the branches.
        windows: the names of the members of each group.
        distance: how far branch j turns when branch i is dropped, at ``i * m + j``.
        cosine: of each branch, how far it turns the stream.
        norm_ratio: of each, how large its contribution is beside the stream.
        kl: of each, what its drop does to the next token; nothing where the model returns no logits.
        group: of each group, the relative error of the stream after it.
        group_kl: of each group, what it does to the next token.
        tokens, batches: how many were measured.
        units: of each FFN that tells its hidden units, by name, float64 ``[width]``: the sum over tokens of
            ``|activation| * ||down column||``.
    """

    places: tuple[BranchRecord, ...]
    windows: tuple[tuple[str, ...], ...]
    distance: Tally
    cosine: Tally
    norm_ratio: Tally
    kl: Tally
    group: Tally
    group_kl: Tally
    tokens: int = 0
    batches: int = 0
    units: dict[str, Tensor] = field(default_factory=dict)

    def add_units(self, name: str, activations: Tensor, columns: Tensor) -> None:
        """Add one batch's sums of ``|activation|`` of the FFN ``name``; not to a state that has none of the others'."""
        if name in self.units:
            self.units[name] += activations * columns
        elif not self.batches:
            self.units[name] = activations * columns

    @classmethod
    def of(cls, places: tuple[BranchRecord, ...], windows: Iterable[tuple[str, ...]]) -> Measurements:
        """Of these branches and groups nothing is measured yet."""
        groups, m = tuple(windows), len(places)
        return cls(
            places,
            groups,
            distance=Tally(m * m),
            cosine=Tally(m),
            norm_ratio=Tally(m),
            kl=Tally(m),
            group=Tally(len(groups)),
            group_kl=Tally(len(groups)),
        )

    @property
    def tallies(self) -> dict[str, Tally]:
        """All of them, by their names."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tally)}

    def check(self) -> None:
        """See that the numbers are of these branches and groups.

        Raises:
            ValueError: a tally has another size or other dtypes than :meth:`of` gives it, or units are of no branch.
        """
        fresh = Measurements.of(self.places, self.windows).tallies
        for name, tally in self.tallies.items():
            wanted = {key: (each.shape, each.dtype) for key, each in fresh[name].state().items()}
            if {key: (each.shape, each.dtype) for key, each in tally.state().items()} != wanted:
                raise ValueError(f"{name} is of other branches")
        widths = {place.name: ((place.width,), torch.float64) for place in self.places}
        for name, sums in self.units.items():
            if widths.get(name) != (tuple(sums.shape), sums.dtype):
                raise ValueError(f"the units of {name!r} are of another branch")

    def recording(self, plan: Plan, model: Mapping[str, str]) -> Recording:
        """What a file holds of it: ``plan`` was in force, and ``model`` is the digest of what was recorded.

        Raises:
            RecordError: nothing was measured.
        """
        if not self.tokens:
            raise RecordError("nothing was recorded: there was no batch, or no token in any. Give at least one batch")
        m, measured = len(self.places), bool(self.kl.count.any())
        kl, group_kl = (
            mean if measured else torch.full_like(mean, torch.nan) for mean in (self.kl.mean(), self.group_kl.mean())
        )
        means, tails = self.group.mean(), self.group.quantile(0.99)
        return Recording(
            branches=self.places,
            mean=self.distance.mean().view(m, m).float(),
            p99=self.distance.quantile(0.99).view(m, m).float(),
            max=self.distance.largest.view(m, m).float(),
            cosine=(1 - self.cosine.mean()).float(),
            norm_ratio=self.norm_ratio.mean().float(),
            kl=kl.float(),
            groups=tuple(
                GroupRecord(names, float(means[i]), float(tails[i]), float(self.group.largest[i]), float(group_kl[i]))
                for i, names in enumerate(self.windows)
            ),
            tokens=self.tokens,
            units={name: (sums / self.tokens).float() for name, sums in self.units.items()},
            plan=plan,
            model=dict(model),
            made=provenance(),
        )
