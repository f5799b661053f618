# SPDX-License-Identifier: Apache-2.0
"""Serving without a GPU."""
