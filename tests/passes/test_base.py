"""The report that passes return."""

from __future__ import annotations

from fxfuse.passes import Edit, PassReport


def test_a_report_is_true_if_something_was_done_and_reads_like_a_list() -> None:
    report = PassReport("drop")
    assert not report
    report.refused.append(Edit(("a", "b"), "fuse", "they differ"))
    assert not report
    report.done.append(Edit(("c",), "dropped"))
    assert report
    assert str(report) == "drop: 1 done, 1 refused\n  dropped c\n  refused: fuse a + b: they differ"
    assert report.done == [Edit(("c",), "dropped", "")]
