# SPDX-License-Identifier: Apache-2.0
"""Coordinates for tests and benchmarks, from a short text: int32 [n, 4] (batch, x, y, z).

Rows are distinct and in raster order (sorted by x, then y, then z); the batch is 0.
"""

from __future__ import annotations

import math

import numpy as np

from .cloud import InputError
from .read import read
from .street import street
from .voxelize import check_memory, voxelize

FORMS = (
    "shell:RES",
    "street[:VOXEL]",
    "room[:RES]",
    "random:N:EXTENT",
    "full:N",
    "line:N",
    "file:PATH@VOXEL",
)
# Peak of building a cloud: two copies of a row of 16 bytes and a 64-bit key.
_ROW_BYTES = 40
# Cubes up to this edge have keys of 63 bits.
_MAX_EXTENT = 1 << 21


def cloud(spec: str, seed: int = 0) -> np.ndarray:
    """The coordinates int32 [n, 4] that a spec (one of FORMS) names, with a seed where it draws.

    >>> clouds.cloud("full:2").shape
    (8, 4)

    Raises InputError: a spec that is none.
    """
    kind, _, rest = spec.partition(":")
    values = rest.split(":") if rest else []
    if kind == "file" and rest:
        return _file(spec, rest)
    counts = {
        "shell": (1,),
        "street": (0, 1),
        "room": (0, 1),
        "random": (2,),
        "full": (1,),
        "line": (1,),
    }
    if len(values) not in counts.get(kind, ()):
        raise InputError(f"cloud is {spec!r}, expected one of {', '.join(FORMS)}")
    if kind == "street":
        return _rows(voxelize(street(seed), values[0] if values else 0.1).coords)
    numbers = [_number(spec, value) for value in values]
    if kind == "random":
        return _random(spec, numbers[0], numbers[1], seed)
    if kind == "room":
        return _room(spec, numbers[0] if numbers else 256)
    return {"shell": _shell, "full": _full, "line": _line}[kind](spec, numbers[0])


def _number(spec: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"cloud is {spec!r}, expected a whole number from 1 on, not {text!r}")
    return int(text)


def _extent(spec: str, extent: int) -> int:
    if extent > _MAX_EXTENT:
        raise InputError(f"cloud {spec!r} is {extent} voxels wide, expected {_MAX_EXTENT} at most")
    return extent


def _rows(coords: np.ndarray) -> np.ndarray:
    rows = np.zeros((len(coords), 4), dtype=np.int32)
    rows[:, 1:] = coords
    return rows


def _unpack(keys: np.ndarray, extent: int) -> np.ndarray:
    return _rows(np.stack(np.unravel_index(keys, (extent,) * 3), axis=1))


def _file(spec: str, rest: str) -> np.ndarray:
    path, at, voxel = rest.rpartition("@")
    if not at:
        raise InputError(f"cloud is {spec!r}, expected file:PATH@VOXEL")
    return _rows(voxelize(read(path), voxel).coords)


def _shell(spec: str, res: int) -> np.ndarray:
    """res/2 - 1.25 <= |(i, j, k) - res/2 + 0.5| <= res/2, evaluated in float32."""
    # The area of the middle sphere times the thickness of 1.25.
    check_memory(f"cloud {spec!r}", int(math.pi * 1.25 * _extent(spec, res) ** 2), _ROW_BYTES)
    outer = np.float32(res / 2)
    inner = outer - np.float32(1.25)
    line = np.arange(res, dtype=np.float32) - outer + np.float32(0.5)
    square = line * line
    parts = []
    for i in range(res):
        # Rows j that reach the shell at all, widened by one: the rest of the slice is skipped.
        half = math.sqrt(max(0.0, float(outer) ** 2 - float(square[i])))
        first = max(0, math.floor(res / 2 - half) - 1)
        last = min(res, math.ceil(res / 2 + half) + 1)
        radius = np.sqrt((square[i] + square[first:last, None]) + square[None, :])
        j, k = np.nonzero((radius >= inner) & (radius <= outer))
        part = np.empty((len(j), 3), dtype=np.int32)
        part[:, 0], part[:, 1], part[:, 2] = i, j + first, k
        parts.append(part)
    return _rows(np.concatenate(parts))


