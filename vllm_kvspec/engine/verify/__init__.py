# SPDX-License-Identifier: Apache-2.0
"""Verification: tree attention, sample-and-walk, and the buffers that carry a tree from one step to the next."""
