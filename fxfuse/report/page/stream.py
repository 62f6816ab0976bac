"""The plan, drawn over the stream of branches: what leaves, what becomes linear, and what stands side by side."""

from __future__ import annotations

from itertools import groupby
from xml.etree.ElementTree import Element

from fxfuse.measure.recording import BranchRecord
from fxfuse.plan import Group, Plan, flat
from fxfuse.report.page.markup import e
from fxfuse.report.page.subject import LETTERS, WORDS, Subject


def section(subject: Subject, plan: Plan) -> Element:
    """Each stream from its beginning to its end, as it runs under the plan."""
    streams = sorted({branch.stream for branch in subject.recording.branches})
    parts: list[Element] = []
    for stream in streams:
        parts += [e("h3", f"stream {stream}")] if len(streams) > 1 else []
        parts.append(_stream(subject, plan, stream))
    return e("section", e("h2", "The plan"), e("p", _summary(subject, plan)), _legend(subject), *parts)


def _summary(subject: Subject, plan: Plan) -> str:
    edits = [f"{len(plan.drop)} dropped"] * bool(plan.drop) + [f"{len(plan.linear)} made linear"] * bool(plan.linear)
    edits += [f"{len(plan.narrow)} narrowed"] * bool(plan.narrow)
    if plan.parallel:
        members, groups = sum(len(flat(group)) for group in plan.parallel), len(plan.parallel)
        edits.append(f"{members} in {groups} group{'s' * (groups > 1)} in parallel")
    told = f"Of {len(subject.recording.branches)} branches, {', '.join(edits) or 'none is edited'}. "
    told += "The stream runs from left to right; a group stands where its first member stood. "
    named = subject.numbers != [str(index) for index in range(len(subject.numbers))]
    told += f"Numbers are {'those that names begin with' if named else 'places in the stream'}."
    known = {branch.name for branch in subject.recording.branches}
    if before := [name for name in plan.drop if name not in known]:
        told += f" Dropped before the recording, so not drawn: {', '.join(map(subject.short, before))}."
    return told


def _legend(subject: Subject) -> Element:
    letters = dict.fromkeys(LETTERS[branch.kind] for branch in subject.recording.branches)
    entries = [_entry(f"{letter}", f"kind-{letter}", WORDS[letter]) for letter in letters]
    entries.append(_entry("A", "kind-A dropped", "dropped"))
    if any(subject.linear(branch.name) for branch in subject.recording.branches):
        entries.append(_entry("A", "kind-A linear", "made linear"))
    return e("ul", *entries, class_="legend")


def _entry(letter: str, class_: str, words: str) -> Element:
    return e("li", e("span", e("b", letter), class_=f"branch {class_}", aria_hidden="true"), words)


def _stream(subject: Subject, plan: Plan, stream: int) -> Element:
    """The steps of one stream, in order; a group is one step, where its first member stood."""
    groups = {name: number for number, group in enumerate(plan.parallel) for name in flat(group)}
    records = {branch.name: branch for branch in subject.recording.branches}
    steps: list[Element] = []
    drawn: set[int] = set()
    in_stream = [branch for branch in subject.recording.branches if branch.stream == stream]
    for _, level in groupby(in_stream, lambda branch: branch.adds):
        alone = []
        for branch in level:
            number = groups.get(branch.name)
            if number is None:
                alone.append(_branch(subject, branch))
            elif number not in drawn:
                drawn.add(number)
                steps.append(_group(subject, number, plan.parallel[number], records))
        if alone:
            steps.append(e("li", *alone, class_="sum" if len(alone) > 1 else None))
    return e(
        "ol",
        *steps,
        class_="stream",
        data_marks=True,
        aria_label="The stream under the plan; arrow keys move along it",
    )


def _group(subject: Subject, number: int, group: Group, records: dict[str, BranchRecord]) -> Element:
    """A wide box with the members side by side; a private sequence is a chain within it."""
    members: list[Element] = []
    for member in group:
        names = (member,) if isinstance(member, str) else member
        drawn = [_branch(subject, records[name]) for name in names if name in records]
        members += drawn if isinstance(member, str) else [e("span", *drawn, class_="sequence")]
    plain = [member for member in group if isinstance(member, str)]
    width = sum(subject.width(name) for name in plain if name in records) if len(plain) == len(group) else 0
    words = f"{len(group)} side by side" + (f", {width:,} hidden units" if width else "")
    title = f"group {number}: {words}"
    told = "\n".join([title, *(" then ".join((m,) if isinstance(m, str) else m) for m in group)])
    heading = e("span", title, class_="title", **_mark(told))
    return e("li", heading, e("span", *members, class_="members"), class_="group")


def _branch(subject: Subject, branch: BranchRecord) -> Element:
    letter = LETTERS[branch.kind]
    classes = f"branch kind-{letter}"
    classes += " dropped" * subject.dropped(branch.name) + " linear" * subject.linear(branch.name)
    number = subject.numbers[subject.recording.index(branch.name)]
    return e("span", e("b", letter), number, class_=classes, **_mark(subject.describe(branch)))


def _mark(told: str) -> dict[str, str]:
    return {"data_mark": "", "tabindex": "-1", "role": "img", "aria_label": told}
