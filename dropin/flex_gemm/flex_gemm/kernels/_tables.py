# SPDX-License-Identifier: Apache-2.0
"""FlexGEMM's neighbour maps, and what its programs derive from them.

FlexGEMM keeps a map as uint32 [rows, taps] with 0xffffffff for none; voxgemm as int32 [taps, rows]
with -1. The bits of the numbers are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import expect

UINT32 = torch.uint32
WORD = 32  # taps in one number of a mask


def to_table(neighbor_map: Tensor) -> Tensor:
    """int32 [taps, rows], contiguous; of int64 both -1 and 0xffffffff are none."""
    expect(
        neighbor_map.ndim == 2,
        f"neighbor_map has {neighbor_map.ndim} dimensions, expected [rows, taps]",
    )
    if neighbor_map.dtype == torch.uint32:
        numbers = neighbor_map.view(torch.int32)
    elif neighbor_map.dtype in (torch.int32, torch.int64):
        numbers = neighbor_map.to(torch.int32)  # keeps the low bits
    else:
        raise TypeError(f"neighbor_map is {neighbor_map.dtype}, expected uint32, int32 or int64")
    return numbers.t().contiguous()


def from_table(table: Tensor) -> Tensor:
    """uint32 [rows, taps]."""
    return table.t().contiguous().view(torch.uint32)


def mask_words(table: Tensor) -> Tensor:
    """int32 [rows], or [rows, words] beyond 32 taps: bit v is set where tap v exists."""
    taps, rows = table.shape
    words = table.new_zeros((max(-(-taps // WORD), 1), rows))
    for tap in range(taps):
        # Bit 31 is the sign: the shift of an int32 keeps the bits.
        words[tap // WORD] |= (table[tap] >= 0).int() << (tap % WORD)
    return words.t().contiguous() if taps > WORD else words[0]


def _words(gray_code: Tensor) -> Tensor:
    return gray_code if gray_code.ndim == 2 else gray_code[:, None]


def masked_order(gray_code: Tensor) -> Tensor:
    """int64 [rows]: rows by their Gray-decoded mask as an unsigned number, ties by row."""
    words = _words(gray_code).long() & 0xFFFFFFFF
    order = torch.arange(len(words), device=words.device)
    decoded, carry = [], None
    for word in reversed(words.unbind(1)):  # the most significant first
        for shift in (1, 2, 4, 8, 16):
            word = word ^ (word >> shift)
        # Above a word stands the parity of all more significant bits.
        if carry is not None:
            word = word ^ (carry * 0xFFFFFFFF)
        carry = word & 1
        decoded.append(word)
    for word in reversed(decoded):
        order = order[torch.sort(word[order], stable=True).indices]
    return order


def pairs(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint32 input rows, output rows, first pair of each tap and their number."""
    tap, out = (table >= 0).nonzero(as_tuple=True)
    first = torch.zeros(table.shape[0] + 1, dtype=torch.int32, device=table.device)
    first[1:] = (table >= 0).sum(1).cumsum(0)
    return (
        table[tap, out].view(torch.uint32),
        out.int().view(torch.uint32),
        first.view(torch.uint32),
    )


def block_taps(gray_code: Tensor, sorted_idx: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """int32: the taps of each block of rows in masked order, and where each block's begin."""
    good = 0 < block_size <= 512 and block_size & (block_size - 1) == 0
    expect(good, f"block_size is {block_size}, expected a power of two up to 512")
    words = _words(gray_code)[sorted_idx]  # [rows, words]
    blocks = -(-len(words) // block_size)
    padded = words.new_zeros((blocks * block_size, words.shape[1]))
    padded[: len(words)] = words
    padded = padded.view(blocks, block_size, words.shape[1])
    present = torch.stack([((padded >> bit) & 1).amax(1) for bit in range(WORD)], 2)
    present = present.flatten(1)  # [blocks, words * 32]
    first = torch.zeros(blocks + 1, dtype=torch.int32, device=words.device)
    first[1:] = present.sum(1).cumsum(0)
    return present.nonzero()[:, 1].int(), first
