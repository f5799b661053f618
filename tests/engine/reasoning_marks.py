# SPDX-License-Identifier: Apache-2.0
"""A reasoning parser whose marks are text, for a vocabulary that has no tokens for them. As a script: ``engine_runner``
with it."""

import engine_runner
from vllm.reasoning import ReasoningParser, ReasoningParserManager

START, END = "<think>", "</think>"


class ReasoningMarks(ReasoningParser):
    """Thinks until ``END``, whose tokens are always the same ones: vLLM forces them when the budget is spent."""

    reasoning_start_str, reasoning_end_str = START, END

    def is_reasoning_end(self, input_ids) -> bool:
        end = self.model_tokenizer.encode(END, add_special_tokens=False)
        ids = list(input_ids)
        return any(ids[i : i + len(end)] == end for i in range(len(ids)))

    def extract_content_ids(self, input_ids):
        raise NotImplementedError

    def extract_reasoning(self, model_output, request):
        raise NotImplementedError

    def extract_reasoning_streaming(self, *args):
        raise NotImplementedError


ReasoningParserManager.register_module("marks", module=ReasoningMarks)

if __name__ == "__main__":
    engine_runner.main()
