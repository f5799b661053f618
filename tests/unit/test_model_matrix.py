# SPDX-License-Identifier: Apache-2.0
"""docs/models.md lists the cases that the tests run, and says of each what they expect."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from architectures import CASES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("model_matrix", ROOT / "tools/model_matrix.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_the_list(tool):
    assert tool.PAGE.read_text() == tool.render(CASES), "run `make models`"


def test_a_changed_case_changes_the_page(tool):
    served, refused = (next(case for case in CASES if bool(case.refusal) == is_refused) for is_refused in (False, True))
    page = tool.render([replace(served, refusal="this word"), replace(refused, refusal="")])
    assert f"`{served.model_type}`" in page and "| refused: this word |" in page
    assert page.index(f"`{refused.model_type}`") < page.index(f"`{served.model_type}`")


def test_every_architecture_is_listed_once():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names)) >= 40
