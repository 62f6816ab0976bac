from __future__ import annotations

import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fxfuse import Plan, PlanError
from fxfuse.plan import Decision, flat
from tests.models.tiny import Counter, Tower, vectors

PLANS = [
    Plan(),
    Plan(drop=["l.0.attn"]),
    Plan(parallel=[["l.0.mlp", "l.1.mlp"]]),
    Plan(drop=["l.3.attn", "@7"], parallel=[["l.0.mlp", "l.1.mlp", "l.2.mlp"], [["l.4.attn", "l.4.mlp"], "l.5.mlp"]]),
    Plan(drop=['l."quoted".\u00e9\u4e2d']),
    Plan(drop=["l.0.attn"], linear=["l.1.attn", "l.2.attn"], parallel=[["l.1.mlp", "l.2.attn", "l.2.mlp"]]),
    Plan(narrow={"l.1.mlp": [5, 0, 1], "l.4.mlp": range(0, 900, 2)}, parallel=[["l.1.mlp", "l.2.mlp"]]),
]


class TestValidation:
    @pytest.mark.parametrize(
        ("entries", "words"),
        [
            ({"drop": ["a", "b", "a"]}, ["'a'", "drop[0]", "drop[2]"]),
            ({"drop": ["a"], "parallel": [["b", "c"], ["d", "a"]]}, ["'a'", "drop[0]", "parallel[1]"]),
            ({"parallel": [["a", "b"], ["b", "c"]]}, ["'b'", "parallel[0]", "parallel[1]"]),
            ({"parallel": [["a", "a"]]}, ["'a'", "parallel[0]"]),
            ({"parallel": [[["a", "a"], "b"]]}, ["'a'", "parallel[0]"]),
            ({"parallel": [["a", "b"], ["c"]]}, ["parallel[1]", "1 member", "at least two"]),
            ({"parallel": [[]]}, ["parallel[0]", "0 member"]),
            ({"parallel": [["a", "b"], ["c", []]]}, ["parallel[1]", "empty private sequence"]),
            ({"drop": ["a"], "linear": ["b", "a"]}, ["'a'", "drop[0]", "linear[1]"]),
            ({"linear": ["a", "a"]}, ["'a'", "linear[0]", "linear[1]"]),
            ({"linear": ["a"], "parallel": [["a", "b"], ["c", "a"]]}, ["'a'", "parallel[0]", "parallel[1]"]),
            ({"linear": ["a"], "parallel": [["a", "a"]]}, ["'a'", "parallel[0]"]),
            ({"linear": [""]}, ["linear[0]", "empty name"]),
            ({"linear": "l.0.attn"}, ["linear", "l.0.attn"]),
            ({"linear": [["a", "b"]]}, ["linear[0]", "a"]),
            ({"drop": ["a"], "narrow": {"b": [0], "a": [1]}}, ["'a'", "drop[0]", "narrow"]),
            ({"linear": ["a"], "narrow": {"a": [1]}}, ["'a'", "linear[0]", "narrow"]),
            ({"narrow": {"a": []}}, ["narrow['a']", "no hidden unit", "drop the FFN"]),
            ({"narrow": {"a": [1, 1]}}, ["narrow['a']", "unit 1 is there twice"]),
            ({"narrow": {"a": [-1]}}, ["narrow['a']", "-1"]),
            ({"narrow": {"a": "0-x"}}, ["narrow['a']", "'0-x'"]),
            ({"narrow": {"a": 3}}, ["narrow['a']", "3"]),
            ({"narrow": {"": [3]}}, ["empty name"]),
            ({"narrow": ["a"]}, ["narrow is", "'a'"]),
            ({"drop": ["a", ""]}, ["drop[1]", "empty name"]),
            ({"drop": [" "]}, ["drop[0]", "empty name"]),
            ({"parallel": [["a", ""]]}, ["parallel[0]", "empty name"]),
            ({"drop": ["a", 3]}, ["drop[1]", "3"]),
            ({"drop": [None]}, ["drop[0]", "None"]),
            ({"drop": "l.0.attn"}, ["drop", "l.0.attn"]),
            ({"drop": {"a": 1}}, ["drop", "'a'"]),
            ({"parallel": ["l.0.mlp", "l.1.mlp"]}, ["parallel[0]", "l.0.mlp"]),
            ({"parallel": [["a", 7]]}, ["parallel[0][1]", "7"]),
            ({"parallel": [["a", ["b", 7]]]}, ["parallel[0][1]", "7"]),
            ({"parallel": [["a", [["b", "c"], "d"]]]}, ["parallel[0][1]"]),
            ({"paralel": [["a", "b"]]}, ["'paralel'", "version, drop, linear, narrow and parallel"]),
            ({"version": 2}, ["version 2", "reads 1"]),
            ({"version": "1"}, ["version '1'", "reads 1"]),
            ({"version": None}, ["version None", "reads 1"]),
        ],
    )
    def test_an_error_names_the_entry_at_fault(self, entries: dict[str, object], words: list[str]) -> None:
        with pytest.raises(PlanError) as caught:
            Plan(**entries)

        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message

    @pytest.mark.parametrize("plan", PLANS)
    def test_a_plan_is_true_exactly_if_it_changes_something(self, plan: Plan) -> None:
        assert bool(plan) == (plan != Plan())

    def test_names_are_those_of_all_branches_in_the_order_of_the_plan(self) -> None:
        plan = PLANS[3]

        assert plan.names == ("l.3.attn", "@7", "l.0.mlp", "l.1.mlp", "l.2.mlp", "l.4.attn", "l.4.mlp", "l.5.mlp")
        assert flat(plan.parallel[1]) == ("l.4.attn", "l.4.mlp", "l.5.mlp")

    def test_a_linear_branch_in_a_group_is_named_once(self) -> None:
        assert PLANS[5].names == ("l.0.attn", "l.1.attn", "l.2.attn", "l.1.mlp", "l.2.mlp")

    def test_plans_that_differ_in_what_is_linear_are_not_equal(self) -> None:
        assert Plan(linear=["a"]) != Plan(linear=["b"])
        assert Plan(linear=["a"]) != Plan(drop=["a"])


