# SPDX-License-Identifier: Apache-2.0
"""Voxels of clouds and meshes, in float64 without fused multiply-add, so that counts are exact.

A point lies in voxel `floor((p - min) / size)`, per axis, `min` being the smallest coordinate of
the cloud. A mesh is voxelised on a grid of R cells along its longest axis, `size = longest / R`,
at samples `((i*a + j*b) + k*c) / n` of each triangle (i + j + k = n), half a voxel or less apart.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .cloud import InputError, Mesh, PointCloud

# Samples worked on at once: about 100 bytes each, so a block stays near 100 MB.
_BLOCK = 1 << 20
# Half an hour at the 6 million samples a second of one core; only needle triangles get there.
_MAX_SAMPLES = 10**10
# Peak of voxelising a mesh: 170 bytes a voxel at 7 to 9 million voxels, half as much for colours.
_MESH_BYTES = 256
_INT32_END = 2**31
_INT64_END = 2**63


@dataclass
class Voxels:
    """What `voxelize` gives.

    >>> clouds.voxelize(clouds.street(beams=4, azimuths=16), 2.0).size
    2.0
    """

    coords: np.ndarray  # [n, 3] int32, distinct, sorted by x, then y, then z
    size: float  # edge of a voxel
    origin: np.ndarray  # [3] float64, the corner of voxel (0, 0, 0)
    samples: np.ndarray  # [n] int64, points (of a mesh: surface samples) in each voxel
    # Means over the samples in the voxel that have a finite value; 0 where none has.
    color: np.ndarray | None = None  # [n, 3] float32 of 0..1
    normal: np.ndarray | None = None  # [n, 3] float32, shorter than 1 where normals differ
    intensity: np.ndarray | None = None  # [n] float32
    inverse: np.ndarray | None = None  # [points] int64, the voxel of each point; None for a mesh


def voxelize(item: PointCloud | Mesh, voxel: str | float, bytes_per_voxel: int = 0) -> Voxels:
    """Voxels of an item, a cloud or a mesh.

    `voxel` is a size in the file's unit (0.05) or a grid ("256grid": cells along the longest axis);
    for a mesh a bare integer of 8 or more is a grid as well. A size s of a mesh is the grid of
    ceil(longest / s) cells, but of exactly that size. `bytes_per_voxel` is what the caller needs
    afterwards: voxels that do not fit in free memory are an InputError before it allocates any.

    >>> import numpy as np
    >>> points = np.array([[0.0, 0, 0], [0.1, 0, 0], [1, 0, 0]])
    >>> clouds.voxelize(clouds.PointCloud(points), 0.5).samples
    array([2, 1])
    """
    mesh = isinstance(item, Mesh)
    corners = item.vertices if mesh else item.points
    if not len(corners):
        raise InputError(f"{item.name} has 0 points, expected at least 1")
    extent = corners.max(axis=0) - corners.min(axis=0)
    size, cells = _grid(item.name, extent, voxel, mesh)
    voxels = (_voxelize_mesh if mesh else _voxelize_points)(item, size, cells)
    check_memory(f"voxel {voxel} of {item.name}", len(voxels.coords), bytes_per_voxel)
    return voxels


def available_memory() -> int:
    """Bytes that this process may still allocate; a guess where the system does not tell."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            # File pages count as used, but are given up on demand.
            cache = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.M)
            free = min(free, int(limit) - used + int(cache[1]))
    except OSError:
        pass  # no control group of version 2
    return free or 2**63


def check_memory(what: str, voxels: int, bytes_per_voxel: int, free: int | None = None) -> None:
    """Refuses a cloud that does not fit: `what` names it, as the subject of the message.

    `free`: bytes of another memory than the host's.
    """
    free = available_memory() if free is None else free
    if voxels * bytes_per_voxel > free:
        raise InputError(
            f"{what} has {voxels:,} voxels and needs {voxels * bytes_per_voxel / 1e9:.1f} GB,"
            f" {free / 1e9:.1f} GB of memory are free"
        )


def _parse(voxel: str | float, mesh: bool) -> tuple[float, bool]:
    """The number in a voxel option, and whether it is a grid."""
    text = str(voxel).strip().lower().replace(" ", "")
    grid = text.endswith("grid")
    number = text[:-4] if grid else text
    try:
        value = float(number)
    except ValueError:
        raise InputError(
            f"voxel is {str(voxel)!r}, expected a size such as 0.05 or a grid such as 256grid"
        ) from None
    whole = number.isdecimal()
    if grid and (not whole or value < 2):
        raise InputError(f"voxel is {str(voxel)!r}, a grid has a whole number of cells from 2 on")
    return value, grid or (mesh and whole and value >= 8)


