"""A narrowed FFN computes the units that it keeps, in any spelling, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse.packing.calls import PackedCall
from fxfuse.packing.recipe import extract
from fxfuse.passes import REPORTS, apply_plan, narrow
from fxfuse.plan import Plan
from tests.models.blocks import (
    GLU,
    GPT2MLP,
    HIDDEN,
    MLP,
    WIDTH,
    Decoder,
    PackedSwiGLU,
    Stream,
    SwiGLU,
    assert_no_dead_nodes,
    assert_refused,
    assert_same,
    flat_tensors,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)
from tests.models.decoders import IndexedExperts, decoder, traced_decoder

FIRST, SECOND = "layers.0.body", "layers.1.body"
UNITS = (0, 3, 4, 5, 9)


def only(body: nn.Module, units: Sequence[int]) -> None:
    """Let the down projection of an FFN read zeros for all other units, from now on."""

    def masked(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        made = torch.zeros_like(args[0])
        made[..., list(units)] = args[0][..., list(units)]
        return made

    body.get_submodule("down").register_forward_pre_hook(masked)


def by_hand(make: Callable[[], nn.Module], units: Mapping[str, Sequence[int]]) -> tuple[Tensor, ...]:
    model = ready(make())
    for name, own in units.items():
        only(model.get_submodule(name), own)
    with torch.no_grad():
        return flat_tensors(model(vectors()))


@on_every_road
def test_it_is_the_model_whose_down_projection_reads_zeros_for_the_others(road: str) -> None:
    traced = traced_decoder(road).copy()
    units = {"layers.0.mlp": (1, 2, 7), "layers.1.mlp": (11,)}

    report = narrow(traced.gm, units)

    assert [(edit.branches, edit.detail) for edit in report.done] == [
        (("layers.0.mlp",), "3 of 12 hidden units"),
        (("layers.1.mlp",), "1 of 12 hidden units"),
    ]
    model = ready(Decoder())
    assert_same(tuple(p.detach() for p in model.parameters()), tuple(p.detach() for p in decoder().parameters()))
    assert_same(traced(), by_hand(Decoder, units))
    assert_no_dead_nodes(traced.gm)
    ffn = traced["layers.0.mlp"].ffn
    assert ffn is not None and ffn.projections[0].width == 3


@pytest.mark.parametrize("body", [SwiGLU, lambda: SwiGLU(bias=True), PackedSwiGLU, MLP, GLU, GPT2MLP])
@on_both_roads
def test_every_spelling_keeps_its_units(body: Callable[[], nn.Module], road: str) -> None:
    traced = trace(ready(Stream(body(), body())), vectors(), road=road)

    narrow(traced.gm, {FIRST: UNITS})

    assert_same(traced(), by_hand(lambda: Stream(body(), body()), {FIRST: UNITS}))
    assert traced[FIRST].name == FIRST and traced[SECOND].ffn is not None


class Scaled(nn.Module):
    """Its activation has a weight for each unit, and one for all, as XIELU and Snake have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.each, self.all = nn.Parameter(torch.ones(1, 1, HIDDEN)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x) * self.each) * self.all)


@on_both_roads
def test_what_the_activation_takes_of_weights_is_that_of_the_units(road: str) -> None:
    traced = trace(ready(Stream(Scaled(), Scaled())), vectors(), road=road)

    narrow(traced.gm, {FIRST: UNITS})

    assert_same(traced(), by_hand(lambda: Stream(Scaled(), Scaled()), {FIRST: UNITS}))


