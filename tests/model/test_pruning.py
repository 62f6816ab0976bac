from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MBartConfig, MBartForConditionalGeneration

import fxfuse
from fxfuse import FxfuseError, Plan, PlanError
from fxfuse.data.batches import cache_keyword, cache_of
from fxfuse.errors import PruneError
from fxfuse.model.stand_ins import Dropped
from tests.models.checks import assert_exact
from tests.models.tiny import Tower, gemma3, llama, planned, redraw, tokens, vectors


def attentions(*layers: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn" for layer in layers]


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def greedy(model: Any, ids: Tensor, count: int = 10, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    """The tokens that ``generate`` finds, and the logits that it found them by."""
    out = model.generate(
        ids, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True, **kwargs
    )
    return out.sequences, list(out.logits)


def in_steps(model: Any, ids: Tensor, *lengths: int) -> list[Tensor]:
    """The logits of the tokens cut into pieces, each continuing with the cache that the one before returned."""
    cache, found = None, []
    with torch.no_grad():
        for piece in ids.split(lengths, 1):
            out = model(piece, use_cache=True, **{cache_keyword(model): cache})
            cache = cache_of(out)
            found.append(out.logits)
    return found


Make = Callable[[], Any]


def windowed() -> Any:
    """Layers 0, 1 and 3 have a sliding window, layer 2 has none."""
    return gemma3(4, window=5)


CASES: list[tuple[Make, tuple[int, ...]]] = [
    (llama, (1, 2)),
    (llama, (0,)),
    (llama, (0, 1, 2, 3)),
    (windowed, (0,)),
    (windowed, (2,)),
    (windowed, (0, 1, 2)),
]


@cache
def pair(make: Make, dropped: tuple[int, ...]) -> tuple[Any, Any]:
    """A pruned model and its reference; no test may change them."""
    model = make()
    reference = planned(model, drop=attentions(*dropped))
    return fxfuse.prune(model, Plan(drop=attentions(*dropped))), reference


class TestWhatIsLeft:
    @pytest.mark.parametrize("dropped", [(2,), (1, 3)])
    def test_the_weights_of_a_dropped_attention_leave_and_all_other_names_stay(self, dropped: tuple[int, ...]) -> None:
        model = llama()
        before = dict(model.named_parameters())
        gone = {name for name in before if name.startswith(tuple(f"{each}." for each in attentions(*dropped)))}
        assert fxfuse.prune(model, Plan(drop=attentions(*dropped))) is model

        after = dict(model.named_parameters())
        assert list(after) == [name for name in before if name not in gone]
        assert all(after[name] is before[name] for name in after)
        assert len(gone) == 4 * len(dropped)
        assert list(model.state_dict()) == list(after)

    def test_its_cache_is_never_made(self) -> None:
        model, _ = pair(llama, (1, 2))
        cache: Any = cache_of(model(tokens(1, 9), use_cache=True))

        assert [layer.get_seq_length() for layer in cache.layers] == [9, 0, 0, 9]
        assert [layer.is_initialized for layer in cache.layers] == [True, False, False, True]

    def test_the_first_attention_keeps_its_weights_its_names_and_its_cache(self) -> None:
        model = llama()
        before = dict(model.named_parameters())
        fxfuse.prune(model, Plan(drop=attentions(0)))
        cache: Any = cache_of(model(tokens(1, 9), use_cache=True))

        assert list(model.state_dict()) == list(before)
        assert all(each is before[name] for name, each in model.named_parameters())
        assert [layer.get_seq_length() for layer in cache.layers] == [9, 9, 9, 9]

    def test_the_first_of_each_kind_of_cache_is_kept_counting(self) -> None:
        model, _ = pair(windowed, (0, 1, 2))

        kept = [index for index, layer in enumerate(model.model.layers) if not isinstance(layer.self_attn, Dropped)]
        assert kept == [0, 2, 3]

    def test_a_dropped_ffn_leaves_too(self) -> None:
        model, x = llama(), tokens()
        reference = planned(model, drop=["model.layers.0.mlp", "model.layers.3.mlp"])
        fxfuse.prune(model, Plan(drop=["model.layers.0.mlp", "model.layers.3.mlp"]))

        assert not [name for name in model.state_dict() if "layers.0.mlp" in name or "layers.3.mlp" in name]
        assert_exact([logits(model, x)], [logits(reference, x)])

    def test_the_attributes_that_the_model_asks_for_stay(self) -> None:
        original = llama().model.layers[2].self_attn
        left = pair(llama, (1, 2))[0].model.layers[2].self_attn

        config = {key: value for key, value in left.config.to_dict().items() if key != "fxfuse"}  # the plan stays there
        assert (left.layer_idx, config, left.head_dim) == (2, original.config.to_dict(), 8)
        assert left.training == original.training

    def test_a_pruned_model_can_be_pruned_again(self) -> None:
        model, x = llama(), tokens()
        reference = planned(model, drop=attentions(0, 1, 3))
        for dropped in ((0, 1), (0, 1), (0, 1, 3), ()):
            fxfuse.prune(model, Plan(drop=attentions(*dropped)))

        assert_exact([logits(model, x)], [logits(reference, x)])

    def test_a_pruned_model_can_be_copied(self) -> None:
        model, x = fxfuse.prune(llama(3), Plan(drop=attentions(0, 2))), tokens()
        made = copy.deepcopy(model)

        assert_exact([logits(made, x)], [logits(model, x)])
        assert_exact(in_steps(made, tokens(1, 9), 5, 3, 1), in_steps(model, tokens(1, 9), 5, 3, 1))

    def test_a_pruned_model_can_be_pickled(self) -> None:
        model, file = fxfuse.prune(llama(3), Plan(drop=attentions(0, 2))), io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)

        assert_exact(in_steps(made, tokens(1, 9), 5, 3, 1), in_steps(model, tokens(1, 9), 5, 3, 1))


class TestInTraining:
    def test_a_model_with_dropout_is_pruned_as_in_eval_mode(self) -> None:
        model = llama(3, attention_dropout=0.5).train()
        model.model.layers[0].eval()
        reference = planned(model, drop=attentions(0, 1))
        modes = {name: module.training for name, module in model.named_modules()}
        state = torch.get_rng_state()
        fxfuse.prune(model, Plan(drop=attentions(0, 1)))

        assert isinstance(model.model.layers[1].self_attn, Dropped)
        assert all(module.training == modes[name] for name, module in model.named_modules())
        assert torch.equal(torch.get_rng_state(), state)
        assert_exact([logits(model.eval(), tokens())], [logits(reference.eval(), tokens())])

    def test_a_model_that_cannot_be_pruned_stays_in_training(self) -> None:
        model = Biased().train()
        with pytest.raises(PruneError, match="differ"):
            fxfuse.prune(model, Plan(drop=["layers.1.mlp"]), vectors())

        assert all(module.training for module in model.modules())


class TestWhatItComputes:
    @pytest.mark.parametrize(("make", "dropped"), CASES)
    def test_the_outputs_of_one_call_are_those_of_the_reference(self, make: Make, dropped: tuple[int, ...]) -> None:
        model, reference = pair(make, dropped)
        ids = tokens(2, 14)

        assert_exact([logits(model, ids, use_cache=False)], [logits(reference, ids, use_cache=False)])

    @pytest.mark.parametrize(("make", "dropped"), CASES)
    def test_so_are_those_of_calls_that_continue_with_the_cache(self, make: Make, dropped: tuple[int, ...]) -> None:
        model, reference = pair(make, dropped)
        ids = tokens(2, 14)

        assert_exact(in_steps(model, ids, 4, 7, 1, 2), in_steps(reference, ids, 4, 7, 1, 2))

    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    @pytest.mark.parametrize(("make", "dropped"), CASES)
    def test_generate_finds_the_tokens_of_the_reference(self, make: Make, dropped: tuple[int, ...], kind: str) -> None:
        model, reference = pair(make, dropped)
        ids = tokens(2, 7)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        found, expected = (
            greedy(each, ids, attention_mask=mask, cache_implementation=kind) for each in (model, reference)
        )

        assert torch.equal(found[0], expected[0])
        assert_exact(found[1], expected[1])

    @pytest.mark.parametrize("how", ["example", "config"])
    def test_an_example_call_without_a_cache_does_not_cost_the_first_attention_its_counter(self, how: str) -> None:
        model, ids = llama(3), tokens(1, 9)
        reference = planned(model, drop=attentions(0))
        if how == "config":
            model.config.use_cache = False
            fxfuse.prune(model, Plan(drop=attentions(0)))
        else:
            fxfuse.prune(model, Plan(drop=attentions(0)), input_ids=ids, use_cache=False)

        assert_exact(in_steps(model, ids, 5, 4), in_steps(reference, ids, 5, 4))

    def test_beams_find_the_tokens_of_the_reference(self) -> None:
        model, reference = pair(llama, (0,))
        ids = tokens(2, 6)
        options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}

        assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))

    def test_gradients_are_those_of_the_reference(self) -> None:
        model, ids = llama(3), tokens(2, 6)
        reference = planned(model, drop=attentions(0, 2))
        fxfuse.prune(model, Plan(drop=attentions(0, 2)))
        for each in (model, reference):
            each(ids, labels=ids, use_cache=False).loss.backward()

        wanted = {name.replace(".layer.", "."): each.grad for name, each in reference.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.grad is None:  # it contributes nothing, and the reference does not know that
                assert wanted[name] is None, name
            else:
                assert_exact([parameter.grad], [wanted[name]])


def silenced(model: nn.Module, name: str) -> Any:
    """A copy of ``model`` in which a module runs, writes its cache, and has zeros in place of its contribution."""

    def silence(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    made = copy.deepcopy(model)
    made.get_submodule(name).register_forward_hook(silence)
    return made


class TestEncoderAndDecoder:
    """A cache that holds two: that of the decoder's own tokens, which carries their number, and the encoder's."""

    @pytest.mark.parametrize(
        ("name", "stays"), [("0.self_attn", True), ("1.self_attn", False), ("0.encoder_attn", True)]
    )
    def test_calls_that_continue_with_the_cache_are_those_of_the_reference(self, name: str, stays: bool) -> None:
        sizes: dict[str, Any] = {f"{side}_{what}": n for side in ("encoder", "decoder")
                                 for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 40))}  # fmt: skip
        model: Any = MBartForConditionalGeneration(MBartConfig(vocab_size=50, d_model=32, **sizes)).double().eval()
        redraw(model)
        name, ids, said = f"model.decoder.layers.{name}", tokens(2, 5), tokens(2, 6, seed=3)
        reference = silenced(model, name)
        fxfuse.prune(model, Plan(drop=[name]), input_ids=ids, decoder_input_ids=said)
        found: list[list[Tensor]] = []
        for each in (model, reference):
            with torch.no_grad():
                first = each(ids, decoder_input_ids=said[:, :4], use_cache=True)
                second = each(ids, decoder_input_ids=said[:, 4:], **{cache_keyword(each): cache_of(first)})
            found.append([first.logits, second.logits])

        assert_exact(found[0], found[1], tolerance=1e-10)
        assert isinstance(model.get_submodule(name), Dropped) != stays


