"""Nested structures of tensors. Seen on torch 2.11.0 and 2.13.0.

``torch.utils.pytree`` is not public; it knows the classes of outputs that transformers registers with it.
"""

from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