class Watched(nn.Module):
    """Returns the hidden units of its first FFN beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"norm": nn.RMSNorm(WIDTH), "body": SwiGLU()}) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h, seen = x * 1.5, []
        for layer in self.layers:
            normed, body = layer["norm"](h), layer["body"]
            hidden = F.silu(body.gate(normed)) * body.up(normed)
            seen.append(hidden)
            h = h + body.down(hidden)
        return h, seen[0]


@on_both_roads
def test_what_others_read_of_the_units_goes_on_to_be_all_of_them(road: str) -> None:
    traced = trace(ready(Watched()), vectors(), road=road)

    report = narrow(traced.gm, {FIRST: UNITS})

    assert "of its nodes serve others and stay" in report.done[0].detail
    stream, hidden = traced()
    expected, all_units = by_hand(Watched, {FIRST: UNITS})
    assert_same((stream, hidden), (expected, all_units))
    assert hidden.shape[-1] == HIDDEN


def test_an_ffn_of_just_so_many_units_stays_as_it_is() -> None:
    """Its others have left the model already: a plan goes on to fit the model that it was applied to."""
    traced = traced_decoder("dynamo").copy()
    before = traced.gm.code

    assert not narrow(traced.gm, {"layers.0.mlp": tuple(range(100, 112))})
    assert not narrow(traced.gm, {})
    assert traced.gm.code == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.1.mlpp", r"'layers\.1\.mlpp' is no branch of this graph; nearest: layers\.1\.mlp"),
        ("layers.1.attn", r"'layers\.1\.attn' is no FFN but of kind attention: narrow is for FFNs"),
        ("layers.1.mlp", r"narrow\['layers\.1\.mlp'\] keeps unit 12, and the FFN has 12, the last of which is 11"),
    ],
)
@on_both_roads
def test_what_cannot_be_narrowed_is_refused(road: str, name: str, words: str) -> None:
    units = {"layers.0.mlp": (1,), name: (0, 12)}
    assert_refused(traced_decoder(road).copy(), lambda gm: narrow(gm, units), words)


class Sandwich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = SwiGLU(), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.mlp(x))


@pytest.mark.parametrize(
    ("body", "name", "words"),
    [
        (IndexedExperts, FIRST, "cannot be narrowed: its experts are routed, and have units of their own"),
        (Sandwich, f"{FIRST}.mlp", "cannot be narrowed: its output is not a linear projection but a norm"),
    ],
)
def test_a_form_whose_units_are_not_told_apart_is_refused(body: Callable[[], nn.Module], name: str, words: str) -> None:
    traced = trace(ready(Stream(body(), SwiGLU())), vectors())
    assert_refused(traced, lambda gm: narrow(gm, {name: (0,)}), words)


PLAN = Plan(narrow={FIRST: UNITS, SECOND: (1, 10)}, parallel=[[FIRST, SECOND]])


def two() -> Stream:
    return Stream(SwiGLU(bias=True), SwiGLU(bias=True))


def in_parallel() -> Tensor:
    model = ready(two())
    only(model.get_submodule(FIRST), UNITS)
    only(model.get_submodule(SECOND), (1, 10))
    h = model.start(vectors())
    return h + model.branch(0, h) + model.branch(1, h)


@on_both_roads
def test_narrowed_ffns_of_a_group_become_one_of_their_units_together(road: str) -> None:
    traced = trace(ready(two()), vectors(), road=road)

    apply_plan(traced.gm, PLAN, strict=True)

    (fused,) = [report for report in traced.gm.meta[REPORTS] if report.name == "fuse_ffn"]
    assert [edit.detail for edit in fused.done] == ["one FFN of width 7"]
    assert traced.linears == 2
    assert_same(traced(), in_parallel())


def test_units_are_taken_once_and_not_at_each_call() -> None:
    """The graph that is compiled has the packed weights for its inputs, and takes no units of any."""
    for plan in (PLAN, Plan(narrow=PLAN.narrow)):
        traced = trace(ready(two()), vectors())
        apply_plan(traced.gm, plan, strict=True)
        expected = traced()
        recipes = extract(traced.gm)

        packed = PackedCall(recipes, "copy")
        packed.compiled = traced.gm
        with torch.no_grad():
            assert_same(flat_tensors(packed(*traced.inputs)), expected)
        assert traced.count("keep") == 0
        made = list(traced.gm.graph.find_nodes(op="placeholder"))[-len(recipes) :]
        assert all(node.users for node in made)  # nothing is packed for nobody
        assert_no_dead_nodes(traced.gm)


def test_a_compiled_model_follows_its_weights_and_gradients_reach_them() -> None:
    torch._dynamo.reset()
    model, twin = ready(two()), ready(two())
    for body, units in ((twin.layers[0].body, UNITS), (twin.layers[1].body, (1, 10))):
        only(body, units)
    compiled = torch.compile(model, backend="ffnfuse", options={"plan": Plan(narrow=PLAN.narrow), "inner": "eager"})
    assert_same(flat_tensors(compiled(vectors()).detach()), twin(vectors()))

    with torch.no_grad():
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            one.mul_(0.5)
            other.mul_(0.5)
    compiled(vectors()).square().sum().backward()
    twin(vectors()).square().sum().backward()

    assert_same(flat_tensors(compiled(vectors()).detach()), twin(vectors()))
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


def test_explain_says_to_how_many_units() -> None:
    told = str(fxfuse.explain(ready(two()), vectors(), plan=PLAN))

    assert "narrow to 5, parallel 0" in told and "narrow to 2, parallel 0" in told
