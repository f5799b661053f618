# SPDX-License-Identifier: Apache-2.0
"""vllm-kvspec: speculative decoding for vLLM whose draft head reads the target's own paged KV cache.

Importing this package imports neither torch nor vLLM: vLLM loads it as a plugin in every process it starts.
"""

__version__ = "0.1.0"
