# SPDX-License-Identifier: Apache-2.0
"""Compiler half of the backend. Kernels are interpreted, so nothing is ever compiled."""

from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def hash(self):
        return "triton-cpu-interpreter"

    def parse_options(self, options):
        return options

    def add_stages(self, stages, options, language=None):
        raise NotImplementedError("the CPU backend interprets kernels: set TRITON_INTERPRET=1")

    def load_dialects(self, context):
        pass

    def get_module_map(self):
        return {}
