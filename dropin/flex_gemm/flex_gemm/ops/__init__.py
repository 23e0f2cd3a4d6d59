# SPDX-License-Identifier: Apache-2.0
"""The operations that programs call."""

from . import spconv

__all__ = ["spconv"]
