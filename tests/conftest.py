"""What every test needs: settings for hypothesis and threads, a clean Dynamo, and a real trained model."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings

from fxfuse.cpu import onednn
from fxfuse.data.loading import Loaded, load, smollm2_path

# Compilation takes seconds and would trip hypothesis' deadline. Its own "ci" profile has none, and draws the same
# examples every time.
settings.register_profile("dev", deadline=None)
# A mutation need only be noticed; to shrink what noticed it takes minutes.
settings.register_profile("mutants", settings.get_profile("ci"), phases=(Phase.explicit, Phase.generate))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores among themselves
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # nor does each keep a pool of compilers of its own


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the pages of tests/golden anew")


def pytest_report_header() -> str:
    """What the suite runs on: a failure elsewhere is told from one everywhere."""
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (torch.bfloat16, torch.float16) if onednn.computes(dtype)]
    multiplies = (
        f"oneDNN multiplies {' and '.join(['float32', *dtypes])}" if onednn.computes(torch.float32) else "no oneDNN"
    )
    processor = torch.backends.cpu.get_cpu_capability()
    return f"Python {platform.python_version()}, torch {torch.__version__}, {processor}; {multiplies}"


@pytest.fixture(autouse=True)
def clean_dynamo() -> Iterator[None]:
    """No compiled graph, and no count towards the recompile limit, survives a test."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama with random weights, float32, two layers, 32 tokens and no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder(pytestconfig: pytest.Config) -> Path:
    """SmolLM2-135M as a Hugging Face folder, float32, converted once and kept in pytest's cache.

    Reading the GGUF takes half a minute, most of it in parsing 98,000 strings three times; the folder loads in a
    second.
    """
    gguf = smollm2_path()
    version = metadata.version("transformers")
    cache = Path(pytestconfig.cache.mkdir("smollm2"))  # type: ignore[union-attr]  # the cache plugin is always on
    folder = cache / f"{gguf.stem}-{gguf.stat().st_size}-transformers-{version}"
    if not folder.exists():
        loaded = load("smollm2")
        draft = Path(tempfile.mkdtemp(dir=cache))
        loaded.model.save_pretrained(draft)
        loaded.tokenizer.save_pretrained(draft)
        try:
            draft.rename(folder)  # whole or not at all, whatever the other workers do
        except OSError:
            shutil.rmtree(draft)
            if not folder.exists():
                raise
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Callable[[torch.dtype], Loaded]:
    """``smollm2(torch.float64)``: the trained model, loaded once per dtype and session. Tests must not change it."""
    loaded: dict[torch.dtype, Loaded] = {}

    def get(dtype: torch.dtype = torch.float32) -> Loaded:
        if dtype not in loaded:
            loaded[dtype] = load(str(smollm2_folder), dtype)
        return loaded[dtype]

    return get
