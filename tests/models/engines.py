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
        self.llm_engine = Steps(self.config, Held(model_config=model, cache_config=cache))
        print("hello from the engine")


class Steps:
    """Reads a prompt in each step, and makes a token after those that are read."""

    def __init__(self, config, vllm_config):
        self.config, self.vllm_config, self.waiting, self.made = config, vllm_config, {}, {}

    def abort_request(self, names):
        for name in names:
            self.waiting.pop(name, None)
            self.made.pop(name, None)

    def add_request(self, name, prompt, params):
        self.waiting[name] = prompt["prompt_token_ids"][-1], params.max_tokens

    def has_unfinished_requests(self):
        return bool(self.waiting or self.made)

    def step(self):
        if "end" in self.config:
            print(self.config["end"], file=sys.stderr, flush=True)
            os._exit(3)
        time.sleep(0.002)
        if self.waiting:
            name = next(iter(self.waiting))
            self.made[name] = [], *self.waiting.pop(name)
        for tokens, last, _ in self.made.values():
            tokens.append(last + 1 + len(tokens))
        done = [Held(request_id=name, outputs=[Held(token_ids=tuple(row[0]))]) for name, row in self.made.items()]
        self.made = {name: row for name, row in self.made.items() if len(row[0]) < row[2]}
        return done
'''


def install_fake_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str = FAKE) -> None:
    """Let processes that are started from now on find a package ``vllm`` that is ``source``."""
    package = folder / "packages" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
