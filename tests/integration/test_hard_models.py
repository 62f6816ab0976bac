"""Where a graph compiler is likely to break: what happens there, each time against the model's own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse import Plan
from fxfuse._torch import dynamo
from fxfuse.errors import PlanError
from tests.models.checks import assert_exact
from tests.models.tiny import Layer, Tower, llama, planned, redraw, tokens, vectors
from tests.zoo.anatomy import dissect
from tests.zoo.reference import in_parallel

DROP = ["model.layers.1.self_attn", "model.layers.2.self_attn"]
GROUP = ["model.layers.0.mlp", "model.layers.1.mlp", "model.layers.2.mlp"]
PLAN = Plan(drop=DROP, parallel=[GROUP])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def compiled(model: nn.Module, plan: Plan, inner: Any = "eager") -> Callable[..., Any]:
    return torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": inner}, dynamic=False)


def logits(model: Callable[..., Any], ids: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits


def is_wide(model: nn.Module, plan: Plan, *args: Any, **kwargs: Any) -> bool:
    members = {name for group in plan.parallel for name in group}
    explained = fxfuse.explain(model, *args, plan=plan, **kwargs)
    return {branch.fused for branch in explained.branches if branch.name in members} == {"wide"}


@torch.no_grad()
def test_hidden_states_are_those_of_the_stream_as_the_plan_leaves_it() -> None:
    """The group stands where its first member stood; after the layers of the other two nothing is added."""
    model = llama(4)
    found = compiled(model, PLAN)(tokens(), use_cache=False, output_hidden_states=True)

    h0 = model.model.embed_tokens(tokens())
    first = copy.deepcopy(model)
    first.model.layers = first.model.layers[:1]
    mid = h0 + _attention(model, 0, h0)
    h1 = mid + sum(layer.mlp(layer.post_attention_layernorm(mid)) for layer in model.model.layers[:3])
    expected = planned(model, DROP, [GROUP])(tokens(), use_cache=False)
    assert_exact(found.hidden_states[:4], [h0, h1, h1, h1])
    assert_exact([found.hidden_states[4], found.logits], [found.hidden_states[-1], expected.logits])


def _attention(model: Any, index: int, h: Tensor) -> Tensor:
    layer = model.model.layers[index]
    rotary = model.model.rotary_emb(h, torch.arange(h.shape[1])[None])
    return layer.self_attn(layer.input_layernorm(h), position_embeddings=rotary, attention_mask=None)[0]


@torch.no_grad()
def test_an_encoder_and_a_decoder_follow_one_plan() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=4, num_heads=4, vocab_size=50, dropout_rate=0.0)
    model = T5ForConditionalGeneration(config).double().eval()
    redraw(model, spread=0.2)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(length=5, seed=2), "use_cache": False}
    drop = [f"encoder.block.{i}.layer.0.SelfAttention" for i in (1, 2)]
    drop += [f"decoder.block.{i}.layer.{k}" for i in (1, 2) for k in ("0.SelfAttention", "1.EncDecAttention")]
    ffns = {"encoder": 1, "decoder": 2}
    groups = [[f"{side}.block.{i}.layer.{k}.DenseReluDense" for i in (1, 2)] for side, k in ffns.items()]
    plan = Plan(drop=drop, parallel=groups)

    encoder, decoder = sorted(dissect(model, inputs).stacks, key=lambda stack: stack[0].path, reverse=True)
    with in_parallel(encoder[1:3]), in_parallel(decoder[1:3]):
        expected = model(**inputs).logits

    assert is_wide(model, plan, **inputs)
    assert_exact([compiled(model, plan)(**inputs).logits], [expected])


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(made_inside: bool) -> None:
    """Tensors made under inference_mode have no version; packed weights are followed by their pointers."""
    with torch.inference_mode() if made_inside else torch.no_grad():
        model = llama(4)
    with torch.inference_mode():
        expected = logits(planned(model, DROP, [GROUP]), tokens())
        assert_exact([logits(compiled(model, PLAN), tokens())], [expected])


@torch.no_grad()
def test_tied_embeddings() -> None:
    model = llama(4, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight

    assert is_wide(model, PLAN, tokens(), use_cache=False)
    assert_exact([logits(compiled(model, PLAN), tokens())], [logits(planned(model, DROP, [GROUP]), tokens())])


@torch.no_grad()
def test_the_whole_model_under_autocast_is_as_exact_as_the_model_is() -> None:
    """Against float64: the planned model's error in mixed precision, uncompiled, sets the scale."""
    exact = planned(llama(4), DROP, [GROUP])(tokens(), use_cache=False).logits
    model = llama(4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = logits(compiled(model, PLAN), tokens())
        plain = logits(planned(model, DROP, [GROUP]), tokens())

    assert is_wide(model, PLAN, tokens(), use_cache=False)
    assert (found - exact).norm() <= 2 * (plain - exact).norm()


class MixedLayer(Layer):
    """bfloat16 projections, a norm computed and kept in float32, a stream in bfloat16."""

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm(h.float()).to(h.dtype))


