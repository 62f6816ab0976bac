"""docs/architectures.md, from the results of the zoo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

from tests.zoo.check import EXACT, OFF, Result

HEAD = """# Architectures

Written by `make zoo`. Every causal language model of transformers, and nets of other people's making, with six layers
of width 32 and random weights, in float64.

{summary}

**How each is checked.** The parts are counted twice: by rules on the names of the modules that a call runs
(`tests/zoo/anatomy.py`), and by fxfuse, which sees adds and matrix products only. Then a plan drops the attention and
the other mixers of tokens in the middle third of the layers, and more until two FFNs stand in a row, and groups what is
left there. The model compiled under it is compared with the model's own layers under hooks, which share no code with
the library (`tests/zoo/reference.py`), and compiled without a plan with the model itself. *exact* means both to 1e-8 of
the largest output; *empty plan* means that there was nothing to plan, for the reason given. Where the library refuses
the group, as that of a post-norm model whose FFNs have no stream in common, the plan only drops. Two more plans narrow
an FFN to every other unit and make an attention linear, the first that is alone in its layer; hooks take the other
units away, and give the output projection the norm's output.

Counts are *found by fxfuse / run by the modules*, shared experts among the FFNs. *Fused* says what became of the FFNs
that the plan put in parallel: `wide`, one wide FFN; `gate_up`, their projections in one GEMM; `no`, neither. *Narrow*
and *linear* say `yes` where these were compared and exact, and `no` where the library refuses them, or hooks cannot
tell. The last rows are of timm, where that is installed: `pip install --no-deps timm torchvision==0.28.0`, beside torch
2.13.
"""


def page(results: Sequence[Result]) -> str:
    """The page as Markdown."""
    built = [result for result in results if result.built]
    columns = "| net | FFN | attention | experts | fused | narrow | linear | checked | |"
    parts = [HEAD.format(summary=_summary(results, built)), columns, "|---" * 9 + "|"]
    parts += [_row(result) for result in built]
    failed = [result for result in results if not result.built]
    if failed:
        why = "A configuration made of defaults and rules on names does not give these a model."
        parts += ["", "## Not built", "", why, ""]
        parts += [f"- {result.name}: {_cell(result.failed)}" for result in failed]
    return "\n".join(parts) + "\n"


def _summary(results: Sequence[Result], built: Sequence[Result]) -> str:
    exact = [result for result in built if result.exact]
    planned = [result for result in built if result.planned_error is not None]
    members = Counter(_fate(why) for result in planned for why in (result.single or result.fused).values())
    wrong = len(built) - len(exact)
    agree = len([result for result in built if not result.miscounted])
    narrow, linear = (sum(getattr(result, edit) == EXACT for result in built) for edit in ("narrow", "linear"))
    return (
        f"**{len(built)} of {len(results)} nets built; {len(exact)} exact, {len(planned)} of them under a plan; "
        f"{wrong} not.** Of the branches that the plans put in parallel {members['wide']} became parts of wide FFNs, "
        f"{members['gate_up']} share their first GEMM, {members['no']} run side by side. "
        f"In {narrow} an FFN was narrowed, in {linear} an attention made linear. "
        f"In {agree} nets the library finds just the parts that the modules ran. "
        f"torch {version('torch')}, transformers {version('transformers')}."
    )


def _row(result: Result) -> str:
    ffns = result.kinds.get("ffn", 0) + result.kinds.get("gated_ffn", 0)
    counts = [
        f"{ffns}/{result.parts.get('ffn', 0) + result.parts.get('shared', 0)}",
        f"{result.kinds.get('attention', 0)}/{result.parts.get('attention', 0)}",
        f"{result.kinds.get('moe', 0)}/{result.parts.get('moe', 0)}",
    ]
    fates = "+".join(dict.fromkeys(_fate(why) for why in (result.single or result.fused).values())) or "-"
    edits = [
        "yes" if how == EXACT else f"**{how}**" if how.startswith(OFF) else "no"
        for how in (result.narrow, result.linear)
    ]
    return f"| {' | '.join([result.name, *counts, fates, *edits, _checked(result), _cell(_note(result))])} |"


def _fate(why: str) -> str:
    return why if why in ("wide", "gate_up") else "no"


def _checked(result: Result) -> str:
    if result.failed:
        return "**failed**"
    if not result.exact:
        return f"**wrong** ({result.empty_error:.0e}, {result.planned_error or 0:.0e})"
    return "exact" if result.planned_error is not None else "exact, empty plan"


def _note(result: Result) -> str:
    reasons = [why for why in (result.single or result.fused).values() if _fate(why) == "no"]
    mixers = result.parts.get("mixer", 0)
    notes = [
        result.failed,
        f"found {result.miscounted}" if result.miscounted else "",
        result.unplanned,
        *dict.fromkeys(reasons),
        "fused in float32 only: its norms round to float32 in any model" if result.single else "",
        f"{mixers} other mixers of tokens" if mixers else "",
        f"{result.graphs} graphs" if result.graphs > 1 else "",
    ]
    return "; ".join(note for note in notes if note)


def _cell(text: str) -> str:
    one = " ".join(text.replace("|", "/").split())
    return one if len(one) <= 240 else one[:240] + "..."
