# SPDX-License-Identifier: Apache-2.0
"""Layers on Voxels."""

from .base_module import BaseSpatialModule
from .sparse_conv import SparseConv2d, SparseConv3d, SpatiallySparseConv
from .sparse_conv_depth import (
    SparseDepthwiseConv,
    SparseDepthwiseConv2d,
    SparseDepthwiseConv3d,
    SpatiallySparseDepthwiseConv,
)

__all__ = [
    "BaseSpatialModule",
    "SparseConv2d",
    "SparseConv3d",
    "SparseDepthwiseConv",
    "SparseDepthwiseConv2d",
    "SparseDepthwiseConv3d",
    "SpatiallySparseConv",
    "SpatiallySparseDepthwiseConv",
]
