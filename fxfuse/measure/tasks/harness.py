"""Run lm_eval on a model as it stands: planned or not, compiled in place or eager.

lm_eval is imported here and nowhere else; it is an extra.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from torch import nn

from fxfuse._common.bounds import check_count
from fxfuse._common.progress import bar
from fxfuse._torch.compiled import original
from fxfuse.data.batches import Model, eval_mode, telling
from fxfuse.errors import MissingDependencyError, OptionError, nearest
from fxfuse.measure.tasks.scores import TaskScore
from fxfuse.measure.tasks.shipped import SHIPPED, config

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.result_schema import EvalResults
    from lm_eval.tasks.manager import TaskDict, TaskManager

ALL = "all"
"""The name that stands for all tasks of this package."""

_SEED = 0
"""Of the examples that tasks of others draw; those of this package draw none."""


def score(
    model: Model,
    tokenizer: object,
    tasks: Sequence[str] = (ALL,),
    *,
    limit: int | None = None,
    progress: bool = False,
) -> tuple[TaskScore, ...]:
    """What ``model`` scores on ``tasks``, by lm_eval, called once for all of them.

    The model is called as it is: what ``fxfuse.apply`` or ``model.compile`` made of it answers, ``generate`` included.
    It runs without gradients and in eval mode, and is left as it was.

    Args:
        model: a causal language model of Hugging Face.
        tokenizer: its tokenizer.
        tasks: names of the tasks of this package (`SHIPPED`), which need no network; "all", for all of them; or names
            of lm_eval's own tasks, whose data lm_eval fetches, or paths of its YAML files.
        limit: put no more documents than this of each task to the model, the first ones.
        progress: show on stderr how far it is.

    Returns:
        A score for each task and metric, in the order of ``tasks``.

    Raises:
        MissingDependencyError: lm_eval is not installed.
        OptionError: no such task, or a model that lm_eval cannot generate with: none of Hugging Face, or what
            ``torch.compile(model)`` returned, whose ``generate`` runs the model uncompiled, without its plan.
        RecordError: the model, or lm_eval, could not do a task.
    """
    check(model, tokenizer, tasks, limit)
    from lm_eval.models.huggingface import HFLM

    with _quiet(), eval_mode(model):
        loaded = _loaded(_names(tasks))
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        lm.loglikelihood = _shown("scoring answers", lm, lm.loglikelihood, progress)
        lm.generate_until = _shown("writing answers", lm, lm.generate_until, progress)
        found = _evaluated(lm, loaded, limit)
    return tuple(made for name in found["results"] for made in _scores(name, found))


def check(model: Model, tokenizer: object, tasks: Sequence[str], limit: int | None = None) -> None:
    """Raise at once, before anything that takes long, what :func:`score` would raise of its arguments."""
    check_count("limit", limit)
    if isinstance(tasks, str) or not tasks:
        raise OptionError(f"tasks is a list of names, of {', '.join(SHIPPED)}, or {ALL!r}; not {tasks!r}")
    if find_spec("lm_eval") is None:
        raise MissingDependencyError("lm_eval is needed to run tasks: pip install 'fxfuse[eval]'")
    if not isinstance(model, nn.Module) or not hasattr(model, "generate") or not hasattr(model, "config"):
        raise OptionError(
            f"tasks need a language model of Hugging Face, with generate and config, not a {type(model).__name__}; "
            "other models are evaluated on batches alone"
        )
    if original(model) is not model:
        raise OptionError(
            "generate, of what torch.compile(model) returned, runs the model uncompiled and without its plan, so the "
            "scores would not be those of the compiled model: use fxfuse.apply(model, plan), or "
            'model.compile(backend="ffnfuse", options=...), which compile in place'
        )
    if tokenizer is None:
        raise OptionError("tasks are text, so they need the model's tokenizer: give tokenizer=")
    if getattr(tokenizer, "eos_token", None) is None:
        raise OptionError("lm_eval needs a tokenizer with an end of text: set its eos_token")
    others = _others(tasks)
    known = _manager(others).all_tasks if others else []
    for name in others:
        if name not in known and not name.endswith((".yaml", ".yml")):
            raise OptionError(f"there is no task {name!r}{nearest(name, [*SHIPPED, *known])}")


def _names(tasks: Sequence[str]) -> list[str]:
    """Each task once, in order."""
    return list(dict.fromkeys(name for task in tasks for name in (SHIPPED if task == ALL else [task])))


def _others(tasks: Sequence[str]) -> list[str]:
    """The tasks that are not of this package."""
    return [name for name in _names(tasks) if name not in SHIPPED]


def _manager(others: Sequence[str]) -> TaskManager:
    """lm_eval's tasks. To look through its own thousands takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=bool(others))


def _loaded(names: Sequence[str]) -> TaskDict:
    manager = _manager(_others(names))
    with telling("lm_eval could not load the tasks"):
        loaded: TaskDict = manager.load([config(name) if name in SHIPPED else name for name in names])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_SEED)
    return loaded


def _evaluated(lm: HFLM, loaded: TaskDict, limit: int | None) -> EvalResults:
    import lm_eval

    with telling("lm_eval could not run the tasks"):
        found: EvalResults = lm_eval.evaluate(lm, loaded, limit=limit, log_samples=True)
    return found


def _scores(name: str, found: EvalResults) -> list[TaskScore]:
    """The scores of one task, from what lm_eval returned: its keys are ``metric,filter``."""
    results, samples = found["results"][name], found["samples"].get(name, [])
    made = []
    for key, value in results.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, float):
            continue
        error = results.get(f"{metric}_stderr,{chosen}")
        each = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        numbers = tuple(float(one) for one in each if isinstance(one, int | float))
        made.append(
            TaskScore(
                task=name,
                metric=metric if chosen == "none" else key,
                score=float(value),  # a number of numpy's, for some metrics
                error=float(error) if isinstance(error, int | float) else math.nan,
                documents=len(each),
                chance=SHIPPED[name].chance if name in SHIPPED else None,
                each=numbers if len(numbers) == len(each) else (),
            )
        )
    return made


class _Advance:
    """Told by lm_eval of each request that was answered: its place for a cache of answers."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def add_partial(self, attr: str, req: object, res: object) -> None:
        self._advance(1)


def _shown(title: str, lm: HFLM, run: Callable[..., list[object]], progress: bool) -> Callable[..., list[object]]:
    """``run``, which answers many requests, with our progress in place of its own."""

    def shown(requests: Sequence[object]) -> list[object]:
        with bar(title, "requests", len(requests), progress) as advance:
            lm.set_cache_hook(_Advance(advance))
            return run(requests, disable_tqdm=True)

    return shown


@contextmanager
def _quiet() -> Iterator[None]:
    """lm_eval warns of what is meant here: a model that is given, documents that are made."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
