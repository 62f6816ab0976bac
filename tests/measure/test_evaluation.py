from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fxfuse
from fxfuse import Plan
from fxfuse.data.batches import cache_keyword, check_batch, eval_mode, logits_of, on_device_of
from fxfuse.errors import NotFiniteError, OptionError, PlanError, RecordError
from fxfuse.measure.evaluation import Metrics, evaluate
from tests.models.tiny import llama, planned, tokens

VOCABULARY = 7
PLAN = {"drop": ["model.layers.1.self_attn"], "parallel": [["model.layers.0.mlp", "model.layers.1.mlp"]]}


class Bigram(nn.Module):
    """Predicts the next token from this one alone; ``wrap`` says in what its logits are returned."""

    def __init__(
        self, seed: int = 0, vocabulary: int = VOCABULARY, wrap: Callable[[Tensor], Any] = lambda x: x
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64))
        self.wrap = wrap

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        assert not self.training
        return self.wrap(self.table[input_ids])


def expected(
    model: Bigram, sequences: Sequence[Sequence[tuple[int, int]]], reference: Bigram | None = None
) -> tuple[float, float, float]:
    """Mean NLL, KL and agreement over sequences of (this token, next token), one token at a time."""
    nll = kl = agreement = 0.0
    count = 0
    for this, following in [pair for sequence in sequences for pair in sequence]:
        q = model.table[this].detach().exp()
        q = q / q.sum()
        nll -= math.log(q[following])
        count += 1
        if reference is not None:
            p = reference.table[this].detach().exp()
            p = p / p.sum()
            kl += sum(float(p[k]) * (math.log(p[k]) - math.log(q[k])) for k in range(len(p)))
            agreement += float(p.argmax() == q.argmax())
    return nll / count, kl / count, agreement / count


def pairs(*rows: Sequence[int]) -> list[list[tuple[int, int]]]:
    return [list(pairwise(row)) for row in rows]


def ids(*rows: Sequence[int]) -> dict[str, Any]:
    return {"input_ids": torch.tensor(rows)}


ROWS = [[0, 3, 5, 2], [6, 6, 1, 4], [2, 0, 0, 1]]


class TestNumbers:
    def test_they_are_those_of_a_sum_over_the_tokens(self) -> None:
        model, reference = Bigram(0), Bigram(1)
        found = evaluate(model, [ids(*ROWS[:2]), ids(ROWS[2])], reference)
        nll, kl, agreement = expected(model, pairs(*ROWS), reference)

        assert found.tokens == 9 and found.sequences == 3
        assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-10)
        assert found.kl == pytest.approx(kl, rel=1e-10)
        assert found.agreement == pytest.approx(agreement, rel=1e-10)
        assert 0 < agreement < 1

    def test_they_do_not_depend_on_how_many_tokens_are_worked_on_at_a_time(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = evaluate(Bigram(0), [ids(*ROWS)], Bigram(1))
        monkeypatch.setattr(sys.modules["fxfuse.measure.evaluation"], "_CHUNK", 2 * VOCABULARY)
        parts = evaluate(Bigram(0), [ids(*ROWS)], Bigram(1))

        assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-12)
        assert parts.kl_interval == pytest.approx(whole.kl_interval, rel=1e-12)

    def test_bfloat16_logits_are_summed_up_in_float32(self) -> None:
        rounded = Bigram(0)
        with torch.no_grad():
            rounded.table.copy_(rounded.table.bfloat16())
        low = Bigram(0, wrap=lambda logits: logits.bfloat16())
        found, true = (evaluate(model, [ids(*ROWS)], Bigram(1)) for model in (low, rounded))

        assert found.perplexity == pytest.approx(true.perplexity, rel=1e-6)
        assert found.kl == pytest.approx(true.kl, rel=1e-5)

    def test_a_model_is_its_own_equal(self) -> None:
        model = llama(2, torch.float32)
        found = evaluate(model, [{"input_ids": tokens(2, 9)}], model)

        assert found.kl == 0.0
        assert found.agreement == 1.0
        assert found.kl_interval == (0.0, 0.0)


