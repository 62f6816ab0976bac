"""Checkpoints: the body of an activation checkpoint in the graph itself, its nodes marked to be recomputed. Exact.

Dynamo makes a graph of its own of each checkpointed region and calls it, so a stream would end at each layer. Written
into the graph that calls it, such a body is as visible as any other code. The marks are those that the region would get
when AOTAutograd traces it; so its partitioner still recomputes in the backward pass what they stand on. What a pass
writes anew, such as a wide FFN, has no mark and is kept.
"""

from __future__ import annotations

from operator import getitem

import torch
from torch import fx
from torch.fx.node import Argument
from torch.utils.checkpoint import CheckpointPolicy

from fxfuse._torch.ops import CHECKPOINT_CONTEXT


def inline_checkpoints(gm: fx.GraphModule) -> list[str]:
    """Replace the calls of checkpointed graphs by what they compute; the names of those calls.

    Selective checkpoints, whose policy is the user's, stay calls.
    """
    inlined: list[str] = []
    while calls := [call for call in _calls(gm) if _body(gm, call) is not None]:
        for call in calls:
            body = _body(gm, call)
            assert body is not None
            _inline(gm, call, body, len(inlined))
            inlined.append(call.name)
    return inlined


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint))


def _body(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule | None:
    """The graph that ``call`` runs, if it is one that can be written in its place."""
    held, *inputs = call.args
    if not isinstance(held, fx.Node) or held.op != "get_attr":
        return None
    if any(isinstance(value, fx.Node) for value in call.kwargs.values()):
        return None
    body = gm.get_submodule(str(held.target))
    if not isinstance(body, fx.GraphModule) or CHECKPOINT_CONTEXT in body.meta:
        return None
    (made,) = body.graph.output_node().args
    plain = isinstance(made, tuple | list) and len(body.graph.find_nodes(op="placeholder")) == len(inputs)
    picked = all(user.target is getitem and isinstance(user.args[1], int) for user in call.users)
    return body if plain and picked else None


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, number: int) -> None:
    held, *inputs = call.args
    new: dict[fx.Node, Argument] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                new[node] = gm.graph.get_attr(_adopt(gm, body, str(node.target)))
            elif node.op not in ("placeholder", "output"):
                made = gm.graph.node_copy(node, lambda source: new[source])
                made.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
                made.meta.setdefault("ac_graph_id", number)
                new[node] = made
    (results,) = body.graph.output_node().args
    assert isinstance(results, tuple | list)
    for user in list(call.users):
        index = user.args[1]
        assert isinstance(index, int)
        result = results[index]
        value = new[result] if isinstance(result, fx.Node) else result
        assert isinstance(value, fx.Node)
        user.replace_all_uses_with(value)
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    assert isinstance(held, fx.Node)
    if not held.users:
        gm.graph.erase_node(held)


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """Let ``gm`` hold what ``body`` holds at ``target``; its name there."""
    owner, _, last = target.rpartition(".")
    name = f"{target.replace('.', '_')}_inlined"
    while hasattr(gm, name):
        name += "_"
    setattr(gm, name, getattr(body.get_submodule(owner), last))
    return name
