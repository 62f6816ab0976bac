"""Sizes: shapes and dtypes for a graph whose tracer recorded none, as ``torch.fx.symbolic_trace`` does not."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fxfuse._torch.fake import FakeTensor, FakeTensorMode, computing_sizes
from fxfuse.errors import CaptureError, OptionError
from fxfuse.graph.ops import is_impure
from fxfuse.graph.values import value

_KEYS = ("example_value", "val", "tensor_meta")


def record_sizes(gm: fx.GraphModule, inputs: Sequence[object]) -> bool:
    """Let every node know its sizes, as far as its tracer left that to us; whether it did.

    The sizes of the inputs are taken as symbols, so that two that are equal by chance are not taken for one; but a size
    of 0 or 1 is taken for just that.

    Raises:
        CaptureError: the graph does not run on such inputs.
        OptionError: there are more inputs, or fewer, than the graph takes.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if len(inputs) != len(placeholders):
        raise OptionError(f"inputs: the graph takes {len(placeholders)} values, and {len(inputs)} were given")
    unknown = [
        node
        for node, given in zip(placeholders, inputs, strict=True)
        if isinstance(given, torch.Tensor) and not any(key in node.meta for key in _KEYS)
    ]
    if not unknown:
        return False
    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    try:
        with computing_sizes(mode):
            FakeTensorProp(gm, mode).propagate(*inputs)
    except Exception as error:
        reason = str(error).strip().splitlines()
        first = reason[0] if reason else type(error).__name__
        raise CaptureError(f"inputs: the graph does not run on values of their sizes: {first}") from error
    return True


def fill_in(gm: fx.GraphModule) -> None:
    """Let the nodes that passes wrote know their sizes, from those of what they read, as far as that is known."""
    mode = next((made.fake_mode for node in gm.graph.nodes if isinstance(made := value(node), FakeTensor)), None)
    if mode is None:
        return
    known: dict[fx.Node, FakeTensor] = {}
    with computing_sizes(mode):
        for node in gm.graph.nodes:
            sources = node.all_input_nodes
            computed = node.op in ("call_function", "call_method") and not any(key in node.meta for key in _KEYS)
            if computed and sources and not is_impure(node) and all(source in known for source in sources):
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                function = node.target if node.op == "call_function" else getattr(args[0], node.target)
                made = function(*(args if node.op == "call_function" else args[1:]), **kwargs)
                if isinstance(made, torch.Tensor):
                    node.meta["example_value"] = made
            if isinstance(found := value(node), FakeTensor) and found.fake_mode is mode:
                known[node] = found  # and not an attribute's real tensor, or what another mode knows
