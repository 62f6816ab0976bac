"""Methods of healing one after the other: each goes on from the one before, and none makes it worse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fxfuse
from fxfuse.errors import HealError, OptionError
from fxfuse.healing import fit as fitting
from fxfuse.healing.course import Distillation
from fxfuse.healing.local import Training
from fxfuse.healing.trainer import Distiller
from tests.healing.test_heal import DROP, assert_same_weights, kl, text, trained, weights

CPU = {"use_cpu": True}


def distillation(**options: Any) -> Distillation:
    return Distillation(**{"inner": "eager", "lr": 1e-2, "trainer": CPU, **options})


def test_three_methods_go_on_from_each_other() -> None:
    model = trained()
    original, unseen = copy.deepcopy(model), text(6, start=100)
    healing = fxfuse.heal(
        model,
        DROP,
        text(20),
        ["fit", "local", "distill"],
        training=Training(epochs=2, rate=1e-2),
        distillation=distillation(steps=30),
    )

    assert [verdict.method for verdict in healing.verdicts] == ["fit", "local", "distill"]
    assert all(verdict.share for verdict in healing.verdicts)
    steps = [verdict.kl[""] for verdict in healing.verdicts]
    assert [kl.after for kl in steps[:-1]] == [kl.before for kl in steps[1:]]
    assert healing.kl[""].before == steps[0].before and healing.kl[""].after == steps[-1].after
    assert steps[2].after < steps[1].after < steps[0].after < steps[0].before
    assert kl(model, original, DROP, unseen) < kl(original, original, DROP, unseen)
    assert healing.distilled is not None and healing.distilled.steps == 30
    assert "distilled in 30 steps" in str(healing)


def test_distilling_begins_where_the_fit_has_ended_and_the_original_teaches() -> None:
    models = [trained() for _ in range(2)]
    once = distillation(steps=1, lr=0.0)
    alone = fxfuse.heal(models[0], DROP, text(), "distill", distillation=once)
    after = fxfuse.heal(models[1], DROP, text(), ["fit", "distill"], distillation=once)
    fitted = trained()
    fxfuse.heal(fitted, DROP, text())

    assert alone.distilled is not None and after.distilled is not None
    assert after.distilled.losses[0] < 0.9 * alone.distilled.losses[0]  # of the same batch
    assert_same_weights(models[0], weights(trained()))
    assert [verdict.share > 0 for verdict in after.verdicts] == [True, False]
    assert_same_weights(models[1], weights(fitted))


def test_what_makes_it_worse_is_not_kept_and_what_was_there_before_is() -> None:
    model, fitted = trained(), trained()
    healing = fxfuse.heal(model, DROP, text(), ["fit", "distill"], distillation=distillation(steps=3, lr=3.0))
    fxfuse.heal(fitted, DROP, text())

    assert [verdict.share > 0 for verdict in healing.verdicts] == [True, False]
    assert healing.share == healing.verdicts[0].share and healing.kl[""].after < healing.kl[""].before
    assert "distill: nothing of it was kept" in str(healing)
    assert_same_weights(model, weights(fitted))


def test_without_a_limit_the_text_is_read_once() -> None:
    healing = fxfuse.heal(trained(), DROP, text(10), "distill", distillation=distillation())

    assert healing.distilled is not None and healing.distilled.steps == 8  # two of ten are held out
    assert healing.tokens == (8 * 2 * 23, 2 * 2 * 23)


def test_each_method_may_have_a_time_of_its_own() -> None:
    model = trained()
    healing = fxfuse.heal(
        model, DROP, text(10), ["fit", "distill"], minutes={"distill": 1e-9}, distillation=distillation()
    )
    assert len(healing.outcomes) == 3 and healing.distilled is None  # it was over before it began
    assert healing.verdicts[1].share == 0 and healing.share == healing.verdicts[0].share > 0
    assert "distill: it changed nothing" in str(healing)

    healing = fxfuse.heal(
        trained(),
        DROP,
        text(10),
        ["fit", "distill"],
        minutes={"fit": 0.0, "distill": 0.02},
        distillation=distillation(),
    )
    assert not healing.outcomes and healing.distilled is not None and healing.distilled.steps > 0


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = trained(), trained()
    before = weights(broken)
    options: dict[str, Any] = {"distillation": distillation(trainer={**CPU, "save_steps": 2})}
    fxfuse.heal(whole, DROP, text(), ["fit", "distill"], **options)

    seen = 0
    real = Distiller.compute_loss

    def interrupted(self: Distiller, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 6:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Distiller, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fxfuse.heal(broken, DROP, text(), ["fit", "distill"], resume=tmp_path, **options)
    assert_same_weights(broken, before)
    monkeypatch.setattr(fitting, "best_strength", None)  # the fit is not made again
    fxfuse.heal(broken, DROP, text(), ["fit", "distill"], resume=tmp_path, **options)

    assert seen == 6 + 4  # of eight steps four were in the last checkpoint
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(broken.state_dict()[name], value, rtol=0, atol=1e-9)


def test_a_training_goes_on_only_from_what_was_there_before(tmp_path: Path) -> None:
    options: dict[str, Any] = {"distillation": distillation(steps=2), "resume": tmp_path}
    fxfuse.heal(trained(), DROP, text(), "distill", **options)
    with pytest.raises(HealError, match="another start"):
        fxfuse.heal(trained(), DROP, text(), ["fit", "distill"], **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minutes": {"fit": 1.0}}, "minutes has 'fit', which is none of the methods: distill"),
        ({"minutes": {"distill": -1.0}}, r"minutes\['distill'\]"),
        ({"distillation": distillation(steps=0)}, "steps"),
        ({"distillation": distillation(lr=-1.0)}, "lr"),
        ({"distillation": distillation(top_k=3)}, "top_k needs a folder"),
        ({"distillation": distillation(trainer={"stepz": 3})}, "stepz"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], words: str) -> None:
    model = trained()
    before = weights(model)
    with pytest.raises(OptionError, match=words):
        fxfuse.heal(model, DROP, text(), "distill", **options)
    assert_same_weights(model, before)


def test_a_model_that_was_pruned_cannot_teach() -> None:
    from fxfuse import Plan

    plan = Plan(linear=DROP.drop)
    model = fxfuse.prune(trained(), plan)
    with pytest.raises(HealError, match="give the original"):
        fxfuse.heal(model, plan, text(), "distill", distillation=distillation())
