"""Attentions that are one linear map: what is left of their modules, and what the model computes then."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM

import fxfuse
from fxfuse import FxfuseError, Plan, PlanError
from fxfuse.data.batches import cache_of
from fxfuse.errors import PruneError
from fxfuse.model.stand_ins import Dropped, MadeLinear
from tests.model.test_pruning import greedy, in_steps, logits
from tests.models.blocks import WIDTH, Attention, Stream, SwiGLU, ready
from tests.models.checks import assert_exact
from tests.models.tiny import Counter, llama, redraw, tokens, vectors

IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50, **IDS}


def gpt2(**config: Any) -> Any:
    """Packed queries, keys and values by ``Conv1D``; a dropout after its output projection."""
    sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 64}
    return _ready(GPT2LMHeadModel(GPT2Config(**sizes, **IDS, **config)))


def opt() -> Any:
    """Biases everywhere."""
    more: dict[str, Any] = {"ffn_dim": 40, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    return _ready(OPTForCausalLM(OPTConfig(**SIZES, **more)))


def qwen3() -> Any:
    """Heads of 64 features together on a stream of 32."""
    more: dict[str, Any] = {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 16}
    return _ready(Qwen3ForCausalLM(Qwen3Config(**SIZES, **more, max_position_embeddings=64)))


def _ready(model: Any) -> Any:
    model = model.double().eval()
    redraw(model)
    return model


def names_of(model: nn.Module, *layers: int) -> list[str]:
    """The attentions of those layers."""
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in ("self_attn", "attn")]
    return [found[layer] for layer in layers]


OUTPUT = ("o_proj", "c_proj", "out_proj")
Map = Callable[[nn.Module, Tensor], Tensor]


def its_own(module: nn.Module, x: Tensor) -> Tensor:
    """The output projection of an attention, of ``x``."""
    (projection,) = [getattr(module, name) for name in OUTPUT if hasattr(module, name)]
    return projection(x)


def linearised(model: Any, names: Sequence[str], mapped: Map = its_own) -> Any:
    """A copy in which those attentions run, write their cache, and contribute ``mapped`` of their input."""

    def instead(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return (mapped(module, args[0] if args else kwargs["hidden_states"]), *output[1:])

    made = copy.deepcopy(model)
    for name in names:
        made.get_submodule(name).register_forward_hook(instead, with_kwargs=True)
    return made


def three() -> Any:
    return llama(3)


every_model = pytest.mark.parametrize("make", [three, gpt2, opt])
some_layers = pytest.mark.parametrize("layers", [(1,), (0, 2)])


class TestWhatItComputes:
    @every_model
    @some_layers
    def test_it_is_the_model_whose_attentions_are_their_output_projections(
        self, make: Callable[[], Any], layers: tuple[int, ...]
    ) -> None:
        model, ids = make(), tokens(2, 9)
        names = names_of(model, *layers)
        reference = linearised(model, names)
        assert (logits(reference, ids) - logits(model, ids)).abs().max() > 1e-2

        assert fxfuse.prune(model, Plan(linear=names)) is model

        assert_exact([logits(model, ids)], [logits(reference, ids)])
        assert_exact(in_steps(model, ids, 4, 1, 4), in_steps(reference, ids, 4, 1, 4))
        found, expected = (greedy(each, ids, count=5) for each in (model, reference))
        assert torch.equal(found[0], expected[0])
        assert_exact(found[1], expected[1])

    @every_model
    def test_the_graph_computes_the_same_without_pruning(self, make: Callable[[], Any]) -> None:
        model, ids, counter = make(), tokens(2, 9), Counter()
        names = names_of(model, 0, 2)
        options: Any = {"plan": Plan(linear=names), "inner": counter, "strict": True}
        compiled = torch.compile(model, backend="ffnfuse", options=options)

        assert_exact([logits(compiled, ids, use_cache=False)], [logits(linearised(model, names), ids)])
        (gm,) = counter.graphs
        assert sum("scaled_dot" in str(node.target) for node in gm.graph.nodes) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_under_an_applied_plan_generate_finds_the_tokens_of_the_reference(self, kind: str) -> None:
        model, ids, counter = three(), tokens(2, 7), Counter()
        names = names_of(model, 0, 1)
        reference = linearised(model, names)
        fxfuse.apply(model, Plan(linear=names), inner=counter, strict=True)
        found, expected = (greedy(each, ids, cache_implementation=kind, count=4) for each in (model, reference))

        assert torch.equal(found[0], expected[0])
        assert_exact(found[1], expected[1])
        assert len(counter) > 0

    def test_a_map_in_a_group_reads_the_stream_where_the_group_stands(self) -> None:
        model, ids = three(), tokens(2, 9)
        first, attn, mlp = model.model.layers[0], model.model.layers[1].self_attn, model.model.layers[1].mlp
        second = model.model.layers[1]
        plan = Plan(linear=names_of(model, 1), parallel=[["model.layers.0.mlp", *names_of(model, 1)]])
        made = copy.deepcopy(model)

        def layers(h: Tensor, **kwargs: Any) -> Tensor:
            h = h + first.self_attn(first.input_layernorm(h), **kwargs)[0]
            h = h + first.mlp(first.post_attention_layernorm(h)) + attn.o_proj(second.input_layernorm(h))
            return h + mlp(second.post_attention_layernorm(h))

        made.model.layers = nn.ModuleList([_Layers(layers), model.model.layers[2]])
        expected = logits(made, ids, use_cache=False)
        fxfuse.apply(model, plan, inner="eager", strict=True)

        assert_exact([logits(model, ids, use_cache=False)], [expected])
        assert_exact([logits(copy.deepcopy(model), ids, use_cache=False)], [expected])

    def test_what_follows_the_output_projection_is_left_in_training_too(self) -> None:
        model, ids = gpt2(attn_pdrop=0.0, resid_pdrop=0.4), tokens(2, 9)
        (name,) = names_of(model, 1)
        reference = copy.deepcopy(model)
        attn = reference.get_submodule(name)
        attn.forward = lambda x, **_: (attn.resid_dropout(attn.c_proj(x)), None)
        fxfuse.prune(model, Plan(linear=[name]))
        found = []
        for each in (model, reference):
            torch.manual_seed(5)
            found.append(logits(each.train(), ids, use_cache=False))

        assert_exact(found[:1], found[1:])
        assert (found[0] - logits(model.eval(), ids)).abs().max() > 1e-2

    def test_gradients_are_those_of_the_reference(self) -> None:
        model, ids = three(), tokens(2, 6)
        names = names_of(model, 0, 2)
        reference = linearised(model, names)
        fxfuse.prune(model, Plan(linear=names))
        for each in (model, reference):
            each(ids, labels=ids, use_cache=False).loss.backward()

        wanted = {name: each.grad for name, each in reference.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:
                assert wanted[name] is None, name
            else:
                assert_exact([parameter.grad], [wanted[name]])


class _Layers(nn.Module):
    """Several decoder layers as one."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, h: Tensor, **kwargs: Any) -> Tensor:
        return self.run(h, **kwargs)


