# SPDX-License-Identifier: Apache-2.0
"""Driver half of the backend: answers what callers ask about the device before the interpreter takes over."""

from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

_PROPERTIES = {"max_shared_mem": 1 << 20, "multiprocessor_count": 1, "warpSize": 32, "max_num_regs": 65536}


class InterpreterDriver(DriverBase):
    def __init__(self):
        self.utils = SimpleNamespace(get_device_properties=lambda device: _PROPERTIES)

    @classmethod
    def is_active(cls):
        return not torch.cuda.is_available()

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return torch.cpu

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def set_current_device(self, device):
        pass

    def get_benchmarker(self):
        raise NotImplementedError("interpreted kernels are not benchmarked")

    def get_empty_cache_for_benchmark(self):
        raise NotImplementedError("interpreted kernels are not benchmarked")

    def clear_cache(self, cache):
        pass
