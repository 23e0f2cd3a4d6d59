# SPDX-License-Identifier: Apache-2.0
"""Features of a batch, samples one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from voxgemm import ArgumentError

from ..coords.ops.batch_index import cpu_offsets

if TYPE_CHECKING:
    from .pad import PadFeatures


class CatFeatures:
    """batched_tensor [N, C] and offsets [B + 1] on the CPU."""

    is_cat, is_pad = True, False

    def __init__(
        self,
        batched_tensor: Tensor | Sequence[Tensor],
        offsets: Tensor | Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ):
        if not isinstance(batched_tensor, Tensor):
            parts = list(batched_tensor)
            offsets = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
            batched_tensor = torch.cat(parts)
        if batched_tensor.ndim != 2 or offsets is None:
            raise ArgumentError(
                f"features are {list(batched_tensor.shape)}, expected [N, C] with offsets"
            )
        self.batched_tensor = batched_tensor.to(device)
        self.offsets = cpu_offsets(offsets, len(batched_tensor))

    @classmethod
    def of(cls, tensor: Tensor, offsets: Tensor) -> CatFeatures:
        """Without a look at what fits by construction."""
        self = object.__new__(cls)
        self.batched_tensor, self.offsets = tensor, offsets
        return self

    @property
    def num_channels(self) -> int:
        return self.batched_tensor.shape[-1]

    @property
    def batch_size(self) -> int:
        return len(self.offsets) - 1

    @property
    def dtype(self) -> torch.dtype:
        return self.batched_tensor.dtype

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

    def to_cat(self) -> CatFeatures:
        return self

    def to_pad(self, multiple: int | None = None) -> PadFeatures:
        """[B, n, C], n the longest sample, or the next multiple."""
        from .pad import PadFeatures

        return PadFeatures.of_cat(self, multiple)
