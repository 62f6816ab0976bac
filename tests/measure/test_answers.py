from __future__ import annotations

import torch
from torch import Tensor

from fxfuse.measure.answers import Answers


class Counting:
    """Says what it is given, as logits, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, **batch: object) -> object:
        self.asked += 1
        ids = batch["input_ids"]
        assert isinstance(ids, Tensor)
        return torch.nn.functional.one_hot(ids, 4).float()


def test_the_model_is_asked_once() -> None:
    model, ids = Counting(), torch.tensor([[0, 3]])
    answers = Answers(model)

    first = answers(input_ids=ids)
    assert first is answers(input_ids=ids) and model.asked == 1
    assert first is not None and first.argmax(-1).equal(ids)
    answers(input_ids=ids.clone())
    assert model.asked == 2


def test_the_same_ids_under_another_mask_are_another_batch() -> None:
    model, ids = Counting(), torch.tensor([[0, 3]])
    answers = Answers(model)

    for mask in (torch.ones(1, 2), torch.tensor([[1, 0]])):
        answers(input_ids=ids, attention_mask=mask)
        answers(input_ids=ids, attention_mask=mask)
    assert model.asked == 2


def test_what_takes_too_much_is_asked_for_again() -> None:
    model, short, long = Counting(), torch.tensor([[0]]), torch.tensor([[1, 2, 3]])
    answers = Answers(model, most=2 * 4 * 4)

    for _ in range(3):
        answers(input_ids=long)
    assert model.asked == 3
    for _ in range(3):
        answers(input_ids=short)
    assert model.asked == 4


def test_ids_that_were_freed_are_not_mistaken_for_others() -> None:
    answers = Answers(Counting())
    for token in range(4):
        said = answers(input_ids=torch.tensor([[token]]))
        assert said is not None and int(said.argmax()) == token


def test_a_model_that_says_nothing_is_asked_each_time() -> None:
    assert Answers(lambda **_: None)(input_ids=torch.tensor([[0]])) is None