class TestWhatIsLeft:
    @every_model
    def test_only_the_output_projection_stays_under_its_own_name(self, make: Callable[[], Any]) -> None:
        model = make()
        (name,) = names_of(model, 1)
        before = dict(model.named_parameters())
        fxfuse.prune(model, Plan(linear=[name]))

        after = dict(model.named_parameters())
        left = {own.removeprefix(f"{name}.").partition(".")[0] for own in after if own.startswith(f"{name}.")}
        assert len(left) == 1
        assert left < set(OUTPUT)
        assert [own for own in before if own not in after] == [
            own for own in before if own.startswith(f"{name}.") and not own.startswith(f"{name}.{min(left)}.")
        ]
        assert all(after[own] is before[own] for own in after)
        assert isinstance(model.get_submodule(name), MadeLinear)

    def test_its_cache_is_never_made_but_that_of_the_first_which_counts(self) -> None:
        model = three()
        fxfuse.prune(model, Plan(linear=names_of(model, 0, 1)))
        cache: Any = cache_of(model(tokens(1, 9), use_cache=True))

        assert [layer.get_seq_length() for layer in cache.layers] == [9, 0, 9]
        assert [layer.is_initialized for layer in cache.layers] == [True, False, True]

    def test_a_pruned_model_can_be_copied_and_pickled(self) -> None:
        model, file = three(), io.BytesIO()
        fxfuse.prune(model, Plan(linear=names_of(model, 0, 2)))
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)

        for made in (copy.deepcopy(model), loaded):
            assert_exact(in_steps(made, tokens(1, 9), 5, 3, 1), in_steps(model, tokens(1, 9), 5, 3, 1))

    def test_the_same_plan_again_changes_nothing(self) -> None:
        model, ids = three(), tokens(2, 9)
        plan = Plan(linear=names_of(model, 0, 1), parallel=[["model.layers.0.mlp", *names_of(model, 1)]])
        fxfuse.apply(model, plan, inner="eager", strict=True)
        modules, expected = dict(model.named_modules()), logits(model, ids, use_cache=False)
        fxfuse.apply(model, plan, inner="eager", strict=True)

        assert dict(model.named_modules()) == modules
        assert_exact([logits(model, ids, use_cache=False)], [expected])

    def test_a_map_can_be_dropped_later_and_nothing_dropped_becomes_one(self) -> None:
        model, ids = three(), tokens(2, 9)
        names = names_of(model, 0, 1)
        reference = linearised(model, names, lambda _, x: torch.zeros_like(x))
        fxfuse.prune(model, Plan(linear=names))
        fxfuse.prune(model, Plan(drop=names))

        assert isinstance(model.get_submodule(names[1]), Dropped)
        assert_exact(in_steps(model, ids, 5, 4), in_steps(reference, ids, 5, 4))
        for name in names:
            with pytest.raises(PruneError, match=f"{name!r} was dropped from this model"):
                fxfuse.prune(model, Plan(linear=[name]))
            options: Any = {"plan": Plan(linear=[name]), "inner": "eager", "strict": True}
            with pytest.raises(Exception, match=f"{name!r} is no branch of this graph"):
                torch.compile(model, backend="ffnfuse", options=options)(ids)


