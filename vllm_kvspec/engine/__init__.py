# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM. No other subpackage imports vLLM.

Rooms by the stages of a step: ``config`` (start), ``draft`` (propose), ``verify``, ``budget`` (how many nodes); ``cpu``
for machines without a GPU; ``hooks`` for what vLLM calls and what we replace in it. ``runner`` ties a step together.
"""
