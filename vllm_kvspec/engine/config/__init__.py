# SPDX-License-Identifier: Apache-2.0
"""The keys of the speculative config, what is refused at start, and what the config selects."""
