"""What is recorded against hooks on the model's own modules, and what a user does wrong or interrupts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse.data.batches import cache_keyword
from fxfuse.errors import CaptureError, FxfuseError, OptionError, PlanError, RecordError
from fxfuse.measure.recording import model_digest
from tests.models.tiny import Tower, llama, planned, tokens, vectors

LAYERS = 4
ATTENTIONS = [f"model.layers.{index}.self_attn" for index in range(LAYERS)]
MLPS = [f"model.layers.{index}.mlp" for index in range(LAYERS)]
BRANCHES = [name for pair in zip(ATTENTIONS, MLPS, strict=True) for name in pair]


def batch(rows: int = 2, length: int = 9, seed: int = 1) -> dict[str, Any]:
    return {"input_ids": tokens(rows, length, seed), "use_cache": False}


@torch.no_grad()
def contributions(model: nn.Module, given: Mapping[str, Any], dropped: str = "") -> tuple[dict[str, Tensor], Tensor]:
    """What each branch of a Llama adds, and the logits, with the output of one module made zero. Hooks, no fxfuse."""
    model = copy.deepcopy(model)
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> Any:
            own = output[0] if isinstance(output, tuple) else output
            seen[name] = own
            if name != dropped:
                return output
            return (torch.zeros_like(own), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(own)

        return keep

    for name in BRANCHES:
        model.get_submodule(name).register_forward_hook(hook(name))
    return seen, model(**given).logits


def test_the_matrix_is_what_hooks_on_the_modules_see() -> None:
    model, batches = llama(LAYERS), [batch(2, 9, 1), batch(1, 12, 2), batch(3, 5, 3)]

    recording = fxfuse.record(model, batches)

    assert [branch.name for branch in recording.branches] == BRANCHES
    assert [branch.kind for branch in recording.branches] == ["attention", "gated_ffn"] * LAYERS
    assert recording.tokens == 18 + 12 + 15
    mean, largest, kl = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8)
    for each in batches:
        base, logits = contributions(model, each)
        for i, dropped in enumerate(BRANCHES):
            changed, other = contributions(model, each, dropped)
            for j in range(i + 1, 8):
                distance = 1 - F.cosine_similarity(base[BRANCHES[j]], changed[BRANCHES[j]], dim=-1)
                mean[i, j] += distance.sum() / recording.tokens
                largest[i, j] = torch.maximum(largest[i, j], distance.max())
            p, q = logits.log_softmax(-1), other.log_softmax(-1)
            kl[i] += (p.exp() * (p - q)).sum() / recording.tokens
    torch.testing.assert_close(recording.mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(recording.max.double(), largest, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(recording.kl, kl, rtol=1e-4, atol=1e-6)
    assert (recording.p99 <= recording.max + 1e-6).all()
    assert (recording.p99 >= recording.mean * 0.9).all()


def test_experts_that_are_added_token_by_token_are_branches_of_the_stream_too() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
        experts_implementation="batched_mm",  # of one graph, and of any dtype
    )
    model: Any = Qwen2MoeForCausalLM(config).double().eval()
    given = batch(2, 9)

    recording = fxfuse.record(model, [given])

    kinds = {branch.name: branch.kind for branch in recording.branches}
    modules = {"model.layers.0.mlp": "model.layers.0.mlp.experts", "model.layers.0.mlp.shared_expert": ""}
    assert [kinds[name] for name in modules] == ["moe", "gated_ffn"] and len(kinds) == 6
    for name, module in modules.items():
        with torch.no_grad():
            right = model(**given).logits.log_softmax(-1)
            handle = model.get_submodule(module or name).register_forward_hook(lambda _, __, out: torch.zeros_like(out))
            left = model(**given).logits.log_softmax(-1)
            handle.remove()
        kl = (right.exp() * (right - left)).sum(-1).mean()
        assert float(recording.kl[recording.index(name)]) == pytest.approx(float(kl), rel=1e-4)


def test_a_linear_attention_is_recorded_as_the_map_that_it_is() -> None:
    """Against a model whose attention module does nothing but project, recorded by hooks."""
    model, given = llama(LAYERS), batch()
    made = copy.deepcopy(model)
    attention = made.get_submodule(ATTENTIONS[1])
    attention.forward = lambda hidden_states, **_: (attention.o_proj(hidden_states), None)

    recording = fxfuse.record(model, [given], fxfuse.Plan(linear=[ATTENTIONS[1]]))

    assert [branch.name for branch in recording.branches] == BRANCHES
    assert [branch.kind for branch in recording.branches] == [
        "attention",
        "gated_ffn",
        "linear",
        *["gated_ffn", "attention"] * 2,
        "gated_ffn",
    ]
    base, logits = contributions(made, given)
    for i, dropped in enumerate(BRANCHES):
        changed, other = contributions(made, given, dropped)
        p, q = logits.log_softmax(-1), other.log_softmax(-1)
        assert float(recording.kl[i]) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4, abs=1e-6)
        distance = 1 - F.cosine_similarity(base[MLPS[3]], changed[MLPS[3]], dim=-1)
        assert float(recording.mean[i, -1]) == pytest.approx(float(distance.mean()) if i < 7 else 0, rel=1e-4, abs=1e-6)


def test_the_one_pass_scores_are_those_of_the_streams() -> None:
    model = Tower(3)
    x = vectors(2, 5, 8)

    recording = fxfuse.record(model, [{"x": x}])

    for index, layer in enumerate(model.layers):
        with torch.no_grad():
            after = layer(x)
        torch.testing.assert_close(recording.cosine[index].double(), F.cosine_similarity(x, after, dim=-1).mean())
        ratio = ((after - x).norm(dim=-1) / x.norm(dim=-1)).mean()
        torch.testing.assert_close(recording.norm_ratio[index].double(), ratio)
        x = after
    assert recording.kl.isfinite().all()  # what it returns has the form of logits, and is taken for them


def test_groups_are_what_the_planned_model_makes_of_the_stream() -> None:
    model, given = llama(LAYERS), batch()
    plan = fxfuse.Plan(drop=ATTENTIONS[1:3])

    recording = fxfuse.record(model, [given], plan=plan, max_group=3)

    assert [group.branches for group in recording.groups] == [
        tuple(MLPS[:2]), tuple(MLPS[:3]), tuple(MLPS[1:3])]  # fmt: skip
    dropped = planned(model, ATTENTIONS[1:3])
    for group in recording.groups:
        after = model.model.layers[int(group.branches[-1].split(".")[2]) + 1]
        made = planned(model, ATTENTIONS[1:3], [group.branches])
        with torch.no_grad():
            x, y = (_stream_before(each, after.self_attn.q_proj, given) for each in (dropped, made))
            logits, others = dropped(**given).logits, made(**given).logits
        error = (y - x).norm(dim=-1) / x.norm(dim=-1)
        assert group.mean == pytest.approx(float(error.mean()), rel=1e-4)
        assert group.max == pytest.approx(float(error.max()), rel=1e-4)
        p, q = logits.log_softmax(-1), others.log_softmax(-1)
        assert group.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def _stream_before(model: Any, attention: nn.Module, given: Mapping[str, Any]) -> Tensor:
    """The stream as it comes to the layer whose attention has this query projection, which copies share by value."""
    seen: list[Tensor] = []
    (norm,) = [m.layer.input_layernorm for m in model.model.layers
               if torch.equal(m.layer.self_attn.q_proj.weight, attention.weight)]  # fmt: skip
    handle = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**given)
    handle.remove()
    return seen[-1]


def test_padding_does_not_count() -> None:
    model = llama(2)
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    scrambled = ids.clone()
    scrambled[0, 5:] = 3

    one, other = (
        fxfuse.record(model, [{"input_ids": each, "attention_mask": mask, "use_cache": False}])
        for each in (ids, scrambled)
    )

    assert one.tokens == other.tokens == 13
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.kl, other.kl)


def test_only_what_a_drop_changes_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """m branches of one size cost (m + 1) / 2 runs of them, where the naive way would take m + 1.

    The hidden units of each FFN are computed once more, because keeping all of them would be too much.
    """
    model = Tower(8)
    calls = 0
    real = F.silu

    from fxfuse.graph.rerun import Program

    original = Program.execute

    def counting(self: Program, node: Any, values: Any) -> object:
        nonlocal calls
        calls += node.target is real
        return original(self, node, values)

    monkeypatch.setattr(Program, "execute", counting)

    fxfuse.record(model, [{"x": vectors(2, 5, 8)}], max_group=0)

    assert calls == 8 + sum(range(8)) + 8


def test_the_model_is_left_as_it_was() -> None:
    model = llama(2)
    model.train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    fxfuse.record(model, [batch()])

    assert [m.training for m in (model, model.model.layers[0], model.model.layers[1])] == [True, False, True]
    assert model._compiled_call_impl is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_compiled_in_place_is_recorded_uncompiled() -> None:
    model = llama(2)
    expected = fxfuse.record(model, [batch()]).to_bytes()
    fxfuse.apply(model, fxfuse.Plan(parallel=[MLPS[:2]]), inner="eager")

    assert fxfuse.record(model, [batch()]).to_bytes() == expected
    assert model._compiled_call_impl is not None


def test_a_wrapper_of_torch_compile_is_recorded_as_its_module_is() -> None:
    model = llama(2)
    compiled: Any = torch.compile(model, backend="eager")

    recording = fxfuse.record(compiled, [batch()])

    assert recording.to_bytes() == fxfuse.record(model, [batch()]).to_bytes()
    recording.check(compiled)
    assert isinstance(fxfuse.make_plan(recording, compiled, [batch()], max_kl=0.0), fxfuse.Plan)


def test_calls_of_many_kinds_are_all_recorded() -> None:
    class Kinds(Tower):
        def forward(self, x: Tensor, kind: str) -> Tensor:
            return super().forward(x) * len(kind)

    kinds = [{"x": vectors(), "kind": "k" * count} for count in range(1, 11)]  # Dynamo gives up after eight

    assert fxfuse.record(Kinds(2), kinds).tokens == 10 * fxfuse.record(Tower(2), [{"x": vectors()}]).tokens


def test_a_cache_in_a_batch_is_as_it_was() -> None:
    from transformers import DynamicCache

    model = llama(2)
    cache = DynamicCache(config=model.config)
    given = [{"input_ids": tokens(), cache_keyword(model): cache}] * 2

    recording = fxfuse.record(model, given)

    assert cache.get_seq_length() == 0
    torch.testing.assert_close(recording.kl, fxfuse.record(model, [{"input_ids": tokens()}]).kl)


def test_a_plan_may_be_the_path_of_one(tmp_path: Path) -> None:
    plan = fxfuse.Plan(drop=["layers.0.mlp"])
    plan.save(tmp_path / "plan.json")

    assert fxfuse.record(Tower(2), [{"x": vectors()}], plan=tmp_path / "plan.json").plan == plan


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16])
def test_weights_of_any_dtype_have_a_digest(dtype: torch.dtype) -> None:
    def digest(value: int) -> str:
        model = nn.Module()
        model.register_buffer("held", torch.tensor([1, 2, value]).to(dtype))
        return model_digest(model)["weights"]

    assert digest(3) == digest(3) != digest(4)


# What a user interrupts ------------------------------------------------------------------------------------------


class StopError(Exception):
    pass


def interrupted(batches: list[dict[str, Any]], after: int) -> Iterator[dict[str, Any]]:
    yield from batches[:after]
    raise StopError


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_recording_ends_in_the_same_bytes(tmp_path: Path, after: int) -> None:
    model, batches, state = llama(2), [batch(seed=seed) for seed in range(3)], tmp_path / "state"
    with pytest.raises(StopError):
        fxfuse.record(model, interrupted(batches, after), resume=state)

    resumed = fxfuse.record(model, batches, resume=state)

    assert resumed.to_bytes() == fxfuse.record(model, batches).to_bytes()
    assert fxfuse.record(model, batches, resume=state).to_bytes() == resumed.to_bytes()


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    model, state = Tower(2), tmp_path / "state"
    x = {"x": vectors()}
    fxfuse.record(model, [x], resume=state)

    with pytest.raises(RecordError, match="another settings.*remove it"):
        fxfuse.record(model, [x], plan=fxfuse.Plan(drop=["layers.0.mlp"]), resume=state)
    with pytest.raises(RecordError, match="another model.*remove it"):
        fxfuse.record(Tower(2, seed=5), [x], resume=state)
    with pytest.raises(RecordError, match="batch 0 is not the one"):
        fxfuse.record(model, [{"x": vectors(seed=9)}], resume=state)
    content = state.read_bytes()
    state.write_bytes(content[:-1])
    with pytest.raises(RecordError, match="cannot be read"):
        fxfuse.record(model, [x], resume=state)


def test_a_state_of_more_or_of_other_batches_is_refused_and_kept(tmp_path: Path) -> None:
    model, state = Tower(2), tmp_path / "state"
    batches = [{"x": vectors(2, 5, 8, seed=seed)} for seed in range(3)]
    fxfuse.record(model, batches, resume=state, max_tokens=30)
    content = state.read_bytes()

    for fewer in ([], batches[:2], iter(batches[:1])):
        with pytest.raises(RecordError, match="3 batches, of which only"):
            fxfuse.record(model, fewer, resume=state)
    with pytest.raises(RecordError, match="30 tokens, more than max_tokens=20"):
        fxfuse.record(model, batches, resume=state, max_tokens=20)
    with pytest.raises(RecordError, match="batch 0 is not the one"):
        fxfuse.record(model, batches[::-1], resume=state, max_tokens=30)

    assert state.read_bytes() == content
    assert fxfuse.record(model, batches, resume=state, max_tokens=30).tokens == 30


@pytest.mark.parametrize("header", ['{"a": 2}', "[]", "null", '{"model": 1}', "x"])
def test_a_damaged_state_is_an_error(header: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from fxfuse.measure.resume import FORMAT

    save_file({"a": torch.zeros(1)}, tmp_path / "state", {FORMAT: header})

    with pytest.raises(RecordError, match="state"):
        fxfuse.record(Tower(2), [{"x": vectors()}], resume=tmp_path / "state")


@pytest.mark.parametrize("path", ["nowhere/state", "."])
def test_a_state_that_cannot_be_written_is_refused_before_the_model_is_called(path: str, tmp_path: Path) -> None:
    def unread() -> Iterator[dict[str, Any]]:
        raise AssertionError
        yield

    with pytest.raises(FxfuseError, match="folder"):
        fxfuse.record(Tower(2), unread(), resume=tmp_path / path)


# What a user does wrong ------------------------------------------------------------------------------------------


def test_nothing_to_record_is_an_error() -> None:
    with pytest.raises(RecordError, match="there was no batch"):
        fxfuse.record(Tower(2), [])


def test_a_batch_that_the_model_rejects_is_named() -> None:
    with pytest.raises(RecordError, match=r"batch 1 \(y\)"):
        fxfuse.record(Tower(2), [{"x": vectors()}, {"y": vectors()}])
    with pytest.raises(RecordError, match="batch 0 is a list"):
        fxfuse.record(Tower(2), [[vectors()]])  # type: ignore[list-item]


def test_nan_in_a_branch_is_an_error_with_its_name() -> None:
    model = Tower(3)
    with torch.no_grad():
        model.layers[1].mlp.down.bias[0] = torch.nan  # type: ignore[index, union-attr]

    with pytest.raises(RecordError, match=r"layers\.1\.mlp: NaN or infinity in batch 0"):
        fxfuse.record(model, [{"x": vectors()}])


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("model.embed_tokens", r"stream before model\.layers\.0\.self_attn.*the embedding.*in batch 0"),
        ("model.norm", r"logits with nothing dropped .*in batch 0"),
        ("lm_head", r"logits with nothing dropped .*in batch 0"),
    ],
)
def test_nan_outside_all_branches_is_not_blamed_on_one(weight: str, message: str) -> None:
    model = llama(2)
    with torch.no_grad():
        model.get_parameter(f"{weight}.weight").fill_(torch.nan)

    with pytest.raises(RecordError, match=message):
        fxfuse.record(model, [batch()])


@pytest.mark.parametrize("max_tokens", [0, -3, "many", 1.5])
def test_a_limit_that_is_none_is_an_error(max_tokens: Any) -> None:
    with pytest.raises(OptionError, match="max_tokens"):
        fxfuse.record(Tower(2), [{"x": vectors()}], max_tokens=max_tokens)


def test_a_plan_of_another_model_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"layers\.7\.mlp"):
        fxfuse.record(Tower(2), [{"x": vectors()}], plan=fxfuse.Plan(drop=["layers.7.mlp"]))
    with pytest.raises(OptionError, match="plan is a"):
        fxfuse.record(Tower(2), [{"x": vectors()}], plan={"drop": []})  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="no branch"):
        fxfuse.record(Tower(2), [{"x": vectors()}], plan=fxfuse.Plan(parallel=[["layers.0.mlp", "layers.7.mlp"]]))


def test_a_cache_written_in_place_is_an_error_that_says_what_to_do() -> None:
    from transformers import StaticCache

    model = llama(2)
    cache = StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        model(input_ids=tokens(1, 3), **{cache_keyword(model): cache})  # from here on the cache is an input

    with pytest.raises(CaptureError, match="use_cache=False"):
        fxfuse.record(model, [{"input_ids": tokens(1, 5), cache_keyword(model): cache}])


def test_a_model_without_a_stream_and_one_in_pieces_are_errors() -> None:
    class Broken(Tower):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[1](self.layers[0](x))
            torch._dynamo.graph_break()
            return self.layers[3](self.layers[2](x))

    with pytest.raises(RecordError, match="no residual stream"):
        fxfuse.record(nn.Linear(8, 8).double(), [{"input": vectors()}])
    with pytest.raises(RecordError, match="2 graphs.*graph breaks"):
        fxfuse.record(Broken(4), [{"x": vectors()}])


@given(data=st.data())
def test_a_recording_cut_anywhere_is_an_error(recorded: Path, data: st.DataObject) -> None:
    content = recorded.read_bytes()
    cut = recorded.with_name("cut")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])

    with pytest.raises(RecordError, match="cannot be read|no recording|damaged"):
        fxfuse.Recording.load(cut)


def test_a_recording_is_read_as_it_was_written_and_fits_its_model_only(recorded: Path) -> None:
    recording = fxfuse.Recording.load(recorded)

    assert recording.to_bytes() == recorded.read_bytes()
    recording.check(Tower(3))
    with pytest.raises(RecordError, match="another model"):
        recording.check(Tower(2))
    with pytest.raises(RecordError, match="other weights"):
        recording.check(Tower(3, seed=1))
    with pytest.raises(PlanError, match=r"no branch 'layers\.9\.mlp'.*nearest: layers"):
        recording.index("layers.9.mlp")
    with pytest.raises(RecordError, match="there is no recording"):
        fxfuse.Recording.load(recorded.with_name("nowhere"))


def test_a_recording_says_when_and_by_what_it_was_made(recorded: Path) -> None:
    made = fxfuse.Recording.load(recorded).made

    assert abs(datetime.now(UTC).date() - date.fromisoformat(made["date"])) <= timedelta(days=1)
    assert made["torch"] == torch.__version__
    assert set(made) == {"date", "fxfuse", "torch"}


@pytest.mark.parametrize("made", [None, [], {"date": 5}])
def test_a_recording_of_an_older_version_says_nothing_and_a_damaged_one_is_an_error(
    made: object, recorded: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(recorded, "pt") as file:
        header = json.loads(file.metadata()["fxfuse-recording"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    header["made"] = made
    del header["sha256"]
    if made is None:
        del header["made"]
    save_file(tensors, tmp_path / "other", {"fxfuse-recording": json.dumps(header)})

    if made is None:
        assert fxfuse.Recording.load(tmp_path / "other").made == {}
    else:
        with pytest.raises(RecordError, match="damaged.*'made' holds texts"):
            fxfuse.Recording.load(tmp_path / "other")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "recording.safetensors"
    fxfuse.record(Tower(3), [{"x": vectors()}]).save(path)
    return path
