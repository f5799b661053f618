# SPDX-License-Identifier: Apache-2.0
"""Write docs/models.md: what kvspec does with each kind of model, from the cases that the tests run.

python tools/model_matrix.py
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/models.md"
HEAD = """# Models

What kvspec does with each kind of model that vLLM serves. *Identical*: `tests/engine/test_models.py` serves a small
model of this architecture with random weights in float32 on a CPU, and the text is that of plain decoding, greedy and
sampled with seeds, with trees that follow it (an oracle) and with a head; the head that is served gives the hidden
states and logits of its definition in torch, so that what training and `vllm-kvspec eval` say about it holds in the
server. *Refused*: an error says so at start. An architecture that is not listed is served where its attention is plain.

`make models` writes this page from `tests/architectures.py`.

"""
COLUMNS = ("architecture", "for example", "what is special", "result", "vLLM")


def load_cases() -> ModuleType:
    """The module ``tests/architectures.py``."""
    spec = importlib.util.spec_from_file_location("architectures", ROOT / "tests/architectures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def render(cases: list) -> str:
    """The page for ``cases`` (``architectures.Case``): what is served first, each part in the order of the list."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for case in sorted(cases, key=lambda case: not case.is_served):
        rows.append((f"`{case.model_type}`", case.families, case.special, _result(case), case.versions))
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _result(case) -> str:
    if case.plain_fails:
        return f"not tried: vLLM itself does not run it on a CPU, {case.plain_fails}"
    return f"refused: {case.refusal}" if case.refusal else "identical"


if __name__ == "__main__":
    PAGE.write_text(render(load_cases().CASES))
    print(f"Wrote {PAGE}.")
