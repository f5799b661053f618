# SPDX-License-Identifier: Apache-2.0
"""What Model Runner V2's Triton kernels do, compiled for the CPU: ``install`` puts each in its kernel's place."""
