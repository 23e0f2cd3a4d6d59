# SPDX-License-Identifier: Apache-2.0
"""What lies below the operations: functions on tables, and launchers."""

from . import triton

__all__ = ["triton"]
