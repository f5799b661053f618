# SPDX-License-Identifier: Apache-2.0
"""The compile gate: what the launchers can choose compiles for each GPU generation, without spills, within its memory.

No GPU is needed; `kernel_variants` says which variants there are and which of them CI compiles.
"""

from pathlib import Path

import pytest
from compile_offline import SHARED_MEMORY, compile_in_subprocesses, problem


def _kernels() -> set[str]:
    """Names of the Triton kernels in kernels/ that a launcher starts."""
    import vllm_kvspec.kernels.reference as neighbour

    lines = "\n".join(path.read_text() for path in Path(neighbour.__file__).parent.glob("*.py"))
    return {
        line.split("(")[0].removeprefix("def ")
        for line in lines.splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("selection", ["pairs", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_compile_without_spills(request, capability, selection):
    if selection == "all" and "slow" not in request.config.option.markexpr:
        pytest.skip(reason="about an hour of one core per architecture: pytest -m slow")
    records = compile_in_subprocesses(capability, selection)
    assert {record["kernel"] for record in records} == _kernels()
    problems = [problem(record) for record in records if problem(record)]
    assert not problems, "\n".join(problems)


def test_largest_tiles():
    """The gate in small, for test_planted_defects.py: one variant of each attention kernel."""
    problems = [problem(record) for record in compile_in_subprocesses(90, "largest")]
    assert problems == [None, None]
