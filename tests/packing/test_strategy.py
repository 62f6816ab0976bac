"""A kind of packed tensor is one class and one row: the package packs, follows and audits it like its own."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.packing.packs import Pack
from fxfuse.packing.recipe import Part, Recipe
from fxfuse.packing.strategy import BY_KIND, BY_OPTION, Copied, Opaque, Shared, strategy_of


class Int8(Tensor):
    """Eight-bit rows ``[out, in]`` and a scale each. It knows no ``cat``, no ``copy_``, no slices."""

    rows: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, rows: Tensor, scale: Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scale.dtype)

    def __init__(self, rows: Tensor, scale: Tensor) -> None:
        self.rows, self.scale = rows, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8:
        scale = weight.detach().abs().amax(1) / 127
        return cls((weight.detach() / scale[:, None]).round().to(torch.int8), scale)

    def dense(self) -> Tensor:
        return self.rows.to(self.scale.dtype) * self.scale[:, None]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scale)
        raise NotImplementedError(f"no {function}")


class Int8Rows(Copied):
    """Joins along the output rows, where each row has a scale of its own."""

    def takes(self, made: Tensor) -> bool:
        return isinstance(made, Int8)

    def join(self, made: Sequence[Any], dim: int) -> Int8:
        assert dim == 0
        return Int8(torch.cat([part.rows for part in made]), torch.cat([part.scale for part in made]))

    def regions(self, packed: Any, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
        return tuple(map(Int8, packed.rows.split(list(sizes)), packed.scale.split(list(sizes))))

    def write(self, region: Any, made: Any) -> None:
        region.rows.copy_(made.rows)
        region.scale.copy_(made.scale)

    def same(self, region: Any, made: Any) -> bool:
        return torch.equal(region.rows, made.rows) and torch.equal(region.scale, made.scale)


def int8_pack(members: Sequence[Tensor], mode: Any) -> Pack:
    parts = tuple(Part(lambda own, take=itemgetter(i): Int8.of(take(own)), None, (i,)) for i in range(len(members)))
    return Pack(Recipe("int8", tuple(range(len(members))), parts, 0, "int8"), members, mode)


@pytest.mark.parametrize("mode", ["copy", "share"])
def test_a_kind_of_its_own_is_packed_followed_and_audited_by_one_class_and_one_row(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxfuse.packing.strategy.BY_KIND", [*BY_KIND, Int8Rows()])
    generator = torch.Generator().manual_seed(0)
    members = [torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (4, 3)]
    pack = int8_pack(members, mode)
    tensor = pack.tensor

    def holds() -> bool:
        assert pack.tensor is tensor and isinstance(tensor, Int8)
        return torch.equal(tensor.dense(), torch.cat([Int8.of(member).dense() for member in members]))

    assert holds()
    members[1].mul_(-2.0)
    assert not holds()
    pack.sync(members)
    assert holds()
    members[0].data.neg_()
    assert [pack.right(index, members) for index in (0, 1)] == [False, True]
    pack.sync(members)
    assert holds()


def test_without_its_row_a_kind_that_knows_no_cat_is_an_error() -> None:
    with pytest.raises(NotImplementedError):
        int8_pack([torch.randn(4, 6), torch.randn(3, 6)], "copy")


def test_plain_tensors_are_kept_as_the_option_says_and_opaque_ones_always_as_copies() -> None:
    weight = torch.randn(4, 6)

    assert [type(strategy_of([weight], mode)) for mode in ("copy", "share")] == [Copied, Shared]
    if torch.backends.mkldnn.is_available():
        assert {type(strategy_of([weight.to_mkldnn()], mode)) for mode in BY_OPTION} == {Opaque}


def test_only_shared_weights_become_views_of_what_is_packed() -> None:
    for mode, strategy in BY_OPTION.items():
        member = torch.randn(4, 6)
        region = strategy.join([member], 0)
        strategy.adopt(member, region)

        assert strategy.shares(member, region) == (mode == "share") == (member.data_ptr() == region.data_ptr())


def test_each_shared_weight_frees_its_memory_before_the_next_is_copied() -> None:
    members = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    values = torch.cat([member.detach().clone() for member in members])
    old = [StorageWeakRef(member.untyped_storage()) for member in members]
    alive: list[int] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default:
                alive.append(sum(not storage.expired() for storage in old))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watched():
        packed = Shared().gather([member.detach() for member in members], members, 0)

    assert alive == [3, 2, 1]
    assert torch.equal(packed, values)
    assert all(member.untyped_storage().data_ptr() == packed.data_ptr() for member in members)
