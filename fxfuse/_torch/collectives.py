"""Collectives as graphs hold them. Seen on torch 2.13.0.

Dynamo traces ``torch.distributed.all_reduce`` and the functional collectives to ops of a namespace that has no public
name: one starts an all-reduce, another waits for its result. Those of a DTensor stay methods of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store, _resolve_process_group
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.fx.node import Target

_OPS = torch.ops._c10d_functional

STARTS: frozenset[Target] = frozenset({_OPS.all_reduce, _OPS.all_reduce.default})
"""What graphs call to start an all-reduce: ``(value, kind, group)``."""

WAITS: frozenset[Target] = frozenset({_OPS.wait_tensor, _OPS.wait_tensor.default})
"""What they call to wait for its result."""


def reduce_in_group(value: Tensor, kind: str, group: str) -> Tensor:
    """``value`` all-reduced in a process group, by the name that graphs have for it; differentiable."""
    made: Tensor = _OPS.wait_tensor(_OPS.all_reduce(value, kind, group))
    return made


def reduce_in_mesh(value: Tensor, kind: str, mesh: object) -> Tensor:
    """``value`` all-reduced over a mesh of one dimension, as a DTensor does it.

    While a graph is being compiled, torch has an object of its own in place of the DeviceMesh.
    """
    placements = [Partial(kind)]
    partial = DTensor.from_local(value, mesh, placements, run_check=False)  # type: ignore[arg-type]  # see above
    whole: Tensor = partial.redistribute(placements=[Replicate()]).to_local()
    return whole


def local_tensor(value: Tensor) -> Tensor:
    """The very tensor of this process that a DTensor wraps, and any other tensor as it is.

    ``to_local()`` makes another one at each call.
    """
    return value._local_tensor if isinstance(value, DTensor) else value


def ranks_of(group: object) -> list[int]:
    """The global ranks of the processes in a group, given by name, or in a mesh."""
    if isinstance(group, str):
        return dist.get_process_group_ranks(_resolve_process_group(group))  # type: ignore[arg-type]  # its type is private, and a str
    mesh: Any = getattr(group, "real_obj", group)  # what torch has in its place while a graph is being compiled
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def default_store() -> Store:
    """What all processes of a job can write to and read, without waiting for each other."""
    return _get_default_store()
