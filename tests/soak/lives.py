"""One compiled model after the other, and what people do with it: each call is compared with the model's own modules.

A life is drawn from a seed: a Llama or a Gemma 3, whose attentions slide, tiny and in float64; a plan; options of the
backend; then a dozen things that happen to it, of :data:`DEEDS`. What a call should give is told by a copy of the model
whose layers are run one branch at a time (:mod:`tests.models.tiny`), which knows nothing of the library.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import fxfuse
from fxfuse.backend.compiler import ffnfuse
from tests.models.tiny import gemma3, llama, planned, redraw, tokens
from tests.models.updates import UPDATES, update

TOLERANCE = 1e-8
DEEDS_OF_A_LIFE = 12
THREADS = 4
LARGEST = 4.0
"""How large a weight may become before all are drawn anew: a stream that grows without bound tells nothing."""


class MismatchError(AssertionError):
    """A call gave something else than the model's modules."""


class Life:
    """A compiled model.

    Attributes:
        log: what has happened to it.
        calls: how many of its calls were compared.
    """

    def __init__(self, seed: int) -> None:
        self.log: list[str] = []
        self.calls = 0
        self.chance = random.Random(seed)
        inner = self.chance.choices(["eager", "aot_eager", "inductor"], [6, 3, 1])[0]
        self.model: Any = gemma3() if self.chance.random() < 0.3 else llama(5)
        _in_float64(self.model)
        self.layers = [f"model.layers.{index}" for index in range(5)]
        self.options: dict[str, object] = {
            "inner": inner,
            "weights": self.chance.choice(["copy", "copy", "share"]),
            "merge_gate_up": self.chance.random() < 0.3,
        }
        self.deeds, self.lengths = DEEDS_OF_A_LIFE, [2, 5, 8]
        self.mode: str | None = None
        if inner == "inductor":
            self.deeds, self.lengths = 4, [5]  # a program takes ten seconds and more
            self.mode = self.chance.choice([None, "reduce-overhead", "max-autotune-no-cudagraphs"])
            for name, buffer in self.model.named_buffers():
                if "inv_freq" in name:
                    buffer.zero_()  # angles are float32 in any model, and inductor's sines are not eager's to 1e-8
        self.dynamic = self.chance.choice([None, None, True, True, False])
        self.log.append(f"{type(self.model).__name__}, {self.options}, mode {self.mode}, dynamic {self.dynamic}")
        swap_the_plan(self)

    def live(self) -> None:
        """Call it, and let a dozen things happen, with a call after each.

        Raises:
            MismatchError: a call gave something else than it should.
        """
        call(self)
        for _ in range(self.deeds):
            (deed,) = self.chance.choices(list(DEEDS), list(DEEDS.values()))
            self.log.append(deed.__name__)
            deed(self)
            if max(float(weight.detach().abs().max()) for weight in self.model.parameters()) > LARGEST:
                redraw(self.model, self.draw())
            call(self)

    def draw(self) -> int:
        return self.chance.randrange(1 << 30)

    def ids(self, length: int | None = None) -> Tensor:
        return tokens(self.chance.randint(1, 2), length or self.chance.choice(self.lengths), seed=self.draw())

    def reference(self) -> Any:
        """The model under the plan by its own modules, with its weights as they are."""
        return planned(self.model, self.plan.drop, self.plan.parallel)

    def expected(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.reference()(ids, use_cache=False).logits
        return logits

    def check(self, got: Tensor, *expected: Tensor) -> None:
        """Compare with what should have come, or with each of what may have."""
        self.calls += 1
        far = min(float((got - each).abs().max() / each.abs().max()) for each in expected)
        if not far <= TOLERANCE:
            raise MismatchError(f"off by {far:.1e}")


def _in_float64(model: nn.Module) -> None:
    """Give it norms of torch's own: those of transformers round to float32, each way of computing in another place."""
    for holder in list(model.modules()):
        for name, norm in holder.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(holder, name, nn.RMSNorm(norm.weight.shape, eps=1e-6, dtype=torch.float64))
    redraw(model)


def swap_the_plan(life: Life) -> None:
    """Compile the model anew, under another plan."""
    without = [number for number in range(1, len(life.layers)) if life.chance.random() < 0.5]
    runs: list[list[str]] = [[life.layers[0]]]
    for number, layer in enumerate(life.layers[1:], 1):
        if number in without and life.chance.random() < 0.8:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    groups = [[f"{layer}.mlp" for layer in run] for run in runs if len(run) > 1]
    life.plan = fxfuse.Plan(drop=[f"{life.layers[number]}.self_attn" for number in without], parallel=groups)
    life.log.append(f"drop {without}, groups {groups}")
    backend = partial(ffnfuse, options={"plan": life.plan, **life.options})
    life.compiled = torch.compile(life.model, backend=backend, mode=life.mode, dynamic=life.dynamic)


@torch.no_grad()
def call(life: Life) -> None:
    ids = life.ids()
    life.check(life.compiled(ids, use_cache=False).logits, life.expected(ids))


@torch.no_grad()
def converse(life: Life) -> None:
    """A prefill and some decode steps with a cache, against the whole text without one."""
    static = life.chance.random() < 0.5
    config = life.model.config
    cache: Any = StaticCache(config=config, max_cache_len=24) if static else DynamicCache(config=config)
    text = life.ids(length=life.chance.randint(10, 14))
    life.log.append(f"{type(cache).__name__} {tuple(text.shape)}")
    expected, done = life.expected(text), 0
    for size in (life.chance.randint(2, 5), 1, 1, 2, 1):
        got = life.compiled(text[:, done : done + size], past_key_values=cache, use_cache=True).logits
        life.check(got, expected[:, done : done + size])
        done += size


def change_weights(life: Life) -> None:
    how = life.chance.choice(UPDATES)
    life.log.append(how)
    update(how, life.model, life.draw())


def train(life: Life) -> None:
    """Gradients, then a step of an optimizer."""
    ids, reference = life.ids(), life.reference()
    for model, run in ((life.model, life.compiled), (reference, reference)):
        model.zero_grad()
        model.requires_grad_()
        run(ids, use_cache=False).logits.square().mean().backward()
    others = {name.replace(".layer.", ".", 1): weight for name, weight in reference.named_parameters()}
    for name, weight in life.model.named_parameters():
        if (wanted := others[name].grad) is not None and bool(wanted.any()):
            life.check(weight.grad, wanted)
    torch.optim.AdamW(life.model.parameters(), 1e-2).step()
    life.model.zero_grad()


@torch.no_grad()
def fail(life: Life) -> None:
    """A call that raises in its middle; the next ones know nothing of it."""
    bad = life.ids()
    bad[0, -1] = 10_000
    try:
        life.compiled(bad, use_cache=False)
    except (IndexError, RuntimeError):
        return
    raise MismatchError("a token that the model does not know was no error")


@torch.no_grad()
def change_under_calls(life: Life) -> None:
    """Four threads call while a weight is exchanged: each call has the old one or the new one, and never both."""
    ids = life.ids()
    weight = life.model.get_submodule(f"{life.chance.choice(life.layers)}.mlp.{life.chance.choice(PROJECTIONS)}").weight
    states, allowed = [weight.data.clone(), torch.randn_like(weight) * 0.3], []
    for state in states:
        weight.data = state
        allowed.append(life.expected(ids))
    life.compiled(ids, use_cache=False)
    errors: list[BaseException] = []
    begin, left = threading.Barrier(THREADS + 1), threading.Semaphore(0)

    def run() -> None:
        try:
            with torch.no_grad():
                begin.wait()
                for _ in range(8):
                    life.check(life.compiled(ids, use_cache=False).logits, *allowed)
        except BaseException as error:
            errors.append(error)
        finally:
            left.release()

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    begin.wait()
    running, turn = THREADS, 0
    while running:
        weight.data = states[turn % 2].clone()
        turn += 1
        while left.acquire(timeout=0.002):
            running -= 1
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def adapt(life: Life) -> None:
    """LoRA in FFNs and attentions: one more, switched, merged, taken apart, or weighted."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    layers = [module for module in life.model.modules() if isinstance(module, LoraLayer)]
    deeds = ["one more"] if len(layers) == 0 else ["merge", "take apart", "switch off", "switch on", "weigh"]
    how = life.chance.choice(deeds)
    life.log.append(how)
    if how == "one more":
        targets = life.chance.sample(["q_proj", "v_proj", *PROJECTIONS], 2)
        inject_adapter_in_model(LoraConfig(target_modules=targets, r=2, lora_alpha=2), life.model)
        life.model.double().eval()
        redraw(life.model, life.draw())
    with torch.no_grad():
        for layer in layers:
            if how == "merge" and not layer.merged:
                layer.merge()
            elif how == "take apart" and layer.merged:
                layer.unmerge()
            elif how in ("switch off", "switch on") and not layer.merged:
                layer.enable_adapters(how == "switch on")
            elif how == "weigh" and not layer.merged:
                layer.scaling["default"] = life.chance.uniform(-1, 1)


@torch.no_grad()
def serve(life: Life) -> None:
    """Many calls, a weight changed before each: in the end they hold no more tensors than after the first few."""
    ids, weight = life.ids(), life.model.model.layers[0].mlp.up_proj.weight

    def held(rounds: int) -> int:
        for _ in range(rounds):
            weight.data.neg_()
            life.compiled(ids, use_cache=False)
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())

    first = held(6)
    if (more := held(40) - first) > 0:
        raise MismatchError(f"it holds {more} tensors more after 40 calls")


def fork(life: Life) -> None:
    """A child that was forked calls the model after it has changed a weight of its own."""
    child = os.fork()
    if child == 0:
        try:
            life.model.model.layers[0].mlp.up_proj.weight.data *= 1.5
            call(life)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise MismatchError("in a forked process")


def spawn(life: Life) -> None:
    """A new process gets the model, and compiles and calls it there."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    ids = life.ids()
    process = context.Process(target=_elsewhere, args=(life.model, life.plan.to_json(), life.options, ids, sender))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process.start()
    sender.close()
    try:
        got = receiver.recv()
    except EOFError:
        raise MismatchError("the new process died") from None
    finally:
        process.join()
    life.check(torch.tensor(got, dtype=torch.float64), life.expected(ids))


@torch.no_grad()
def _elsewhere(model: nn.Module, plan: str, options: Mapping[str, object], ids: Tensor, sender: Connection) -> None:
    torch.set_num_threads(1)
    own = {**options, "plan": fxfuse.Plan.from_json(plan)}
    compiled: Any = torch.compile(model, backend="ffnfuse", options=own)
    sender.send(compiled(ids, use_cache=False).logits.tolist())


DEEDS: Mapping[Callable[[Life], None], float] = {
    change_weights: 6,
    converse: 3,
    change_under_calls: 2,
    swap_the_plan: 2,
    train: 2,
    adapt: 2,
    fail: 1,
    serve: 1,
    fork: 0.5,
    spawn: 0.1,
}
"""What happens in a life, and how often."""


def lived(seed: int) -> Life:
    """A whole life; what was compiled in it is forgotten.

    Raises:
        Exception: with the log of the life as a note.
    """
    life = Life(seed)
    try:
        life.live()
    except Exception as error:
        error.add_note(f"life {seed}: " + "; ".join(life.log))
        raise
    finally:
        del life.compiled
        torch.compiler.reset()
        gc.collect()
    return life