def _grid(name: str, extent: np.ndarray, voxel: str | float, mesh: bool) -> tuple[float, int]:
    """The voxel size, and the cells that coordinates are clamped to."""
    value, grid = _parse(voxel, mesh)
    longest = float(extent.max())
    if not grid and not (value > 0 and math.isfinite(value)):
        raise InputError(f"voxel is {voxel}, expected a finite size above 0")
    if not math.isfinite(longest):
        raise InputError(f"{name} has an extent of {longest:g}, expected a finite one")
    if not longest > 0:
        raise InputError(f"{name} has an extent of 0, every voxel size gives one voxel")
    size = longest / value if grid else value
    across = longest / size if size > 0 else math.inf
    if across >= _INT32_END or size == 0:
        raise InputError(
            f"voxel {voxel} makes {name} {across:.3g} voxels wide, "
            f"int32 coordinates allow {_INT32_END}"
        )
    # Points are inside by definition; one cell more leaves room for the rounding of `across`.
    cells = int(value) if grid else (math.ceil(across) if mesh else math.floor(across) + 2)
    if cells < 2:
        raise InputError(f"voxel {voxel} gives one voxel, {name} is only {longest:g} wide")
    shape = _shape(extent, size, cells)
    if math.prod(shape) >= _INT64_END:
        raise InputError(
            f"voxel {voxel} makes a grid of {shape[0]} x {shape[1]} x {shape[2]} cells of {name}, "
            "expected less than 2^63 cells"
        )
    return size, cells


def _shape(extent: np.ndarray, size: float, cells: int) -> list[int]:
    """Cells per axis, with one to spare for samples that rounding puts beyond the extent."""
    return [min(cells, math.floor(float(e) / size) + 2) for e in extent]


def _voxelize_points(cloud: PointCloud, size: float, cells: int) -> Voxels:
    origin = cloud.points.min(axis=0)
    step = round(size * cloud.ticks_per_unit)
    # Of whole ticks (0.05 of centimetres): in integers, as float64 has no exact 0.05.
    exact = cloud.ticks is not None and step > 0 and size == step / cloud.ticks_per_unit
    columns = []
    for axis in range(3):
        if exact:
            ticks = cloud.ticks[:, axis]
            column = (ticks - ticks.min()) // step
        else:
            column = np.floor((cloud.points[:, axis] - origin[axis]) / size).astype(np.int64)
        columns.append(np.minimum(column, cells - 1))
    shape = [int(column.max()) + 1 for column in columns]
    keys, inverse, samples = np.unique(
        _pack(columns, shape), return_inverse=True, return_counts=True
    )
    if len(keys) == 1:
        longest = (cloud.points.max(axis=0) - origin).max()
        raise InputError(f"voxel {size:g} gives one voxel, {cloud.name} is only {longest:g} wide")
    voxels = Voxels(_unpack(keys, shape), size, origin, samples, inverse=inverse)
    for field in ("color", "normal", "intensity"):
        values = getattr(cloud, field)
        if values is not None:
            scale = 255 if values.dtype == np.uint8 and field == "color" else 1
            setattr(voxels, field, _means(values, inverse, len(keys), scale))
    return voxels


def _means(values: np.ndarray, inverse: np.ndarray, rows: int, scale: int) -> np.ndarray:
    table = values.reshape(len(values), -1)
    good = np.isfinite(table).all(axis=1)
    where = inverse[good]
    count = np.maximum(np.bincount(where, minlength=rows), 1) * scale
    # bincount adds in row order, so the sums do not depend on how unique sorts.
    sums = [np.bincount(where, table[good, c], rows) / count for c in range(table.shape[1])]
    return np.stack(sums, axis=1).reshape(rows, *values.shape[1:]).astype(np.float32)


def _pack(columns: list[np.ndarray], shape: list[int]) -> np.ndarray:
    return (columns[0] * shape[1] + columns[1]) * shape[2] + columns[2]


def _unpack(keys: np.ndarray, shape: list[int]) -> np.ndarray:
    return np.stack(np.unravel_index(keys, shape), axis=1).astype(np.int32)


