"""Every file that the library reads: cut short, with bytes that flipped, with values of other types.

What is read is what was written, or there is an error of the library's own that says what is wrong in a sentence.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

import fxfuse
from fxfuse import Plan, Recording
from fxfuse._common.sealed import seal
from fxfuse.data.loading import load
from fxfuse.errors import FxfuseError
from fxfuse.exporting.folder import PROVENANCE, format_of
from fxfuse.hardware.configs import Config
from fxfuse.healing import state as healing_state
from fxfuse.healing.steps import Outcome
from fxfuse.healing.teacher import LIKELIEST, TOKENS, TopK
from fxfuse.healing.text import Kind
from fxfuse.healing.training import FORMAT as STAGE
from fxfuse.healing.training import Lesson, same_run
from fxfuse.measure import resume
from fxfuse.measure.measurements import Measurements
from fxfuse.model.healed import mark_healed
from fxfuse.model.mark import ENTRY
from fxfuse.planning import state as planning_state
from fxfuse.planning.changes import Changes
from fxfuse.planning.costs import Costs
from fxfuse.report.page.results import load_results
from tests.models.language import language, sentences
from tests.models.tiny import llama
from tests.planning.costs import costs_of
from tests.planning.recordings import recording
from tests.properties.examples import examples

RECORDED = recording("afaf", kl=0.5, groups={("f0", "f1"): 0.25})
PLAN = Plan(drop=["a0"], parallel=[["f0", "f1"]], narrow={"f0": "0-3,7"})


@dataclass(frozen=True)
class File:
    """A file of the library.

    Attributes:
        write: a whole one into a folder; its path.
        read: what it holds, in a form that can be compared, used in passing as the library uses it.
        sealed: it is of tensors, and any byte that is not what was written shows.
    """

    write: Callable[[Path], Path]
    read: Callable[[Path], object]
    sealed: bool = False


def _written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _plan(path: Path) -> object:
    plan = Plan.load(path)
    return plan, plan.digest, hash(plan), str(plan)


def _recording(path: Path) -> object:
    made = Recording.load(path)
    return made.to_bytes(), str(made), made.to_json()


def _measured() -> Measurements:
    made = Measurements.of(RECORDED.branches, [("f0", "f1")])
    for tally in made.tallies.values():
        tally.add(0, torch.tensor([0.25, 0.5]))
    made.tokens, made.batches = 2, 1
    made.units = {"f0": torch.arange(10, dtype=torch.float64)}
    return made


def _recording_state(folder: Path) -> resume.State:
    return resume.State(folder / "state", {"shapes": "a", "weights": "b"}, {"max_group": "4"})


def _write_recording_state(folder: Path) -> Path:
    state = _recording_state(folder)
    state.save(_measured(), "digest")
    return state.path


def _read_recording_state(path: Path) -> object:
    state = _recording_state(path.parent)
    made = state.load(None)
    assert made is not None
    state.check_all(1)
    return _comparable(made.recording(Plan(), {}))


def _comparable(made: Recording) -> object:
    return made.branches, made.groups, made.tokens, made.to_json(), {name: u.tolist() for name, u in made.units.items()}


def _search(folder: Path, text: str = "text") -> planning_state.State:
    return planning_state.State(folder / "state", {"weights": "b"}, sentences(1), text)


def _write_search(folder: Path) -> Path:
    state = _search(folder)
    changes = Changes.empty().having(Plan(drop=["a0"]), 0.5, torch.arange(1.0, 5.0))
    state.keep_changes(changes.having(Plan(linear=["a1"]), 0.25, torch.arange(4.0, 8.0)))
    state.keep_kl("a plan", 0.75)
    return folder / "state"


def _read_search(path: Path) -> object:
    state = _search(path.parent)
    return state.kl, list(state.changes.kl.items()), state.changes.vectors.tolist(), state.changes.pairs()


def _costs(path: Path) -> object:
    costs = Costs.load(path)
    return costs, costs.original, costs.void, [costs[branch.name].seconds for branch in costs.branches], costs.to_json()


_MODEL = nn.Linear(2, 2)
_TEXT = (Kind("prose", tuple(sentences(1)), tuple(sentences(1, seed=2))),)


def _healing(folder: Path) -> healing_state.State:
    return healing_state.State(folder, _MODEL, PLAN, _TEXT, "fit")


def _write_healing(folder: Path) -> Path:
    outcome = Outcome("fit", ("f0",), 0.5, 0.25, (10, 2), 1e-3, {"f1": "it is shared"})
    _healing(folder).add({"weight": torch.ones(2, 2)}, outcome)
    return folder / "step-0000.safetensors"


def _read_healing(path: Path) -> object:
    state = _healing(path.parent)
    return state.outcomes, [{name: each.tolist() for name, each in weights.items()} for weights in state.weights]


def _said(folder: Path) -> TopK:
    return TopK(folder, 3, "teacher")


def _write_said(folder: Path) -> Path:
    for _ in _said(folder).fill(language(), sentences(1), (0, 1)):
        pass
    return next(folder.iterdir())


def _read_said(path: Path) -> object:
    batch = _said(path.parent).dress(sentences(1)[0])
    likeliest, tokens = batch[LIKELIEST], batch[TOKENS]
    assert isinstance(likeliest, torch.Tensor) and isinstance(tokens, torch.Tensor)
    return likeliest.tolist(), tokens.tolist()


def _write_stage(folder: Path) -> Path:
    tensors = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    return _written(folder, "done.safetensors", seal(STAGE, {"steps": 3, "losses": [0.5, 0.25]}, tensors))


def _read_stage(path: Path) -> object:
    student: Any = copy.deepcopy(_MODEL)
    lesson = Lesson(student, _MODEL, "", 0.0, 0.0, None, None, ())
    return lesson._done(path), [each.tolist() for each in student.parameters()]


def _run(folder: Path) -> None:
    waits = SimpleNamespace(wait_for_everyone=lambda: None)
    run: Any = SimpleNamespace(distributed_state=waits, process_index=0, max_steps=3, learning_rate=0.1, world_size=1)
    run.gradient_accumulation_steps = 1
    text: Any = SimpleNamespace(first=sentences(1)[0], count=1)
    same_run(folder, _MODEL, PLAN, [text], [run], ["edited", None])


def _write_run(folder: Path) -> Path:
    _run(folder)
    return folder / "run.json"


def _results(folder: Path) -> Path:
    entry = {"name": "drop a0", "solver": "milp", "latency": 0.5, "kl": 0.25, "healed_kl": None, "chosen": True}
    return _written(folder, "results.json", json.dumps([entry]))


def _tuned(path: Path) -> object:
    from fxfuse.kernels import tune

    return [each.rows * each.split for each in tune._read(path).values()]


def _write_tuned(folder: Path) -> Path:
    return _written(folder, "tuned.json", json.dumps({"a key": vars(Config(16, 64, 64, warps=4, stages=3))}))


FILES = {
    "plan": File(lambda folder: _written(folder, "plan.json", PLAN.to_json()), _plan),
    "recording": File(lambda folder: _written(folder, "r", RECORDED.to_bytes()), _recording, sealed=True),
    "state of a recording": File(_write_recording_state, _read_recording_state, sealed=True),
    "state of a search": File(_write_search, _read_search, sealed=True),
    "costs": File(lambda folder: _written(folder, "costs", costs_of(RECORDED).to_json()), _costs),
    "step of a healing": File(_write_healing, _read_healing, sealed=True),
    "what a teacher said": File(_write_said, _read_said, sealed=True),
    "stage of a distillation": File(_write_stage, _read_stage, sealed=True),
    "run of a distillation": File(_write_run, lambda path: _run(path.parent)),
    "results": File(_results, load_results),
    "tuned kernels": File(_write_tuned, _tuned),
    "export": File(
        lambda folder: _written(folder, PROVENANCE, json.dumps({"fxfuse": "0.1", "format": "gguf"})),
        lambda path: format_of(path.parent),
    ),
}


@cache
def whole(name: str) -> tuple[bytes, object]:
    """A file as it was written, and what is read of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = FILES[name].write(Path(folder))
        content = path.read_bytes()
        return content, FILES[name].read(path)


