# SPDX-License-Identifier: Apache-2.0
"""Proposing: the speculator that vLLM calls, and the drafters behind it."""
