from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fxfuse.errors import HealError
from fxfuse.healing import loss
from fxfuse.healing.loss import completed, divergence, live, targets
from fxfuse.measure.evaluation import IGNORED

TOKENS, VOCABULARY = 7, 9


def drawn(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(TOKENS, VOCABULARY, generator=generator, dtype=torch.float64)


WANTED = torch.tensor([3, IGNORED, 0, 8, IGNORED, 1, 1])


@pytest.fixture(params=[1, 2 * VOCABULARY, 10**6])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "_CHUNK", request.param)


def of_autograd(student: Tensor, teacher: Tensor, lm: float) -> tuple[Tensor, Tensor]:
    """The loss and its gradient as torch has them, a token at a time."""
    student = student.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for token in range(TOKENS):
        if WANTED[token] != IGNORED:
            log_q = student[token].log_softmax(-1)
            total = total + F.kl_div(log_q, teacher[token].softmax(-1), reduction="sum") - lm * log_q[WANTED[token]]
    (gradient,) = torch.autograd.grad(3 * total, student)
    return total.detach(), gradient


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("lm", [0.0, 0.7])
@pytest.mark.parametrize("overwrite", [True, False])
def test_live_is_what_autograd_has(lm: float, overwrite: bool) -> None:
    student, teacher = drawn(0).requires_grad_(), drawn(1)
    total, gradient = of_autograd(student.detach(), teacher, lm)

    found, kl = divergence(student, live(teacher), WANTED, lm, teacher if overwrite else None)
    (3 * found).backward()

    torch.testing.assert_close(found.detach(), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=0, atol=1e-12)
    torch.testing.assert_close(kl, of_autograd(student.detach(), drawn(1), 0.0)[0], rtol=1e-12, atol=0)
    assert overwrite or torch.equal(teacher, drawn(1))


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
def test_the_rest_is_one_class(k: int) -> None:
    student, teacher = drawn(0).requires_grad_(), drawn(1)
    best = teacher.log_softmax(-1).topk(k, -1)

    total = torch.zeros((), dtype=torch.float64)
    for token in (WANTED != IGNORED).nonzero().flatten():
        p, q = teacher[token].softmax(-1), student[token].softmax(-1)
        rest = torch.ones(VOCABULARY, dtype=torch.bool)
        rest[best.indices[token]] = False
        classes = [(p[best.indices[token]], q[best.indices[token]])]
        if k < VOCABULARY:
            classes.append((p[rest].sum()[None], q[rest].sum()[None]))
        total = total + sum((a * (a / b).log()).sum() for a, b in classes)
    (gradient,) = torch.autograd.grad(total, student)

    found, _ = divergence(student, completed(best.values, best.indices.int()), WANTED)
    found.backward()

    torch.testing.assert_close(found.detach(), total.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=0, atol=1e-12)


def test_a_vocabulary_masked_out_makes_no_nan() -> None:
    student, teacher = drawn(0), drawn(1)
    student[:, 0] = teacher[:, 0] = -torch.inf
    student.requires_grad_()
    found, _ = divergence(student, live(teacher), WANTED)
    found.backward()
    assert torch.isfinite(found) and student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_what_is_hidden_or_left_out_does_not_count() -> None:
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, -100, 3, 4], [5, 6, 7, 8, 9]])
    assert targets({"input_ids": ids}).tolist() == [[1, 2, 3, 4, IGNORED], [6, 7, 8, 9, IGNORED]]
    masked = [[IGNORED, 2, 3, 4, IGNORED], [6, 7, IGNORED, IGNORED, IGNORED]]
    assert targets({"input_ids": ids, "attention_mask": mask}).tolist() == masked
    both = [[IGNORED, IGNORED, 3, 4, IGNORED], [6, 7, IGNORED, IGNORED, IGNORED]]
    assert targets({"input_ids": ids, "attention_mask": mask, "labels": labels}).tolist() == both


def test_what_cannot_be_told_is_an_error() -> None:
    ids = torch.arange(10).view(2, 5)
    with pytest.raises(HealError, match="give labels"):
        targets({"input_ids": ids, "attention_mask": torch.ones(2, 1, 5, 5)})
    with pytest.raises(HealError, match="labels must be"):
        targets({"input_ids": ids, "labels": ids[:, 1:]})
