"""Tables: the candidates, the decisions of a plan, the groups that were recorded, and all scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias
from xml.etree.ElementTree import Element

from fxfuse.plan import Decision, Plan
from fxfuse.report.page.markup import e, number
from fxfuse.report.page.subject import Subject

Cell: TypeAlias = "str | Element"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], marked: Sequence[bool] = ()) -> Element:
    """A table. On narrow screens each row becomes a card, in which a cell is named by its column.

    Args:
        caption: what it shows.
        head: names of the columns.
        rows: cells, as many as columns.
        marked: for each row, whether it stands out; none does by default.
    """
    body = []
    for index, row in enumerate(rows):
        cells = [e("td", cell, data_column=name) for name, cell in zip(head, row, strict=True)]
        body.append(e("tr", *cells, class_="marked" if marked and marked[index] else None))
    titles = e("tr", *(e("th", name, scope="col") for name in head))
    whole = e("table", e("caption", caption), e("thead", titles), e("tbody", *body))
    return e("div", whole, class_="scroll")


def decisions(subject: Subject, plan: Plan) -> Element:
    """Why each edit of the plan was made or refused, in the order in which it was decided.

    Those that were refused without a measurement, of which there may be hundreds, are folded away.
    """
    title = e("h2", "Why each edit was made or refused")
    if not plan.why:
        told = "The plan does not say how it came about: it was written by hand, or saved by an older version."
        return e("section", title, e("p", told, class_="hint"))
    tried = [made for made in plan.why if made.kl is not None or made.outcome == "kept"]
    rest = [made for made in plan.why if made not in tried]
    counts = {outcome: sum(made.outcome == outcome for made in plan.why) for outcome in ("kept", "split", "refused")}
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    told += ". The score is what an edit was proposed by: a drop's score, or a group's largest mean distance."
    parts = [_decided(subject, tried)] if tried else []
    if rest:
        parts.append(e("details", e("summary", f"{len(rest)} refused without a measurement"), _decided(subject, rest)))
    return e("section", title, e("p", told), *parts)


def _decided(subject: Subject, decided: Sequence[Decision]) -> Element:
    rows: list[list[Cell]] = [
        [
            e("span", made.outcome, class_=f"outcome {made.outcome}"),
            made.edit,
            _members(subject, made.branches),
            number(made.score),
            "" if made.kl is None else number(made.kl),
            "" if made.added is None else number(made.added),
            made.why,
        ]
        for made in decided
    ]
    head = ["outcome", "edit", "branches", "score", "KL of the plan", "added KL", "why"]
    return table("In the order of deciding; KL in nats per token", head, rows)


def groups(subject: Subject) -> Element | None:
    """What became of the stream when FFNs that follow each other read one point; None if none was measured."""
    recorded = subject.recording.groups
    if not recorded:
        return None
    rows: list[list[Cell]] = [
        [
            _members(subject, group.branches),
            number(group.kl),
            number(group.mean),
            number(group.p99),
            number(group.max),
            "yes" if _planned(subject, group.branches) else "",
        ]
        for group in recorded
    ]
    head = ["FFNs in parallel", "KL", "stream off by, mean", "99th percentile", "worst token", "in the plan"]
    told = (
        "Each group alone, in the recorded model. Off by: the change of the stream after the group, relative to its "
        "length. A worst token far above the mean is a group that ruins a few tokens, which no mean distance shows."
    )
    marked = [_planned(subject, group.branches) for group in recorded]
    whole = table("KL in nats per token", head, rows, marked)
    return e("section", e("h2", "Groups that were measured"), e("p", told), _folded(len(rows), whole))


def scores(subject: Subject) -> Element:
    """All scores of all branches: the numbers of the charts."""
    recording = subject.recording
    numbers = zip(recording.kl.tolist(), recording.cosine.tolist(), recording.norm_ratio.tolist(), strict=True)
    rows: list[list[Cell]] = []
    for i, (branch, (kl, cosine, ratio)) in enumerate(zip(recording.branches, numbers, strict=True)):
        reason = "" if branch.reason == branch.kind else branch.reason
        row = [str(i), subject.short(branch.name), branch.kind, number(kl), number(cosine, 5), number(ratio)]
        rows.append([*row, f"{branch.parameters:,}", subject.edit(branch.name) or reason])
    head = ["branch", "name", "kind", "KL if dropped", "cosine of the stream", "|added| / |stream|", "parameters"]
    whole = table("KL in nats per token", [*head, "plan, or why it cannot be fused"], rows)
    return e("section", e("h2", "All scores"), e("details", e("summary", f"{len(rows)} branches"), whole))


def _folded(rows: int, whole: Element) -> Element:
    return whole if rows <= 12 else e("details", e("summary", f"{rows} groups"), whole)


def _planned(subject: Subject, branches: tuple[str, ...]) -> bool:
    return subject.plan is not None and any(set(group) == set(branches) for group in subject.plan.parallel)


def _members(subject: Subject, names: Sequence[str]) -> str:
    return " + ".join(map(subject.short, names))
