# SPDX-License-Identifier: Apache-2.0
"""Tuning files and the tuner that programs wrap around their own kernels."""

from . import autotuner
from .autotuner import autotune, get_autotune_cache, load_autotune_cache, save_autotune_cache

__all__ = [
    "autotune",
    "autotuner",
    "get_autotune_cache",
    "load_autotune_cache",
    "save_autotune_cache",
]
