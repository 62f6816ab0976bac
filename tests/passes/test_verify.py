"""A fusion that is not what it replaces is an error that names its branches; a right one passes, in any dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fxfuse import Plan
from fxfuse.errors import OptionError, VerifyError
from fxfuse.packing import expressions as pack
from fxfuse.passes import REPORTS, apply_plan, fuse_ffn, merge_gate_up
from tests.models.blocks import MLP, WIDTH, Attention, Layer, Stream, SwiGLU, assert_same, ready, trace, vectors

BODIES = [f"layers.{index}.body" for index in range(4)]


class Sides(Stream):
    """Pairs of branches that read one point, the pairs one behind the other."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for index in range(0, len(self.layers), 2):
            h = h + self.branch(index, h) + self.branch(index + 1, h)
        return h


class Post(SwiGLU):
    """With a norm behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(super().forward(x), (WIDTH,))


def forgets_a_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pack.weight_of
    monkeypatch.setattr(pack, "weight_of", lambda graph, projection, gain=None: whole(graph, projection))


PASSES: list[tuple[Callable[[], nn.Module], Callable[..., object]]] = [(SwiGLU, fuse_ffn), (Post, merge_gate_up)]


@pytest.mark.parametrize(("make", "run"), PASSES, ids=["fuse_ffn", "merge_gate_up"])
def test_a_wrong_fusion_is_an_error_that_names_its_branches_and_is_taken_back(
    make: Callable[[], nn.Module], run: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = trace(ready(Sides(Attention(), Attention(), make(), make())), vectors())
    before, expected = traced.gm.code, traced()
    forgets_a_gain(monkeypatch)

    with pytest.raises(VerifyError, match=r"layers\.2\.body \+ layers\.3\.body.*max_rewrites"):
        run(traced.gm, inputs=traced.inputs, verify=True)

    assert traced.gm.code == before
    assert_same(traced(), expected)
    run(traced.gm)  # without it nobody notices
    with pytest.raises(AssertionError):
        assert_same(traced(), expected)


class Typical(Sides):
    """What verifying has to run past: casts, a cache that is written, autocast, live dropout, a complex number."""

    def __init__(self) -> None:
        super().__init__(SwiGLU(), MLP(), MLP(), SwiGLU(), Post(), Post())
        self.register_buffer("cache", torch.zeros(2, 3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.cache.index_copy_(1, torch.arange(3), F.dropout(x, 0.5, True))
        turned = torch.view_as_complex(self.cache.float().view(2, 3, -1, 2)) * torch.ones(4, dtype=torch.complex64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            turned = torch.view_as_real(turned).flatten(2) @ torch.eye(WIDTH)
        h = x + turned.to(x.dtype)
        h = h + self.branch(0, h) + self.branch(3, h)
        h = h + self.branch(1, h) + self.branch(2, h)
        return h + self.branch(4, h) + self.branch(5, h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_right_fusion_passes_and_inputs_and_buffers_stay(dtype: torch.dtype) -> None:
    model = ready(Typical()).to(dtype)
    x = vectors().to(dtype)
    traced = trace(model, x)
    model.get_buffer("cache").zero_()
    before = [each.clone() for each in traced.inputs if isinstance(each, Tensor)]

    apply_plan(traced.gm, Plan(), names=traced.names, inputs=traced.inputs, verify=True)

    done = {report.name: [edit.branches for edit in report.done] for report in traced.gm.meta[REPORTS]}
    assert done["fuse_ffn"] == [("layers.0.body", "layers.3.body"), ("layers.1.body", "layers.2.body")]
    assert done["merge_gate_up"] == [("layers.4.body", "layers.5.body")]
    after = [each for each in traced.inputs if isinstance(each, Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_graph_that_owns_its_weights_is_verified_too() -> None:
    class Leaf(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Attention)

    model = ready(Sides(Attention(), Attention(), SwiGLU(), SwiGLU())).float()
    gm = fx.GraphModule(model, Leaf().trace(model))
    x = vectors().float()

    apply_plan(gm, Plan(), inputs=(x,), verify=True)

    with torch.no_grad():
        torch.testing.assert_close(gm(x), model(x))
    assert all(parameter.dtype == torch.float32 for parameter in gm.parameters())


def test_without_inputs_there_is_nothing_to_verify_on() -> None:
    traced = trace(ready(Sides(SwiGLU(), SwiGLU())), vectors())

    with pytest.raises(OptionError, match="inputs="):
        fuse_ffn(traced.gm, verify=True)
    with pytest.raises(OptionError, match=r"takes \d+ values, and 1 were given"):
        fuse_ffn(traced.gm, verify=True, inputs=[vectors()])


@pytest.mark.parametrize("most", [0, 1, 2, 3, 4])
def test_so_many_fusions_are_made_and_no_more(most: int) -> None:
    model = ready(Sides(SwiGLU(), SwiGLU(), Post(), Post(), MLP(), MLP(), Layer(Post()), Layer(Post())))
    traced = trace(model, vectors())

    apply_plan(traced.gm, Plan(), names=traced.names, max_rewrites=most)

    with torch.no_grad():
        assert_same(traced(), model(vectors()))
    wide, merged = (report for report in traced.gm.meta[REPORTS] if report.name in ("fuse_ffn", "merge_gate_up"))
    pairs = {edit.branches for edit in (*wide.done, *merged.done)}
    order = [(0, 1), (4, 5), (2, 3), (6, 7)]  # wide ones first, in stream order
    assert pairs == {tuple(f"layers.{index}.body" for index in pair) for pair in order[:most]}
    refused = [edit for edit in (*wide.refused, *merged.refused) if "max_rewrites" in edit.detail]
    assert len(refused) >= 4 - most
