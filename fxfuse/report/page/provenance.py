"""Where the numbers of a page come from."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from fxfuse.report.page.markup import e
from fxfuse.report.page.subject import Subject

UNKNOWN = "not recorded"


def section(subject: Subject) -> Element:
    """The model, the text and the software that a recording was made of, and the plan it was made under."""
    recording = subject.recording
    facts = {
        "model, names and shapes": recording.model.get("shapes", UNKNOWN),
        "model, weights": recording.model.get("weights", UNKNOWN),
        "tokens": f"{recording.tokens:,}",
        "recorded on": recording.made.get("date", UNKNOWN),
        "by": ", ".join(f"{name} {version}" for name, version in recording.made.items() if name != "date") or UNKNOWN,
        "recorded under": _edits(subject),
    }
    if subject.plan is not None:
        facts["plan"] = subject.plan.digest
    pairs = [e("div", e("dt", name), e("dd", fact)) for name, fact in facts.items()]
    told = "Digests are SHA-256; fxfuse checks those of the model before it uses a recording."
    return e("section", e("h2", "Provenance"), e("dl", *pairs), e("p", told, class_="hint"))


def _edits(subject: Subject) -> str:
    plan = subject.recording.plan
    if not plan:
        return "no plan"
    told = [f"{len(plan.drop)} drops"] * bool(plan.drop) + [f"{len(plan.linear)} linear"] * bool(plan.linear)
    told += [f"{len(plan.narrow)} narrowed"] * bool(plan.narrow)
    return ", ".join([*told, *[f"{len(plan.parallel)} groups"] * bool(plan.parallel)])
