# SPDX-License-Identifier: Apache-2.0
"""Integer coordinates of a batch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from voxgemm import ArgumentError
from voxgemm.columns import narrow

from .._rows import sizes, to_rows
from .ops.batch_index import batch_indexed_coordinates, cpu_offsets, offsets_from_batch_index
from .ops.serialization import POINT_ORDERING, order_rows


class IntCoords:
    """batched_tensor int32 [N, D], samples one after the other, and offsets [B + 1] on the CPU."""

    def __init__(
        self,
        batched_tensor: Tensor | Sequence[Tensor],
        offsets: Tensor | Sequence[int] | None = None,
        voxel_size: float | None = None,
        voxel_origin: Any = None,
        tensor_stride: Any = None,
        device: torch.device | str | None = None,
    ):
        if not isinstance(batched_tensor, Tensor):
            parts = list(batched_tensor)
            if not parts:
                raise ArgumentError("coordinates are an empty list, expected a tensor per sample")
            ends = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
            batched_tensor, offsets = torch.cat(parts), ends
        if batched_tensor.ndim != 2:
            raise ArgumentError(f"coordinates are {list(batched_tensor.shape)}, expected [N, D]")
        if offsets is None:
            raise ArgumentError("coordinates in one tensor need offsets")
        self.batched_tensor = narrow(batched_tensor, "the coordinates").to(device)
        self.offsets = cpu_offsets(offsets, len(batched_tensor))
        self.voxel_size, self.voxel_origin = voxel_size, voxel_origin
        self.tensor_stride: tuple[int, ...] | None = None
        if tensor_stride is not None:
            self.set_tensor_stride(tensor_stride)
        self._rows: tuple[Tensor, int, Tensor] | None = None
        # What convolutions from here lead to, by layer and target; of these rows.
        self.places: dict[Hashable, Any] = {}

    @classmethod
    def of_rows(cls, rows: Tensor, axes: int, samples: int, tensor_stride: Any) -> IntCoords:
        """Of voxgemm's rows int32 [N, 4], ascending by sample, which are kept."""
        offsets = offsets_from_batch_index(rows[:, 0], samples)
        self = cls(rows[:, 1 : 1 + axes], offsets, tensor_stride=tensor_stride)
        self._rows = (self.batched_tensor, self.batched_tensor._version, rows)
        return self

    def rows(self) -> Tensor:
        """int32 [N, 4] (sample, x, y, z): one object as long as the coordinates are unchanged."""
        tensor = self.batched_tensor
        if torch.compiler.is_compiling() and self._rows is not None:
            return self._rows[2]  # a graph cannot ask for versions
        if self._rows is None or self._rows[0] is not tensor or self._rows[1] != tensor._version:
            made = to_rows(batch_indexed_coordinates(tensor, self.offsets))
            self._rows = (tensor, tensor._version, made)
            self.places.clear()
        return self._rows[2]

    @property
    def batch_indexed_coordinates(self) -> Tensor:
        """int32 [N, 1 + D], the sample in front."""
        return self.rows()[:, : 1 + self.num_spatial_dims]

    @property
    def num_spatial_dims(self) -> int:
        return self.batched_tensor.shape[1]

    @property
    def batch_size(self) -> int:
        return len(self.offsets) - 1

    @property
    def device(self) -> torch.device:
        return self.batched_tensor.device

    @property
    def shape(self) -> torch.Size:
        return self.batched_tensor.shape

    def __len__(self) -> int:
        return len(self.batched_tensor)

    def __getitem__(self, sample: int) -> Tensor:
        begin, end = self.offsets[sample : sample + 2].tolist()
        return self.batched_tensor[begin:end]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "places": {}}

    def set_tensor_stride(self, tensor_stride: Any) -> None:
        self.tensor_stride = sizes(tensor_stride, self.num_spatial_dims, "tensor_stride")

    def with_rows(self, rows: Tensor) -> IntCoords:
        """The same, of chosen rows [M, 4] that are ascending by sample."""
        out = IntCoords.of_rows(
            rows.contiguous(), self.num_spatial_dims, self.batch_size, self.tensor_stride
        )
        out.voxel_size, out.voxel_origin = self.voxel_size, self.voxel_origin
        return out

    def sort(
        self, ordering: POINT_ORDERING = POINT_ORDERING.MORTON_XYZ
    ) -> tuple[IntCoords, Tensor]:
        """Ordered within samples, and the permutation int64 [N]."""
        if ordering == POINT_ORDERING.RANDOM:
            return self, torch.arange(len(self), device=self.device)
        permutation = order_rows(self.rows(), ordering).permutation
        return self.with_rows(self.rows()[permutation]), permutation

    def unique(self) -> tuple[IntCoords, Tensor]:
        """One row per coordinate, the first, in the order there was, and its row int64 [M]."""
        from voxgemm import kernel_map

        kept = kernel_map.unique(self.rows()).first_row.long().sort().values
        return self.with_rows(self.rows()[kept]), kept

    def to(self, device: torch.device | str) -> IntCoords:
        if torch.device(device) == self.device:
            return self
        return IntCoords(
            self.batched_tensor.to(device),
            self.offsets,
            self.voxel_size,
            self.voxel_origin,
            self.tensor_stride,
        )

    def __repr__(self) -> str:
        return (
            f"IntCoords({len(self)} rows, {self.batch_size} samples, {self.num_spatial_dims} axes, "
            f"tensor_stride={self.tensor_stride})"
        )
