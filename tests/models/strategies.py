"""Hypothesis strategies: random residual models, and random plans that a model may or may not follow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar, get_args

import torch
from hypothesis import strategies as st

from tests.models import spec as s
from tests.models.edits import Edit, Place

T = TypeVar("T")
SCALES = (0.7, 0.22, -1.0, 1.0, 2.0)
SWIGLU_ACTIVATIONS: tuple[s.Activation, ...] = ("silu", "silu_module", "silu_sigmoid")
SWIGLU_LAYOUTS: tuple[s.Layout, ...] = (
    "separate", "gate_up_chunk", "up_gate_chunk", "gate_up_split", "gate_up_slice",
)  # fmt: skip


def mostly(common: T, others: tuple[T, ...]) -> st.SearchStrategy[T]:
    """The common value about half of the time, so that most models stay recognisable."""
    return st.one_of(st.just(common), st.sampled_from(others))


def edits(places: tuple[Place, ...]) -> st.SearchStrategy[tuple[Place, Edit] | None]:
    """An edit in place in about one body of four."""
    edit = st.tuples(st.sampled_from(places), st.sampled_from(get_args(Edit)))
    return st.one_of(st.none(), st.none(), st.none(), edit)


def norms() -> st.SearchStrategy[s.Norm]:
    return st.builds(s.Norm, kind=st.sampled_from(get_args(s.NormKind)), eps=st.sampled_from((1e-5, 1e-6, 1e-2)))


def gated_ffns() -> st.SearchStrategy[s.FFN]:
    """Gated bodies; half of the layouts and activations drawn are ones that a wide FFN can hold."""
    return st.builds(
        s.FFN,
        hidden=st.sampled_from((1, 5, 8, 11)),
        layout=mostly("separate", get_args(s.Layout)),
        activation=mostly("silu", get_args(s.Activation)),
        up_first=st.booleans(),
        bias=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        gate_scale=mostly(None, (0.5, -1.0)),
        inner_norm=mostly(False, (False, False, True)),
        flat=st.booleans(),
        twist=mostly("none", get_args(s.Twist)),
    )


def plain_ffns() -> st.SearchStrategy[s.FFN]:
    return st.builds(
        s.FFN,
        hidden=st.sampled_from((1, 5, 8, 11)),
        gated=st.just(False),
        activation=st.sampled_from(get_args(s.Activation)),
        bias=st.tuples(st.just(False), st.booleans(), st.booleans()),
        flat=st.booleans(),
    )


@st.composite
def attentions(draw: st.DrawFn, width: int) -> s.Attention:
    heads = draw(st.sampled_from([n for n in (1, 2, 4, 7) if width % n == 0]))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4, 7) if heads % n == 0]))
    return s.Attention(heads, kv_heads, draw(st.booleans()), draw(st.booleans()), draw(st.booleans()))


def mixers() -> st.SearchStrategy[s.Mixer]:
    return st.builds(s.Mixer, st.sampled_from(("conv", "shift", "cumulative")))


@st.composite
def branches(draw: st.DrawFn, attribute: str, body: s.Body, house_norm: s.Norm) -> s.Branch:
    """A branch; most read the house norm, as the layers of one model do."""
    return s.Branch(
        attribute,
        body,
        norm=draw(st.one_of(st.just(house_norm), st.just(house_norm), norms())),
        scale=draw(mostly(None, SCALES)),
        scale_form=draw(st.sampled_from(("f*s", "s*f", "f/q", "torch.mul"))),
        dropout=draw(mostly("none", ("module", "functional", "p=0"))),
        post_norm=draw(mostly(False, (False, False, True))),
        gain=draw(mostly("none", ("none", "channel", "scalar"))),
    )


@st.composite
def edited_branches(draw: st.DrawFn, branch: s.Branch, shared_norm: bool) -> s.Branch:
    """``branch``, perhaps with an edit in place of what it contributes, and of a value inside an FFN.

    Not of an input that others read too: which of them see the edit depends on an order that a plan changes.
    """
    contribution = draw(mostly(None, (None, *get_args(Edit))))
    if not isinstance(branch.body, s.FFN):
        return replace(branch, edit=contribution)
    own = branch.norm.kind != "none" and not shared_norm
    places = tuple(place for place in get_args(Place) if own or place != "input")
    return replace(branch, edit=contribution, body=replace(branch.body, edit=draw(edits(places))))


LAYER_SHAPES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("attn",), ("mlp",)),
    (("mlp",),),
    (("attn", "mlp"),),
    (("mlp",), ("mlp2",)),
    (("attn",), ("mlp",), ("mlp2",)),
    (("mixer",), ("mlp",)),
    (("attn",),),
    (("attn", "mixer", "mlp"),),
    (("mlp", "mlp2"),),
)


def factors() -> st.SearchStrategy[st.SearchStrategy[s.Factor]]:
    """From what the sums of a model draw their factors: two models in three have none."""
    none: st.SearchStrategy[s.Factor] = st.just("none")
    return st.sampled_from((none, none, st.sampled_from(get_args(s.Factor))))


@st.composite
def layers(
    draw: st.DrawFn, width: int, house_norm: s.Norm, in_place: bool, factor: st.SearchStrategy[s.Factor]
) -> s.Layer:
    sums = []
    for attributes in draw(st.sampled_from(LAYER_SHAPES)):
        members = []
        for attribute in attributes:
            body = attentions(width) if attribute == "attn" else mixers()
            if attribute.startswith("mlp"):
                body = st.one_of(gated_ffns(), gated_ffns(), plain_ffns())
            members.append(draw(branches(attribute, draw(body), house_norm)))
        shared = len(members) > 1 and draw(st.booleans())
        if in_place:
            members = [draw(edited_branches(member, shared)) for member in members]
        forms = s.ONE_BRANCH_FORMS if len(members) == 1 else s.SEVERAL_BRANCH_FORMS
        form = draw(st.sampled_from([f for f in forms if in_place or f not in s.IN_PLACE_FORMS]))
        scale = draw(st.sampled_from((-1.0, -0.7))) if form == "h-f" else draw(mostly(None, SCALES))
        sums.append(s.Sum(tuple(members), form, scale, shared, draw(factor), draw(factor)))
    return s.Layer(tuple(sums))


@st.composite
def residual_models(
    draw: st.DrawFn,
    dtype: torch.dtype = torch.float64,
    max_layers: int = 6,
    in_place: bool = True,
) -> s.Model:
    """Any model of the family. With ``in_place=False`` no sum overwrites the stream, as training needs."""
    width = draw(st.sampled_from((6, 7, 16, 24)))
    house_norm = draw(norms())
    depth, factor = draw(st.integers(1, max_layers)), draw(factors())
    model = s.Model(
        width=width,
        layers=tuple(draw(layers(width, house_norm, in_place, factor)) for _ in range(depth)),
        batch=draw(st.integers(1, 3)),
        length=draw(st.integers(1, 5)),
        dtype=dtype,
        cast=draw(mostly("none", ("explicit", "implicit"))),
        front=draw(st.sampled_from(("float", "scaled", "projection", "embedding", "embedding+position"))),
        taps=draw(mostly("none", ("layers", "sums", "pooled"))),
        head=draw(st.sampled_from(("none", "norm", "norm+linear"))),
        seed=draw(st.integers(0, 2**16)),
    )
    if model.in_place and model.front == "float":  # would overwrite the caller's input
        model = replace(model, front="scaled")
    return model


@st.composite
def swiglu_models(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> s.Model:
    """Attention and SwiGLU layers of one norm: what a wide FFN must be able to hold, in any of its spellings."""
    activation = draw(st.sampled_from(SWIGLU_ACTIVATIONS))
    width = draw(st.sampled_from((6, 7, 16, 24)))
    norm = s.Norm(draw(st.sampled_from(("rms_hf", "rms_functional", "rms_module", "rms_rsqrt"))), 1e-5)
    made, factor = [], draw(factors())
    for _ in range(draw(st.integers(2, 5))):
        ffn = s.FFN(
            hidden=draw(st.sampled_from((1, 5, 8, 11))),
            layout=draw(st.sampled_from(SWIGLU_LAYOUTS)),
            activation=activation,
            up_first=draw(st.booleans()),
            bias=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
            flat=draw(st.booleans()),
        )
        mlp = s.Branch("mlp", ffn, norm, scale=draw(mostly(None, SCALES)))
        form = draw(st.sampled_from([f for f in s.ONE_BRANCH_FORMS if f not in s.IN_PLACE_FORMS and f != "h-f"]))
        attention = s.Sum((s.Branch("attn", draw(attentions(width)), norm),), before=draw(factor), after=draw(factor))
        has_attention = draw(st.booleans())
        made.append(
            s.Layer((attention,) * has_attention + (s.Sum((mlp,), form, before=draw(factor), after=draw(factor)),))
        )
    return s.Model(
        width, tuple(made), draw(st.integers(1, 3)), draw(st.integers(1, 5)), dtype,
        front="embedding", seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@dataclass(frozen=True)
class PlanSpec:
    """The lists of a plan, without the library's class, so that the reference can read them."""

    drop: tuple[str, ...] = ()
    parallel: tuple[tuple[str | tuple[str, ...], ...], ...] = ()
    linear: tuple[str, ...] = ()
    narrow: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def as_lists(self) -> dict[str, object]:
        groups: list[object] = [[m if isinstance(m, str) else list(m) for m in group] for group in self.parallel]
        narrow = {name: list(units) for name, units in self.narrow}
        return {"drop": list(self.drop), "linear": list(self.linear), "narrow": narrow, "parallel": groups}


