# SPDX-License-Identifier: Apache-2.0
"""Convolutions and pooling as functions."""

from .sparse_conv import (
    SPARSE_CONV_AB_ALGO_MODE,
    SPARSE_CONV_ATB_ALGO_MODE,
    SPARSE_CONV_BWD_ALGO_MODE,
    SPARSE_CONV_FWD_ALGO_MODE,
    STRIDED_CONV_MODE,
    generate_output_coords_and_kernel_map,
    spatially_sparse_conv,
)
from .sparse_conv_depth import (
    SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE,
    SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE,
    spatially_sparse_depthwise_conv,
)
from .sparse_pool import sparse_avg_pool, sparse_max_pool, sparse_reduce, sparse_unpool

__all__ = [
    "SPARSE_CONV_AB_ALGO_MODE",
    "SPARSE_CONV_ATB_ALGO_MODE",
    "SPARSE_CONV_BWD_ALGO_MODE",
    "SPARSE_CONV_FWD_ALGO_MODE",
    "SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE",
    "SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE",
    "STRIDED_CONV_MODE",
    "generate_output_coords_and_kernel_map",
    "sparse_avg_pool",
    "sparse_max_pool",
    "sparse_reduce",
    "sparse_unpool",
    "spatially_sparse_conv",
    "spatially_sparse_depthwise_conv",
]
