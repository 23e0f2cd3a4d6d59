# SPDX-License-Identifier: Apache-2.0
"""The operations that programs call."""

from . import grid_sample, serialize, spconv, utils

__all__ = ["grid_sample", "serialize", "spconv", "utils"]