class TestImmutability:
    @pytest.mark.parametrize("field", ["version", "drop", "linear", "parallel", "other"])
    def test_no_field_can_be_set(self, field: str) -> None:
        with pytest.raises(ValidationError):
            setattr(Plan(), field, ())

    def test_a_plan_does_not_follow_the_lists_it_was_made_of(self) -> None:
        drop, group, sequence = ["a"], ["b", "c"], ["d", "e"]
        plan = Plan(drop=drop, parallel=[[*group, sequence]])
        before = pickle.dumps(plan)
        for each in (drop, group, sequence):
            each.append("z")

        assert pickle.dumps(plan) == before

    @pytest.mark.parametrize("plan", PLANS)
    def test_a_plan_is_hashable_and_survives_pickle(self, plan: Plan) -> None:
        again = pickle.loads(pickle.dumps(plan))

        assert again == plan
        assert hash(again) == hash(plan)


class TestFile:
    @pytest.mark.parametrize("plan", PLANS)
    def test_what_was_saved_is_what_is_loaded(self, plan: Plan, tmp_path: Path) -> None:
        plan.save(tmp_path / "plan.json")

        assert Plan.load(tmp_path / "plan.json") == plan
        assert Plan.load(str(tmp_path / "plan.json")) == plan
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_it_is_json_that_a_person_can_write(self, tmp_path: Path) -> None:
        PLANS[3].save(tmp_path / "plan.json")
        data = json.loads((tmp_path / "plan.json").read_text())

        assert data["version"] == 1
        assert data["parallel"] == [["l.0.mlp", "l.1.mlp", "l.2.mlp"], [["l.4.attn", "l.4.mlp"], "l.5.mlp"]]
        assert Plan.from_json('{"drop": ["a"]}') == Plan(drop=["a"])

    def test_a_byte_order_mark_is_no_part_of_it(self, tmp_path: Path) -> None:
        (tmp_path / "plan.json").write_text('{"drop": ["l.0.attn"]}', encoding="utf-8-sig")  # as Notepad saves it

        assert Plan.load(tmp_path / "plan.json") == PLANS[1]

    def test_a_relative_path_is_saved_where_it_points(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        PLANS[1].save("plan.json")

        assert Plan.load(tmp_path / "plan.json") == PLANS[1]

    def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "plan.json"
        PLANS[1].save(target)

        def full(*args: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="disk full"):
            PLANS[2].save(target)

        assert Plan.load(target) == PLANS[1]
        assert os.listdir(tmp_path) == ["plan.json"]

    def test_a_reader_never_sees_a_part_of_a_file(self, tmp_path: Path) -> None:
        target = tmp_path / "plan.json"
        long = Plan(drop=[f"layers.{index}.attention" for index in range(2000)])
        PLANS[1].save(target)
        done = threading.Event()

        def write() -> None:
            for _ in range(50):
                long.save(target)
                PLANS[1].save(target)
            done.set()

        writer = threading.Thread(target=write)
        writer.start()
        seen = set()
        while not done.is_set():
            seen.add(len(Plan.load(target).drop))
        writer.join()

        assert seen <= {1, 2000}

    @pytest.mark.parametrize("plan", PLANS)
    def test_a_file_cut_at_any_byte_is_an_error_that_names_it(self, plan: Plan, tmp_path: Path) -> None:
        target = tmp_path / "plan.json"
        plan.save(target)
        whole = target.read_bytes()
        assert whole.endswith(b"}\n")

        for size in range(len(whole) - 1):  # the last byte is a line's end
            target.write_bytes(whole[:size])
            with pytest.raises(PlanError, match="plan.json"):
                Plan.load(target)

    @pytest.mark.parametrize(
        ("content", "word"),
        [
            (b"[]", "list"),
            (b"null", "NoneType"),
            (b"\xff\xfe", "cannot be read"),
            (b'{"drop": ["a", "a"]}', "'a'"),
            (b'{"version": 2}', "version 2"),
            (b'{"droop": []}', "'droop'"),
            (b'{"drop": NaN}', "drop"),
            (b"[" * 100_000, "not JSON"),
            (b'{"drop": ["a"], "drop": []}', "'drop'"),
        ],
    )
    def test_what_is_no_plan_is_an_error_that_names_file_and_fault(
        self, content: bytes, word: str, tmp_path: Path
    ) -> None:
        target = tmp_path / "plan.json"
        target.write_bytes(content)

        with pytest.raises(PlanError, match="plan.json") as caught:
            Plan.load(target)
        assert word in str(caught.value)

    def test_a_missing_file_and_a_folder_are_errors_that_name_the_path(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.json", tmp_path):
            with pytest.raises(PlanError, match="cannot be read") as caught:
                Plan.load(path)
            assert str(path) in str(caught.value)


class TestWhy:
    MADE = (
        Decision("drop", ("l.3.attn",), "kept", "adds 0.01; it may add 0.02", 0.5, kl=0.01, added=0.01),
        Decision("parallel", ("l.0.mlp", "l.1.mlp"), "refused", "recorded to add 9 by itself; it may add 0.1", 0.25),
    )

    def test_decisions_survive_a_file_with_all_their_numbers(self, tmp_path: Path) -> None:
        Plan(drop=["l.3.attn"], why=self.MADE).save(tmp_path / "plan.json")

        assert Plan.load(tmp_path / "plan.json").why == self.MADE
        assert json.loads((tmp_path / "plan.json").read_text())["why"][1] == {
            "edit": "parallel",
            "branches": ["l.0.mlp", "l.1.mlp"],
            "outcome": "refused",
            "why": "recorded to add 9 by itself; it may add 0.1",
            "score": 0.25,
        }

    def test_plans_that_differ_only_in_it_are_equal(self) -> None:
        bare, told = Plan(drop=["l.3.attn"]), Plan(drop=["l.3.attn"], why=self.MADE)

        assert bare == told
        assert hash(bare) == hash(told)
        assert bare.model_dump_json() == told.model_dump_json()
        assert repr(bare) == repr(told)
        assert told != Plan(drop=["l.2.attn"], why=self.MADE)
        assert not Plan(why=self.MADE)

    def test_a_file_of_a_plan_that_nothing_was_decided_of_is_what_it_was(self) -> None:
        assert json.loads(Plan(drop=["a"]).to_json()) == {"version": 1, "drop": ["a"], "parallel": []}

    def test_a_file_names_what_is_linear_if_anything_is(self) -> None:
        made = json.loads(Plan(linear=["a"]).to_json())

        assert made == {"version": 1, "drop": [], "linear": ["a"], "parallel": []}

    @pytest.mark.parametrize(
        ("why", "words"),
        [
            (
                '[{"edit": "drop", "branches": ["a"], "outcome": "perhaps", "why": "", "score": 0}]',
                r"why\[0\].*perhaps",
            ),
            ('[{"edit": "drop"}]', r"why\[0\]"),
            ('"because"', "why.*because"),
        ],
    )
    def test_what_is_no_decision_is_an_error_that_says_where(self, why: str, words: str) -> None:
        with pytest.raises(PlanError, match=words):
            Plan.from_json(f'{{"drop": ["a"], "why": {why}}}')

    def test_no_compilation_is_made_anew_for_it(self) -> None:
        model, x, counter = Tower(3), vectors(), Counter()
        for why in ((), self.MADE):
            plan = Plan(parallel=[model.mlps], why=why)
            torch.compile(model, backend="ffnfuse", options={"plan": plan, "inner": counter})(x)

        assert len(counter) == 1


def test_units_are_written_as_text_and_read_from_numbers_as_well() -> None:
    plan = Plan(narrow={"l.1.mlp": [600, *range(512)]})
    assert json.loads(plan.to_json())["narrow"] == {"l.1.mlp": "0-511,600"}
    assert Plan.from_json('{"narrow": {"l.1.mlp": [600, ' + ", ".join(map(str, range(512))) + "]}}") == plan
    other = Plan(narrow={"l.1.mlp": range(512)})
    assert other != plan and other.digest != plan.digest
    assert plan.digest == Plan(narrow={"l.1.mlp": "600,0-511"}).digest and plan.names == ("l.1.mlp",)


def test_the_digest_is_of_the_edits_and_not_of_their_order() -> None:
    plan = Plan(drop=["a", "b"], parallel=[["c", ["d", "e"]], ["f", "g"]])
    same = Plan(drop=["b", "a"], parallel=[["g", "f"], [["d", "e"], "c"]])
    others = [
        Plan(),
        Plan(drop=["a", "b"]),
        Plan(drop=["a", "b"], parallel=[["c", ["e", "d"]], ["f", "g"]]),
        Plan(drop=["a", "b"], parallel=[["c", "d", "e"], ["f", "g"]]),
    ]

    assert plan.digest == same.digest and len(plan.digest) == 64
    assert len({plan.digest, *(other.digest for other in others)}) == 5