class Count:
    """A cache that can tell the length of the sequence, and is laid out like no other."""

    def __init__(self) -> None:
        self.tokens = 0

    def get_seq_length(self) -> int:
        return self.tokens


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()

    def forward(self, h: Tensor, cache: Count) -> Tensor:
        cache.tokens += h.shape[1]
        return self.down(self.up(h))


class Positions(Tower):
    """Adds to each token its position, which the cache knows from an attention."""

    def __init__(self) -> None:
        super().__init__(2)
        self.attn = Attention()

    def forward(self, x: Tensor, cache: Count | None = None) -> tuple[Tensor, Count]:
        cache = Count() if cache is None else cache
        x = x + torch.arange(cache.get_seq_length(), cache.get_seq_length() + x.shape[1])[:, None]
        return super().forward(x + self.attn(x, cache)), cache


class TestAnUnknownCache:
    def test_what_may_carry_the_length_goes_on_counting(self) -> None:
        model, x = Positions(), vectors()
        reference = silenced(model, "attn")
        fxfuse.prune(model, Plan(drop=["attn"]), x)

        found, expected = ([first, each(x, cache)[0]] for each in (model, reference) for first, cache in [each(x)])
        assert_exact(found, expected)


class Twice(nn.Module):
    """Calls one module twice in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = Tower(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(self.tower(x))


class Biased(Tower):
    """Norms what its FFNs contribute, with a bias: zeros in place of an FFN leave the bias behind."""

    def __init__(self) -> None:
        super().__init__(2)
        self.after = nn.ModuleList(nn.LayerNorm(8) for _ in range(2)).double()
        redraw(self)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.after, strict=True):
            x = x + norm(layer.mlp(layer.norm(x)))
        return x


class Wider(nn.Module):
    """Has a module whose output is none of its inputs' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Says(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "nothing"


