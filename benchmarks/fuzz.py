"""Fuzz: module classes of transformers and timm, each as a branch of a residual stream; no bare error, no wrong number.

Every class that can be built of a tiny configuration and maps ``[2, 4, 32]`` to the same sizes stands twice in
``h = h + block(norm(h))``, in float64. It is explained, and compiled without a plan, with a branch dropped, with both
in parallel, and with gate and up merged. Each time the result is eager's (or the plan's) to 1e-8, or an error of
fxfuse's own says why not.

    python -m benchmarks.fuzz              # all of them, in an hour or so
    python -m benchmarks.fuzz --step 20    # every twentieth
    python -m benchmarks.fuzz --only Llama
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fxfuse
from fxfuse import Plan
from fxfuse.errors import FxfuseError
from tests.zoo.configs import WIDTH, tiny

WORDS = (
    "mlp",
    "feedforward",
    "ffn",
    "dense",
    "gated",
    "glu",
    "expert",
    "moe",
    "intermediate",
    "block",
    "layer",
    "head",
)
"""What the name of a class that may be a branch has in it."""

Make = Callable[[], nn.Module]


class Residual(nn.Module):
    """``h + block(norm(h))``, once for each block."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.norms, self.blocks = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in blocks), nn.ModuleList(blocks)

    def added(self, index: int, h: Tensor) -> Tensor:
        made = self.blocks[index](self.norms[index](h))
        made = made[0] if isinstance(made, tuple) else made
        assert isinstance(made, Tensor) and made.shape == h.shape, "it is no branch"
        return made

    def forward(self, h: Tensor) -> Tensor:
        for index in range(len(self.blocks)):
            h = h + self.added(index, h)
        return h


def cases() -> Iterator[tuple[str, list[Make]]]:
    """Classes by name, and the ways to build one that are worth a try."""
    import transformers.models as models

    for family in pkgutil.iter_modules(models.__path__):
        for name in (f"{models.__name__}.{family.name}.modeling_{family.name}",):
            try:
                module = importlib.import_module(name)
                configuration = importlib.import_module(name.replace("modeling", "configuration"))
            except Exception:  # a dependency of its own
                continue
            kinds = [kind for _, kind in inspect.getmembers(configuration, inspect.isclass) if _is_config(kind, name)]
            for cls in _classes(module):
                yield f"{family.name}.{cls.__name__}", [_of_config(cls, kind) for kind in kinds] + _of_sizes(cls)
    try:
        for name in ("timm.layers", "timm.models"):
            for entry in pkgutil.iter_modules(importlib.import_module(name).__path__, name + "."):
                for cls in _classes(importlib.import_module(entry.name)):
                    yield f"{entry.name}.{cls.__name__}", _of_sizes(cls)
    except (ImportError, RuntimeError) as error:
        print("without timm:", error)


def _is_config(kind: type, name: str) -> bool:
    from transformers import PreTrainedConfig

    return issubclass(kind, PreTrainedConfig) and kind.__module__.split(".")[-2] == name.split(".")[-2]


def _classes(module: object) -> list[type[nn.Module]]:
    found = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if issubclass(cls, nn.Module)]
    own = [cls for cls in found if cls.__module__ == getattr(module, "__name__", "")]
    return [cls for cls in own if any(word in cls.__name__.lower() for word in WORDS)]


def _of_config(cls: type[nn.Module], kind: type) -> Make:
    def make(**more: object) -> nn.Module:
        config = tiny(kind)
        parameters = inspect.signature(cls.__init__).parameters
        return cls(config, **({"layer_idx": 0} if "layer_idx" in parameters else {}))

    return make


