# SPDX-License-Identifier: Apache-2.0
"""WarpConvNet's sparse convolutions on voxgemm; docs/migration-warpconvnet.md says what differs."""

from . import constants

__all__ = ["constants", "get_fp16_accum", "set_fp16_accum"]
__version__ = "1.8.1+voxgemm"

_fp16_accum = False


def set_fp16_accum(enabled: bool) -> None:
    """Kept, and without effect: sums are float32 or wider."""
    global _fp16_accum
    _fp16_accum = bool(enabled)


def get_fp16_accum() -> bool:
    return _fp16_accum
