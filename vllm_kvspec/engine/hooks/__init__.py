# SPDX-License-Identifier: Apache-2.0
"""vLLM's doors: the plugin entry point, the patches, and the check that what we override is still there."""
