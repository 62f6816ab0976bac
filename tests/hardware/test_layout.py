"""Layouts under plans, and the released ones."""

import pytest

from fxfuse import Plan
from fxfuse.errors import LoadError, PlanError
from fxfuse.hardware import released
from fxfuse.hardware.layout import Layout, Part, Shape, planned


def blocks(count: int) -> Layout:
    """Blocks of an attention a0, a1, ... and an FFN f0, f1, ... on a stream of width 8."""
    parts = [
        Part((shape,))
        for block in range(count)
        for shape in (
            Shape(f"a{block}", "attention", 256, cache=8, heads=2),
            Shape(f"f{block}", "ffn", 3 * 8 * (16 + block), 16 + block, joins=True),
        )
    ]
    return Layout("blocks", 8, 10, tuple(parts))


def names(layout: Layout) -> list[tuple[str, ...]]:
    return [tuple(shape.name for shape in part.shapes) for part in layout.parts]


def runs(layout: Layout) -> list[tuple[str, ...]]:
    return [tuple(shape.name for shape in part.run) for part in layout.parts]


def test_an_empty_plan_changes_nothing() -> None:
    assert planned(blocks(3), Plan()) == blocks(3)


def test_what_is_dropped_is_gone() -> None:
    found = planned(blocks(2), Plan(drop=["a0", "f1"]))
    assert names(found) == [("f0",), ("a1",)]
    assert found.weights == blocks(2).weights - 256 - 3 * 8 * 17


def test_a_linear_attention_is_one_matrix_without_a_cache() -> None:
    found = planned(blocks(2), Plan(linear=["a1"])).parts[2].shapes
    assert found == (Shape("a1", "linear", 64),)


def test_a_narrowed_ffn_has_the_matrices_of_its_units() -> None:
    whole = {shape.name: shape for shape in blocks(2).shapes}
    found = planned(blocks(2), Plan(narrow={"f1": range(4)}, parallel=[["f0", "f1"]]))
    assert found.parts[1].run[0].width == whole["f0"].width + 4
    assert found.weights == blocks(2).weights - 3 * 8 * (whole["f1"].width - 4)


def test_a_group_stands_where_its_first_member_stood_and_is_one_ffn() -> None:
    found = planned(blocks(4), Plan(drop=["a2"], parallel=[["f2", "f1"]]))
    assert names(found) == [("a0",), ("f0",), ("a1",), ("f2", "f1"), ("a3",), ("f3",)]
    assert runs(found)[3] == ("f2+f1",)
    assert (found.parts[3].run[0].width, found.parts[3].run[0].weights) == (35, 3 * 8 * 35)
    assert found.weights == blocks(4).weights - 256
    late = names(planned(blocks(11), Plan(parallel=[["f10", "f9"]])))
    assert late[-2:] == [("f10", "f9"), ("a10",)]


def test_attentions_and_ffns_that_cannot_join_share_an_all_reduce_and_no_matrix() -> None:
    found = planned(blocks(2), Plan(parallel=[["a0", "a1"], ["f0", "f1"]]))
    assert runs(found) == [("a0", "a1"), ("f0+f1",)]
    stiff = Part(tuple(Shape(name, "ffn", 384, 16) for name in "xy"), fused=True)
    assert (stiff.wide, stiff.run) == ((), stiff.shapes)


def test_private_sequences_run_stage_by_stage_on_streams_of_their_own() -> None:
    found = planned(blocks(2), Plan(parallel=[[["a0", "f0"], ["a1", "f1"]]]))
    assert runs(found) == [("a0", "a1"), ("f0", "f1")]
    assert [part.streams for part in found.parts] == [2, 2]
    uneven = planned(blocks(3), Plan(parallel=[[["a1", "f1"], "f2"]]))
    assert names(uneven) == [("a0",), ("f0",), ("a1", "f2"), ("f1",), ("a2",)]


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="no branch 'a7'; .*a0"):
        planned(blocks(2), Plan(drop=["a7"]))
    with pytest.raises(PlanError, match="'a1' is to keep 4 hidden units, and is of kind attention with 0"):
        planned(blocks(2), Plan(narrow={"a1": range(4)}))
    with pytest.raises(PlanError, match="'f1' is in linear, and no attention but ffn"):
        planned(blocks(2), Plan(linear=["f1"]))


@pytest.mark.parametrize(
    ("name", "billions", "attentions", "ffns"),
    [
        ("llama-70b", 70.55, 80, 80),
        ("llama-405b", 405.85, 126, 126),
        ("nemotron-49b", 49.87, 49, 80),
        ("nemotron-253b", 253.40, 64, 81),
        ("nemotron-253b-unfused", 253.40, 64, 126),
    ],
)
def test_released_layouts_have_the_parameters_that_are_published(
    name: str, billions: float, attentions: int, ffns: int
) -> None:
    layout = released.find(name)
    kinds = [shape.kind for shape in layout.shapes]
    assert round(layout.weights / 1e9, 2) == billions
    assert (kinds.count("attention"), kinds.count("ffn")) == (attentions, ffns)


def test_fusing_the_papers_groups_makes_the_released_253b() -> None:
    found = planned(released.find("nemotron-253b-unfused"), Plan(parallel=released.fused_groups()))

    def shapes(layout: Layout) -> list[tuple[str, int, int]]:
        return [(shape.kind, shape.weights, shape.width) for part in layout.parts for shape in part.run]

    assert shapes(found) == shapes(released.find("nemotron-253b"))


def test_an_unknown_layout_names_those_there_are() -> None:
    with pytest.raises(LoadError, match="llama-405b"):
        released.find("llama-450b")