class Silent(Tower):
    """Has a module that returns no tensor."""

    def __init__(self) -> None:
        super().__init__(2)
        self.says = Says()

    def forward(self, x: Tensor) -> Tensor:
        self.says(x)
        return super().forward(x)


class Unused(Tower):
    """Has a module that no call calls."""

    def __init__(self) -> None:
        super().__init__(2)
        self.spare = nn.Linear(8, 8)


class TestErrors:
    @pytest.mark.parametrize(
        ("model", "name", "words"),
        [
            (Tower(2), "layers.1.mpl", "'layers.1.mpl' is no module of this model.*nearest: layers.1.mlp"),
            (Twice(), "tower.layers.0.mlp", "'tower.layers.0.mlp' was called 2 times"),
            (Unused(), "spare", "'spare' was called 0 times"),
            (Biased(), "layers.1.mlp", "layers.1.mlp is not the model with zeros in its place: its outputs differ"),
            (Wider(), "up", r"'up' returns \(2, 3, 12\), which is the shape of none of its inputs"),
            (Silent(), "says", "'says' returns no tensor"),
        ],
    )
    def test_an_error_names_the_module_and_the_model_is_as_it_was(
        self, model: nn.Module, name: str, words: str
    ) -> None:
        x = vectors()
        modules, expected = dict(model.named_modules()), model(x)

        with pytest.raises(PruneError, match=words):
            fxfuse.prune(model, Plan(drop=[name]), x)

        assert dict(model.named_modules()) == modules
        assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
        assert torch.equal(model(x), expected)

    def test_one_bad_name_among_good_ones_changes_nothing(self) -> None:
        model, x = Tower(3), vectors()
        with pytest.raises(PruneError, match="layers.9.mlp"):
            fxfuse.prune(model, Plan(drop=["layers.1.mlp", "layers.9.mlp"]), x)

        assert not [module for module in model.modules() if isinstance(module, Dropped)]

    def test_a_branch_that_is_part_of_one_is_an_error(self) -> None:
        model, x = Tower(2), vectors()
        with pytest.raises(FxfuseError, match="layers.1.mlp"):
            fxfuse.prune(model, Plan(drop=["layers.1.mlp.down"]), torch.randn(2, 3, 8, dtype=torch.float64))
        assert torch.equal(model(x), Tower(2)(x))

    def test_a_module_that_is_no_branch_is_a_plan_error_and_the_model_is_as_it_was(self) -> None:
        model, x = Tower(3), vectors()
        modules, expected = dict(model.named_modules()), model(x)
        with pytest.raises(PlanError, match=r"'layers\.1' is no branch of this graph.*nearest: layers\.1\.mlp"):
            fxfuse.prune(model, Plan(drop=["layers.1"]), x)

        assert dict(model.named_modules()) == modules
        assert torch.equal(model(x), expected)

    def test_without_an_example_call_it_asks_for_one(self) -> None:
        with pytest.raises(PruneError, match="one example call is needed"):
            fxfuse.prune(Tower(2), Plan(drop=["layers.1.mlp"]))

    def test_with_nothing_to_drop_none_is_needed(self) -> None:
        model = Tower(2)

        assert fxfuse.prune(model, Plan(parallel=[model.mlps])) is model


