# SPDX-License-Identifier: Apache-2.0
"""Samples of a sparse grid at real points.

HASHMAP_RATIO is kept for programs that assign it, and has no effect.
"""

import math as _math

from ...errors import expect as _expect

HASHMAP_RATIO = 2.0


def set_hashmap_ratio(ratio: float) -> None:
    """Kept and without effect; at least 1 and finite."""
    global HASHMAP_RATIO
    if not isinstance(ratio, int | float):
        raise TypeError(f"ratio is a {type(ratio).__name__}, expected a number")
    _expect(_math.isfinite(ratio) and ratio >= 1, f"ratio is {ratio}, expected at least 1")
    HASHMAP_RATIO = ratio


from .grid_sample import GridSample3dFunction, grid_sample_3d  # noqa: E402
from .grid_sample_torch import grid_sample_3d_torch  # noqa: E402

__all__ = [
    "HASHMAP_RATIO",
    "GridSample3dFunction",
    "grid_sample_3d",
    "grid_sample_3d_torch",
    "set_hashmap_ratio",
]
