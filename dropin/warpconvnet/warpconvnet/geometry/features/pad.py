# SPDX-License-Identifier: Apache-2.0
"""Features of a batch, samples side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from voxgemm import ArgumentError

from .cat import CatFeatures


class PadFeatures:
    """batched_tensor [B, n, C], zero behind a sample's end, and offsets [B + 1] on the CPU."""

    is_cat, is_pad = False, True

    def __init__(
        self,
        batched_tensor: Tensor,
        offsets: Tensor | Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ):
        if batched_tensor.ndim != 3 or offsets is None:
            raise ArgumentError(
                f"features are {list(batched_tensor.shape)}, expected [B, n, C] with offsets"
            )
        self.batched_tensor = batched_tensor.to(device)
        given = torch.as_tensor(offsets).detach().to("cpu", torch.int64)
        counts = given.diff()
        fits = len(counts) == len(batched_tensor) and int(given[0]) == 0
        if not fits or bool(((counts < 0) | (counts > batched_tensor.shape[1])).any()):
            raise ArgumentError(
                f"offsets is {given.tolist()}, features {list(batched_tensor.shape)}"
            )
        self.offsets = given

    @classmethod
    def of_cat(cls, features: CatFeatures, multiple: int | None) -> PadFeatures:
        counts = features.offsets.diff()
        longest = int(counts.max()) if len(counts) else 0
        if multiple:
            longest = -(-longest // multiple) * multiple
        parts = features.batched_tensor.split(counts.tolist())
        rows = [torch.nn.functional.pad(part, (0, 0, 0, longest - len(part))) for part in parts]
        empty = features.batched_tensor.new_zeros((0, longest, features.num_channels))
        return cls(torch.stack(rows) if rows else empty, features.offsets)

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

    def to_pad(self, multiple: int | None = None) -> PadFeatures:
        return self if multiple is None else self.to_cat().to_pad(multiple)

    def to_cat(self) -> CatFeatures:
        counts = self.offsets.diff().tolist()
        rows = [part[:count] for part, count in zip(self.batched_tensor, counts, strict=True)]
        empty = self.batched_tensor.new_zeros((0, self.num_channels))
        return CatFeatures(torch.cat(rows) if rows else empty, self.offsets)
