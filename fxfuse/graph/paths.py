"""Paths of modules: which module a branch is, told from the names of its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

_Key = TypeVar("_Key", bound=Hashable)


def common_path(names: Iterable[str]) -> str:
    """The deepest module path that holds all parameters of those ``names``."""
    common: list[str] = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def deeper(named: Mapping[_Key, tuple[str, Sequence[str]]]) -> dict[_Key, str]:
    """Names for what has one with others, or one that lies above another's: the path of its :func:`last_module`.

    Args:
        named: for each key its path, and the names of its parameters in the order in which they are used.
    """
    counts = Counter(path for path, _ in named.values())
    above = {".".join(parts[:k]) for parts in (path.split(".") for path in counts) for k in range(1, len(parts))}
    found = {key: last_module(path, names) for key, (path, names) in named.items() if counts[path] > 1 or path in above}
    # A name of its own, though above another's, gives way only to the module that ends the branch.
    found = {key: name for key, name in found.items() if counts[named[key][0]] > 1 or _ends(named[key][1], name)}
    taken = Counter(found.values()) + counts
    return {key: path for key, path in found.items() if path and taken[path] == 1}


def _ends(names: Sequence[str], module: str) -> bool:
    return names[-1].startswith(module + ".") if names else False


def last_module(path: str, names: Sequence[str]) -> str:
    """The module within ``path`` that holds more than half of the modules with parameters, if there is one; else "".

    What comes before it prepares its input, as a norm with matrices of its own does; after it comes one map at most, as
    of a convolution of its output.
    """
    depth = len(path.split(".")) if path else 0
    heads = [".".join(name.split(".")[: depth + 1]) for name in names]
    held = {head: {n.rpartition(".")[0] for n, h in zip(names, heads, strict=True) if h == head} for head in heads}
    own = max(held, key=lambda head: len(held[head]), default="")
    if not own or len(held[own]) < 2 or 2 * len(held[own]) <= sum(map(len, held.values())):
        return ""
    after = {module for head in heads[heads.index(own) :] if head != own for module in held[head]}
    return common_path(name for name, head in zip(names, heads, strict=True) if head == own) if len(after) < 2 else ""
