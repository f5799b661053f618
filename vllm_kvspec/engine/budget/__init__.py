# SPDX-License-Identifier: Apache-2.0
"""How many nodes a step verifies: the choice, the timed step costs behind it, and the scheduler that asks."""
