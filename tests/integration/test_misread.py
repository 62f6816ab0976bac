"""Models whose branches are easily taken for something else: what is no branch, which terms are one, and which not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxfuse
from fxfuse import Plan
from fxfuse.backend.frontend import capture
from fxfuse.passes import fuse_ffn
from tests.models.blocks import HIDDEN, MLP, WIDTH, Stream, assert_same, on_both_roads, ready, trace, vectors
from tests.models.checks import assert_exact


def kinds(model: nn.Module) -> dict[str, str]:
    return {branch.name: branch.kind for branch in fxfuse.explain(model, vectors()).branches}


def planned(model: nn.Module, plan: Plan) -> Tensor:
    torch.compiler.reset()
    options = {"plan": plan, "inner": "eager", "strict": True}
    made = torch.compile(model, backend="ffnfuse", options=options)(vectors())  # type: ignore[arg-type]
    assert isinstance(made, Tensor)
    return made


class Beside(nn.Module):
    """PyTorch's attention, which is one op, and an FFN behind one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), MLP()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, h: Tensor, ffn: bool = True) -> Tensor:
        y = self.norm(h)
        h = h + self.attn(y, y, y, need_weights=False)[0]
        return h + self.mlp(y) if ffn else h


@torch.no_grad()
def test_an_attention_that_is_one_op_is_a_branch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    model = ready(nn.Sequential(Beside(), Beside()))

    assert kinds(model) == {"0.attn": "attention", "0.mlp": "ffn", "1.attn": "attention", "1.mlp": "ffn"}
    expected = model[1](model[0](vectors()), ffn=False)  # type: ignore[index]
    assert_exact([planned(model, Plan(drop=["1.mlp"]))], [expected])


@torch.no_grad()
def test_layers_of_pytorch_itself_have_two_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)
    layers = (nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, norm_first=True, batch_first=True) for _ in range(2))
    model = ready(nn.Sequential(*layers))

    assert kinds(model) == {"0.self_attn": "attention", "0": "ffn", "1.self_attn": "attention", "1": "ffn"}


@torch.no_grad()
def test_a_layer_that_is_one_op_is_told_as_that() -> None:
    layers = (nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, norm_first=True, batch_first=True) for _ in range(2))

    found = fxfuse.explain(ready(nn.Sequential(*layers)), vectors())

    assert not found.branches
    assert "set_fastpath_enabled(False)" in str(found)


class FromTheStart(Stream):
    """``x + lambda * x0`` behind each FFN, as in modded-nanogpt."""

    def __init__(self) -> None:
        super().__init__(MLP(), MLP(), MLP())
        self.share = nn.ParameterList(torch.ones(()) for _ in range(3))

    def forward(self, x: Tensor, without: int = -1) -> Tensor:
        h = first = self.start(x)
        for index, layer in enumerate(self.layers):
            h = h if index == without else layer(h)
            h = h + self.share[index] * first
        return h


@torch.no_grad()
def test_a_share_of_an_earlier_point_is_no_part_of_a_branch() -> None:
    model = ready(FromTheStart())

    assert kinds(model) == {f"layers.{index}.body": "ffn" for index in range(3)}
    assert_exact([planned(model, Plan(drop=["layers.1.body"]))], [model(vectors(), without=1)])


class Largest(nn.Module):
    """Keeps the largest input that it has seen, as quantisers do, and multiplies with it: ``write`` says how."""

    def __init__(self, write: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("largest", torch.ones(2))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return self.down(F.gelu(self.up(x))) * self.largest[0]


WRITES: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "an element": lambda m, x: m.largest.__setitem__(0, x.abs().amax()),
    "a slice": lambda m, x: m.largest[:1].copy_(x.abs().amax()),
    "a weight": lambda m, x: m.up.weight.data.mul_(0.5),
    "rows of a weight": lambda m, x: m.up.weight.detach()[:2].mul_(2.0),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("weights", ["copy", "share"])
@torch.no_grad()
def test_a_weight_that_the_model_writes_to_is_never_packed(name: str, weights: str) -> None:
    class Side(Stream):
        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x)
            return h + self.layers[0].branch(h) + self.layers[1].branch(h)

    model, reference = (ready(Side(Largest(WRITES[name]), Largest(WRITES[name]))) for _ in range(2))
    torch.compiler.reset()
    options = {"inner": "eager", "weights": weights, "merge_gate_up": True}
    compiled = torch.compile(model, backend="ffnfuse", options=options)  # type: ignore[arg-type]

    for seed in range(3):
        x = vectors(seed=seed)
        assert_exact([compiled(x)], [reference(x)])


