"""Pages to look at, and a reader of them that shares no code with what wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import torch

from fxfuse import Plan, Recording
from fxfuse.measure.recording import BranchRecord
from fxfuse.plan import Decision
from fxfuse.report.page import Result

VOID = {"meta", "input"}

RESULTS = (
    Result(name="as it was", solver="none", latency=0.040, kl=0.0),
    Result(name="cheap", solver="greedy", latency=0.036, kl=0.09, healed_kl=0.05),
    Result(name="best", solver="search", latency=0.035, kl=0.07, healed_kl=0.03, chosen=True),
    Result(name="poor", solver="greedy", latency=0.039, kl=0.5, healed_kl=0.3),
)


def layers(count: int, prefix: str = "model.layers.") -> Recording:
    """A recording of ``count`` layers of attention and FFN, with random numbers."""
    generator = torch.Generator().manual_seed(0)
    m = 2 * count
    names = [f"{prefix}{index // 2}.{'mlp' if index % 2 else 'attn'}" for index in range(m)]
    branches = tuple(
        BranchRecord(name, "gated_ffn" if index % 2 else "attention", 0, index, index, 1000, 96 * (index % 2), "")
        for index, name in enumerate(names)
    )
    mean = (0.5 * torch.rand(m, m, generator=generator) ** 3).triu(1)
    scores = torch.rand(3, m, generator=generator)
    return Recording(
        branches=branches,
        mean=mean,
        p99=mean * 1.5,
        max=mean * 3,
        cosine=1 - scores[0] / 10,
        norm_ratio=scores[1],
        kl=scores[2],
        groups=(),
        tokens=1024,
        model={"shapes": "a" * 64, "weights": "b" * 64},
        made={"date": "2026-11-28", "fxfuse": "0.1.0", "torch": "2.13.0"},
    )


def plan_of_layers(prefix: str = "model.layers.") -> Plan:
    """For :func:`layers`: attentions 2 and 3 dropped, FFNs 1 to 3 in parallel, and two layers as private sequences."""
    attn, mlp = (lambda i: f"{prefix}{i}.attn"), (lambda i: f"{prefix}{i}.mlp")
    return Plan(
        drop=[attn(2), attn(3)],
        parallel=[[mlp(1), mlp(2), mlp(3)], [[attn(4), mlp(4)], [attn(5), mlp(5)]]],
        why=[
            Decision("drop", (attn(2),), "kept", "adds 0.01; it may add 0.02", 0.01, 0.01, 0.01),
            Decision("parallel", (mlp(0), mlp(1)), "refused", "recorded to add 2.2 by itself", 0.3),
        ],
    )


@dataclass
class Node:
    """An element of a page as a browser's parser sees it."""

    tag: str
    attributes: dict[str, str]
    parts: list[Node | str] = field(default_factory=list)

    @property
    def children(self) -> list[Node]:
        return [part for part in self.parts if isinstance(part, Node)]

    @property
    def text(self) -> str:
        """The text that is in no element within."""
        return "".join(part for part in self.parts if isinstance(part, str))

    def all(self, tag: str = "", class_: str = "") -> list[Node]:
        """The descendants of a tag, of a class, or both, in order."""
        return list(self._descend(tag, class_))

    def _descend(self, tag: str, class_: str) -> Iterator[Node]:
        for child in self.children:
            if tag in ("", child.tag) and (not class_ or class_ in child.classes):
                yield child
            yield from child._descend(tag, class_)

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    @property
    def words(self) -> str:
        """All text in it."""
        return "".join(part if isinstance(part, str) else part.words for part in self.parts)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Node("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attrs})
        assert len(node.attributes) == len(attrs), f"an attribute stands twice: {attrs}"
        self.open[-1].parts.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")


def read(page: str) -> Node:
    """The elements of a page, each of which is closed in its turn."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    (root,) = reader.open
    return root


def section(page: Node, title: str) -> Node:
    """The section with this heading."""
    (found,) = (one for one in page.all("section") if one.children[0].text == title)
    return found


def distances(page: Node) -> dict[str, Any]:
    """The data that the page's script tells from."""
    (node,) = (script for script in page.all("script") if script.attributes.get("id") == "distances")
    told: dict[str, Any] = json.loads(node.text)
    return told
