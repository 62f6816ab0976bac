"""Inline: calls of torch.nn's modules as the functions that these call.

``torch.fx.symbolic_trace`` leaves an ``nn.Linear`` or an ``nn.LayerNorm`` as a call of the module. Written as functions
of the module's parameters, such calls speak the vocabulary that all other tracers speak. Modules of other kinds, and
those that have hooks, stay calls: what they do is their own affair. A module is taken in the mode, training or
evaluation, that it is in.
"""

from __future__ import annotations

from torch import fx, nn
from torch.fx.node import Argument

from fxfuse._torch.modules import has_hooks

_MODULES = frozenset(
    {
        nn.Identity, nn.Linear, nn.Embedding, nn.Dropout, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm,
        nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.GLU, nn.Sigmoid,
        nn.LogSigmoid, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softmax,
        nn.PReLU, nn.Threshold, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink,
    }
)  # fmt: skip


def inline(gm: fx.GraphModule) -> list[str]:
    """Replace the calls of torch.nn's modules by what they compute; the names of those modules."""
    inlined: list[str] = []
    for node in gm.graph.find_nodes(op="call_module"):
        module = gm.get_submodule(str(node.target))
        if type(module) in _MODULES and not _is_special(module):
            _inline(gm.graph, node, module)
            inlined.append(str(node.target))
    return inlined


def _is_special(module: nn.Module) -> bool:
    """Whether calling this very module does more than its class says: hooks, or a forward of its own."""
    return has_hooks(module) or bool(vars(module).get("forward"))


def _inline(graph: fx.Graph, call: fx.Node, module: nn.Module) -> None:
    inner = fx.Tracer().trace(module)
    new: dict[fx.Node, Argument] = {}
    positional = iter(call.args)
    with graph.inserting_before(call):
        for node in inner.nodes:
            if node.op == "placeholder":
                new[node] = call.kwargs[str(node.target)] if node.target in call.kwargs else next(positional)
            elif node.op == "get_attr":
                new[node] = graph.get_attr(f"{call.target}.{node.target}")
            elif node.op != "output":
                new[node] = _copied(graph, node, new)
    (result,) = inner.output_node().args
    assert isinstance(result, fx.Node)
    made = new[result]
    assert isinstance(made, fx.Node)
    if made not in call.all_input_nodes:
        made.meta = dict(call.meta)
    call.replace_all_uses_with(made)
    graph.erase_node(call)


def _copied(graph: fx.Graph, node: fx.Node, new: dict[fx.Node, Argument]) -> fx.Node:
    """The call ``node`` of a module's own graph in ``graph``; one of its inputs may be any argument of the module's."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), new.__getitem__)
    return graph.create_node(node.op, node.target, args, kwargs)
