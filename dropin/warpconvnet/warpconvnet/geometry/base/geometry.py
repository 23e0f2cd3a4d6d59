# SPDX-License-Identifier: Apache-2.0
"""Coordinates and features of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from voxgemm import ArgumentError

from ..coords.integer import IntCoords
from ..features.cat import CatFeatures
from ..features.pad import PadFeatures


class Geometry:
    """Base of Voxels: coordinates, features, and named extras that `replace` carries along."""

    def __init__(
        self,
        batched_coordinates: IntCoords,
        batched_features: CatFeatures | PadFeatures,
        **extra: Any,
    ):
        if not torch.equal(batched_coordinates.offsets, batched_features.offsets):
            raise ArgumentError(
                f"the features' offsets are {batched_features.offsets.tolist()}, the coordinates' "
                f"{batched_coordinates.offsets.tolist()}"
            )
        self.batched_coordinates = batched_coordinates
        self.batched_features = batched_features
        self.extra_attributes = extra

    @property
    def coordinate_tensor(self) -> Tensor:
        return self.batched_coordinates.batched_tensor

    coordinates = coordinate_tensor

    @property
    def feature_tensor(self) -> Tensor:
        """[N, C], or padded [B, n, C]; under autocast in its dtype."""
        tensor = self.batched_features.batched_tensor
        kind = tensor.device.type
        if torch.is_autocast_enabled(kind) and tensor.dtype != torch.float64:
            return tensor.to(torch.get_autocast_dtype(kind))
        return tensor

    features = feature_tensor
    feats = feature_tensor

    @property
    def offsets(self) -> Tensor:
        return self.batched_coordinates.offsets

    @property
    def batch_size(self) -> int:
        return self.batched_coordinates.batch_size

    @property
    def num_channels(self) -> int:
        return self.batched_features.num_channels

    @property
    def num_spatial_dims(self) -> int:
        return self.batched_coordinates.num_spatial_dims

    @property
    def device(self) -> torch.device:
        return self.batched_coordinates.device

    @property
    def dtype(self) -> torch.dtype:
        return self.batched_features.dtype

    def __len__(self) -> int:
        return len(self.batched_coordinates)
