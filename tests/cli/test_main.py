from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fxfuse import Plan
from fxfuse.cli.main import main
from tests.models.bodies import SwiGLU

TINY = f"{__name__}:tiny"


class Tiny(nn.Module):
    """Three FFNs on a stream of token embeddings: what Dynamo traces in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.norms = nn.ModuleList(nn.RMSNorm(8) for _ in range(3))
        self.mlps = nn.ModuleList(SwiGLU(bias=True) for _ in range(3))

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embed(input_ids)
        for norm, mlp in zip(self.norms, self.mlps, strict=True):
            h = h + mlp(norm(h))
        return h


def tiny() -> tuple[nn.Module, tuple[()], dict[str, Tensor]]:
    torch.manual_seed(0)
    return Tiny(), (), {"input_ids": torch.arange(6).reshape(1, 6)}


def boom() -> nn.Module:
    raise RuntimeError("no\nmodel today")


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``fxfuse *args``."""
    with pytest.raises(SystemExit) as exit:
        main(args)
    out, err = capsys.readouterr()
    code = exit.value.code
    if isinstance(code, str):  # what the interpreter does with a message at exit
        return 1, out, err + code
    return code or 0, out, err


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    Plan(parallel=[["mlps.1", "mlps.2"]]).save(path)
    return path


class TestUsage:
    def test_help_answers_without_importing_torch(self) -> None:
        program = "import sys; from fxfuse.cli.main import main\ntry: main(['--help'])\n"
        program += "except SystemExit: sys.exit('torch' in sys.modules)"

        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

        assert done.returncode == 0, done.stderr
        assert "explain" in done.stdout
        assert "bench" in done.stdout

    @pytest.mark.parametrize("command", ["explain", "bench"])
    def test_the_help_of_a_command_teaches_by_examples(self, capsys: pytest.CaptureFixture[str], command: str) -> None:
        code, out, _ = run(capsys, command, "--help")

        assert code == 0
        assert f"fxfuse {command} smollm2" in out

    @pytest.mark.parametrize(
        "args",
        [
            ["explain"],
            ["explode", "smollm2"],
            ["explain", "smollm2", "--dtype", "int3"],
            ["explain", "smollm2", "--length", "0"],
            ["bench", "smollm2", "--repeats", "0"],
            ["bench", "smollm2", "--inner", "no_such_backend"],
        ],
    )
    def test_bad_usage_exits_with_2(self, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
        code, out, err = run(capsys, *args)

        assert code == 2
        assert "Usage" in err
        assert out == ""

    def test_without_typer_the_message_is_how_to_install_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in [name for name in sys.modules if name.startswith("fxfuse.cli.") and name != "fxfuse.cli.main"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "typer", None)

        code, _, err = run(capsys, "--help")

        assert (code, err) == (1, "fxfuse: the command line needs typer: pip install 'fxfuse[cli]'")


class TestErrors:
    @pytest.mark.parametrize("command", ["explain", "bench"])
    def test_a_model_that_is_not_there(self, capsys: pytest.CaptureFixture[str], command: str) -> None:
        code, out, err = run(capsys, command, "no/such/model")

        assert code == 1
        assert err.startswith("fxfuse: there is no 'no/such/model' here")
        assert out == ""

    def test_a_broken_plan_is_one_line(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        broken = tmp_path / "plan.json"
        broken.write_text('{"drop": [')

        code, _, err = run(capsys, "explain", TINY, "--plan", str(broken))

        assert code == 1
        assert str(broken) in err
        assert len(err.splitlines()) == 1

    def test_what_a_function_raises_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = run(capsys, "explain", f"{__name__}:boom")

        assert code == 1
        assert err.startswith(f"fxfuse: cannot load {__name__}:boom: RuntimeError: no model today")
        assert len(err.splitlines()) == 1

    def test_a_text_for_a_model_without_tokenizer(self, capsys: pytest.CaptureFixture[str], llama_folder: Path) -> None:
        code, _, err = run(capsys, "explain", str(llama_folder), "--text", "hello")

        assert code == 1
        assert "without a tokenizer" in err


class TestExplain:
    def test_the_table_names_every_branch(self, capsys: pytest.CaptureFixture[str], llama_folder: Path) -> None:
        code, out, _ = run(capsys, "explain", str(llama_folder))

        assert code == 0
        for layer in range(2):
            assert f"\n{layer}.self_attn" in out
            assert f"\n{layer}.mlp" in out
        assert out.startswith("names begin with model.layers.\n")

    @pytest.mark.slow
    def test_every_branch_of_a_trained_model_is_understood(
        self, capsys: pytest.CaptureFixture[str], smollm2_folder: Path
    ) -> None:
        _, out, _ = run(capsys, "explain", str(smollm2_folder), "--text", "The capital of France is", "--json")

        kinds = [branch["kind"] for branch in json.loads(out)["branches"]]
        assert kinds == ["attention", "gated_ffn"] * 30

    def test_json_says_what_a_plan_fuses(self, capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
        code, out, _ = run(capsys, "explain", TINY, "--plan", str(plan_file), "--length", "5", "--json")

        assert code == 0
        fused = {branch["name"]: branch["fused"] for branch in json.loads(out)["branches"]}
        assert fused == {"mlps.0": "", "mlps.1": "wide", "mlps.2": "wide"}


class TestBench:
    def test_json_holds_every_sample_and_says_whether_the_run_is_void(
        self, capsys: pytest.CaptureFixture[str], plan_file: Path
    ) -> None:
        args = ["--plan", str(plan_file), "--length", "6", "--repeats", "3", "--inner", "eager", "--json"]
        code, out, err = run(capsys, "bench", TINY, *args)

        report = json.loads(out)
        assert [each["phase"] for each in report["comparisons"]] == ["prefill", "decode"]
        for each in report["comparisons"]:
            assert list(each["programs"]) == ["original", "original again", "planned"]
            assert all(len(program["seconds"]) == 3 for program in each["programs"].values())
            assert each["output_distance"] > 1e-3  # this plan changes what the model computes
        void = any(each["void"] for each in report["comparisons"])
        assert (code, "void" in err) == (int(void), void)

    def test_without_a_plan_the_outputs_are_those_of_the_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = ["--repeats", "1", "--inner", "eager", "--dtype", "float64", "--json"]
        _, out, _ = run(capsys, "bench", TINY, *args)

        assert all(each["output_distance"] < 1e-8 for each in json.loads(out)["comparisons"])

    def test_the_table_has_a_row_for_each_program(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, out, _ = run(capsys, "bench", TINY, "--repeats", "1", "--inner", "eager")

        assert "threads, load" in out
        assert out.count("original again") == out.count("planned") == 2

    def test_what_ffnfuse_says_about_a_plan_is_one_line(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """Dynamo wraps what a backend raises in its own exception and a trace; the command unwraps it."""
        plan = tmp_path / "plan.json"
        Plan(parallel=[["mlps.1", "mlps.7"]]).save(plan)

        code, out, err = run(capsys, "bench", TINY, "--plan", str(plan), "--inner", "eager")

        assert code == 1
        assert out == ""
        assert err.splitlines()[-1].startswith("fxfuse: ")
        assert "mlps.7" in err.splitlines()[-1]

    @pytest.mark.slow
    def test_a_plan_that_changes_nothing_changes_no_output_under_inductor(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        _, out, _ = run(capsys, "bench", TINY, "--repeats", "3", "--dtype", "float64", "--json")

        assert all(each["output_distance"] < 1e-8 for each in json.loads(out)["comparisons"])