@torch.no_grad()
def test_low_precision_weights_and_norms_in_float32() -> None:
    def tower(mixed: bool) -> Tower:
        made = Tower(3)
        made.layers = nn.ModuleList(MixedLayer(8, 12) for _ in range(3)) if mixed else made.layers
        redraw(made)
        made.bfloat16() if mixed else made.double()
        for layer in made.layers if mixed else ():
            layer.get_submodule("norm").float()
        return made

    model, reference = tower(True), tower(False)
    reference.load_state_dict(model.state_dict())
    plan = Plan(parallel=[model.mlps])
    x = vectors().bfloat16()
    exact = reference.parallel(x.double())
    plain = x + sum(layer.mlp(layer.norm(x.float()).to(x.dtype)) for layer in model.layers)  # type: ignore[operator]

    assert is_wide(model, plan, x)
    found = compiled(model, plan)(x)
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() <= 2 * (plain.double() - exact).norm()


def test_activation_checkpointing() -> None:
    """Gradients, with the layers recomputed in the backward pass."""
    model = llama(4)
    model.train()
    expected_model = planned(model, DROP, [GROUP])
    logits(expected_model, tokens()).square().mean().backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    logits(compiled(model, PLAN, "aot_eager"), tokens()).square().mean().backward()

    own, reference = dict(model.named_parameters()), dict(_renamed(expected_model))
    assert_exact([own[name].grad for name in reference], list(reference.values()))


def test_checkpointed_layers_are_seen_and_still_recomputed() -> None:
    """By how many values the forward pass keeps for the backward pass."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def kept(model: nn.Module) -> int:
        sizes: list[int] = []

        def count(gm: Any, inputs: Any) -> Any:
            sizes.append(len(gm.graph.output_node().args[0]))
            return gm.forward

        inner = aot_autograd(fw_compiler=count, partition_fn=min_cut_rematerialization_partition)
        torch.compiler.reset()
        logits(compiled(model, PLAN, inner), tokens()).sum().backward()
        return sizes[0]

    model = llama(4)
    model.train()
    plain = kept(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})

    found = {
        branch.name: branch.fused for branch in fxfuse.explain(model, tokens(), plan=PLAN, use_cache=False).branches
    }
    assert all(found[name] == "wide" for name in GROUP)
    assert kept(model) < 0.8 * plain


def _renamed(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n.replace(".layer.", "."), p.grad) for n, p in model.named_parameters() if p.grad is not None]


class Natural(nn.Module):
    """Layers of one mixer each, as hybrid models have them: FFNs follow each other with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(8, 12) for _ in range(4))
        self.mix = nn.Conv1d(8, 8, 3, padding=2)
        self.double().eval()
        redraw(self)

    def forward(self, h: Tensor, together: bool = False) -> Tensor:
        h = h + self.mix(h.transpose(1, 2))[..., : h.shape[1]].transpose(1, 2)
        if together:
            return h + sum(layer.mlp(layer.norm(h)) for layer in self.layers)  # type: ignore[operator]
        for layer in self.layers:
            h = layer(h)
        return h


@torch.no_grad()
def test_ffns_that_follow_each_other_need_no_drop() -> None:
    model = Natural()
    plan = Plan(parallel=[[f"layers.{i}.mlp" for i in range(4)]])

    assert is_wide(model, plan, vectors())
    assert_exact([compiled(model, plan)(vectors())], [model(vectors(), together=True)])


@torch.no_grad()
def test_a_branch_that_takes_keys_of_another_layer_stays_behind_it() -> None:
    """Cross-layer keys and values: what shares them may be dropped or left, and cannot move before they are made."""
    model = SharedKeys().double().eval()
    redraw(model)
    group = Plan(parallel=[["layers.0.mlp", "layers.2.attn"]])

    assert_exact([compiled(model, Plan(drop=["layers.1.attn"]))(vectors())], [model(vectors(), silent=1)])
    with pytest.raises(PlanError, match=r"(?s)layers.2.attn.*made only after"):
        fxfuse.explain(model, vectors(), plan=group)


class SharedAttention(nn.Module):
    def __init__(self, makes: bool) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)
        self.kv = nn.Linear(8, 16) if makes else None

    def forward(self, x: Tensor, kv: Tensor | None) -> tuple[Tensor, Tensor]:
        kv = self.kv(x) if self.kv is not None else kv
        assert kv is not None
        k, v = kv.chunk(2, dim=-1)
        return self.o(F.scaled_dot_product_attention(self.q(x), k, v)), kv


class SharedLayer(nn.Module):
    def __init__(self, makes: bool) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(8), SharedAttention(makes)
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