@dataclass(frozen=True)
class Nothing:
    """What is read of a file that is refused."""

    why: str


def in_words(error: FxfuseError) -> Nothing:
    """Why a file was refused, which must be a sentence."""
    assert len(str(error).split()) > 3, f"that is no sentence: {error}"
    return Nothing(str(error))


def read(name: str, content: bytes, folder: Path) -> object:
    """What is read of ``content`` in the place of a file, or why it is not."""
    path = FILES[name].write(folder)
    path.write_bytes(content)
    try:
        return FILES[name].read(path)
    except FxfuseError as error:
        return in_words(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A folder of its own, each time."""
    return lambda: tmp_path_factory.mktemp("files")


@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_is_read(name: str, folder: Callable[[], Path]) -> None:
    content, held = whole(name)

    assert read(name, content, folder()) == held


@pytest.mark.parametrize("name", FILES)
@examples(30)
@given(data=st.data())
def test_a_file_that_was_cut_short_is_refused(name: str, folder: Callable[[], Path], data: st.DataObject) -> None:
    content, _ = whole(name)
    end = data.draw(st.integers(0, len(content.rstrip()) - 1))

    assert isinstance(read(name, content[:end], folder()), Nothing)


@pytest.mark.parametrize("name", FILES)
@examples(100)
@given(data=st.data())
def test_a_byte_that_flipped_is_seen_or_does_not_matter(
    name: str, folder: Callable[[], Path], data: st.DataObject
) -> None:
    content, held = whole(name)
    changed = bytearray(content)
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3, unique=True)):
        changed[place] ^= data.draw(st.integers(1, 255))

    found = read(name, bytes(changed), folder())
    if FILES[name].sealed:  # a text says what it says: it may have been written by hand
        assert isinstance(found, Nothing) or found == held


OTHERS = [None, True, -1, 0, 2.5, 10**30, "x", "", [], [1], ["x"], {}, {"x": 1}, [[]], float("nan")]


def other_types(document: Any) -> Iterator[Any]:
    """The JSON document with one value changed: each in turn is another, is gone, or has a neighbour unknown to all."""
    yield from OTHERS
    for path in list(places(document)):
        for change in ("gone", "more", *OTHERS):
            made = copy.deepcopy(document)
            *way, last = path
            holder = reduce(lambda at, key: at[key], way, made)
            if change == "gone":
                del holder[last]
            elif change == "more":
                if not isinstance(holder, dict):
                    continue
                holder["x"] = None
            else:
                holder[last] = change
            yield made


def places(document: Any) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value within a JSON document."""
    numbered = dict(enumerate(document)) if isinstance(document, list) else document
    for key, value in numbered.items() if isinstance(numbered, dict) else ():
        yield (key,)
        yield from ((key, *path) for path in places(value))


@pytest.mark.parametrize("name", FILES)
def test_a_value_of_another_type_is_refused_in_words_or_used(name: str, folder: Callable[[], Path]) -> None:
    content, _ = whole(name)
    home = folder()
    if FILES[name].sealed:
        path = _written(home, "sealed", content)
        with safe_open(path, "pt") as file:
            ((form, text),) = file.metadata().items()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
        header = json.loads(text)
        del header["sha256"]  # as files were before they had one
        changed = (save(tensors, {form: json.dumps(other)}) for other in other_types(header))
    else:
        changed = (json.dumps(other).encode() for other in other_types(json.loads(content)))

    path = FILES[name].write(home)
    for document in changed:
        path.write_bytes(document)
        try:
            FILES[name].read(path)
        except FxfuseError as error:
            in_words(error)


CHECKPOINT = Plan(drop=["model.layers.1.self_attn"], narrow={"model.layers.0.mlp": "0-15"})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a plan has left in a folder of transformers."""
    model, folder = llama(2), tmp_path_factory.mktemp("checkpoint")
    mark_healed(model, CHECKPOINT)
    fxfuse.prune(model, CHECKPOINT).save_pretrained(folder)  # type: ignore[operator]  # a model of transformers
    return folder


@examples(20)
@given(data=st.data())
def test_the_config_of_a_healed_checkpoint_is_read_or_refused(saved: Path, data: st.DataObject) -> None:
    path = saved / "config.json"
    content = path.read_bytes()
    config = json.loads(content)
    other = data.draw(st.sampled_from(list(other_types(config[ENTRY]))))
    changed = json.dumps(config | {ENTRY: other}).encode()
    if data.draw(st.booleans()):
        changed = content[: data.draw(st.integers(0, len(content.rstrip()) - 1))]
    try:
        path.write_bytes(changed)
        assert load(str(saved)).plan == CHECKPOINT
    except FxfuseError as error:
        in_words(error)
    finally:
        path.write_bytes(content)


@examples(10)
@given(data=st.data())
def test_the_weights_of_a_healed_checkpoint_that_were_cut_short_are_refused(saved: Path, data: st.DataObject) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    try:
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(FxfuseError, match=r"cannot load .*\. Is it complete"):
            load(str(saved))
    finally:
        path.write_bytes(content)
