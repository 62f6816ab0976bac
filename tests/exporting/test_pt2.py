from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxfuse
from fxfuse.errors import ExportError
from fxfuse.exporting.pt2 import DECODE, PREFILL, Programs, trace
from tests.exporting.families import tiny, tokens
from tests.models.language import language
from tests.models.tiny import planned

EXAMPLES = Path(__file__).parents[2] / "examples" / "pt2"

DROP = ["model.layers.2.self_attn", "model.layers.4.self_attn"]
WIDE = [["model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp"]]
PAIRS = [["model.layers.2.self_attn", "model.layers.3.self_attn"], ["model.layers.2.mlp", "model.layers.3.mlp"]]

LENGTH, PADDING = 9, 4


@torch.no_grad()
def continued(programs: Programs, ids: Tensor, mask: Tensor, pieces: Sequence[int]) -> list[Tensor]:
    """Logits after each of the pieces of ``ids``, which the programs read one after the other."""
    caches = [each for spec in programs.caches for each in spec.tensors(ids.shape[1], len(ids), next_cache(programs))]
    found, done = [], 0
    for piece in pieces:
        end = done + piece
        program = programs.graphs[PREFILL if piece > 1 else DECODE]
        found += program(ids[:, done:end], mask[:, :end], [cache[:end] for cache in caches])
        done = end
    return found


def next_cache(programs: Programs) -> Tensor:
    return programs.examples[PREFILL][2][0]


@torch.no_grad()
def wanted(model: nn.Module, ids: Tensor, starts: Sequence[int], ends: Sequence[int]) -> list[Tensor]:
    """The same of a model that reads each row anew, from where its padding ends."""
    rows = [[ids[row : row + 1, start:end] for row, start in enumerate(starts)] for end in ends]
    return [torch.cat([model(input_ids=each, use_cache=False).logits[:, -1] for each in row]) for row in rows]


def largest(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("family", "parallel"),
    [
        ("llama", WIDE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("llama", PAIRS),
                ("biased", WIDE),
                ("qwen3", WIDE),
                ("phi3", WIDE),
                ("gemma3", []),
                ("granite", WIDE),
                ("olmo2", WIDE),
            ]
        ),
    ],
)
def test_a_prompt_in_pieces_gives_the_planned_models_logits(family: str, parallel: list[list[str]]) -> None:
    drop = [name for name in DROP if not any(name in group for group in parallel)]
    model, ids = tiny(family, torch.float32), tokens(2, LENGTH + 5)
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[1, :PADDING] = False

    programs = trace(model, fxfuse.Plan(drop=drop, parallel=parallel), check=False)
    made = continued(programs, ids, mask, (LENGTH, 1, 3, 1))

    ends = (LENGTH, LENGTH + 1, LENGTH + 4, LENGTH + 5)
    own = wanted(planned(model, drop, parallel), ids, (0, PADDING), ends)
    exact = wanted(planned(model.double(), drop, parallel), ids, (0, PADDING), ends)
    assert largest(own, wanted(model, ids, (0, PADDING), ends)) > 1e-3
    eps = torch.finfo(torch.float32).eps * max(float(each.abs().max()) for each in exact)
    assert largest(made, exact) <= 2 * largest(own, exact) + eps


def test_a_wide_ffn_is_stored_once_and_what_was_dropped_is_not() -> None:
    model = tiny("llama", torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    programs = trace(model, fxfuse.Plan(drop=DROP, parallel=WIDE))

    assert len(programs.caches) == 4
    assert not [name for name in programs.weights if "layers.2.self_attn" in name or "layers.4.self_attn" in name]
    assert not [name for name in programs.weights if any(f"layers.{index}.mlp" in name for index in (1, 2, 3))]
    assert {tuple(value.shape) for name, value in programs.weights.items() if name.startswith("packed")} == {
        (2 * 3 * 40, 32),
        (32, 3 * 40),
    }
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_would_compute_something_else_is_not_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fxfuse.exporting.cached._Rows.get_seq_length", lambda self: 0)

    with pytest.raises(ExportError, match="is not the planned model"):
        fxfuse.export(tiny("llama", torch.float32), fxfuse.Plan(drop=DROP), tmp_path / "out", "pt2")

    assert not list(tmp_path.iterdir())


def test_a_model_whose_caches_are_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Hugging Face"):
        trace(language(), fxfuse.Plan())


def test_a_model_that_keeps_more_than_keys_and_values_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()

    with pytest.raises(ExportError, match="keys and values"):
        trace(model, fxfuse.Plan())


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


BLOCKED = """
import runpy, sys
sys.modules["fxfuse"] = sys.modules["transformers"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny planned Llama, compiled."""
    model, folder = tiny("llama", torch.float32), tmp_path_factory.mktemp("pt2") / "out"
    return fxfuse.export(model, fxfuse.Plan(drop=DROP, parallel=WIDE), folder, "pt2")


@pytest.mark.slow
def test_a_package_runs_without_fxfuse(package: Path) -> None:
    prompts = [tokens(1, 11)[0].tolist(), tokens(1, 5)[0].tolist()]
    texts = [" ".join(map(str, prompt)) for prompt in prompts]
    command = [sys.executable, "-c", BLOCKED, str(EXAMPLES / "generate.py"), str(package), "16"]

    both = subprocess.run([*command, texts[0], "/", texts[1]], capture_output=True, text=True)
    one = subprocess.run([*command, texts[1].split()[0]], capture_output=True, text=True)

    assert both.returncode == one.returncode == 0, both.stderr + one.stderr
    model = planned(tiny("llama", torch.float32), DROP, WIDE)
    made = [list(map(int, line.split())) for line in (both.stdout + one.stdout).splitlines()]
    assert made == [greedy(model, prompt, 16) for prompt in (*prompts, prompts[1][:1])]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="there is no cmake")
def test_a_package_runs_in_a_program_without_python(package: Path, tmp_path: Path) -> None:
    prompt = tokens(1, 11)[0].tolist()
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"

    subprocess.run(["cmake", "-S", EXAMPLES, "-B", tmp_path, prefix], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)
    command = [tmp_path / "generate", package, "16", *map(str, prompt)]
    ran = subprocess.run(command, capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert list(map(int, ran.stdout.split())) == greedy(planned(tiny("llama", torch.float32), DROP, WIDE), prompt, 16)