def _random(spec: str, n: int, extent: int, seed: int) -> np.ndarray:
    """n distinct voxels, uniform in a cube."""
    cells = _extent(spec, extent) ** 3
    if n > cells:
        raise InputError(f"cloud {spec!r} wants {n} voxels, its cube has {cells}")
    check_memory(f"cloud {spec!r}", n, _ROW_BYTES)
    draw = np.random.RandomState(seed)
    # A nearly full cube is drawn by its holes, so half of the cells are drawn at most.
    wanted = n if 2 * n <= cells else cells - n
    keys = np.zeros(0, dtype=np.int64)
    while len(keys) < wanted:
        drawn = draw.randint(0, cells, wanted - len(keys) + 16, dtype=np.int64)
        keys = np.unique(np.concatenate([keys, drawn]))
    if len(keys) > wanted:
        keys = np.sort(draw.permutation(keys)[:wanted])
    if wanted != n:
        keys = np.delete(np.arange(cells), keys)
    return _unpack(keys, extent)


def _full(spec: str, n: int) -> np.ndarray:
    check_memory(f"cloud {spec!r}", _extent(spec, n) ** 3, _ROW_BYTES)
    return _unpack(np.arange(n**3), n)


def _line(spec: str, n: int) -> np.ndarray:
    """n voxels along x."""
    if n > 1 << 31:
        raise InputError(f"cloud {spec!r} is {n} voxels wide, expected {1 << 31} at most")
    check_memory(f"cloud {spec!r}", n, _ROW_BYTES)
    rows = np.zeros((n, 4), dtype=np.int32)
    rows[:, 1] = np.arange(n)
    return rows


# Boxes of the room in metres: corner, size. Their surfaces are occupied, as a scan sees them.
_ROOM = (6.4, 4.8, 2.6)
_TABLE = [(2.4, 1.6, 0.70, 1.6, 0.9, 0.05)] + [
    (x, y, 0, 0.06, 0.06, 0.72) for x in (2.45, 3.89) for y in (1.65, 2.39)
]
_CHAIRS = [
    box
    for x, y, back in ((2.6, 1.0, 0), (3.3, 1.0, 0), (2.6, 2.65, 1), (3.3, 2.65, 1))
    for box in (
        (x, y, 0.43, 0.45, 0.45, 0.05),
        (x, y + 0.40 * back, 0.48, 0.45, 0.05, 0.45),
        *((x + dx, y + dy, 0, 0.04, 0.04, 0.43) for dx in (0, 0.41) for dy in (0, 0.41)),
    )
]
_SOFA = [(0.2, 3.6, 0, 2.2, 0.9, 0.42), (0.2, 4.3, 0.42, 2.2, 0.2, 0.45)] + [
    (x, 3.6, 0.42, 0.2, 0.7, 0.2) for x in (0.2, 2.2)
]
_SHELF = [(5.95, 0.5 + 1.2 * k, 0, 0.4, 0.04, 2.0) for k in range(3)] + [
    (5.95, 0.5, 0.05 + 0.4 * k, 0.4, 2.44, 0.03) for k in range(5)
]
_WARDROBE = [(0.1, 0.2, 0, 0.6, 1.6, 1.9)]
_BED = [(4.6, 3.5, 0, 1.6, 1.1, 0.55)]
_PICTURE = [(3.0, 0.05, 1.1, 1.2, 0.04, 0.7)]
_FURNITURE = np.array(_TABLE + _CHAIRS + _SOFA + _SHELF + _WARDROBE + _BED + _PICTURE)


def _room(spec: str, res: int) -> np.ndarray:
    """Floor, four walls and furniture of a room, `res` voxels long."""
    # Walls and floor hold 2 voxels per square of the length, furniture half as much again.
    check_memory(f"cloud {spec!r}", 3 * _extent(spec, res) ** 2, _ROW_BYTES)
    edge = _ROOM[0] / res
    cells = np.maximum(1, np.rint(np.array(_ROOM) / edge).astype(int))
    parts = [_box_surface(np.zeros(3, dtype=int), cells, top=False)]
    for box in _FURNITURE:
        low = np.minimum(np.floor(box[:3] / edge).astype(int), cells - 1)
        high = np.clip(np.rint((box[:3] + box[3:]) / edge).astype(int), low + 1, cells)
        parts.append(_box_surface(low, high))
    keys = np.unique(np.ravel_multi_index(np.concatenate(parts).T, (res,) * 3))
    return _unpack(keys, res)


def _box_surface(low: np.ndarray, high: np.ndarray, top: bool = True) -> np.ndarray:
    parts = []
    for axis in range(3):
        for side in (low[axis], high[axis] - 1):
            if axis == 2 and side != low[2] and not top:
                continue
            lines = [np.arange(low[a], high[a]) for a in range(3)]
            lines[axis] = np.array([side])
            parts.append(np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 3))
    return np.concatenate(parts)
