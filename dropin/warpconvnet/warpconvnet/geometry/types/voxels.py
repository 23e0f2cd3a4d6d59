# SPDX-License-Identifier: Apache-2.0
"""Features on voxels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from voxgemm import ArgumentError

from .._rows import to_rows
from ..base.geometry import Geometry
from ..coords.integer import IntCoords
from ..coords.ops.serialization import POINT_ORDERING
from ..coords.search.cache import IntSearchCache
from ..coords.search.torch_hashmap import TorchHashTable
from ..features.cat import CatFeatures
from ..features.pad import PadFeatures

Features = CatFeatures | PadFeatures


def _coordinates(value: Any, offsets: Any, device: Any, stride: Any) -> IntCoords:
    if isinstance(value, IntCoords):
        value = value if device is None else value.to(device)
        if stride is None:
            return value
        other = IntCoords(value.batched_tensor, value.offsets, value.voxel_size, value.voxel_origin)
        other.set_tensor_stride(stride)
        return other
    return IntCoords(value, offsets, tensor_stride=stride, device=device)


def _features(value: Any, offsets: Tensor, device: Any) -> Features:
    if isinstance(value, CatFeatures | PadFeatures):
        return value if device is None else type(value)(value.batched_tensor, value.offsets, device)
    if not isinstance(value, Tensor):
        lengths = [len(part) for part in value]
        if lengths != offsets.diff().tolist():
            raise ArgumentError(
                f"features have {lengths} rows by sample, coordinates {offsets.diff().tolist()}"
            )
        return CatFeatures(list(value), device=device)
    kind = PadFeatures if value.ndim == 3 else CatFeatures
    if value.ndim == 2 and len(value) != int(offsets[-1]):
        raise ArgumentError(f"features have {len(value)} rows, coordinates {int(offsets[-1])}")
    return kind(value, offsets, device)


class Voxels(Geometry):
    """Features [N, C] on integer coordinates [N, D] of B samples.

    Of lists (a tensor per sample), of tensors with offsets [B + 1], or of IntCoords and
    CatFeatures. Extras (voxel_size, ordering, ...) are attributes that `replace` carries along.
    """

    def __init__(
        self,
        batched_coordinates: IntCoords | Tensor | Sequence[Tensor],
        batched_features: Features | Tensor | Sequence[Tensor],
        offsets: Tensor | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        **extra: Any,
    ):
        stride = extra.pop("tensor_stride", None)
        stride = extra.pop("stride", None) if stride is None else stride
        coordinates = _coordinates(batched_coordinates, offsets, device, stride)
        features = _features(batched_features, coordinates.offsets, device)
        cache = extra.pop("_cache", None)
        super().__init__(coordinates, features, **extra)
        self.cache: IntSearchCache = IntSearchCache() if cache is None else cache

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra_attributes", {})
        if name in extra:
            return extra[name]
        if name in ("voxel_size", "ordering"):
            return getattr(self.__dict__.get("batched_coordinates"), name, None)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def batch_indexed_coordinates(self) -> Tensor:
        return self.batched_coordinates.batch_indexed_coordinates

    coords = batch_indexed_coordinates

    @property
    def tensor_stride(self) -> tuple[int, ...] | None:
        return self.batched_coordinates.tensor_stride

    stride = tensor_stride

    @property
    def padded_features(self) -> PadFeatures:
        return self.batched_features.to_pad()

    @property
    def nested_features(self) -> Tensor:
        parts = self.batched_features.to_cat()
        return torch.nested.as_nested_tensor([parts[b] for b in range(self.batch_size)])

    @property
    def coordinate_hashmap(self) -> TorchHashTable:
        return TorchHashTable(self.batched_coordinates.rows())

    def set_tensor_stride(self, tensor_stride: Any) -> None:
        self.batched_coordinates.set_tensor_stride(tensor_stride)

    def replace(
        self,
        batched_coordinates: IntCoords | Tensor | None = None,
        batched_features: Features | Tensor | None = None,
        **extra: Any,
    ) -> Voxels:
        """With other coordinates, features or extras. An ordering stays with its coordinates."""
        kept = dict(self.extra_attributes)
        offsets = None
        if batched_coordinates is None:
            batched_coordinates = self.batched_coordinates
        else:
            kept.pop("ordering", None)
            offsets = extra.pop("offsets", self.offsets)
        if batched_features is None:
            batched_features = self.batched_features
        shared = {"_cache": self.cache}
        return type(self)(
            batched_coordinates, batched_features, offsets, **shared, **{**kept, **extra}
        )

    def on(
        self, coordinates: IntCoords, features: Tensor, ordering: POINT_ORDERING | None = None
    ) -> Voxels:
        """Features [N, C] on coordinates that they fit; the ordering is that of new coordinates."""
        out = object.__new__(type(self))
        out.batched_coordinates, out.cache = coordinates, self.cache
        out.batched_features = CatFeatures.of(features, coordinates.offsets)
        out.extra_attributes = dict(self.extra_attributes)
        if coordinates is not self.batched_coordinates:
            out.extra_attributes.pop("ordering", None)
            if ordering is not None:
                out.extra_attributes["ordering"] = ordering
        return out

    def replace_features(self, features: Features | Tensor) -> Voxels:
        return self.replace(batched_features=features)

    def _rows(self, coordinates: IntCoords, kept: Tensor, **extra: Any) -> Voxels:
        """Chosen rows, whose coordinates are these."""
        features = self.batched_features.to_cat().batched_tensor[kept]
        return self.replace(coordinates, CatFeatures(features, coordinates.offsets), **extra)

    def unique(self) -> Voxels:
        """One row per coordinate, the first; the others keep their order."""
        coordinates, kept = self.batched_coordinates.unique()
        if self.ordering is None:
            return self._rows(coordinates, kept)
        return self._rows(coordinates, kept, ordering=self.ordering)

    def sort(self, ordering: POINT_ORDERING = POINT_ORDERING.MORTON_XYZ) -> Voxels:
        """Rows ordered within samples; `ordering` says how."""
        if ordering == self.ordering:
            return self
        coordinates, permutation = self.batched_coordinates.sort(ordering)
        return self._rows(coordinates, permutation, ordering=ordering)

    @classmethod
    def from_dense(
        cls,
        dense_tensor: Tensor,
        dense_tensor_channel_dim: int = 1,
        target_spatial_sparse_tensor: Voxels | None = None,
        dense_max_coords: Sequence[int] | None = None,
        **extra: Any,
    ) -> Voxels:
        """The sites of [B, ..., C, ...] whose channels are not all zero, in ascending order.

        With a target, its rows, taken relative to its lowest coordinates; beyond dense_max_coords
        (as beyond the tensor) they are zero.
        """
        grid = dense_tensor.movedim(dense_tensor_channel_dim, -1)  # [B, ..., C]
        if target_spatial_sparse_tensor is not None:
            return _at_target(grid, target_spatial_sparse_tensor, dense_max_coords)
        found = (grid != 0).any(-1).nonzero()
        rows = to_rows(found.int())
        coordinates = IntCoords.of_rows(rows, grid.ndim - 2, len(grid), None)
        return cls(coordinates, grid[tuple(found.T)], **extra)

    def to_dense(
        self,
        channel_dim: int = 1,
        spatial_shape: Sequence[int] | None = None,
        min_coords: Sequence[int] | None = None,
        max_coords: Sequence[int] | None = None,
    ) -> Tensor:
        """[B, C, ...], zero where no voxel is; of repeated voxels the first row.

        Without bounds the box of the data; with them (max_coords included) rows outside are left
        out.
        """
        at = self.coordinate_tensor.long()
        if min_coords is not None:
            low = torch.as_tensor(min_coords, device=at.device)
        elif spatial_shape is not None or not len(at):
            low = at.new_zeros(at.shape[1])
        else:
            low = at.amin(0)
        if spatial_shape is not None:
            shape = torch.as_tensor(spatial_shape, device=at.device)
        elif max_coords is not None:
            shape = torch.as_tensor(max_coords, device=at.device) - low + 1
        else:
            shape = at.amax(0) - low + 1 if len(at) else at.new_zeros(at.shape[1])
        once = self.unique() if len(at) else self
        at = once.coordinate_tensor.long() - low
        inside = ((at >= 0) & (at < shape)).all(1)
        features = once.batched_features.to_cat().batched_tensor
        grid = features.new_zeros((self.batch_size, *shape.tolist(), self.num_channels))
        batch = once.batched_coordinates.rows()[inside, 0].long()
        grid = grid.index_put((batch, *at[inside].T), features[inside])
        return grid.movedim(-1, channel_dim)

    def to_point(self, voxel_size: float | None = None) -> Any:
        raise NotImplementedError("this warpconvnet has no point types")

    def _map(self, function: Callable[[Tensor], Tensor]) -> Voxels:
        kind = type(self.batched_features)
        tensor = function(self.batched_features.batched_tensor)
        return self.replace(batched_features=kind(tensor, self.offsets))

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Voxels:
        """To another device or dtype; kernel maps stay behind."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        out = self if dtype is None else self._map(lambda features: features.to(dtype))
        if device is None or torch.device(device) == self.device:
            return out
        extra = dict(out.extra_attributes)
        coordinates = out.batched_coordinates.to(device)
        kind = type(out.batched_features)
        return type(self)(
            coordinates, kind(out.batched_features.batched_tensor, out.offsets, device), **extra
        )

    def half(self) -> Voxels:
        return self.to(dtype=torch.float16)

    def float(self) -> Voxels:
        return self.to(dtype=torch.float32)

    def double(self) -> Voxels:
        return self.to(dtype=torch.float64)

    def to_pad(self, multiple: int | None = None) -> Voxels:
        return self.replace(batched_features=self.batched_features.to_pad(multiple))

    def to_cat(self) -> Voxels:
        return self.replace(batched_features=self.batched_features.to_cat())

    def __getitem__(self, sample: int) -> Voxels:
        """A sample, as a batch of one."""
        number = operator.index(sample)
        if not -self.batch_size <= number < self.batch_size:
            raise IndexError(f"sample {number} of {self.batch_size}")
        number %= self.batch_size
        coordinates = self.batched_coordinates[number]
        features = self.batched_features.to_cat()[number]
        return type(self)(
            [coordinates], [features], tensor_stride=self.tensor_stride, **self.extra_attributes
        )

    def _with(self, other: Any, function: Callable[..., Tensor], reflected: bool = False) -> Voxels:
        mine = self.feature_tensor
        if isinstance(other, Voxels):
            if not torch.equal(self.offsets, other.offsets):
                raise ArgumentError(
                    f"offsets are {self.offsets.tolist()} and {other.offsets.tolist()}"
                )
            other = other.feature_tensor
        if isinstance(other, Tensor) and other.numel() != 1 and other.shape != mine.shape:
            raise ArgumentError(
                f"features are {list(mine.shape)}, the other operand {list(other.shape)}"
            )
        result = function(other, mine) if reflected else function(mine, other)
        return self.replace(batched_features=type(self.batched_features)(result, self.offsets))

    def __repr__(self) -> str:
        return (
            f"Voxels({len(self)} rows, {self.batch_size} samples, {self.num_channels} channels, "
            f"{self.dtype}, {self.device}, tensor_stride={self.tensor_stride})"
        )


def _at_target(grid: Tensor, target: Voxels, most: Sequence[int] | None) -> Voxels:
    at = target.coordinate_tensor.long()
    at = at - at.amin(0) if len(at) else at
    limits = torch.tensor(grid.shape[1:-1], device=at.device)
    if most is not None:
        limits = torch.minimum(limits, torch.as_tensor(most, device=at.device) + 1)
    inside = (at < limits).all(1)
    batch = target.batched_coordinates.rows()[:, 0].long()
    picked = grid[(batch, *torch.where(inside[:, None], at, 0).T)]
    features = torch.where(inside[:, None], picked, 0)
    return target.replace(batched_features=CatFeatures(features, target.offsets))


def _operators() -> None:
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        function = getattr(operator, name)
        setattr(Voxels, f"__{name}__", lambda a, b, f=function: a._with(b, f))
        setattr(Voxels, f"__r{name}__", lambda a, b, f=function: a._with(b, f, reflected=True))


_operators()
