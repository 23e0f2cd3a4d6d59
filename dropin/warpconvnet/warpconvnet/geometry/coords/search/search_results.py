# SPDX-License-Identifier: Apache-2.0
"""Kernel maps as lists of pairs, tap by tap."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from voxgemm import ArgumentError
from voxgemm.geometry import Geometry
from voxgemm.kernel_map import KernelMap, table_map


class IntSearchResult:
    """in_maps and out_maps int32 [L], grouped by tap, and offsets [K + 1] on the CPU.

    identity_map_index names a tap that maps every row onto itself, whether or not its pairs are
    listed.
    """

    def __init__(
        self,
        in_maps: Tensor,
        out_maps: Tensor,
        offsets: Tensor,
        identity_map_index: int | None = None,
    ):
        if in_maps.shape != out_maps.shape or in_maps.ndim != 1:
            raise ArgumentError(
                f"in_maps is {list(in_maps.shape)} and out_maps {list(out_maps.shape)}, expected "
                "two of the same [L]"
            )
        self.in_maps, self.out_maps = in_maps.int(), out_maps.int()
        self.offsets = offsets.detach().to("cpu", torch.int64)
        self.identity_map_index = identity_map_index
        if int(self.offsets[-1]) != len(in_maps):
            raise ArgumentError(f"offsets end at {int(self.offsets[-1])}, of {len(in_maps)} pairs")
        self._maps: dict[tuple[int, int, int], KernelMap] = {}

    @classmethod
    def of_table(cls, table: Tensor, identity: int | None = None) -> IntSearchResult:
        """Of a table int32 [K, M] of input rows, -1 for none."""
        tap, out = (table >= 0).nonzero(as_tuple=True)
        counts = (table >= 0).sum(1).cpu()
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(table[tap, out], out.int(), offsets, identity)

    @property
    def device(self) -> torch.device:
        return self.in_maps.device

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, tap: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= tap < len(self):
            raise IndexError(f"tap {tap} of {len(self)}")
        begin, end = self.offsets[tap % len(self) :][:2].tolist()
        return self.in_maps[begin:end], self.out_maps[begin:end]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[tap] for tap in range(len(self)))

    def numel(self, tap: int) -> int:
        return int(self.offsets[tap + 1] - self.offsets[tap])

    def get_batch(
        self, start: int, end: int, out_format: str = "list"
    ) -> tuple[list[Tensor], list[Tensor]] | tuple[Tensor, Tensor]:
        """The taps from start to end: lists, or one tensor [taps, most] padded with -1 each."""
        pairs = [self[tap] for tap in range(start, min(end, len(self)))]
        ins, outs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        if out_format == "list":
            return ins, outs
        if out_format != "tensor":
            raise ArgumentError(f"out_format is {out_format!r}, expected 'list' or 'tensor'")
        pad = torch.nn.utils.rnn.pad_sequence
        return tuple(pad(rows, batch_first=True, padding_value=-1) for rows in (ins, outs))

    def to_csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """Input rows by output, the distinct outputs, and where each begins, on the CPU."""
        order = torch.sort(self.out_maps, stable=True).indices
        outs, counts = self.out_maps[order].unique_consecutive(return_counts=True)
        counts = counts.cpu()
        return self.in_maps[order], outs, torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def neighbor_count_per_output(self, num_out: int) -> Tensor:
        return torch.bincount(self.out_maps.long(), minlength=num_out).int()

    def clone(self) -> IntSearchResult:
        return IntSearchResult(
            self.in_maps.clone(),
            self.out_maps.clone(),
            self.offsets.clone(),
            self.identity_map_index,
        )

    def kernel_map(self, n_in: int, n_out: int) -> KernelMap:
        """voxgemm's map of these pairs, kept; no two of a tap may have one output."""
        key = (n_in, n_out, self.in_maps._version + self.out_maps._version)
        if key not in self._maps:
            # The identity may stand behind the taps that are listed.
            count = max(len(self), 1 + (self.identity_map_index or 0))
            table = self.in_maps.new_full((count, n_out), -1)
            taps = torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())
            taps = taps.to(self.device)
            for rows, most, name in ((self.in_maps, n_in, "in"), (self.out_maps, n_out, "out")):
                if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < most:
                    raise ArgumentError(f"{name}_maps names rows outside the {most} there are")
            table[taps, self.out_maps.long()] = self.in_maps
            listed = int((table >= 0).sum())
            if listed != len(self.in_maps):
                raise ArgumentError(
                    f"{len(self.in_maps) - listed} pairs share tap and output with another one"
                )
            if self.identity_map_index is not None:
                rows = torch.arange(n_out, dtype=torch.int32, device=self.device)
                table[self.identity_map_index] = torch.where(rows < n_in, rows, -1)
            map = self._maps[key] = table_map(table, n_in, Geometry((count, 1, 1)))
            # Whether a transposed map has all pairs: no two of a tap have one input.
            map._exact = len((taps * n_in + self.in_maps).unique()) == listed
        return self._maps[key]