def _barycentric(n: int) -> Iterator[np.ndarray]:
    """All integers i, j, k >= 0 with i + j + k = n, as float64 [3, m], m <= max(_BLOCK, n + 1)."""
    step = max(1, _BLOCK // (n + 1))
    for start in range(0, n + 1, step):
        rows = np.arange(start, min(start + step, n + 1))
        i = np.repeat(rows, n - rows + 1)
        ends = np.cumsum(n - rows + 1)
        j = np.arange(len(i)) - np.repeat(ends - (n - rows + 1), n - rows + 1)
        yield np.stack([i, j, n - i - j]).astype(np.float64)


def _blocks(divisions: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(n, weights [3, m], triangles [t]): triangles of equal n, t * m near _BLOCK at most."""
    order = np.argsort(divisions, kind="stable")
    starts = np.flatnonzero(np.diff(divisions[order], prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        n = int(divisions[order[start]])
        for weights in _barycentric(n):
            step = max(1, _BLOCK // weights.shape[1])
            for first in range(start, end, step):
                yield n, weights, order[first : min(first + step, end)]


class _Sums:
    """Adds rows with equal keys: memory follows the distinct keys, not the rows added."""

    def __init__(self) -> None:
        self.parts: list[tuple[np.ndarray, np.ndarray]] = []
        self.rows = 0
        self.merged_rows = 0

    def add(self, keys: np.ndarray, values: list[np.ndarray]) -> None:
        unique, inverse, count = np.unique(keys, return_inverse=True, return_counts=True)
        sums = [count, *(np.bincount(inverse, v, len(unique)) for v in values)]
        self.parts.append((unique, np.stack(sums, axis=1)))  # [unique], [unique, 1 + values]
        self.rows += len(unique)
        # Doubling before each merge keeps the merges' total work linear.
        if self.rows > 2 * self.merged_rows + _BLOCK:
            self.merge()

    def merge(self) -> tuple[np.ndarray, np.ndarray]:
        if len(self.parts) > 1:
            keys = np.concatenate([p[0] for p in self.parts])
            table = np.concatenate([p[1] for p in self.parts])
            unique, inverse = np.unique(keys, return_inverse=True)
            sums = [np.bincount(inverse, column, len(unique)) for column in table.T]
            self.parts = [(unique, np.stack(sums, axis=1))]
        self.rows = self.merged_rows = len(self.parts[0][0])
        return self.parts[0]


def _voxelize_mesh(mesh: Mesh, size: float, cells: int) -> Voxels:
    origin = mesh.vertices.min(axis=0)
    corners = mesh.vertices[mesh.faces]  # [m, corner, axis]
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    divisions = np.maximum(1, np.ceil(_longest_edge(a, b, c) / (0.5 * size)))
    cross = np.cross(b - a, c - a)
    _check_mesh(mesh.name, divisions, float(np.abs(cross).sum()) / 2 / size**2)

    face_normal = cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), 1e-300)
    color = None
    if mesh.color is not None:
        color = np.nan_to_num(mesh.color / (255 if mesh.color.dtype == np.uint8 else 1))
    normal = None if mesh.normal is None else np.nan_to_num(mesh.normal)
    shape = _shape(mesh.vertices.max(axis=0) - origin, size, cells)
    sums = _Sums()
    for n, (i, j, k), t in _blocks(divisions.astype(np.int64)):

        def sampled(at: np.ndarray, n=n, i=i, j=j, k=k) -> np.ndarray:  # [t, 3] -> [t, m]
            return ((i * at[:, 0, None] + j * at[:, 1, None]) + k * at[:, 2, None]) / n

        columns = []
        for axis in range(3):
            column = np.floor((sampled(corners[t, :, axis]) - origin[axis]) / size)
            columns.append(np.clip(column, 0, shape[axis] - 1).astype(np.int64))
        if normal is None:
            values = [np.repeat(face_normal[t, axis], len(i)) for axis in range(3)]
        else:
            values = [sampled(normal[mesh.faces[t], axis]).ravel() for axis in range(3)]
        if color is not None:
            values += [sampled(color[mesh.faces[t], axis]).ravel() for axis in range(3)]
        sums.add(_pack(columns, shape).ravel(), values)
    keys, table = sums.merge()
    means = (table[:, 1:] / table[:, :1]).astype(np.float32)
    return Voxels(
        _unpack(keys, shape),
        size,
        origin,
        table[:, 0].astype(np.int64),
        color=None if color is None else means[:, 3:],
        normal=means[:, :3],
    )


def _longest_edge(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    lengths = []
    for p, q in ((a, b), (b, c), (c, a)):
        d = q - p
        lengths.append(np.sqrt((d[:, 0] * d[:, 0] + d[:, 1] * d[:, 1]) + d[:, 2] * d[:, 2]))
    return np.maximum(np.maximum(lengths[0], lengths[1]), lengths[2])


def _check_mesh(name: str, divisions: np.ndarray, area: float) -> None:
    """`area`: the triangles' projections on the three axes in voxels, the voxels they pass."""
    samples = float(((divisions + 1) * (divisions + 2) / 2).sum())
    check_memory(f"{name} on this grid", int(min(samples, area)), _MESH_BYTES)
    if samples > _MAX_SAMPLES:
        raise InputError(
            f"{name} on this grid has {samples:.3g} surface samples, "
            f"expected {_MAX_SAMPLES:.0e} at most"
        )
