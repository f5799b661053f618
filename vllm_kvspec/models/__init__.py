# SPDX-License-Identifier: Apache-2.0
"""The draft head in plain torch: the definition that training, evaluation and the engine agree on."""
