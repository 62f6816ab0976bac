"""What a traced graph knows of its values: shapes, dtypes, and which of them are weights.

Nothing here adds a guard: symbolic sizes are compared as expressions, never as numbers.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TypeAlias

import sympy  # type: ignore[import-untyped]  # it has no annotations
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.shape_prop import TensorMetadata
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fxfuse._torch.sources import source_text

Dim: TypeAlias = int | sympy.Expr


def value(node: fx.Node) -> torch.Tensor | None:
    """The (fake) tensor that stands for ``node``, if the tracer left one; an attribute of the graph's module itself."""
    if node.op == "get_attr":
        owner: object = node.graph.owning_module
        try:
            owner = reduce(getattr, str(node.target).split("."), owner)
        except AttributeError:
            return None
        return owner if isinstance(owner, torch.Tensor) else None
    for key in ("example_value", "val"):
        known = node.meta.get(key)
        if isinstance(known, torch.Tensor):
            return known
    recorded = node.meta.get("tensor_meta")  # what torch.fx.passes.shape_prop.ShapeProp leaves
    if isinstance(recorded, TensorMetadata):
        return torch.empty(recorded.shape, dtype=recorded.dtype, device="meta")
    return None


def sized(like: fx.Node, *sizes: int | torch.SymInt) -> torch.Tensor | None:
    """A tensor to stand for a value of other ``sizes`` that is else like that of a node; it takes no memory."""
    known = value(like)
    return None if known is None else known.new_empty(1).expand(*sizes)


def dtype(node: fx.Node) -> torch.dtype | None:
    known = value(node)
    return None if known is None else known.dtype


def shape(node: fx.Node) -> tuple[Dim, ...] | None:
    """The sizes of ``node``; symbolic ones as sympy expressions."""
    known = value(node)
    if known is None:
        return None
    return tuple(map(expression, known.shape))


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether the two have equal sizes; True where a tracer recorded none, since then nothing speaks against it.

    Symbolic sizes are equal if that can be proved: ``s0`` and ``s0 * s1 // s1`` are.
    """
    return _same_sizes(a, b, None)


def same_rows(a: fx.Node, b: fx.Node) -> bool:
    """The same of their sizes but the last."""
    return _same_sizes(a, b, -1)


def _same_sizes(a: fx.Node, b: fx.Node, end: int | None) -> bool:
    first, second = value(a), value(b)
    if first is None or second is None:
        return True
    return first.dim() == second.dim() and all(map(_same_size, first.shape[:end], second.shape[:end]))


def _same_size(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return expression(one) == expression(other) or statically_known_true(one == other)


def expression(size: int | torch.SymInt) -> Dim:
    if isinstance(size, int):
        return size
    known: sympy.Expr = size.node.expr
    return int(known) if known.is_Integer else known


def sizes_only(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that tell of their inputs no value but only sizes: ``x.size(1)``, and what is computed from such."""
    sizes: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        known = bool(sources) and all(source in sizes for source in sources)
        if known or node.target in _SIZES or (node.target is getattr and node.args[1] in ("shape", "ndim")):
            sizes.add(node)
    return sizes


_SIZES = ("size", "dim", "numel", torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default)


def is_floating(node: fx.Node) -> bool:
    kind = dtype(node)
    return kind is None or kind.is_floating_point


def widens(source: fx.Node, made: fx.Node) -> bool:
    """Whether ``made`` has a dtype that holds every value of ``source``'s."""
    first, second = dtype(source), dtype(made)
    return first is not None and second is not None and holds(second, first)


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether every number of dtype ``narrow`` is one of ``wide``; an integer dtype is held by itself alone.

    Not by promotion, which float8 does not have, and by which bfloat16 would hold any integer.
    """
    if wide == narrow or not (wide.is_floating_point and narrow.is_floating_point):
        return wide == narrow
    one, other = torch.finfo(wide), torch.finfo(narrow)
    least = one.smallest_normal * one.eps <= other.smallest_normal * other.eps
    return one.eps <= other.eps and one.max >= other.max and least


WEIGHT = "fxfuse_weight"
"""Key of ``node.meta`` for the name of a weight that the graph by itself takes for an input, or calls otherwise."""


def name_weights(names: Mapping[fx.Node, str]) -> None:
    """Let the graph itself know the names of its weights, for every pass to come."""
    for node, name in names.items():
        node.meta[WEIGHT] = clean(name)


def parameters(gm: fx.GraphModule, names: Mapping[fx.Node, str] | None = None) -> dict[fx.Node, str]:
    """The nodes that are weights or buffers of a module, with their dotted names as far as the graph knows them.

    ``names`` overrides what the graph says: whoever holds the root module knows better (graph breaks, ``fn``).
    """
    weights: dict[fx.Node, str] = {}
    for node in gm.graph.nodes:
        if WEIGHT in node.meta:
            weights[node] = node.meta[WEIGHT]
        elif node.op == "get_attr":
            if value(node) is not None:
                weights[node] = clean(str(node.target))
        elif node.op == "placeholder":
            if path := module_path(node):
                weights[node] = path
            elif isinstance(value(node), torch.nn.Parameter):
                weights[node] = ""
    if names:
        weights.update({node: clean(name) for node, name in names.items()})
    return weights


def names_in(root: torch.nn.Module, gm: fx.GraphModule, inputs: Sequence[object] | None = None) -> dict[fx.Node, str]:
    """The dotted names, from ``root``, of what in ``gm`` is one of its parameters or buffers.

    That are attributes of the graph (``_param_constant0`` of make_fx) and, if its ``inputs`` are given, those of them.
    """
    own: dict[int, str] = {}
    for name, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
        own.setdefault(id(tensor), name)
    held: dict[fx.Node, object] = {node: value(node) for node in gm.graph.find_nodes(op="get_attr")}
    if inputs is not None:
        held |= zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    return {node: own[id(given)] for node, given in held.items() if id(given) in own}


def called_module(node: fx.Node) -> torch.nn.Module | None:
    """The module that ``node`` calls, if it is a call of one."""
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if node.op == "call_module" and owner is not None else None


_SEGMENT = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")


def module_path(node: fx.Node) -> str:
    """The dotted path of an input below the outermost module of its source; empty if it is not a module's tensor."""
    source = source_text(node)
    if source is None or not re.search(r"\._(?:parameters|buffers)\['[^']+'\]$", source):
        return ""
    return clean(".".join(_SEGMENT.findall(source)))


def is_buffer(node: fx.Node) -> bool:
    """Whether a weight of the graph is known to be a buffer of its module, and no parameter."""
    if node.op == "get_attr":
        return not isinstance(value(node), torch.nn.Parameter)
    return bool(re.search(r"\._buffers\['[^']+'\]$", source_text(node) or ""))


_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")
_ADAPTERS = re.compile(r"^(base_model\.model\.)+")


def clean(name: str) -> str:
    """A parameter's name without what wrappers add: ``_orig_mod.``, checkpoint and adapter prefixes."""
    name = _WRAPPERS.sub("", name).lstrip(".")
    return _ADAPTERS.sub("", name)


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module that DistributedDataParallel or DataParallel wraps, if one of them does."""
    while isinstance(module, DistributedDataParallel | DataParallel):
        module = module.module
    return module


def last_dim(node: fx.Node) -> Dim | None:
    sizes = shape(node)
    return sizes[-1] if sizes else None


def product(sizes: tuple[Dim, ...]) -> Dim:
    return reduce(operator.mul, sizes, 1)
