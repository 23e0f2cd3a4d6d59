# SPDX-License-Identifier: Apache-2.0
"""The coordinate sets that a network's tensors stand on, and the kernel maps between them."""

from __future__ import annotations

import dataclasses
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from . import kernel_map
from .errors import ArgumentError
from .geometry import Geometry, Triple, triple
from .kernel_map import KernelMap

# Whole where it can be: a transposed convolution of the first set leads to a part of a voxel.
Stride = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class CoordinateSet:
    coords: Tensor  # int32 [n, 4]
    spatial_shape: Triple | None
    batch_size: int | None
    stride: Stride  # in voxels of the set that all began with


class MapCache:
    """Coordinate sets that come from one another, and their kernel maps, each built once.

    Every tensor that a network makes of its input shares one. Sets are known by number, so that
    nothing refers back to a tensor and memory is freed as soon as the last one is dropped. Threads
    that ask for the same at once get the same: what the first of them made.
    """

    def __init__(self, root: CoordinateSet):
        self.sets = [root]
        self._submanifold: dict[tuple[int, Geometry], KernelMap] = {}
        # (set, geometry, output rule, max_voxels) -> (set it leads to, map)
        self._strided: dict[tuple[int, Geometry, str, int | None], tuple[int, KernelMap]] = {}
        # (set, geometry, output padding) -> (set it leads to, map)
        self._generated: dict[tuple[int, Geometry, Triple], tuple[int, KernelMap]] = {}
        # What sets became on other devices, while it is in use there.
        self._there: WeakValueDictionary[tuple[int, torch.device], MapCache] = WeakValueDictionary()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "_there"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state, _there=WeakValueDictionary())

    def there(self, number: int, device: torch.device, non_blocking: bool) -> MapCache:
        """A cache that begins with a copy of a set on another device, the same for all askers."""
        found = self._there.get((number, device))
        if found is None:
            here = self.sets[number]
            coords = here.coords.to(device, non_blocking=non_blocking)
            found = MapCache(dataclasses.replace(here, coords=coords))
            self._there[number, device] = found
        return found

    def _added(self, here: CoordinateSet) -> int:
        """The number of a new set."""
        number = len(self.sets)
        self.sets.append(here)
        while self.sets[number] is not here:  # another thread added one before
            number += 1
        return number

    def submanifold(self, number: int, geometry: Geometry) -> KernelMap:
        key = (number, geometry)
        if key not in self._submanifold:
            coords = self.sets[number].coords
            self._submanifold.setdefault(key, kernel_map.submanifold_map(coords, geometry))
        return self._submanifold[key]

    def strided(
        self, number: int, geometry: Geometry, output_rule: str, max_voxels: int | None = None
    ) -> tuple[int, KernelMap]:
        """The number of the set that the convolution leads to, and the map towards it."""
        key = (number, geometry, output_rule, max_voxels)
        if key not in self._strided:
            source = self.sets[number]
            shape = source.spatial_shape
            coords = kernel_map.output_coords(
                source.coords, geometry, output_rule, shape, max_voxels
            )
            if shape is not None and output_rule == "reached":
                shape = geometry.out_shape(shape)
            elif shape is not None:
                shape = triple(
                    (-(-n // s) for n, s in zip(shape, geometry.stride, strict=True)), "the shape"
                )
            stride = [a * b for a, b in zip(source.stride, geometry.stride, strict=True)]
            map = kernel_map.strided_map(source.coords, coords, geometry)
            here = CoordinateSet(coords, shape, source.batch_size, _whole(stride))
            self._strided.setdefault(key, (self._added(here), map))
        return self._strided[key]

    def generated(
        self, number: int, geometry: Geometry, output_padding: Triple
    ) -> tuple[int, KernelMap]:
        """The number of the set that the transposed convolution makes, and the map towards it."""
        key = (number, geometry, output_padding)
        if key not in self._generated:
            source = self.sets[number]
            shape = source.spatial_shape
            if shape is not None:
                shape = geometry.in_shape(shape, output_padding)
            coords = kernel_map.generated_coords(source.coords, geometry, shape)
            stride = [a / b for a, b in zip(source.stride, geometry.stride, strict=True)]
            map = kernel_map.strided_map(coords, source.coords, geometry).transposed()
            here = CoordinateSet(coords, shape, source.batch_size, _whole(stride))
            self._generated.setdefault(key, (self._added(here), map))
        return self._generated[key]

    def settle(self) -> None:
        """Waits for the device; raises if a map could not be built, as for want of `max_voxels`.

        Of maps in a CUDA graph only this tells, after a replay.
        """
        made = [*self._strided.values(), *self._generated.values()]
        for map in [*self._submanifold.values(), *(map for _, map in made)]:
            map.pairs  # noqa: B018  raises with the reason

    def inverse(self, number: int, asked: dict[str, Triple]) -> tuple[int, KernelMap]:
        """Back through the convolution that led to a set and has the geometry asked for."""
        ways = [
            (key[0], key[1], map)
            for made in (self._strided, self._generated)
            for key, (target, map) in made.items()
            if target == number
        ]
        fitting = [
            way for way in ways if all(getattr(way[1], name) == asked[name] for name in asked)
        ]
        if len(fitting) == 1:
            return fitting[0][0], fitting[0][2].transposed()
        found = "; ".join(_described(way[1]) for way in fitting or ways)
        wanted = ", ".join(f"{_FIELDS[name]}={value}" for name, value in asked.items())
        if fitting:
            raise ArgumentError(
                f"several SparseConv3d with {wanted} led to these coordinates ({found}); say which "
                "by stride, padding and dilation"
            )
        came = f"they came from SparseConv3d with {found}" if ways else "they came from none"
        raise ArgumentError(
            f"an inverse convolution goes back to where a SparseConv3d with {wanted} came from, "
            f"but of these coordinates {came}"
        )


def _whole(stride: list[float]) -> Stride:
    x, y, z = (int(step) if step == int(step) else step for step in stride)
    return x, y, z


_FIELDS = dict(zip(Geometry._fields, ("kernel_size", "stride", "padding", "dilation"), strict=True))


def _described(geometry: Geometry) -> str:
    return ", ".join(f"{_FIELDS[name]}={value}" for name, value in geometry._asdict().items())


def way_back(
    kernel_size: int | Triple,
    stride: int | Triple | None,
    padding: int | Triple | None,
    dilation: int | Triple | None,
) -> dict[str, Triple]:
    """What is known of the layer to go back through, by the names of Geometry's fields."""
    given = {"size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return {
        name: triple(value, "kernel_size" if name == "size" else name)
        for name, value in given.items()
        if value is not None
    }