class TestWhatCounts:
    def check(self, batch: dict[str, Any], *rows: list[tuple[int, int]]) -> None:
        found = evaluate(Bigram(), [batch])

        assert found.tokens == sum(map(len, rows))
        assert found.sequences == len(rows)
        assert found.perplexity == pytest.approx(math.exp(expected(Bigram(), rows)[0]), rel=1e-10)

    def test_padding_on_the_right_does_not(self) -> None:
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
        self.check(ids(*ROWS) | {"attention_mask": mask}, [(0, 3), (3, 5)], [(6, 6), (6, 1), (1, 4)])

    def test_neither_does_padding_on_the_left_nor_what_it_would_predict(self) -> None:
        mask = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
        self.check(ids(*ROWS[:2]) | {"attention_mask": mask}, [(5, 2)], [(6, 1), (1, 4)])

    def test_labels_say_which_tokens_and_what_they_are(self) -> None:
        labels = torch.tensor([[-100, -100, 5, 2], [6, 2, -100, 4]])  # 2 is not what input_ids has there
        self.check(ids(*ROWS[:2]) | {"labels": labels}, [(3, 5), (5, 2)], [(6, 2), (1, 4)])

    def test_labels_and_mask_say_it_together(self) -> None:
        labels, mask = torch.tensor([[0, -100, 5, 2]]), torch.tensor([[1, 1, 1, 0]])
        self.check(ids(ROWS[0]) | {"labels": labels, "attention_mask": mask}, [(3, 5)])

    def test_what_is_hidden_may_be_no_number(self) -> None:
        hidden = Bigram()
        with torch.no_grad():
            hidden.table[4] = torch.nan  # the last token of the second sequence predicts nothing
        assert math.isfinite(evaluate(hidden, [ids(*ROWS[:2])]).perplexity)

    @pytest.mark.parametrize(("limit", "count"), [(1, 1), (4, 4), (6, 6), (7, 7), (100, 9)])
    def test_no_more_than_max_tokens(self, limit: int, count: int) -> None:
        found = evaluate(Bigram(), [ids(*ROWS[:2]), ids(ROWS[2])], max_tokens=limit)
        kept = [pair for row in pairs(*ROWS) for pair in row][:count]

        assert found.tokens == count
        assert found.perplexity == pytest.approx(math.exp(expected(Bigram(), [kept])[0]), rel=1e-10)

    def test_batches_after_max_tokens_are_not_asked_for(self) -> None:
        def batches() -> Iterator[dict[str, Any]]:
            yield ids(*ROWS)
            raise AssertionError("one batch is enough")

        assert evaluate(Bigram(), batches(), max_tokens=9).tokens == 9

    def test_a_dataloader_serves(self) -> None:
        loader: DataLoader[Any] = DataLoader([{"input_ids": torch.tensor(row)} for row in ROWS], batch_size=2)

        assert evaluate(Bigram(), loader) == evaluate(Bigram(), [ids(*ROWS)])


class TestIntervals:
    def test_for_sequences_of_one_length_they_are_students_of_the_sequences_means(self) -> None:
        model, reference = Bigram(0), Bigram(1)
        means = [expected(model, pairs(row), reference) for row in ROWS]
        found = evaluate(model, [ids(*ROWS)], reference, confidence=0.9)

        def interval(values: Sequence[float]) -> tuple[float, float]:
            centre, spread = sum(values) / len(values), stats.sem(values)
            low, high = stats.t.interval(0.9, len(values) - 1, loc=centre, scale=spread)
            return float(low), float(high)

        nll, kl, _ = (interval(values) for values in zip(*means, strict=True))
        assert found.perplexity_interval == pytest.approx([math.exp(end) for end in nll], rel=1e-9)
        assert found.kl_interval == pytest.approx((max(kl[0], 0.0), kl[1]), rel=1e-9)

    def test_one_sequence_says_nothing_of_the_spread(self) -> None:
        found = evaluate(Bigram(0), [ids(ROWS[0])], Bigram(1))

        for interval in (found.perplexity_interval, found.kl_interval, found.agreement_interval):
            assert interval is not None and all(map(math.isnan, interval))

    def test_they_hold_the_truth_as_often_as_they_say_though_tokens_of_a_sequence_are_alike(self) -> None:
        """Every sequence repeats one coin's toss, and the longer ones say no more than the shorter ones."""
        coin = Bigram(vocabulary=2)
        with torch.no_grad():
            coin.table.copy_(torch.tensor([[0.7, 0.3], [0.7, 0.3]]).log())
        truth = math.exp(-(math.log(0.7) + math.log(0.3)) / 2)
        generator = torch.Generator().manual_seed(0)
        held = 0
        for _ in range(400):
            toss = torch.randint(2, (25, 1), generator=generator).expand(25, 10)
            lengths = torch.randint(2, 11, (25, 1), generator=generator)
            mask = torch.arange(10) < lengths
            found = evaluate(coin, [{"input_ids": toss, "attention_mask": mask}])
            held += found.perplexity_interval[0] <= truth <= found.perplexity_interval[1]

        assert 0.91 < held / 400 < 0.98

    def test_they_end_where_no_mean_can_be(self) -> None:
        found = evaluate(Bigram(0), [ids([0, 1], [1, 2], [2, 3])], Bigram(1))

        assert found.agreement_interval is not None and found.kl_interval is not None
        assert 0 <= found.agreement_interval[0] <= found.agreement_interval[1] <= 1
        assert found.kl_interval[0] >= 0