class Decaying(Largest):
    """Multiplies with a number that it then makes smaller: what is packed at the end of the sum would be too small."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.down(F.gelu(self.up(x))) * self.largest[0]
        self.write(self, x)
        return made


@torch.no_grad()
def test_a_weight_that_the_model_writes_to_after_its_use_is_not_read_again() -> None:
    class Side(Stream):
        def forward(self, x: Tensor) -> Tensor:
            h = self.start(x)
            return h + self.layers[0].branch(h) + self.layers[1].branch(h)

    model, reference = (ready(Side(*(Decaying(lambda m, x: m.largest.mul_(0.5)) for _ in range(2)))) for _ in range(2))
    (captured,) = capture(model, vectors())
    reference.load_state_dict(model.state_dict())

    fuse_ffn(captured.gm)

    assert_exact([captured.gm(*captured.inputs)[0]], [reference(vectors())])


class SoftExperts(nn.Module):
    """Soft MoE (arXiv 2308.00951): each expert gets a mean of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.experts = nn.Parameter(torch.ones(WIDTH, 4)), nn.ModuleList(MLP() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.einsum("bsd,de->bse", x, self.slots)
        given = torch.einsum("bsd,bse->bed", x, scores.softmax(1)).split(2, 1)
        made = torch.cat([expert(part) for expert, part in zip(self.experts, given, strict=True)], 1)
        return torch.einsum("bed,bse->bsd", made, scores.softmax(-1))


class DenseExperts(nn.Module):
    """All experts on all tokens, their matrices stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.up, self.down = nn.Parameter(torch.ones(3, WIDTH, HIDDEN)), nn.Parameter(torch.ones(3, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        made = torch.einsum("bsef,efd->bsed", F.gelu(torch.einsum("bsd,edf->bsef", x, self.up)), self.down)
        return torch.einsum("bse,bsed->bsd", self.router(x).softmax(-1), made)


class Sparse(nn.Module):
    """An attention to the two keys that fit best."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2)
        least = scores.topk(2, -1).values[..., -1:]
        return self.o(torch.softmax(scores.masked_fill(scores < least, -1e9), -1) @ self.v(x))


class Efficient(Sparse):
    """Efficient attention (arXiv 1812.01243): two softmaxes, and no product of queries and keys."""

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.q(x).softmax(-1) @ (self.k(x).softmax(1).transpose(-1, -2) @ self.v(x)))


@pytest.mark.parametrize(
    ("make", "kind"), [(SoftExperts, "moe"), (DenseExperts, "moe"), (Sparse, "attention"), (Efficient, "attention")]
)
@on_both_roads
def test_experts_and_attentions_are_told_apart(make: Callable[[], nn.Module], kind: str, road: str) -> None:
    traced = trace(ready(Stream(make(), MLP())), vectors(), road=road)

    assert [branch.kind for branch in traced.stream.branches] == [kind, "ffn"]


class Places(Stream):
    """GPT-2's embedding: which places there are is told by the size of what they are added to."""

    def __init__(self) -> None:
        super().__init__(MLP(), MLP())
        self.places = nn.Embedding(9, WIDTH)

    def start(self, x: Tensor) -> Tensor:
        return x * 1.5 + self.places(torch.arange(x.size(1)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x))


@torch.no_grad()
def test_who_only_asks_for_a_size_reads_nothing() -> None:
    model = ready(Places())
    seen: list[set[str]] = []

    for tokens in (3, 4, 5):
        x = vectors(2, tokens, WIDTH)
        assert_same((model(x),), model(x))
        seen.append({branch.name for branch in fxfuse.explain(model, x).branches})
    compiled = torch.compile(model, backend="ffnfuse", dynamic=True,
                             options={"plan": Plan(parallel=[["layers.0.body", "layers.1.body"]]),
                                      "inner": "eager"})  # fmt: skip
    x = vectors(2, 5, WIDTH)
    h = model.start(torch.tanh(x))
    assert_exact([compiled(x)], [h + model.branch(0, h) + model.branch(1, h)])  # type: ignore[operator]
    assert seen == [{"layers.0.body", "layers.1.body"}] * 3


class Mapped(nn.Module):
    """A mixer with a region of vmap in it, as an associative scan leaves one."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = self.into(x).cumsum(1)
        return self.out(torch.vmap(lambda a, b: a * torch.tanh(b))(made, x))


@torch.no_grad()
def test_nothing_moves_across_a_region_of_vmap_and_an_empty_one_is_in_nobodys_way() -> None:
    model = ready(Stream(MLP(), Mapped(), MLP(), Mapped()))
    group = [["layers.0.body", "layers.2.body"]]

    x = vectors()
    h = model.start(x)  # type: ignore[operator]
    parallel = h + model.branch(0, h) + model.branch(2, h)  # type: ignore[operator]
    assert_exact([planned(model, Plan(drop=["layers.1.body"], parallel=group))], [model.layers[3](parallel)])  # type: ignore[index]
    with pytest.raises(Exception, match="cross the border of an autocast, no_grad or vmap region"):
        planned(model, Plan(parallel=group))
