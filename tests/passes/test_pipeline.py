"""A plan is applied whole or not at all; what it names means what it meant before the first edit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from fxfuse.packing.strategy import Weights
from fxfuse.passes import REPORTS, apply_plan
from fxfuse.passes.pipeline import CUT
from fxfuse.plan import Plan
from tests.models.blocks import (
    WIDTH,
    Stream,
    SwiGLU,
    Traced,
    assert_no_dead_nodes,
    assert_refused,
    assert_same,
    on_both_roads,
    on_every_road,
    ready,
    trace,
    vectors,
)
from tests.models.decoders import Deep, InPlace, LateKeys, Tied, deep, traced_deep


def graph(road: str) -> tuple[Deep, Traced]:
    """A decoder and a fresh copy of its graph."""
    return deep(), traced_deep(road).copy()


def actions(made: Traced) -> dict[str, list[str]]:
    """What each pass did, and what it refused."""
    return {r.name: [str(edit).split(":")[0] for edit in r.done] for r in made.gm.meta[REPORTS]}


FUSION = Plan(drop=["layers.1.attn", "layers.2.attn"], parallel=[["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]])


@on_every_road
@pytest.mark.parametrize("weights", ["copy", "share"])
def test_ffn_fusion_drops_makes_parallel_and_fuses(road: str, weights: Weights) -> None:
    model, made = graph(road)

    assert apply_plan(made.gm, FUSION, names=made.names, strict=True, weights=weights) is made.gm

    h = vectors() * 1.5
    h = h + model.attn(0, h)
    h = h + sum(model.mlp(index, h) for index in range(3))
    assert_same(made(), model.head(model.norm(h)))
    assert made.linears == 4 + (0 if weights == "share" else 2) + 1
    assert_no_dead_nodes(made.gm)
    done = actions(made)
    fusions = ["fuse_ffn", "merge_gate_up", "join_reductions", "add_in_kernel"]
    assert list(done) == ["simplify", "drop", "linear", "narrow", "parallelize", *fusions]
    assert done["drop"] == ["dropped layers.1.attn", "dropped layers.2.attn"]
    assert done["parallelize"] == ["made parallel layers.0.mlp + layers.1.mlp + layers.2.mlp"]
    assert done["fuse_ffn"] == ["fused layers.0.mlp + layers.1.mlp + layers.2.mlp"]


@on_every_road
def test_an_empty_plan_changes_nothing_that_is_computed(road: str) -> None:
    model, made = graph(road)
    before = made.linears

    apply_plan(made.gm, Plan(), names=made.names)

    with torch.no_grad():
        assert_same(made(), model(vectors()))
    assert made.linears == before
    assert not any(done for name, done in actions(made).items() if name != "simplify")


@on_both_roads
def test_what_does_not_become_wide_is_merged_if_asked_for(road: str) -> None:
    model, made = graph(road)

    apply_plan(made.gm, Plan(parallel=[["layers.0.mlp", "layers.1.mlp"]]), names=made.names, merge_gate_up=True)

    h = vectors() * 1.5
    h = h + model.attn(0, h)
    h = h + model.mlp(0, h) + model.mlp(1, h)
    h = h + model.attn(1, h)
    h = h + model.attn(2, h)
    assert_same(made(), model.head(model.norm(h + model.mlp(2, h))))
    assert actions(made)["merge_gate_up"] == ["merged layers.2.mlp"]
    assert made.linears == 3 * 4 + 2 + 2 + 1


@on_both_roads
def test_sums_in_place_follow_a_plan(road: str) -> None:
    model = ready(InPlace("old name"))
    made = trace(model, vectors(), road=road)

    apply_plan(made.gm, Plan(parallel=[["layers.0.body", "layers.2.body"]]), names=made.names)

    h = vectors() * 1.5
    h = h + model.branch(0, h) + model.branch(2, h)
    assert_same(made(), h + model.branch(1, h))


@on_both_roads
def test_a_number_counts_the_branches_of_the_model_and_not_what_is_left_of_them(road: str) -> None:
    model = ready(Tied())
    made = trace(model, vectors(), road=road)

    apply_plan(made.gm, Plan(drop=["layers.0.attn", "@1"], parallel=[["layers.1.mlp", "@5"]]), names=made.names)

    h = vectors() * 1.5
    h = h + model.attn(1, h)
    h = h + model.mlp(1, h) + model.mlp(2, h)
    assert_same(made(), model.head(model.norm(h + model.attn(2, h))))


@on_both_roads
def test_a_group_of_which_a_member_is_unknown_is_refused(road: str) -> None:
    _, made = graph(road)
    plan = Plan(drop=["layers.0.attn"], parallel=[["layers.0.mlp", "layers.1.mlp"], ["layers.2.mlp", "layers.3.mlp"]])

    assert_refused(
        made,
        lambda gm: apply_plan(gm, plan, names=made.names),
        r"parallel\[1\]: 'layers\.3\.mlp' is no branch.*nearest",
    )


@on_both_roads
def test_a_group_that_a_graph_break_divides_is_refused(road: str) -> None:
    _, made = graph(road)
    made.gm.meta[CUT] = "break"
    plan = Plan(parallel=[["layers.2.mlp", "layers.3.mlp"]])

    assert_refused(
        made,
        lambda gm: apply_plan(gm, plan, names=made.names, elsewhere={"layers.3.mlp"}.__contains__),
        r"parallel\[0\]: a graph break separates 'layers\.3\.mlp' from 'layers\.2\.mlp'",
    )


@on_both_roads
def test_a_group_of_which_a_member_is_not_called_is_refused_and_no_break_is_blamed(road: str) -> None:
    _, made = graph(road)
    plan = Plan(parallel=[["layers.2.mlp", "layers.3.mlp"]])

    assert_refused(
        made,
        lambda gm: apply_plan(gm, plan, names=made.names, elsewhere={"layers.3.mlp"}.__contains__),
        r"parallel\[0\]: 'layers\.3\.mlp' takes no part in this call of the model(?!.*break)",
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.1", r"no branch of this graph, but a module that holds 'layers\.1\.attn', 'layers\.1\.mlp'"),
        ("layers.1.mlp.down", r"no branch of this graph, but a part of the branch 'layers\.1\.mlp'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("cut", ["", "break"])
def test_what_holds_branches_or_is_a_part_of_one_is_told_so(cut: str, name: str, words: str) -> None:
    _, made = graph("dynamo")
    made.gm.meta[CUT] = cut

    assert_refused(made, lambda gm: apply_plan(gm, Plan(drop=[name]), names=made.names), words + "(?!.*break)")


@on_both_roads
def test_a_group_that_another_graph_holds_is_left_to_it(road: str) -> None:
    model, made = graph(road)
    plan = Plan(drop=["layers.5.attn"], parallel=[["layers.3.mlp", "layers.4.mlp"]])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fxfuse")
        apply_plan(made.gm, plan, names=made.names, elsewhere=set(plan.names).__contains__, strict=True)

    with torch.no_grad():
        assert_same(made(), model(vectors()))


def test_an_unknown_name_to_drop_is_warned_of_once_with_the_nearest() -> None:
    model, made = graph("export")

    with pytest.warns(UserWarning, match="fxfuse") as caught:
        apply_plan(made.gm, Plan(drop=["layers.0.mlp", "layers.1.attention"]))

    (warning,) = [w for w in caught if "fxfuse" in str(w.message)]
    assert "'layers.1.attention' is no branch of this graph; nearest: layers.1.attn" in str(warning.message)
    h = vectors() * 1.5
    h = h + model.attn(0, h)
    h = h + model.attn(1, h)
    h = h + model.mlp(1, h)
    h = h + model.attn(2, h)
    assert_same(made(), model.head(model.norm(h + model.mlp(2, h))))


def test_many_unknown_names_are_counted_and_not_listed() -> None:
    _, made = graph("export")

    with pytest.warns(UserWarning, match=r"'l\.4'.*; and 2 more$"):
        apply_plan(made.gm, Plan(drop=[f"l.{index}" for index in range(7)]))


@on_both_roads
def test_strictly_an_unknown_name_to_drop_is_an_error(road: str) -> None:
    _, made = graph(road)
    plan = Plan(drop=["layers.0.mlp", "layers.1.attention"])

    assert_refused(
        made, lambda gm: apply_plan(gm, plan, names=made.names, strict=True), "'layers.1.attention' is no branch"
    )


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ("", "though its weights are here: what they compute is not added to a stream by itself(?!.*break)"),
        ("break", "which holds weights of it.*graph break"),
        ("ddp", "which holds weights of it.*DDP's gradient buckets.*optimize_ddp = False"),
    ],
)
def test_a_branch_whose_weights_are_here_and_that_is_not_is_an_error(cut: str, words: str) -> None:
    class Severed(nn.Module):
        """The FFN is in the graph, the sum that it is added in is not."""

        def __init__(self) -> None:
            super().__init__()
            self.stream, self.mlp = Stream(SwiGLU()), SwiGLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.stream(x))

    made = trace(ready(Severed()), vectors())
    made.gm.meta[CUT] = cut

    assert_refused(
        made,
        lambda gm: apply_plan(gm, Plan(drop=["mlp"]), names=made.names),
        f"'mlp' is no branch of this graph, {words}",
    )


def test_a_graph_without_streams_passes_a_plan_by() -> None:
    made = trace(nn.Linear(WIDTH, WIDTH).double(), vectors())
    before = made()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fxfuse")
        apply_plan(made.gm, Plan(drop=["layers.0.mlp"], parallel=[["a", "b"]]))

    assert_same(made(), before)


@on_both_roads
@pytest.mark.parametrize("member", ["layers.2.attn", ["layers.2.attn", "layers.2.mlp"]], ids=["branch", "sequence"])
def test_after_an_illegal_group_nothing_of_the_plan_is_done(road: str, member: object) -> None:
    """Not the simplification, not the drop, not the first group."""
    made = trace(ready(LateKeys()), vectors(), road=road)
    plan = Plan(drop=["layers.0.mlp"], parallel=[["layers.1.attn", "layers.1.mlp"], ["layers.0.attn", member]])

    assert_refused(made, lambda gm: apply_plan(gm, plan, names=made.names), r"'layers\.2\.attn' needs")

    assert REPORTS not in made.gm.meta


@on_both_roads
def test_a_plan_that_is_already_applied_is_noticed(road: str) -> None:
    _, made = graph(road)
    plan = Plan(drop=["layers.1.mlp"])
    apply_plan(made.gm, plan, names=made.names, strict=True)
    before = made()

    with pytest.warns(UserWarning, match=r"'layers\.1\.mlp' is no branch"):
        apply_plan(made.gm, plan)

    assert_same(made(), before)
