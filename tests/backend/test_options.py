from __future__ import annotations

import os
from pathlib import Path

import pytest

from fxfuse import Plan, PlanError
from fxfuse.backend.options import Options, PlanFile
from fxfuse.errors import OptionError

PLAN = Plan(drop=["l.0.attn"])
OTHER = Plan(drop=["l.1.attn"])  # as many bytes as PLAN


class TestParse:
    def test_nothing_given_means_no_plan_and_inductor(self) -> None:
        options = Options.parse({})

        assert not options.edits
        assert (options.inner, options.weights) == ("inductor", "copy")
        assert not options.merge_gate_up
        assert not options.strict
        assert not options.verify
        assert options.max_rewrites is None

    def test_a_plan_and_the_path_of_one_are_the_same(self, tmp_path: Path) -> None:
        PLAN.save(tmp_path / "plan.json")

        for given in (PLAN, tmp_path / "plan.json", str(tmp_path / "plan.json")):
            assert Options.parse({"plan": given}).edits == PLAN

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"plann": PLAN}, ["unknown option 'plann'", "nearest: plan", "merge_gate_up"]),
            ({"triton.cudagraphs": True}, ["unknown option 'triton.cudagraphs'", "inner_options"]),
            ({"plan": {"drop": ["a"]}}, ["'plan'", "dict"]),
            ({"plan": 3}, ["'plan'", "int"]),
            ({"plan": ["a"]}, ["'plan'", "list"]),
            ({"weights": "shared"}, ["'weights'", "'copy'", "'share'", "'shared'"]),
            ({"weights": None}, ["'weights'", "None"]),
            ({"weights": ["copy"]}, ["'weights'", "['copy']"]),
            ({"merge_gate_up": 1}, ["'merge_gate_up'", "1"]),
            ({"strict": "yes"}, ["'strict'", "'yes'"]),
            ({"verify": 1}, ["'verify'", "1"]),
            ({"max_rewrites": -1}, ["'max_rewrites'", "-1"]),
            ({"max_rewrites": True}, ["'max_rewrites'", "True"]),
            ({"max_rewrites": 1.5}, ["'max_rewrites'", "1.5"]),
            ({"inner": 5}, ["'inner'", "5"]),
            ({"inner": None}, ["'inner'", "None"]),
            ({"inner_options": [1]}, ["'inner_options'", "list"]),
            ({"inner": "eager", "inner_options": {"max_autotune": True}}, ["'inner_options'", "inductor"]),
        ],
    )
    def test_an_error_names_the_option_and_what_it_takes(self, given: dict[str, object], words: list[str]) -> None:
        with pytest.raises(OptionError) as caught:
            Options.parse(given)
        assert all(word in str(caught.value) for word in words), str(caught.value)

    def test_a_plan_file_that_is_missing_or_broken_is_a_plan_error(self, tmp_path: Path) -> None:
        (tmp_path / "broken.json").write_text('{"drop":')

        for name in ("missing.json", "broken.json"):
            with pytest.raises(PlanError, match=name):
                Options.parse({"plan": str(tmp_path / name)})


class TestPlanFile:
    def test_it_equals_its_path_while_the_file_holds_the_plan(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        read = PlanFile(path)

        assert read == str(path)
        assert read == path
        assert read != str(tmp_path / "other.json")
        assert read != 3

    def test_it_equals_its_path_no_more_once_the_file_has_changed_even_to_as_many_bytes(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        read = PlanFile(path)
        OTHER.save(path)

        assert read != str(path)
        assert read.plan == PLAN
        assert read != PlanFile(path)

    def test_it_equals_its_path_again_once_the_file_is_as_it_was(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        read = PlanFile(path)
        OTHER.save(path)
        assert read != str(path)
        PLAN.save(path)

        assert read == str(path)
        assert read == PlanFile(path)
        assert hash(read) == hash(PlanFile(path))

    def test_a_file_that_was_only_touched_has_not_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        read = PlanFile(path)
        os.utime(path, ns=(1, 1))

        assert read == str(path)

    def test_one_of_the_same_length_and_time_has_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        read, time = PlanFile(path), path.stat().st_mtime_ns
        OTHER.save(path)
        os.utime(path, ns=(time, time))  # as rsync -t, tar and container layers leave it

        assert read != str(path)

    def test_so_has_one_that_was_rewritten_where_it_lies(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        read, found = PlanFile(path), path.stat()
        path.write_bytes(path.read_bytes().replace(b"l.0.attn", b"l.1.attn"))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

        assert path.stat().st_ino == found.st_ino
        assert read != str(path)

    def test_a_file_that_has_gone_has_changed(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        PLAN.save(path)
        read = PlanFile(path)
        path.unlink()

        assert read != str(path)
