"""The page: its sections in order, with style, script and data inside, so that it is one file and asks no network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable
from importlib import resources
from xml.etree.ElementTree import Element

from fxfuse._common.files import write_atomically
from fxfuse.errors import OptionError
from fxfuse.measure.recording import Recording
from fxfuse.plan import Plan
from fxfuse.report.page import colours, depth, matrix, pareto, provenance, stream, tables
from fxfuse.report.page.markup import e, html, raw
from fxfuse.report.page.results import Result
from fxfuse.report.page.subject import LETTERS, WORDS, Subject

TITLE = "fxfuse: what depends on what"


def save_report(
    recording: Recording, path: str | os.PathLike[str], plan: Plan | None = None, results: Iterable[Result] = ()
) -> None:
    """Write the page of :func:`render` to ``path``, atomically.

    Raises:
        PlanError: the plan names a branch that the recording has not.
        OSError: the file cannot be written.
    """
    write_atomically(path, render(recording, plan, results).encode())


def render(recording: Recording, plan: Plan | None = None, results: Iterable[Result] = ()) -> str:
    """One HTML page of all that is known: it needs nothing else, and runs no script but its own.

    Args:
        recording: of a model: the dependency matrix, the scores, the groups that were measured.
        plan: for that model: drawn over its branches, with the reasons of its decisions.
        results: of a search: drawn by latency and KL. See :func:`fxfuse.report.page.load_results`.

    Raises:
        PlanError: the plan names a branch that the recording has not.
        OptionError: the recording has no branches.
    """
    if not recording.branches:
        raise OptionError("the recording has no branches, so there is nothing to show")
    subject = Subject(recording, plan, tuple(results))
    body = e("body", e("header", e("h1", TITLE), e("p", _summary(subject))), e("main", *_sections(subject)))
    body.append(e("div", id="tip", role="status", hidden=True))
    body.append(raw("script", _json(matrix.data(subject)), type="application/json", id="distances"))
    body.append(raw("script", _asset("page.js")))
    return f"<!DOCTYPE html>\n{html(e('html', _head(), body, lang='en'))}\n"


def _sections(subject: Subject) -> list[Element | None]:
    plan, results = subject.plan, subject.results
    return [
        stream.section(subject, plan) if plan is not None else None,
        pareto.section(results) if results else None,
        matrix.section(subject),
        depth.section(subject),
        tables.groups(subject),
        tables.decisions(subject, plan) if plan is not None else None,
        tables.scores(subject),
        provenance.section(subject),
    ]


def _head() -> Element:
    """The policy lets the page's own script run, by its digest, and no other; nothing is loaded from anywhere."""
    digest = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return e(
        "head",
        e("meta", charset="utf-8"),
        e("meta", http_equiv="Content-Security-Policy", content=policy),
        e("meta", name="viewport", content="width=device-width, initial-scale=1"),
        e("meta", name="color-scheme", content="light dark"),
        e("title", TITLE),
        raw("style", _asset("page.css") + colours.rules()),
    )


def _summary(subject: Subject) -> str:
    letters = [LETTERS[branch.kind] for branch in subject.recording.branches]
    kinds = ", ".join(f"{letters.count(letter)} {WORDS[letter]}" for letter in dict.fromkeys(letters))
    told = f"{len(letters)} branches ({kinds}), measured on {subject.recording.tokens:,} tokens."
    return told + (f" All names begin with {subject.prefix}, which is left out." if subject.prefix else "")


def _json(data: object) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files("fxfuse.report.page") / name).read_text(encoding="utf-8")
