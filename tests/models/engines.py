"""An engine that is none: a package ``vllm`` as far as the worker knows it, for processes that are told where it is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FAKE = '''
import json, os, sys, time
from types import SimpleNamespace as Held

__version__ = os.environ["VLLM_CPU_KVCACHE_SPACE"]


class SamplingParams:
    def __init__(self, temperature, max_tokens, **others):
        self.max_tokens = max_tokens


class LLM:
    """Says the numbers after a prompt's last token; a model whose config says so is refused, or ends the process."""

    def __init__(self, folder, dtype, model_impl, enforce_eager, max_num_seqs, **others):
        self.config = json.load(open(os.path.join(folder, "config.json")))
        if "refuse" in self.config:
            raise ValueError(self.config["refuse"])
        how = f"{model_impl} {'eager' if enforce_eager else 'compiled'}"
        model = Held(architecture=how, dtype=dtype, get_vocab_size=lambda: self.config["vocab_size"])
        cache = Held(num_gpu_blocks=self.config.get("num_blocks", 1000), block_size=16)
        self.llm_engine = Held(vllm_config=Held(model_config=model, cache_config=cache))
        print("hello from the engine")

    def generate(self, prompts, how, use_tqdm):
        if "end" in self.config:
            print(self.config["end"], file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(0.002 * (1 + how.max_tokens))
        last = [prompt["prompt_token_ids"][-1] for prompt in prompts]
        made = [[token + 1 + place for place in range(how.max_tokens)] for token in last]
        return [Held(outputs=[Held(token_ids=tuple(tokens))]) for tokens in made]
'''


def install_fake_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str = FAKE) -> None:
    """Let processes that are started from now on find a package ``vllm`` that is ``source``."""
    package = folder / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
