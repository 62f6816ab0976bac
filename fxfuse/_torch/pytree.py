"""Nested structures of tensors. Seen on torch 2.11.0 and 2.13.0.

``torch.utils.pytree`` is not public; it knows the classes of outputs that transformers registers with it.
"""

from typing import TypeVar

from torch.utils._pytree import register_constant
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only

C = TypeVar("C", bound=type)


def constant_in_graphs(cls: C) -> C:
    """Let Dynamo take objects of a class for constants, which torch 2.11 wants of what a constant function is given.

    The class has to say what equality is.
    """
    register_constant(cls)
    return cls
