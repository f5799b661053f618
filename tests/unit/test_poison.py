# SPDX-License-Identifier: Apache-2.0
"""The allocations that conftest.py poisons still obey torch's device contexts: on a GPU vLLM builds models in one."""

import torch


def test_allocations_obey_a_device_context():
    with torch.device("meta"):
        assert torch.empty(3).device.type == "meta"
        assert torch.empty_like(torch.zeros(3, device="cpu"), device="meta").device.type == "meta"