def _of_sizes(cls: type[nn.Module]) -> list[Make]:
    """The sizes that a signature asks for by name."""
    known = {"dim": WIDTH, "in_features": WIDTH, "hidden_features": 48, "num_heads": 4, "hidden_size": WIDTH}
    known |= {"intermediate_size": 48, "embed_dim": WIDTH, "d_model": WIDTH, "in_dim": WIDTH, "out_dim": WIDTH}
    asked = list(inspect.signature(cls.__init__).parameters.values())[1:]
    given = {each.name: known[each.name] for each in asked if each.name in known and each.default is each.empty}
    more = {"hidden_features": 48} if any(each.name == "hidden_features" for each in asked) else {}
    return [lambda: cls(**{**given, **more}), lambda: cls(**given)]


def built(makes: list[Make], h: Tensor) -> Residual | None:
    """The model of the first way that makes a branch."""
    for make in makes:
        try:
            torch.manual_seed(0)
            model = Residual([make(), make()]).double().eval().requires_grad_(False)
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.1))
            made = model(h)
            if made.isfinite().all() and torch.equal(made, model(h)):
                return model
        except Exception:  # whatever it is, this is no way to build it
            continue
    return None


def check(model: Residual, h: Tensor) -> list[str]:
    """What is wrong, in words."""
    wrong: list[str] = []
    plain, first = model(h), h + model.added(0, h)
    names: list[str] = []

    def explain() -> None:
        names.extend(branch.name for branch in fxfuse.explain(model, h).branches)

    wrong += tried("explain", explain, model, h)
    whole = names == ["blocks.0", "blocks.1"]
    plans: dict[str, tuple[dict[str, object], Tensor | None]] = {"no plan": ({}, plain)}
    plans["merge_gate_up"] = ({"merge_gate_up": True}, plain)
    if len(names) > 1:
        dropped = h + model.added(1, h) if whole else None
        plans["drop"] = ({"plan": Plan(drop=names[:1])}, dropped)
        side = first + model.added(1, h) if whole else None
        plans["parallel"] = ({"plan": Plan(parallel=[names[:2]]), "merge_gate_up": True}, side)
    for name, (options, expected) in plans.items():

        def run(options: dict[str, object] = options, expected: Tensor | None = expected) -> None:
            torch._dynamo.reset()
            made = torch.compile(model, backend="ffnfuse", options={"inner": "eager", **options})(h)
            if expected is not None:
                scale = max(1.0, float(expected.abs().max()))
                torch.testing.assert_close(made, expected, rtol=1e-8, atol=1e-8 * scale)

        wrong += tried(name, run, model, h)
    return wrong


def tried(what: str, run: Callable[[], None], model: Residual, h: Tensor) -> list[str]:
    """A line if ``run`` fails with what is no error of fxfuse's, where torch itself can compile the model."""
    try:
        run()
    except Exception as error:
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or getattr(chain[-1], "inner_exception", None)) and cause not in chain:
            chain.append(cause)
        if any(isinstance(each, FxfuseError) for each in chain) or "fxfuse" in type(error).__module__:
            return []
        torch._dynamo.reset()
        try:
            torch.compile(model, backend="eager")(h)
        except Exception:  # not ours
            return []
        where = traceback.extract_tb(chain[-1].__traceback__)[-1]
        place = f"{where.filename.split('/')[-1]}:{where.lineno}"
        return [f"{what}: {type(chain[-1]).__name__}: {str(chain[-1]).splitlines()[0][:150]} ({place})"]
    return []


@torch.no_grad()
def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the name")
    parser.add_argument("--step", type=int, default=1, help="every so manyth class")
    parser.add_argument("--start", type=int, default=0, help="the first one")
    chosen = parser.parse_args(words)
    warnings.simplefilter("ignore")
    h = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts: Counter[str] = Counter()
    found = [(name, makes) for name, makes in cases() if chosen.only in name]
    for name, makes in found[chosen.start :: chosen.step]:
        model = built(makes, h)
        if model is None:
            counts["not a branch"] += 1
            continue
        counts["cases"] += 1
        for line in check(model, h):
            counts["wrong"] += 1
            print(f"{name}  {line}", flush=True)
        if counts["cases"] % 25 == 0:
            print(dict(counts), flush=True)
    print(f"{counts['cases']} classes as branches, {counts['wrong']} wrong; {counts['not a branch']} others are none")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
