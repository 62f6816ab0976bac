"""The pages show what the passes do: ``pytest tests/golden --update-golden`` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fxfuse._torch import onednn
from tests.golden.cases import CASES, Case
from tests.models.blocks import flat_tensors, vectors

FOLDER = Path(__file__).parent

NO_ONEDNN = pytest.mark.skipif(not onednn.available(), reason="this build of PyTorch has no oneDNN")

every_case = pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=NO_ONEDNN if case.name == "prepack" else ()) for case in CASES]
)


@every_case
def test_the_page_shows_the_graph_before_and_after(case: Case, pytestconfig: pytest.Config) -> None:
    page, text = FOLDER / f"{case.name}.txt", case.page()
    if pytestconfig.getoption("--update-golden"):
        page.write_text(text)

    assert page.read_text() == text, "look at the difference; if it is meant, --update-golden writes the page anew"


@every_case
def test_the_graph_on_the_page_computes_what_the_models_modules_do(case: Case) -> None:
    model, traced = case.trace()

    case.run(traced)

    tolerance = 1e-10 if case.dtype == torch.float64 else 1e-5
    with torch.no_grad():
        expected = flat_tensors(case.computes(model, vectors().to(case.dtype)))
    torch.testing.assert_close(traced(), expected, rtol=tolerance, atol=tolerance)


def test_every_page_is_of_a_case() -> None:
    assert {page.stem for page in FOLDER.glob("*.txt")} == {case.name for case in CASES}
