# SPDX-License-Identifier: Apache-2.0
"""Measurements: acceptance lengths of a head, offline."""