class TestModels:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda logits: logits,
            lambda logits: (logits, "cache"),
            lambda logits: (logits.sum(), torch.zeros(3, 4, 5, dtype=torch.int64), logits),
            lambda logits: {"loss": logits.sum(), "logits": logits},
            lambda logits: SimpleNamespace(logits=logits),
        ],
        ids=["a tensor", "a tuple", "a tuple that starts otherwise", "a mapping", "an object"],
    )
    def test_logits_are_found_in(self, wrap: Callable[[Tensor], Any]) -> None:
        assert evaluate(Bigram(wrap=wrap), [ids(*ROWS)]) == evaluate(Bigram(), [ids(*ROWS)])

    @pytest.mark.parametrize(
        "output", [None, "text", {"last": torch.zeros(1, 2, 3)}, torch.zeros(4), [torch.ones(2, 2)]]
    )
    def test_and_not_in(self, output: Any) -> None:
        assert logits_of(output) is None

    def test_a_compiled_function_serves(self) -> None:
        model = Bigram().eval()

        @torch.compile(backend="eager")
        def function(input_ids: Tensor) -> Tensor:
            return torch.as_tensor(model(input_ids))

        assert evaluate(function, [ids(*ROWS)]) == evaluate(model, [ids(*ROWS)])

    @pytest.mark.parametrize("road", ["torch.compile", "apply"])
    def test_a_planned_model_is_as_far_from_its_original_as_the_reference_is(self, road: str) -> None:
        model, original = llama(2), llama(2)
        batches = [{"input_ids": tokens(3, 9), "use_cache": False}]
        true = evaluate(planned(original, **PLAN), batches, original)
        if road == "apply":
            made: Any = fxfuse.apply(model, Plan(**PLAN), inner="eager")
        else:
            made = torch.compile(model, backend="ffnfuse", options={"plan": Plan(**PLAN), "inner": "eager"})
        found = evaluate(made, batches, original)

        assert true.kl is not None and true.kl > 1e-3
        assert found.kl == pytest.approx(true.kl, rel=1e-8)
        assert found.perplexity == pytest.approx(true.perplexity, rel=1e-8)
        assert found.agreement == true.agreement

    def test_training_flags_and_gradients_are_as_before(self) -> None:
        model, reference = llama(2), llama(2)
        model.train()
        model.model.layers[0].mlp.eval()
        flags = [module.training for module in model.modules()]
        with eval_mode(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
        evaluate(model, [{"input_ids": tokens(1, 5)}], reference)

        assert [module.training for module in model.modules()] == flags
        assert torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_they_are_so_after_an_error_too(self) -> None:
        model = llama(1).train()
        with pytest.raises(RecordError):
            evaluate(model, [{"input_ids": tokens(1, 5, vocabulary=50) + 50}])

        assert all(module.training for module in model.modules())

    def test_a_batch_goes_where_the_weights_are(self) -> None:
        assert on_device_of(Bigram().to("meta"), ids([1]) | {"k": 1})["input_ids"].device.type == "meta"  # type: ignore[attr-defined]

    def test_labels_are_not_the_models_business(self) -> None:
        batch = ids(*ROWS)
        assert evaluate(Bigram(), [batch | {"labels": batch["input_ids"]}]) == evaluate(Bigram(), [batch])


class TestErrors:
    @pytest.mark.parametrize(
        ("batches", "words"),
        [
            ([], "no token was evaluated"),
            ([ids([1])], "no token was evaluated"),
            ([ids([1, 2]) | {"attention_mask": torch.tensor([[1, 0]])}], "no token was evaluated"),
            ([ids(*ROWS), torch.tensor(ROWS)], "batch 1 is a Tensor, not a mapping"),
            ([ids(*ROWS), {"tokens": 1, "mask": 2}], "batch 1 needs a tensor input_ids; it has only tokens, mask"),
            ([{"input_ids": ROWS}], "batch 0 needs a tensor input_ids; it has a list"),
            ([{"input_ids": torch.tensor(ROWS[0])}], r"batch 0: input_ids must be integers \[batch, length\]"),
            ([ids(*ROWS) | {"labels": torch.tensor(ROWS[:2])}], r"batch 0: labels must be a tensor \[3, 4\]"),
            ([ids(*ROWS) | {"attention_mask": torch.ones(3, 1, 4, 4)}], "give labels"),
            ([ids(*ROWS), ids([1, 2]) | {"nonsense": 3}], r"batch 1 \(input_ids, nonsense\): TypeError: .*'nonsense'"),
            ([ids(*ROWS) | {"labels": torch.tensor(ROWS) + 3}], "batch 0: token [789] is not in a vocabulary of 7"),
            ([ids(*ROWS) | {"labels": torch.tensor(ROWS) - 3}], "batch 0: token -[123] is not in a vocabulary of 7"),
        ],
    )
    def test_of_batches(self, batches: list[Any], words: str) -> None:
        with pytest.raises(RecordError, match=words):
            evaluate(Bigram(), batches)

    def test_the_models_own_error_is_chained(self) -> None:
        with pytest.raises(RecordError) as caught:
            evaluate(Bigram(), [ids([1, VOCABULARY])])
        assert isinstance(caught.value.__cause__, IndexError)

    @pytest.mark.parametrize(
        ("wrap", "words"),
        [
            (lambda logits: None, "returned no logits"),
            (lambda logits: logits[:, -1:], r"logits \[3, 1, 7\] for input_ids \[3, 4\]"),
            (lambda logits: logits[..., :3], "batch 0: token [3456] is not in a vocabulary of 3"),
        ],
    )
    def test_of_logits(self, wrap: Callable[[Tensor], Any], words: str) -> None:
        with pytest.raises(RecordError, match=words):
            evaluate(Bigram(wrap=wrap), [ids(*ROWS)])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("which", ["model", "reference"])
    def test_of_logits_that_are_no_numbers(self, value: float, which: str) -> None:
        model, broken = Bigram(), Bigram()
        with torch.no_grad():
            broken.table[6, 2] = value
        first, second = (broken, model) if which == "model" else (model, broken)
        with pytest.raises(NotFiniteError, match="batch 1: the logits hold NaN or infinity"):
            evaluate(first, [ids(ROWS[0]), ids(ROWS[1])], second)

    def test_of_a_reference_with_another_vocabulary(self) -> None:
        with pytest.raises(RecordError, match="vocabulary of 7 tokens, its reference one of 9"):
            evaluate(Bigram(), [ids(*ROWS)], Bigram(vocabulary=9))

    def test_of_a_plan_that_does_not_fit_is_the_plans(self) -> None:
        plan = Plan(parallel=[["model.layers.0.mlp", "model.layers.9.mlp"]])
        made = torch.compile(llama(2), backend="ffnfuse", options={"plan": plan, "inner": "eager"})
        with pytest.raises(PlanError, match=r"model\.layers\.9\.mlp"):
            evaluate(made, [{"input_ids": tokens(1, 5)}])

    @pytest.mark.parametrize(
        "options", [{"max_tokens": 0}, {"confidence": 0.0}, {"confidence": 1.0}, {"confidence": 95}]
    )
    def test_of_options(self, options: dict[str, Any]) -> None:
        with pytest.raises(OptionError, match=next(iter(options))):
            evaluate(Bigram(), [ids(*ROWS)], **options)

    def test_a_batch_for_a_recording_needs_no_tokens(self) -> None:
        assert check_batch(0, {"x": 1}, tokens=False) == {"x": 1}


class TestPrinting:
    METRICS = Metrics(1234, 2, 22.7183, (20.5, 25.25), 0.25, (0.125, 0.5), 0.9, (0.875, 0.95))

    def test_the_table_has_every_number(self) -> None:
        assert str(self.METRICS).splitlines() == [
            "                                      mean             0.95 interval",
            "perplexity                           22.72             20.5 .. 25.25",
            "KL to the reference, nats/token       0.25              0.125 .. 0.5",
            "top-1 agreement                        0.9             0.875 .. 0.95",
            "1,234 tokens of 2 sequences",
        ]

    def test_without_a_reference_only_the_perplexity(self) -> None:
        assert [line[:10] for line in str(evaluate(Bigram(), [ids(*ROWS)])).splitlines()[1:-1]] == ["perplexity"]

    def test_json_reads_back(self) -> None:
        assert json.loads(self.METRICS.to_json())["kl_interval"] == [0.125, 0.5]
        assert json.loads(Metrics(1, 1, math.inf, (math.nan, math.nan)).to_json()) == {
            "tokens": 1, "sequences": 1, "perplexity": None, "perplexity_interval": [None, None], "kl": None,
            "kl_interval": None, "agreement": None, "agreement_interval": None, "confidence": 0.95,
            "tasks": [], "reference_tasks": [],
        }  # fmt: skip


def test_a_cache_in_a_batch_serves_both_models_alike_and_is_as_it_was() -> None:
    from transformers import DynamicCache

    model = llama(2)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(1, 4), **{cache_keyword(model): cache})

    found = evaluate(model, [{"input_ids": tokens(1, 9), cache_keyword(model): cache}], model)

    assert found.kl == 0.0
    assert cache.get_seq_length() == 4
