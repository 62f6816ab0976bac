"""A kind of text that counts twice counts as if it were there twice."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse import Plan
from fxfuse.errors import OptionError
from fxfuse.healing.distill import distill
from fxfuse.healing.fit import fit_step
from fxfuse.healing.judge import Change, Judge
from fxfuse.healing.local import Training, train_step
from fxfuse.healing.pair import Pair, pairs
from fxfuse.healing.stages import weighed
from fxfuse.healing.steps import Sample, front_to_back
from fxfuse.healing.text import kinds
from fxfuse.measure.answers import Answers
from fxfuse.measure.evaluation import Metrics
from tests.healing.test_heal import DROP, text, trained
from tests.models.language import EDITS, language, sentences


def samples(made: list[Pair], held: int) -> list[Sample]:
    return [Sample(pair, f"kind {n % 2}", n < held) for n, pair in enumerate(made)]


def test_in_the_sums_of_the_fit() -> None:
    batches = text(10)
    twice = [*batches, *batches[2::2]]  # the first kind of text, but for what is held out, once more
    weighed_pairs = pairs(trained(), DROP, batches)
    for pair in weighed_pairs[::2]:
        pair.weight = 2.0
    repeated = [
        Sample(pair, f"kind {n % 2 if n < 10 else 0}", n < 2) for n, pair in enumerate(pairs(trained(), DROP, twice))
    ]
    fit = partial(fit_step, block=4096)
    one, other, plain = (
        front_to_back(each, fit)
        for each in (samples(weighed_pairs, 2), repeated, samples(pairs(trained(), DROP, batches), 2))
    )

    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-7, atol=1e-9)
        assert (one[name] - plain[name]).abs().max() > 1e-4


def test_in_the_loss_of_a_region() -> None:
    def at_first_region(weight: float) -> list[Pair]:
        made = pairs(trained(), DROP, text(8), at="regions")
        for pair in made:
            pair.weight = weight
            pair.reach()
        return made

    def error(pair: Pair) -> Any:
        goal = pair.goal()
        return ((goal - pair.stream({})).square().sum(-1) / goal.square().sum(-1)).tolist()

    plain, heavy = at_first_region(1.0), at_first_region(4.0)
    for one, other in zip(plain, heavy, strict=True):
        assert error(other) == pytest.approx([4 * each for each in error(one)])
    before = [train_step(samples(each, 2), Training(epochs=1))[1].before for each in (plain, heavy)]
    assert before[1] == pytest.approx(4 * before[0])


def test_in_the_loss_of_a_distillation() -> None:
    first, second = sentences(2)
    first["attention_mask"] = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]])

    def loss(*batches: Any, **options: Any) -> float:
        made = distill(language(), Plan(**EDITS), batches, steps=1, inner="eager", use_cpu=True, **options)
        return made.stages[0].losses[0]

    one, other = loss(first), loss(second)
    both = loss(weighed(first, 3.0), weighed(second, 1.0), gradient_accumulation_steps=2)
    assert both == pytest.approx((3 * 3 * one + 10 * other) / (3 * 3 + 10), rel=1e-5)
    assert loss(weighed(first, 0.01)) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(("weights", "share"), [({"a": 3.0, "b": 1.0}, 1.0), ({"a": 1.0, "b": 3.0}, 0.75)])
def test_where_it_is_chosen_what_is_kept(
    weights: dict[str, float], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([1.0, 1.0, 0.2, 0.9, 0.4, 0.5, 0.9, 0.9])  # of a and b: before, with all of the change, with less

    def judged(*args: object, **kwargs: object) -> Metrics:
        return Metrics(1, 1, 1.0, (1.0, 1.0), kl=next(scores))

    monkeypatch.setattr("fxfuse.healing.judge.evaluate", judged)
    model = language()
    parts = kinds({"a": sentences(2), "b": sentences(2)}, 0.5, list, weights)
    name = "layers.0.mlp.down.weight"
    change = Change(model, {}, {name: model.get_parameter(name) + 1})
    verdict, _ = Judge(model, model, Plan(**EDITS), parts, False)("fit", change)

    assert verdict.share == share


def test_few_tokens_judge_and_the_original_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Asked(Answers):
        def __call__(self, **batch: Any) -> Any:
            before = len(self._known)
            made = super().__call__(**batch)
            asked.append(len(self._known) - before)
            return made

    monkeypatch.setattr("fxfuse.healing.judge.Answers", Asked)
    monkeypatch.setattr("fxfuse.healing.judge.TOKENS", 15)  # of batches of ten
    model = language()
    name = "layers.0.mlp.down.weight"
    change = Change(model, {}, {name: model.get_parameter(name) + 1})
    Judge(model, model, Plan(**EDITS), kinds(sentences(8), 0.5, list), False)("fit", change)

    assert asked == [1, 1] + [0, 0] * 4  # two batches of the four that are held out: before, and at each share


def test_the_weights_of_kinds_are_one_on_the_average() -> None:
    parts = kinds({"a": text(2), "b": text(2), "c": text(2)}, 0.5, list, {"a": 4.0})
    assert [part.weight for part in parts] == [2.0, 0.5, 0.5]


def test_a_healing_follows_them() -> None:
    mixed = {"a": text(10), "b": text(10, start=50)}
    one, other = trained(), trained()
    healing = fxfuse.heal(one, DROP, mixed, weights={"a": 100.0})
    fxfuse.heal(other, DROP, mixed)

    assert healing.share > 0
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(
    ("batches", "weights", "words"),
    [
        ({"code": text(2), "prose": text(2)}, {"proze": 1.0}, "no kind of text is called 'proze'; nearest: prose"),
        (text(2), {"code": 1.0}, "give batches="),
        ({"code": text(2)}, {"code": 0.0}, "'code'.* is a positive number, not 0.0"),
        ({"code": text(2)}, {"code": -1.0}, "positive"),
        ({"code": text(2)}, {"code": float("inf")}, "positive"),
        ({"code": text(2)}, {"code": "2"}, "positive"),
    ],
)
def test_bad_ones_are_named(batches: Any, weights: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        fxfuse.heal(trained(), DROP, batches, weights=weights)