@st.composite
def members(draw: st.DrawFn, names: list[str]) -> tuple[str | tuple[str, ...], ...]:
    """``names``, in stream order, dealt to at least two members of one group; the members come in any order."""
    hands = list(range(len(names)))
    if draw(st.booleans()):  # private sequences
        hands = [0, 1, *(draw(st.integers(0, 2)) for _ in names[2:])]
        hands = draw(st.permutations(hands))
    sequences = [tuple(n for n, hand in zip(names, hands, strict=True) if hand == i) for i in range(len(names))]
    dealt = [sequence[0] if len(sequence) == 1 else sequence for sequence in sequences if sequence]
    return tuple(draw(st.permutations(dealt)))


@st.composite
def layer_pairs(draw: st.DrawFn, spec: s.Model, style: str) -> list[tuple[str | tuple[str, ...], ...]]:
    """Two or three layers that follow each other: their branches pairwise (Layer Parallelism), or the whole blocks."""
    first = draw(st.integers(0, len(spec.layers) - 2))
    chosen = range(first, min(first + draw(st.integers(2, 3)), len(spec.layers)))
    blocks = [tuple(b.name for b in spec.branches if b.layer == i) for i in chosen]
    if style == "blocks":
        return [tuple(blocks)]
    attributes = sorted({name.rsplit(".", 1)[1] for block in blocks for name in block})
    pairs = [tuple(n for block in blocks for n in block if n.endswith(f".{attribute}")) for attribute in attributes]
    return [pair for pair in pairs if len(pair) > 1]


