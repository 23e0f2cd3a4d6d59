# SPDX-License-Identifier: Apache-2.0
"""Sparse-voxel convolution for PyTorch: see README.md."""

from __future__ import annotations

from typing import Any

import torch

from . import (
    _library,
    depthwise,
    errors,
    functional,
    hashmap,
    nn,
    pooling,
    sampling,
    serialization,
    tuning,
)
from .errors import ArgumentError
from .functional import (
    PADDING_BATCH,
    Algorithm,
    Geometry,
    KernelMap,
    build_map,
    output_coords,
    unique,
)
from .joins import cat, collate, union_add
from .nn import explain, explanations
from .tensor import SparseTensor
from .tuning import calibrate, tune

__all__ = [
    "PADDING_BATCH",
    "Algorithm",
    "ArgumentError",
    "Geometry",
    "KernelMap",
    "SparseTensor",
    "build_map",
    "calibrate",
    "cat",
    "collate",
    "depthwise",
    "errors",
    "explain",
    "explanations",
    "functional",
    "hashmap",
    "info",
    "nn",
    "output_coords",
    "pooling",
    "sampling",
    "serialization",
    "tune",
    "tuning",
    "union_add",
    "unique",
]


def info() -> dict[str, Any]:
    """Versions, backends and engines that run here, threads, GPUs, places of library and cache.

    >>> sorted(vg.info())[:4]
    ['backends', 'cache_dir', 'cpu', 'engines']
    """
    version, kernels = _library.version_and_kernels()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "voxgemm": version,
        "torch": torch.__version__,
        "backends": ["cpu", "cuda"] if _library.HAS_CUDA and len(gpus) else ["cpu"],
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "engines": {
            dtype: list(dict.fromkeys(name.rpartition("/")[2] for name in names))
            for dtype, names in kernels.items()
        },
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus],
        "library": str(_library.PATH),
        "cache_dir": _library.cache_dir(),
    }


__version__ = _library.version()