class TestAMapOfItsOwn:
    """The output projection reads more features than the stream has."""

    def test_it_contributes_nothing_until_it_is_given_weights(self) -> None:
        model, ids = qwen3(), tokens(2, 9)
        names = names_of(model, 0, 1)
        silent = linearised(model, names, lambda _, x: torch.zeros_like(x))
        weight = vectors(32, 32)
        fitted = linearised(model, names, lambda _, x: F.linear(x, weight))
        fxfuse.apply(model, Plan(linear=names), inner="eager", strict=True)

        assert_exact(in_steps(model, ids, 5, 4), in_steps(silent, ids, 5, 4))
        with torch.no_grad():
            for name in names:
                model.get_submodule(f"{name}.linear").weight.copy_(weight)
        assert_exact(in_steps(model, ids, 5, 4), in_steps(fitted, ids, 5, 4))
        found, expected = (greedy(each, ids, count=4) for each in (model, fitted))
        assert torch.equal(found[0], expected[0])

    def test_it_is_the_only_weight_left_and_a_checkpoint_holds_it(self) -> None:
        model, ids = qwen3(), tokens(2, 9)
        (name,) = names_of(model, 1)
        again = copy.deepcopy(model)
        fxfuse.prune(model, Plan(linear=[name]))
        model.get_submodule(f"{name}.linear").weight.data.normal_()
        keys = [key for key in model.state_dict() if key.startswith(f"{name}.")]
        assert keys == [f"{name}.linear.weight"]

        fxfuse.prune(again, Plan(linear=[name])).load_state_dict(model.state_dict())

        assert_exact([logits(again, ids)], [logits(model, ids)])

    def test_its_dtype_is_the_projections(self) -> None:
        model = qwen3().to(torch.bfloat16)
        (name,) = names_of(model, 2)
        fxfuse.prune(model, Plan(linear=[name]))

        weight = model.get_submodule(f"{name}.linear").weight
        assert (weight.dtype, tuple(weight.shape), weight.requires_grad) == (torch.bfloat16, (32, 32), True)

    def test_without_a_module_in_its_place_the_graph_is_refused_and_both_sizes_told(self) -> None:
        model, ids = qwen3(), tokens(2, 9)
        names = names_of(model, 1)
        for run in (
            lambda: fxfuse.explain(model, ids, plan=Plan(linear=names)),
            lambda: fxfuse.record(model, [{"input_ids": ids, "use_cache": False}], Plan(linear=names)),
        ):
            with pytest.raises(FxfuseError, match=r"reads 64 features, and its input has 32\. fxfuse\.prune"):
                run()


class NormInside(Attention):
    """Norms its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Raw(Attention):
    """Has its output projection's weight to itself, and no module for it."""

    def __init__(self) -> None:
        super().__init__()
        del self.o
        self.out = nn.Parameter(torch.empty(WIDTH, WIDTH))

    def o(self, x: Tensor) -> Tensor:
        return x @ self.out


class Doubled(Attention):
    """Multiplies what its output projection returns, in no module."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Holder(nn.Module):
    """Holds its output projection in a module that does more, as BERT's does."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout, self.after = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.dropout(self.dense(x)))


class Held(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.o = Holder()


class TestHomeMadeModels:
    def test_all_modules_after_the_projection_stay_under_their_names(self) -> None:
        model, x = ready(Stream(Held(), SwiGLU())), vectors()
        assert isinstance(model, Stream)
        h = model.start(x)
        h = h + model.layers[0].body.o(model.layers[0].norm(h))
        expected = h + model.branch(1, h)

        fxfuse.prune(model, Plan(linear=["layers.0.body"]), x)

        assert_exact([model(x)], [expected])
        assert [name for name, _ in model.layers[0].body.named_parameters()] == [
            "o.dense.weight", "o.dense.bias", "o.after.weight", "o.after.bias",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("attention", "name", "error", "words"),
        [
            (
                NormInside,
                "layers.0.body",
                PruneError,
                "layers.0.body made linear is not the model with a linear map",
            ),
            (Raw, "layers.0.body", FxfuseError, "its output projection is in 'layers.0.body'"),
            (Doubled, "layers.0.body", PruneError, "'o.*is no module that is called, or more than modules follow it"),
            (Attention, "layers.1.body", PlanError, "'layers.1.body' is no attention but of kind gated_ffn: linear is"),
            (Attention, "layers.0", PlanError, "'layers.0' is no branch of the model's stream; nearest: layers.0.body"),
            (Attention, "layers.7.body", PruneError, "'layers.7.body' is no module of this model"),
        ],
    )
    def test_what_cannot_be_replaced_is_an_error_and_the_model_is_as_it_was(
        self, attention: Callable[[], nn.Module], name: str, error: type[Exception], words: str
    ) -> None:
        model, x = ready(Stream(attention(), SwiGLU())), vectors()
        modules, expected = dict(model.named_modules()), model(x)

        with pytest.raises(error, match=words):
            fxfuse.prune(model, Plan(linear=[name]), x)

        assert dict(model.named_modules()) == modules
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
        assert torch.equal(model(x), expected)