class TestOtherModels:
    def test_any_module_with_an_example_call(self) -> None:
        model, x = Tower(3), vectors()
        first, _, third = model.layers
        fxfuse.prune(model, Plan(drop=["layers.1.mlp"]), x=x)

        assert torch.equal(model(x), third(first(x)))
        assert torch.equal(model(vectors(1, 1, 8)), third(first(vectors(1, 1, 8))))

    def test_a_module_whose_forward_was_wrapped(self) -> None:
        model, x = Tower(3), vectors()
        first, second, third = model.layers
        forward = second.mlp.forward
        second.mlp.forward = lambda *args: forward(*args)  # as accelerate does to models on several devices
        fxfuse.prune(model, Plan(drop=["layers.1.mlp"]), x)

        assert torch.equal(model(x), third(first(x)))

    def test_a_module_whose_forward_is_called_by_name(self) -> None:
        class ByName(Tower):
            """As llama2.c and mistral-inference call their layers' parts."""

            def forward(self, x: Tensor) -> Tensor:
                for layer in self.layers:
                    x = x + layer.mlp.forward(layer.norm.forward(x))
                return x

        model, x = ByName(3), vectors()
        first, _, third = model.layers
        fxfuse.prune(model, Plan(drop=["layers.1.mlp"]), x)

        assert torch.equal(model(x), third(first(x)))

    def test_a_compiled_model_stays_compiled(self) -> None:
        model, x = Tower(3), vectors()
        first, _, third = model.layers
        model.compile(backend="eager")
        model(x)
        before = model._compiled_call_impl
        fxfuse.prune(model, Plan(drop=["layers.1.mlp"]), x)

        assert model._compiled_call_impl is before
        assert torch.equal(model(x), third(first(x)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        model, ids = llama(3, dtype=dtype), tokens()
        reference = planned(model, drop=attentions(0, 2))
        fxfuse.prune(model, Plan(drop=attentions(0, 2)))

        assert torch.equal(logits(model, ids), logits(reference, ids))


def test_any_number_of_models_of_a_class_can_be_pruned_in_a_process() -> None:
    """Dynamo compiles the forward of a class a few times, and then no more: a search prunes many copies of a model."""
    plan, models = Plan(linear=attentions(0)), [llama(2) for _ in range(5)]
    fxfuse.prune(models[0], plan)  # the backend is set up now
    with torch._dynamo.config.patch(recompile_limit=2):
        for model in models[1:]:
            fxfuse.prune(model, plan)


def test_where_torch_compile_is_switched_off_the_message_says_so() -> None:
    model = llama(2)

    # Not monkeypatch: pytest 9.2 deletes what is not in an object's __dict__, and a config deleted is gone for good.
    with torch._dynamo.config.patch(disable=True), pytest.raises(PruneError, match="TORCH_COMPILE_DISABLE"):
        fxfuse.prune(model, fxfuse.Plan(drop=["model.layers.1.self_attn"]))
