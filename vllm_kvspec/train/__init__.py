# SPDX-License-Identifier: Apache-2.0
"""Training of draft heads on text the target wrote itself. Never imports vLLM."""
