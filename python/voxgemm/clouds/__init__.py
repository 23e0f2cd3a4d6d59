# SPDX-License-Identifier: Apache-2.0
"""Point clouds and meshes: reading, voxelising, and synthetic clouds for demo and benchmarks."""

from .cloud import InputError, Mesh, PointCloud
from .read import read
from .shapes import cloud
from .street import street
from .voxelize import Voxels, voxelize

__all__ = [
    "InputError",
    "Mesh",
    "PointCloud",
    "Voxels",
    "cloud",
    "read",
    "street",
    "voxelize",
]
