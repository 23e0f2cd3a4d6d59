# SPDX-License-Identifier: Apache-2.0
"""What both neighbour caches are: a kernel map, and fields that are derived from it on demand."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from voxgemm.geometry import Geometry
from voxgemm.kernel_map import KernelMap, table_map

from ...errors import expect
from ...kernels import _tables

_BLOCKS = re.compile(r"valid_kernel(_bwd)?(_seg)?_(\d+)")


def volume(size: tuple[int, int, int]) -> int:
    return size[0] * size[1] * size[2]


class NeighborCache:
    """Fields by attribute and by name, each derived on first access and assignable.

    `_map` is voxgemm's kernel map: made with the cache, or of an assigned neighbor_map at its first
    use. `_known` says of which geometry it was made; nothing if it came as a bare neighbor_map.
    """

    _map: KernelMap | None = None
    _known: Geometry | None = None
    _backward = False  # whether there are fields of the transposed map

    def __init__(self, **fields: Any):
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "neighbor_map":
            # All else was derived from the map before.
            for old in [key for key in vars(self) if self._derives(key)]:
                delattr(self, old)
            vars(self).pop("_map", None)
            vars(self).pop("_known", None)
            vars(self).pop("compared", None)
        object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "compared":
            # The map by operands and geometry that were found to fit.
            object.__setattr__(self, name, {})
            return vars(self)[name]
        if not self._derives(name):
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        value = self._derived(name)
        object.__setattr__(self, name, value)
        return value

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Torch cannot pickle uint32 tensors: they go as int32, and their names with them."""
        state = {name: value for name, value in vars(self).items() if name != "compared"}
        unsigned = [n for n, v in state.items() if getattr(v, "dtype", None) == torch.uint32]
        state.update({name: state[name].view(torch.int32) for name in unsigned})
        return {**state, "_unsigned": unsigned}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of the original's pickles, which are the fields alone."""
        unsigned = state.get("_unsigned", ())
        for name, value in state.items():
            if name != "_unsigned":
                value = value.view(torch.uint32) if name in unsigned else value
                object.__setattr__(self, name, value)

    @classmethod
    def _derives(cls, name: str) -> bool:
        if name in ("gray_code", "sorted_idx", "neighbor_map") or name.startswith("valid_signal_"):
            return name.removeprefix("valid_signal_") in (
                *("gray_code", "sorted_idx", "neighbor_map"),
                *("i", "o", "seg"),
            )
        if name in ("gray_code_bwd", "sorted_idx_bwd", "neighbor_map_bwd"):
            return cls._backward
        blocks = _BLOCKS.fullmatch(name)
        return blocks is not None and (cls._backward or not blocks[1])

    def _derived(self, name: str) -> Tensor:
        if blocks := _BLOCKS.fullmatch(name):
            side = blocks[1] or ""
            order = getattr(self, f"sorted_idx{side}")
            taps, first = _tables.block_taps(
                getattr(self, f"gray_code{side}"), order, int(blocks[3])
            )
            object.__setattr__(self, f"valid_kernel{side}_{blocks[3]}", taps)
            object.__setattr__(self, f"valid_kernel{side}_seg_{blocks[3]}", first)
            return first if blocks[2] else taps
        if name.startswith("valid_signal_"):
            parts = _tables.pairs(self._table())
            for part, value in zip(("i", "o", "seg"), parts, strict=True):
                object.__setattr__(self, f"valid_signal_{part}", value)
            return getattr(self, name)
        side = "_bwd" if name.endswith("_bwd") else ""
        if name.startswith("sorted_idx"):
            return _tables.masked_order(getattr(self, f"gray_code{side}"))
        table = self._whole_map().transposed().neighbours if side else self._table()
        if name.startswith("gray_code"):
            return _tables.mask_words(table)
        return _tables.from_table(table)

    def _table(self) -> Tensor:
        """int32 [taps, rows]."""
        if self._map is not None:
            return self._map.neighbours
        expect("neighbor_map" in vars(self), "the cache was made without a neighbor_map")
        return _tables.to_table(self.neighbor_map)

    def _whole_map(self) -> KernelMap:
        if self._map is None:
            table = self._table()
            rows = vars(self).get("_rows", table.shape[1])
            object.__setattr__(self, "_map", user_map(table, rows))
        return self._map

    def compute_kernel_idx(self, block_size: int) -> None:
        self._derived(f"valid_kernel_{block_size}")

    def valid_kernel_callback(self, block_size: int) -> Tensor:
        return getattr(self, f"valid_kernel_{block_size}")

    def valid_kernel_seg_callback(self, block_size: int) -> Tensor:
        return getattr(self, f"valid_kernel_seg_{block_size}")

    def map_for(self, rows: int, size: tuple[int, int, int], device: torch.device) -> KernelMap:
        """The kernel map, if it is one of `rows` input rows and a kernel of this size."""
        map = self._map
        if map is None:
            table = self._table()
            object.__setattr__(self, "_map", user_map(table, rows, size))
            map = self._map
        if map.n_in != rows:
            expect(False, f"feats has {rows} rows, the neighbor_cache was made of {map.n_in}")
        if map.geometry.size != size:
            known = self._known
            fits = known is None and map.taps == volume(size)
            expect(
                fits,
                f"the weight has a {_times(size)} kernel, the neighbor_cache was made for "
                + (_times(known.size) if known else f"{map.taps} taps"),
            )
            object.__setattr__(self, "_map", user_map(map.neighbours, rows, size))
            map = self._map
        if map.neighbours.device != device:
            place = map.neighbours.device
            expect(False, f"feats is on {device}, the neighbor_cache on {place}")
        return map

    def expect_geometry(self, asked: Geometry) -> None:
        """That the cache was made with these; one of a bare neighbor_map fits all."""
        known = self._known
        if known is None or known == asked:
            return
        # Padding last: of a submanifold kernel it follows from the others.
        for name in ("size", "stride", "dilation", "padding"):
            value, made = getattr(asked, name), getattr(known, name)
            if made != value:
                expect(False, f"{name} is {value}, the neighbor_cache was made for {made}")


def _times(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def user_map(table: Tensor, rows: int, size: tuple[int, int, int] | None = None) -> KernelMap:
    """The map of a table that a program brought; its numbers are looked at once."""
    taps = table.shape[0]
    if size is not None and volume(size) != taps:
        expect(False, f"the weight has a {_times(size)} kernel, the neighbor_map {taps} taps")
    if not torch.compiler.is_compiling() and table.numel() and not _capturing(table):
        low, high = (int(value) for value in table.aminmax())
        expect(
            low >= -1 and high < rows,
            f"neighbor_map names row {high if low >= -1 else low}, feats has {rows}",
        )
    return table_map(table, rows, Geometry(size or (taps, 1, 1)))


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
