# SPDX-License-Identifier: Apache-2.0
"""FlexGEMM's names on voxgemm; docs/migration-flex_gemm.md says what differs."""

import os as _os

USE_AUTOTUNE_CACHE = _os.environ.get("FLEX_GEMM_USE_AUTOTUNE_CACHE", "1") == "1"
AUTOSAVE_AUTOTUNE_CACHE = _os.environ.get("FLEX_GEMM_AUTOSAVE_AUTOTUNE_CACHE", "1") == "1"
AUTOTUNE_CACHE_PATH = _os.environ.get(
    "FLEX_GEMM_AUTOTUNE_CACHE_PATH", _os.path.expanduser("~/.flex_gemm/autotune_cache.json")
)

from . import kernels, ops, utils  # noqa: E402
from .errors import ArgumentError  # noqa: E402

__all__ = ["ArgumentError", "kernels", "ops", "utils"]
__version__ = "1.0.0+voxgemm"

if USE_AUTOTUNE_CACHE:
    utils.load_autotune_cache()
