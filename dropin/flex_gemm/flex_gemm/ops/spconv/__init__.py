# SPDX-License-Identifier: Apache-2.0
"""Sparse convolutions, and the variables that programs assign.

The variables are read at every call. HASHMAP_RATIO and OUT_COORD_HASHMAP_RATIO have no effect: no
table here has a size to be guessed.
"""

import math as _math

from ...errors import expect as _expect


class Algorithm:
    EXPLICIT_GEMM = "explicit_gemm"
    IMPLICIT_GEMM = "implicit_gemm"
    IMPLICIT_GEMM_SPLITK = "implicit_gemm_splitk"
    MASKED_IMPLICIT_GEMM = "masked_implicit_gemm"
    MASKED_IMPLICIT_GEMM_SPLITK = "masked_implicit_gemm_splitk"


class SerializationMode:
    BXYZ = 0
    Z_ORDER = 1
    HILBERT = 2


class SparseConv3dOutCoordAlgorithm:
    HASHMAP = 0
    EXPAND_UNIQUE = 1


ALGORITHM = Algorithm.MASKED_IMPLICIT_GEMM_SPLITK
HASHMAP_RATIO = 2.0
OUT_COORD_HASHMAP_RATIO = 1.1
OUT_COORD_ALGO = SparseConv3dOutCoordAlgorithm.HASHMAP
SERIALIZATION_MODE = SerializationMode.BXYZ
_ALGORITHMS = tuple(name for key, name in vars(Algorithm).items() if key.isupper())


def check_algorithm(algorithm: str) -> str:
    _expect(algorithm in _ALGORITHMS, f"Unsupported algorithm {algorithm}")
    return algorithm


def set_algorithm(algorithm: str) -> None:
    """The search space of every later call in this process: one of `Algorithm`'s names."""
    global ALGORITHM
    ALGORITHM = check_algorithm(algorithm)


def set_hashmap_ratio(ratio: float) -> None:
    """Kept and without effect; at least 1 and finite, as a table with room for its keys needs."""
    global HASHMAP_RATIO
    number = isinstance(ratio, int | float)
    if not number:
        raise TypeError(f"ratio is a {type(ratio).__name__}, expected a number")
    _expect(_math.isfinite(ratio) and ratio >= 1, f"ratio is {ratio}, expected at least 1")
    HASHMAP_RATIO = ratio


from . import _custom_ops  # noqa: E402, F401

# The function sparse_conv3d takes the name of its module.
from .sparse_conv3d import (  # noqa: E402
    SparseConv3dFunction,
    SparseConv3dNeighborCache,
    sparse_conv3d,
)
from .submanifold_conv3d import (  # noqa: E402
    SpConvConfig,
    SubMConv3dCompiledFunction,
    SubMConv3dFunction,
    SubMConv3dNeighborCache,
    sparse_submanifold_conv3d,
)

__all__ = [
    "ALGORITHM",
    "HASHMAP_RATIO",
    "OUT_COORD_ALGO",
    "OUT_COORD_HASHMAP_RATIO",
    "SERIALIZATION_MODE",
    "Algorithm",
    "SerializationMode",
    "SpConvConfig",
    "SparseConv3dFunction",
    "SparseConv3dNeighborCache",
    "SparseConv3dOutCoordAlgorithm",
    "SubMConv3dCompiledFunction",
    "SubMConv3dFunction",
    "SubMConv3dNeighborCache",
    "set_algorithm",
    "set_hashmap_ratio",
    "sparse_conv3d",
    "sparse_submanifold_conv3d",
]
