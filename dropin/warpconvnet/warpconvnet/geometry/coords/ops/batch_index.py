# SPDX-License-Identifier: Apache-2.0
"""Between offsets of samples and a batch number per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from voxgemm import ArgumentError
from voxgemm.columns import narrow


def cpu_offsets(offsets: Tensor | Sequence[int], rows: int) -> Tensor:
    """int64 [B + 1] on the CPU, ascending from 0 to rows."""
    if isinstance(offsets, Tensor):
        result = offsets.detach().to("cpu", torch.int64)
    else:
        result = torch.tensor(list(offsets), dtype=torch.int64, device="cpu")
    good = result.ndim == 1 and len(result) and int(result[0]) == 0 and int(result[-1]) == rows
    if not good or bool((result.diff() < 0).any()):
        raise ArgumentError(f"offsets is {result.tolist()}, expected ascending from 0 to {rows}")
    return result


def batch_index_from_offset(offsets: Tensor, device: torch.device | str | None = None) -> Tensor:
    """int32 [N]: the sample of each row."""
    counts = offsets.diff()
    numbers = torch.arange(len(counts), dtype=torch.int32, device=offsets.device)
    rows = numbers.repeat_interleave(counts)
    return rows if device is None else rows.to(device)


def offsets_from_batch_index(index: Tensor, num_batches: int | None = None) -> Tensor:
    """int64 [B + 1] on the CPU, of ascending samples; num_batches keeps empty ones at the end."""
    counts = torch.bincount(index.long(), minlength=num_batches or 0).cpu()
    if num_batches is not None and len(counts) > num_batches:
        raise ArgumentError(f"the batch index names sample {len(counts) - 1} of {num_batches}")
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def batch_indexed_coordinates(coords: Tensor, offsets: Tensor) -> Tensor:
    """int32 [N, 1 + D], the sample in front."""
    batch = batch_index_from_offset(offsets.cpu()).to(coords.device)
    return torch.cat([batch[:, None], narrow(coords, "the coordinates")], 1)
