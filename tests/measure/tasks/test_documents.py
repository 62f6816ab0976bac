from __future__ import annotations

import re
from random import Random

import pytest

from fxfuse.measure.tasks import documents
from fxfuse.measure.tasks.documents import CHOICES, Document
from fxfuse.measure.tasks.shipped import SHIPPED

every_task = pytest.mark.parametrize("name", SHIPPED)


def made(name: str) -> list[Document]:
    return SHIPPED[name].make(Random(name))


@every_task
def test_the_documents_are_the_same_each_time_and_no_two_are_alike(name: str) -> None:
    assert made(name) == made(name)
    assert SHIPPED[name].make(Random("another")) != made(name)
    assert len({str(document["prompt"]) for document in made(name)}) == len(made(name)) >= 40


@pytest.mark.parametrize("name", [name for name, task in SHIPPED.items() if task.kind == "choice"])
def test_one_of_different_choices_is_right_and_its_place_tells_nothing(name: str) -> None:
    places = []
    for document in made(name):
        choices, answer = document["choices"], document["answer"]
        assert isinstance(choices, list) and isinstance(answer, int)
        assert len(set(choices)) == CHOICES
        places.append(answer)

    assert SHIPPED[name].chance == 1 / CHOICES
    assert max(places.count(place) for place in range(CHOICES)) < 0.5 * len(places)


def test_the_right_end_of_a_sentence_is_right() -> None:
    ends = {}
    for document in made("cloze"):
        choices, answer = document["choices"], document["answer"]
        assert isinstance(choices, list) and isinstance(answer, int)
        ends[document["prompt"]] = choices[answer]

    assert ends["The capital of France is"] == " Paris"
    assert ends["The opposite of hot is"] == " cold"
    assert ends["What you need to see far-away stars is a"] == " telescope"
    assert len(ends) == 100


def test_copied_words_are_those_that_came_before() -> None:
    for document in made("copying"):
        first, second = str(document["prompt"]).split("\n")
        assert first.startswith(f"{second}{document['answer']} ")


def test_sums_are_right() -> None:
    for document in made("arithmetic"):
        *shown, asked = str(document["prompt"]).split("\n")
        for line in [*shown, f"{asked}{document['answer']}"]:
            one, sign, other, result = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", line).groups()  # type: ignore[union-attr]
            assert int(result) == (int(one) + int(other) if sign == "+" else int(one) - int(other))


def test_what_is_asked_for_was_said_once_among_800_words_or_so() -> None:
    for document in made("retrieval"):
        prompt, choices, answer = str(document["prompt"]), document["choices"], document["answer"]
        assert isinstance(choices, list) and isinstance(answer, int)
        assert 700 < len(prompt.split()) < 1000
        (said,) = re.findall(re.escape(prompt.rsplit(". ", 1)[1]) + r"( \w+) in", prompt)
        assert said == choices[answer]
        assert all(prompt.count(f"keeps a{choice} in") == 1 for choice in choices)


def test_a_record_holds_what_its_sentence_says() -> None:
    pattern = r"(\w+) took the (\w+) from the (\w+) and gave it to (\w+)\."
    for document in made("rewriting"):
        sentence = str(document["prompt"]).rpartition("Sentence: ")[2].removesuffix("\nRecord:")
        giver, thing, place, taker = re.fullmatch(pattern, sentence).groups()  # type: ignore[union-attr]
        assert document["answer"] == f"{thing}, {place}, {giver}, {taker}"


def test_more_documents_can_be_drawn() -> None:
    assert len(documents.arithmetic(Random(0), count=7)) == 7