class SharedKeys(nn.Module):
    """Layer 1 makes keys and values, and layer 2 takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SharedLayer(index != 2) for index in range(3))

    def forward(self, h: Tensor, silent: int | None = None) -> Tensor:
        kv = None
        for index, layer in enumerate(self.layers):
            f, kv = layer.attn(layer.norm(h), kv)  # type: ignore[operator]
            h = h if index == silent else h + f
            h = h + layer.mlp(layer.norm2(h))  # type: ignore[operator]
        return h


@torch.no_grad()
def test_a_model_wrapped_by_peft_keeps_its_names() -> None:
    peft = pytest.importorskip("peft")
    model = llama(4)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2)).double().eval()
    redraw(wrapped)
    found = {branch.name: branch for branch in fxfuse.explain(wrapped, tokens(), use_cache=False).branches}

    assert set(found) == {f"model.layers.{i}.{part}" for i in range(4) for part in ("self_attn", "mlp")}
    ungrouped = Plan(drop=DROP)
    expected = logits(planned(model, DROP), tokens())  # the adapters live inside the model
    assert_exact([logits(compiled(wrapped, ungrouped), tokens())], [expected])


class TestDiagnostics:
    """What a user sees of a compilation without asking fxfuse anything."""

    def test_the_log_says_what_was_found_and_what_was_done(self, caplog: pytest.LogCaptureFixture) -> None:
        model = Tower(3)
        with caplog.at_level("DEBUG", logger="fxfuse"):
            compiled(model, Plan(parallel=[model.mlps[:2]]))(vectors())

        assert "found: 1 residual stream(s)" in caplog.text
        assert "layers.2.mlp: gated_ffn" in caplog.text
        assert "fused layers.0.mlp + layers.1.mlp: one FFN of width 24" in caplog.text

    def test_the_log_says_why_a_branch_cannot_be_wide(self, caplog: pytest.LogCaptureFixture) -> None:
        model = SharedKeys().double().eval()
        with caplog.at_level("DEBUG", logger="fxfuse"):
            compiled(model, Plan(drop=["layers.1.attn"]))(vectors())

        assert "layers.0.attn: attention\n" in caplog.text

    def test_tlparse_gets_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pages: dict[str, str] = {}

        def record(kind: str, metadata_fn: Callable[[], dict[str, str]], payload_fn: Callable[[], str]) -> None:
            pages[metadata_fn()["name"]] = payload_fn()

        monkeypatch.setattr(dynamo, "trace_structured", record)
        model = Tower(2)
        compiled(model, Plan(parallel=[model.mlps]))(vectors())

        assert "layers.1.mlp: gated_ffn" in pages["fxfuse_passes"]
        assert "one FFN of width 24" in pages["fxfuse_passes"]

    def test_a_model_without_a_stream_says_what_was_seen_and_how_to_report_it(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double()

        assert_exact(
            [torch.compile(model, backend="ffnfuse", options={"inner": "eager"})(vectors())], [model(vectors())]
        )

        (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert "2 linear" in line and "nothing is added" in line and "fxfuse explain MODEL --trace FOLDER" in line


class SingleNorm(nn.Module):
    """Computes in float32 in any model, gain and all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), (8,)) * self.weight.float()).type_as(x)


@torch.no_grad()
def test_norms_in_float32_keep_ffns_apart_in_float64_and_nowhere_else() -> None:
    """To fold such a gain would spare a rounding that the model does, more than the 1e-8 of an exact rewrite."""
    model = Tower(2)
    for layer in model.layers:
        layer.norm = SingleNorm()
    redraw(model.double())
    plan = Plan(parallel=[model.mlps])

    assert_exact([compiled(model, plan)(vectors())], [model.parallel(vectors())])
    reasons = {branch.reason for branch in fxfuse.explain(model, vectors(), plan=plan).branches}
    assert reasons == {
        "its norm applies its gain in float32 and its projections read float64: to fold it would spare that rounding"
    }
    assert is_wide(model.float(), plan, vectors().float())


class Modulated(nn.Module):
    """DiT's adaLN: shift, scale and gate are slices of one projection, of a condition or of the stream's mean."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm, self.ada = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 24)
        self.up, self.down, self.gated = nn.Linear(8, 12), nn.Linear(12, 8), gated

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        condition = h.mean(1, keepdim=True) if condition is None else condition
        shift, scale, gate = self.ada(F.silu(condition)).chunk(3, -1)
        out = self.down(F.gelu(self.up(self.norm(h) * (1 + scale) + shift)))
        return gate * out if self.gated else out


class Diffusion(nn.Module):
    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Modulated(gated) for _ in range(2))

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            h = h + block(h, condition)
        return h


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("conditioned", [True, False])
@torch.no_grad()
def test_slices_of_one_projection_that_modulate_a_norm_are_left_to_it(gated: bool, conditioned: bool) -> None:
    model, h = Diffusion(gated).double(), vectors()
    condition = vectors(2, 1, 8, seed=5) if conditioned else None
    plan = Plan(parallel=[["blocks.0", "blocks.1"]])
    expected = h + sum(block(h, condition) for block in model.blocks)

    assert not is_wide(model, plan, h, condition)
    assert_exact([compiled(model, Plan())(h, condition)], [model(h, condition)])
    torch.compiler.reset()
    assert_exact([compiled(model, plan)(h, condition)], [expected])
