# SPDX-License-Identifier: Apache-2.0
"""Features on active voxels, and the kernel maps of their coordinates."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from . import kernel_map
from ._library import call, ops
from .errors import ArgumentError
from .kernel_map import Geometry, KernelMap, Triple, triple


@dataclasses.dataclass(frozen=True, eq=False)
class CoordinateSet:
    coords: Tensor  # int32 [n, 4]
    spatial_shape: Triple | None
    batch_size: int | None
    stride: Triple  # in voxels of the set that all began with


class MapCache:
    """Coordinate sets that come from one another, and their kernel maps, each built once.

    Every tensor that a network makes of its input shares one. Sets are known by number, so that
    nothing refers back to a tensor and memory is freed as soon as the last one is dropped.
    """

    def __init__(self, root: CoordinateSet):
        self.sets = [root]
        self._submanifold: dict[tuple[int, Geometry], KernelMap] = {}
        # (set, geometry, output rule) -> (set it leads to, map)
        self._strided: dict[tuple[int, Geometry, str], tuple[int, KernelMap]] = {}

    def submanifold(self, number: int, geometry: Geometry) -> KernelMap:
        key = (number, geometry)
        if key not in self._submanifold:
            coords = self.sets[number].coords
            self._submanifold[key] = kernel_map.submanifold_map(coords, geometry)
        return self._submanifold[key]

    def strided(self, number: int, geometry: Geometry, output_rule: str) -> tuple[int, KernelMap]:
        """The number of the set that the convolution leads to, and the map towards it."""
        key = (number, geometry, output_rule)
        if key not in self._strided:
            source = self.sets[number]
            shape = source.spatial_shape
            coords = kernel_map.output_coords(source.coords, geometry, output_rule, shape)
            if shape is not None and output_rule == "reached":
                shape = geometry.out_shape(shape)
            elif shape is not None:
                shape = tuple(-(-n // s) for n, s in zip(shape, geometry.stride, strict=True))
            stride = tuple(a * b for a, b in zip(source.stride, geometry.stride, strict=True))
            map = kernel_map.strided_map(source.coords, coords, geometry)
            self.sets.append(CoordinateSet(coords, shape, source.batch_size, stride))
            self._strided[key] = (len(self.sets) - 1, map)
        return self._strided[key]

    def inverse(self, number: int, asked: dict[str, Triple]) -> tuple[int, KernelMap]:
        """Back through the strided convolution that led to a set and has the geometry asked for."""
        ways = [
            (key[0], key[1], map)
            for key, (target, map) in self._strided.items()
            if target == number
        ]
        fitting = [
            way for way in ways if all(getattr(way[1], name) == asked[name] for name in asked)
        ]
        if len(fitting) == 1:
            return fitting[0][0], fitting[0][2].transposed()
        found = "; ".join(_described(way[1]) for way in fitting or ways)
        wanted = ", ".join(f"{_FIELDS[name]}={value}" for name, value in asked.items())
        if fitting:
            raise ArgumentError(
                f"several SparseConv3d with {wanted} led to these coordinates ({found}); say which "
                "by stride, padding and dilation"
            )
        came = f"they came from SparseConv3d with {found}" if ways else "they came from none"
        raise ArgumentError(
            f"an inverse convolution goes back to where a SparseConv3d with {wanted} came from, "
            f"but of these coordinates {came}"
        )


_FIELDS = dict(zip(Geometry._fields, ("kernel_size", "stride", "padding", "dilation"), strict=True))


def _described(geometry: Geometry) -> str:
    return ", ".join(f"{_FIELDS[name]}={value}" for name, value in geometry._asdict().items())


class SparseTensor:
    """Features [n, channels] on voxels with coordinates int32 [n, 4] (batch, x, y, z) in any order.

    With a spatial shape or a batch size given, a coordinate outside it is an error; without, any
    int32 is legal. Voxels may repeat: a look-up finds the lowest row, each row has its own output
    (`voxgemm.unique` merges). Layers find their kernel maps here, so whatever a network computes on
    one set of coordinates shares them.
    """

    def __init__(
        self,
        features: Tensor,
        coords: Tensor,
        spatial_shape: Triple | None = None,
        batch_size: int | None = None,
    ):
        _check(features, coords)
        coords = coords.contiguous()
        if spatial_shape is not None:
            spatial_shape = triple(spatial_shape, "spatial_shape")
        zero = call(ops._check_coords.default, coords, spatial_shape, batch_size)
        if torch.compiler.is_compiling():
            coords = coords + zero  # a graph drops what nothing uses, a check too
        self.features = features
        self._maps = MapCache(CoordinateSet(coords, spatial_shape, batch_size, (1, 1, 1)))
        self._number = 0

    @property
    def maps(self) -> MapCache:
        return self._maps

    @property
    def number(self) -> int:
        """Which of the sets in `maps` the rows stand on."""
        return self._number

    @property
    def coords(self) -> Tensor:
        return self._maps.sets[self._number].coords

    @property
    def spatial_shape(self) -> Triple | None:
        return self._maps.sets[self._number].spatial_shape

    @property
    def stride(self) -> Triple:
        """How many voxels of the first tensor one step is, per axis."""
        return self._maps.sets[self._number].stride

    @property
    def batch_size(self) -> int:
        """As given, else the highest batch number plus one."""
        given = self._maps.sets[self._number].batch_size
        if given is not None:
            return given
        return int(self.coords[:, 0].max()) + 1 if len(self.coords) else 0

    def replace(self, features: Tensor, number: int | None = None) -> SparseTensor:
        """Other features on the same coordinates or another set of `maps`, which is shared."""
        out = object.__new__(SparseTensor)
        out.features = features
        out._maps = self._maps
        out._number = self._number if number is None else number
        if features.ndim != 2 or len(features) != len(out.coords):
            raise ArgumentError(
                f"features is {_shape(features)}, expected [{len(out.coords)}, channels]: "
                "one row per voxel"
            )
        return out

    def to(self, *args: Any, **kwargs: Any) -> SparseTensor:
        """As Tensor.to, of the features. To another device coordinates follow, maps do not."""
        features = self.features.to(*args, **kwargs)
        if features.device == self.coords.device:
            return self.replace(features)
        here = self._maps.sets[self._number]
        moved = dataclasses.replace(here, coords=here.coords.to(features.device))
        out = self.replace(features)
        out._maps, out._number = MapCache(moved), 0
        return out

    def dense(self) -> Tensor:
        """[batch, channels, X, Y, Z], zero where no voxel is; of repeated voxels the lowest row.

        Without a spatial shape the extents are those of the coordinates, from 0.
        """
        shape = self.spatial_shape
        if shape is None:
            most = self.coords[:, 1:].amax(0).tolist() if len(self.coords) else (-1, -1, -1)
            shape = tuple(max(int(c) + 1, 0) for c in most)
        batch = self.batch_size
        call(ops._check_coords.default, self.coords, shape, batch)
        coords, rows, _ = kernel_map.unique(self.coords)
        grid = self.features.new_zeros((batch, *shape, self.features.shape[1]))
        grid = grid.index_put(tuple(coords.long().T), self.features[rows.long()])
        return grid.permute(0, 4, 1, 2, 3).contiguous()

    def __len__(self) -> int:
        return len(self.coords)

    def __repr__(self) -> str:
        return (
            f"SparseTensor({len(self)} voxels, {self.features.shape[1]} channels, "
            f"{self.features.dtype}, {self.features.device}, stride={self.stride}, "
            f"spatial_shape={self.spatial_shape})"
        )


def _shape(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _check(features: Tensor, coords: Tensor) -> None:
    """What two tensors must be to each other; the rules for coordinates alone are in C++."""
    for name, value in (("features", features), ("coords", coords)):
        if not isinstance(value, Tensor):
            raise ArgumentError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if coords.dtype != torch.int32 or coords.ndim != 2 or coords.shape[1] != 4:
        absent = coords.isnan().nonzero() if coords.is_floating_point() else ()
        nan = f" with NaN in row {int(absent[0, 0])}" if len(absent) else ""
        raise ArgumentError(
            f"coords is {_shape(coords)}{nan}, expected int32 [n, 4]: "
            "(batch, x, y, z) of each voxel"
        )
    if features.ndim != 2 or not features.is_floating_point():
        raise ArgumentError(f"features is {_shape(features)}, expected floats [n, channels]")
    if len(features) != len(coords):
        raise ArgumentError(f"features has {len(features)} rows, coords {len(coords)}")
    if features.device != coords.device:
        raise ArgumentError(f"features is on {features.device}, coords on {coords.device}")