@st.composite
def legal_plans(draw: st.DrawFn, spec: s.Model) -> PlanSpec:
    """Any drops and groups; some of the attentions that are left made linear, some of the FFNs narrowed."""
    plan = draw(drops_and_groups(spec))
    attentions = [b.name for b in spec.branches if b.kind == "attention" and b.name not in plan.drop]
    linear = draw(st.lists(st.sampled_from(attentions), unique=True)) if attentions and draw(st.booleans()) else []
    return draw(narrowed(spec, replace(plan, linear=tuple(linear))))


@st.composite
def narrowed(draw: st.DrawFn, spec: s.Model, plan: PlanSpec) -> PlanSpec:
    """The plan with some of its FFNs narrowed, in a group or not, of those that keep their hidden units apart."""
    bodies = {
        f"layers.{i}.{branch.attribute}": branch.body
        for i, _, item in spec.sums()
        for branch in item.branches
        if has_units(branch)
    }
    names = [name for name in bodies if name not in plan.drop]
    chosen = draw(st.lists(st.sampled_from(names), unique=True)) if names and draw(st.booleans()) else []
    made = []
    for name in chosen:
        body = bodies[name]
        assert isinstance(body, s.FFN)
        units = draw(st.sets(st.integers(0, body.hidden - 1), min_size=1))
        made.append((name, tuple(sorted(units))))
    return replace(plan, narrow=tuple(made))


def has_units(branch: s.Branch) -> bool:
    """Whether a branch is ``down(f(projections of one input))`` and nothing else, gains and numbers of it aside."""
    body = branch.body
    if not isinstance(body, s.FFN) or branch.edit is not None or branch.post_norm:
        return False
    return body.edit is None and not body.inner_norm and body.twist in ("none", "self_gate", "clamp", "transposed")


