from __future__ import annotations

from fxfuse import Plan
from fxfuse.report.page import render
from tests.planning.recordings import recording
from tests.report.page.pages import Node, layers, plan_of_layers, read, section


def drawn(page: str) -> list[list[str]]:
    """For each stream its steps: the letters and numbers of their branches."""
    return [
        [" ".join(branch.words for branch in step.all(class_="branch")) for step in stream.children]
        for stream in section(read(page), "The plan").all("ol")
    ]


def steps(page: str, class_: str) -> list[Node]:
    return section(read(page), "The plan").all("li", class_)


def test_the_stream_is_drawn_as_it_runs_under_the_plan() -> None:
    page = render(layers(6), plan_of_layers())

    assert drawn(page) == [["A0", "F0", "A1", "F1 F2 F3", "A2", "A3", "A4 F4 A5 F5"]]
    (stream,) = section(read(page), "The plan").all("ol")
    assert [branch.words for branch in stream.all(class_="dropped")] == ["A2", "A3"]


def test_a_group_is_one_box_that_names_its_members_and_its_width() -> None:
    wide, blocks = steps(render(layers(6), plan_of_layers()), "group")

    (title,) = wide.all(class_="title")
    assert title.text == "group 0: 3 side by side, 288 hidden units"
    assert title.attributes["aria-label"].split("\n")[1:] == [f"model.layers.{i}.mlp" for i in (1, 2, 3)]
    assert [[b.words for b in chain.all(class_="branch")] for chain in blocks.all(class_="sequence")] == [
        ["A4", "F4"],
        ["A5", "F5"],
    ]
    assert blocks.all(class_="title")[0].text == "group 1: 2 side by side"
    assert "model.layers.4.attn then model.layers.4.mlp" in blocks.all(class_="title")[0].attributes["aria-label"]


def test_linear_attentions_are_marked_in_and_out_of_groups() -> None:
    plan = Plan(linear=["a0", "a1"], parallel=[["a1", "f1"]])

    page = render(recording("afaf"), plan)

    (stream,) = section(read(page), "The plan").all("ol")
    assert [branch.attributes["aria-label"].split("\n")[1] for branch in stream.all(class_="linear")] == [
        "branch 0, attention: linear",
        "branch 2, attention: linear, in parallel, group 0",
    ]


def test_streams_are_drawn_apart_and_what_is_added_together_stands_together() -> None:
    page = render(recording("(af)f|am"), Plan(drop=["f1"]))

    assert drawn(page) == [["A0 F1", "F2"], ["A3", "M4"]]
    assert [step.words for step in steps(page, "sum")] == ["A0F1"]


def test_numbers_are_those_of_names_only_if_all_names_have_one() -> None:
    assert drawn(render(layers(2), Plan()))[0] == ["A0", "F0", "A1", "F1"]
    assert drawn(render(layers(2, prefix="h"), Plan()))[0] == ["A0", "F1", "A2", "F3"]


def test_of_long_names_pictures_show_the_end() -> None:
    (names, _) = read(render(layers(2, prefix="a_network_of_many_words_"))).all("g", "names")

    ends = ["…ny_words_0.attn", "…any_words_0.mlp", "…ny_words_1.attn", "…any_words_1.mlp"]
    assert [name.text for name in names.all("text")] == ends
