# SPDX-License-Identifier: Apache-2.0
"""What lies below the operations: functions on tables, and launchers."""

from . import cuda, cuda_ops, triton

__all__ = ["cuda", "cuda_ops", "triton"]
