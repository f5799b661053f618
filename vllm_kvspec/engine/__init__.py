# SPDX-License-Identifier: Apache-2.0
"""Everything that touches vLLM. No other subpackage imports vLLM.

``plugin`` is what vLLM calls at start; it stays light. The worker modules import the runner, the sampler, the
speculator and the attention backend, in the order that vLLM's CPU worker needs.
"""