@st.composite
def drops_and_groups(draw: st.DrawFn, spec: s.Model) -> PlanSpec:
    """Drops, and groups of one kind, of mixed kinds, of layer pairs, of private sequences, near or far apart."""
    names = [b.name for b in spec.branches]
    style = draw(st.sampled_from(("any", "ffns", "attention", "pairs", "blocks")))
    if style in ("pairs", "blocks") and len(spec.layers) > 1:
        parallel = draw(layer_pairs(spec, style))
        used = {n for group in parallel for m in group for n in ([m] if isinstance(m, str) else m)}
        rest = [n for n in names if n not in used]
        drop = draw(st.lists(st.sampled_from(rest), unique=True, max_size=2)) if rest else []
        return PlanSpec(tuple(drop), tuple(parallel))
    kinds = {"ffns": ("gated", "plain"), "attention": ("attention",)}.get(style, get_args(s.Kind))
    labels = {n: draw(st.sampled_from(("keep", "drop", "group", "group", "other group"))) for n in names}
    drop = [n for n in names if labels[n] == "drop"]
    parallel = []
    for label in ("group", "other group"):
        held = [b.name for b in spec.branches if labels[b.name] == label and b.kind in kinds]
        if len(held) > 1:
            parallel.append(draw(members(held)))
    return PlanSpec(tuple(draw(st.permutations(drop))), tuple(draw(st.permutations(parallel))))


@st.composite
def fusing_plans(draw: st.DrawFn, spec: s.Model) -> PlanSpec:
    """FFN Fusion as the paper does it: a run of FFNs in parallel, the attentions between them dropped or kept."""
    ffns = [b.name for b in spec.branches if b.kind == "gated"]
    first = draw(st.integers(0, len(ffns) - 2))
    run = ffns[first : draw(st.integers(first + 2, len(ffns)))]
    attentions = [b.name for b in spec.branches if b.kind == "attention"]
    drop = draw(st.lists(st.sampled_from(attentions), unique=True)) if attentions else []
    return draw(narrowed(spec, PlanSpec(tuple(drop), (tuple(run),))))


@dataclass(frozen=True)
class Illegal:
    """A plan that no model may follow, and the words that its error must hold."""

    drop: list[object]
    parallel: list[object]
    quoted: str
    linear: list[object] = field(default_factory=list)
    narrow: object = field(default_factory=dict)


@st.composite
def malformed_plans(draw: st.DrawFn) -> Illegal:
    """Plans that contradict themselves: known without a model."""
    a, b, c = draw(st.permutations([f"layers.{i}.{name}" for i in range(3) for name in ("attn", "mlp")]))[:3]
    return draw(
        st.sampled_from(
            [
                Illegal([a, b, a], [], a),
                Illegal([b], [[c, b]], b),
                Illegal([b], [[a, [c, b]]], b),
                Illegal([], [[a, b], [c, b]], b),
                Illegal([], [[a, b, a]], a),
                Illegal([], [[[a, b], a]], a),
                Illegal([], [[[a, b], [c, b]]], b),
                Illegal([], [[a, b], [c]], "parallel[1]"),
                Illegal([], [[[a, b, c]]], "parallel[0]"),
                Illegal([], [[]], "parallel[0]"),
                Illegal([], [[a, []]], "parallel[0]"),
                Illegal([""], [[a, b]], "drop[0]"),
                Illegal([a, 7], [], "drop"),
                Illegal([], [[a, [b, [c]]]], "parallel[0]"),
                Illegal([a, b], [], b, linear=[c, b]),
                Illegal([], [], a, linear=[a, c, a]),
                Illegal([], [[a, b], [c, a]], a, linear=[a]),
                Illegal([], [], "linear[1]", linear=[b, " "]),
                Illegal([], [], "linear[0]", linear=[[b]]),
                Illegal([a, b], [], b, narrow={c: [0], b: [1]}),
                Illegal([], [], a, linear=[b, a], narrow={a: [1]}),
                Illegal([], [], a, narrow={a: []}),
                Illegal([], [], "-1", narrow={a: [3, -1]}),
                Illegal([], [], "unit 3 is there twice", narrow={a: [3, 1, 3]}),
                Illegal([], [], "1.5", narrow={a: [1.5]}),
                Illegal([], [], "'a-b'", narrow={a: "0-3,a-b"}),
                Illegal([], [], "'3-0'", narrow={a: "3-0"}),
                Illegal([], [], "base64", narrow={a: "base64:?"}),
                Illegal([], [], "narrow is", narrow=[a]),
                Illegal([], [], "empty name", narrow={" ": [1]}),
            ]
        )
    )


@st.composite
def misspelt_plans(draw: st.DrawFn, spec: s.Model) -> Illegal:
    """A group of which one name is a slip of the pen away from a branch's."""
    names = [b.name for b in spec.branches]
    right, other = draw(st.permutations(names))[:2]
    slips = (f"{right}s", right[:-1], f"model.{right}", right.replace("layers", "layer"))
    slip = draw(st.sampled_from([s for s in slips if s not in names]))  # "mlp2" is a slip away from "mlp"
    member = draw(st.sampled_from((slip, [slip])))
    return Illegal([], [draw(st.permutations([other, member]))], slip)
