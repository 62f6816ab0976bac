"""What a log sees of steps that take long, and that nothing is written while something is timed."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest
from rich.console import Console

from fxfuse._common import progress
from fxfuse._common.progress import bar


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.05)


class TestWithoutATerminal:
    def test_one_long_call_shows_that_it_lives(self, capsys: pytest.CaptureFixture[str]) -> None:
        with bar("compiling", "programs", 10, True) as advance:
            advance(3)
            time.sleep(0.3)
            first, second, *_ = capsys.readouterr().err.splitlines()  # while it goes on

        assert re.fullmatch(r"compiling: 3 of 10 programs, 0:00, about 0:0\d left", first)
        assert second.startswith("compiling: 3 of 10 programs")

    def test_what_is_left_is_what_the_rest_takes_at_this_pace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step = progress._Step("recording", "tokens", 4096, done=1024, began=0.0)
        monkeypatch.setattr(time, "monotonic", lambda: 1300.0)

        assert str(step) == "recording: 1,024 of 4,096 tokens, 21:40, about 1:05:00 left"

    def test_of_an_unknown_total_no_time_is_promised(self, capsys: pytest.CaptureFixture[str]) -> None:
        with bar("planning", "plans", None, True) as advance:
            advance(2)
            time.sleep(0.1)

        assert capsys.readouterr().err.splitlines()[0] == "planning: 2 plans, 0:00"

    def test_a_step_within_a_step_stands_on_its_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with bar("planning", "plans", None, True), bar("evaluating", "tokens", 8, True) as advance:
            advance(8)
            time.sleep(0.1)

        assert capsys.readouterr().err.splitlines()[0] == "planning: 0 plans, 0:00; evaluating: 8 of 8 tokens, 0:00"

    def test_many_short_steps_within_a_long_one_are_no_silence(self, capsys: pytest.CaptureFixture[str]) -> None:
        with bar("planning", "plans", None, True):
            for _ in range(10):
                with bar("evaluating", "tokens", 8, True):
                    time.sleep(0.02)

        assert len(capsys.readouterr().err.splitlines()) >= 3

    @pytest.mark.parametrize(("shown", "seconds"), [(False, 0.1), (True, 0.0)])
    def test_nothing_is_written_of_what_is_hidden_or_short(
        self, capsys: pytest.CaptureFixture[str], shown: bool, seconds: float
    ) -> None:
        with bar("evaluating", "tokens", 8, shown) as advance:
            advance(8)
            time.sleep(seconds)

        assert capsys.readouterr().err == ""

    def test_while_something_is_timed_only_the_end_of_a_unit_writes(self, capsys: pytest.CaptureFixture[str]) -> None:
        threads = threading.active_count()
        with bar("timing", "rounds", 9, True, still=True) as advance:
            assert threading.active_count() == threads
            time.sleep(0.1)
            assert capsys.readouterr().err == ""
            advance(1)
            assert capsys.readouterr().err.startswith("timing: 1 of 9 rounds")

    def test_an_error_inside_ends_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        threads = threading.active_count()
        with pytest.raises(KeyError), bar("evaluating", "tokens", 8, True):
            raise KeyError

        assert threading.active_count() == threads
        with bar("recording", "tokens", 8, True):
            time.sleep(0.1)
        assert "evaluating" not in capsys.readouterr().err


@pytest.mark.parametrize("still", [False, True])
def test_in_a_terminal_steps_are_bars_that_go_away(monkeypatch: pytest.MonkeyPatch, still: bool) -> None:
    screen = io.StringIO()

    def terminal(**_: object) -> Console:
        return Console(file=screen, force_terminal=True, width=100, _environ={"TERM": "xterm"})

    monkeypatch.setattr(progress, "Console", terminal)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with bar("planning", "plans", None, True, still), bar("evaluating", "tokens", 8, True) as advance:
        advance(8)
        time.sleep(0.2 if not still else 0.0)

    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "planning" in shown
    assert "8/8 tokens" in shown
    assert screen.getvalue().endswith("\x1b[2K\x1b[?25h\r")  # the lines are cleared, and the cursor is back
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]  # it is a StringIO
