# SPDX-License-Identifier: Apache-2.0
"""Features on active voxels."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import kernel_map
from ._library import call, ops
from .errors import ArgumentError
from .geometry import Triple, triple, whole
from .map_cache import CoordinateSet, MapCache, Stride
from .pooling import segment_reduce

Number = int | float


# A dataclass: torch's distributed training finds features in these, and puts others in their place.
@dataclasses.dataclass(init=False, repr=False, eq=False)
class SparseTensor:
    """Features on voxels: floats [n, channels] and coordinates int32 [n, 4], in any order.

    A coordinate is (batch, x, y, z). With a spatial shape or a batch size given, one outside it is
    an error; without, any int32 is legal. Voxels may repeat: a look-up finds the lowest row, each
    row has its own output (`unique` merges). n may be 0.

    Rows with the batch number `PADDING_BATCH` are no voxels: they have no neighbours, and what a
    convolution gives them is its bias. Whatever counts rows, a batch norm or a mean of a loss,
    counts them too unless it is told not to.

    Layers find their kernel maps here: all that a network computes on one set of coordinates shares
    the set and its maps. Arithmetic and `cat` take tensors on the same set, which they know by
    identity: no device is asked, nothing is compared.

    >>> coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, 5, 0, 0]], dtype=torch.int32)
    >>> x = vg.SparseTensor(torch.ones(3, 2), coords)
    >>> y = x * 2 + x.replace(torch.zeros(3, 2))
    >>> y.features.sum(), y.coords is x.coords
    (tensor(12.), True)
    >>> [item.voxels for item in x]
    [2, 1]

    Raises ArgumentError: tensors of another shape, dtype or device than said, coordinates outside.
    """

    features: Tensor
    _maps: MapCache
    _number: int

    def __init__(
        self,
        features: Tensor,
        coords: Tensor | None = None,
        spatial_shape: int | Sequence[int] | None = None,
        batch_size: int | None = None,
        **parts: Any,
    ):
        self.features = features
        if coords is None and parts:  # dataclasses.replace() gives every field
            self._maps, self._number = parts["_maps"], parts["_number"]
            return
        if parts:
            raise TypeError(f"SparseTensor got an unexpected argument {next(iter(parts))!r}")
        coords = _checked(features, coords).contiguous()
        shape = None if spatial_shape is None else triple(spatial_shape, "spatial_shape")
        zero = call(ops._check_coords.default, coords, shape, batch_size)
        if torch.compiler.is_compiling():
            coords = coords + zero  # a graph drops what nothing uses, a check too
        self._maps = MapCache(CoordinateSet(coords, shape, batch_size, (1, 1, 1)))
        self._number = 0

    @classmethod
    def _on(cls, features: Tensor, maps: MapCache, number: int = 0) -> SparseTensor:
        out: SparseTensor = object.__new__(cls)
        out.features, out._maps, out._number = features, maps, number
        return out

    @classmethod
    def from_dense(cls, grid: Tensor, mask: Tensor | None = None) -> SparseTensor:
        """The voxels of a grid [batch, channels, X, Y, Z] that a mask, bool [batch, X, Y, Z], has.

        Without a mask: where any channel differs from zero. Rows are in ascending order of
        (batch, x, y, z). Waits for the device. Differentiable in the grid.

        >>> grid = torch.zeros(1, 2, 4, 4, 4)
        >>> grid[0, 1, 3, 0, 2] = 5
        >>> x = vg.SparseTensor.from_dense(grid)
        >>> x.coords.tolist(), x.features.tolist()
        ([[0, 3, 0, 2]], [[0.0, 5.0]])
        """
        if grid.ndim != 5 or not grid.is_floating_point():
            raise ArgumentError(
                f"grid is {_shape(grid)}, expected floats [batch, channels, X, Y, Z]"
            )
        batch, _, *extents = grid.shape
        if mask is None:
            mask = (grid != 0).any(1)
        elif mask.dtype != torch.bool or mask.shape != (batch, *extents):
            raise ArgumentError(f"mask is {_shape(mask)}, expected bool {[batch, *extents]}")
        at = mask.nonzero()
        features = grid.permute(0, 2, 3, 4, 1)[tuple(at.T)]
        here = CoordinateSet(at.int(), triple(extents, "extents"), batch, (1, 1, 1))
        return cls._on(features, MapCache(here))

    @property
    def maps(self) -> MapCache:
        """The coordinate sets and maps shared by all that descends from one tensor."""
        return self._maps

    @property
    def number(self) -> int:
        """Which of the sets in `maps` the rows stand on."""
        return self._number

    @property
    def _set(self) -> CoordinateSet:
        return self._maps.sets[self._number]

    @property
    def coords(self) -> Tensor:
        """int32 [n, 4]: (batch, x, y, z) of each row, in steps of `stride`."""
        return self._maps.sets[self._number].coords

    @property
    def spatial_shape(self) -> Triple | None:
        """The number of voxels per axis, if the first tensor had a shape."""
        return self._set.spatial_shape

    @property
    def stride(self) -> Stride:
        """How many voxels of the first tensor one step is, per axis."""
        return self._set.stride

    @property
    def batch_size(self) -> int:
        """As given, else the highest batch number plus one, for which the device is waited for."""
        given = self._set.batch_size
        if given is not None:
            return given
        return max(int(self.coords[:, 0].max()) + 1, 0) if self.voxels else 0

    @property
    def voxels(self) -> int:
        """n, the number of rows."""
        return self.coords.shape[0]

    @property
    def channels(self) -> int:
        """Of each row of features."""
        return self.features.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        """Of the features."""
        return self.features.device

    def replace(self, features: Tensor, number: int | None = None) -> SparseTensor:
        """Other features [n, any] on the same coordinates, or on another set of `maps`."""
        out = self._on(features, self._maps, self._number if number is None else number)
        is_matrix = isinstance(features, Tensor) and features.ndim == 2
        if not is_matrix or features.shape[0] != out.coords.shape[0]:
            raise ArgumentError(
                f"features is {_shape(features)}, expected [{out.voxels}, channels]: "
                "one row per voxel"
            )
        return out

    def apply(self, function: Callable[[Tensor], Tensor]) -> SparseTensor:
        """function(features), [n, any], on the same coordinates.

        >>> x = vg.SparseTensor(torch.tensor([[-1.0]]), torch.zeros(1, 4, dtype=torch.int32))
        >>> x.apply(torch.relu).features
        tensor([[0.]])
        """
        return self.replace(function(self.features))

    def shares_coords(self, other: SparseTensor) -> bool:
        """Whether row i of both is one voxel, by identity: two equal copies do not count."""
        return self.coords is other.coords

    def _operand(self, other: Operand, name: str) -> Tensor | Number:
        """What stands beside the features: those of a tensor on the same coordinates, or other."""
        if not isinstance(other, SparseTensor):
            return other
        check_shared(name, (self, other))
        return other.features

    def __add__(self, other: Operand) -> SparseTensor:
        return self.replace(self.features + self._operand(other, "a sum"))

    def __sub__(self, other: Operand) -> SparseTensor:
        return self.replace(self.features - self._operand(other, "a difference"))

    def __mul__(self, other: Operand) -> SparseTensor:
        return self.replace(self.features * self._operand(other, "a product"))

    def __truediv__(self, other: Operand) -> SparseTensor:
        return self.replace(self.features / self._operand(other, "a quotient"))

    def __rsub__(self, other: Tensor | Number) -> SparseTensor:
        return self.replace(other - self.features)

    def __rtruediv__(self, other: Tensor | Number) -> SparseTensor:
        return self.replace(other / self.features)

    def __neg__(self) -> SparseTensor:
        return self.replace(-self.features)

    __radd__ = __add__
    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy's scalars on the left leave the operation to the above

    def select(self, which: Tensor) -> SparseTensor:
        """The rows where a mask bool [n] is set, or those that int64 [k] names, in its order.

        They stand on coordinates of their own, whose maps are built anew. A mask makes the caller
        wait for the device.

        >>> x = vg.SparseTensor(torch.eye(3), torch.arange(12, dtype=torch.int32).view(3, 4))
        >>> x.select(x.features[:, 1] == 0).coords.tolist()
        [[0, 1, 2, 3], [8, 9, 10, 11]]
        """
        is_tensor = isinstance(which, Tensor)
        if is_tensor and which.dtype == torch.bool and which.shape == (self.voxels,):
            rows = which.nonzero()[:, 0]
        elif is_tensor and which.dtype == torch.int64 and which.ndim == 1:
            rows = which
        else:
            raise ArgumentError(
                f"which is {_shape(which)}, expected bool [{self.voxels}] or int64 [k]"
            )
        return self.moved(self.features[rows], self.coords[rows])

    def moved(self, features: Tensor, coords: Tensor, **changes: Any) -> SparseTensor:
        """On other coordinates, whose CoordinateSet is this one's but for the changes."""
        here = dataclasses.replace(self._set, coords=coords, **changes)
        return self._on(features, MapCache(here))

    def unique(self, reduce: str = "sum") -> SparseTensor:
        """Each voxel once, in order of first appearance, with its rows' features reduced.

        'sum' and 'mean' add in float32 (float64 for float64) and give the same bits every time;
        'first' takes the lowest row. Waits for the device. Differentiable, any order.

        >>> x = vg.SparseTensor(torch.tensor([[1.0], [2.0], [4.0]]), torch.zeros(3, 4).int())
        >>> x.unique().features, x.unique("mean").features, x.unique("first").features
        (tensor([[7.]]), tensor([[2.3333]]), tensor([[1.]]))
        """
        if reduce not in ("sum", "mean", "first"):
            raise ArgumentError(f"reduce is {reduce!r}, expected one of sum, mean, first")
        coords, first, inverse = kernel_map.unique(self.coords)
        if coords.shape[0] == self.voxels:
            return self
        if reduce == "first":
            return self.moved(self.features[first.long()], coords)
        features = segment_reduce(self.features, inverse, coords.shape[0], reduce)
        return self.moved(features, coords)

    def dense(self) -> Tensor:
        """[batch, channels, X, Y, Z], zero where no voxel is; of repeated voxels the lowest row.

        Without a spatial shape the extents are those of the coordinates, from 0. Raises
        ArgumentError where a coordinate is negative. Waits for the device. Differentiable.

        >>> x = vg.SparseTensor(torch.ones(1, 2), torch.tensor([[0, 1, 2, 3]], dtype=torch.int32))
        >>> x.dense().shape
        torch.Size([1, 2, 2, 3, 4])
        """
        shape = self.spatial_shape
        coords, rows, _ = kernel_map.unique(self.coords)
        if shape is None:
            most = coords[:, 1:].amax(0).tolist() if coords.shape[0] else (-1, -1, -1)
            shape = triple([max(int(c) + 1, 0) for c in most], "the extents")
        batch = self.batch_size
        call(ops._check_coords.default, self.coords, shape, batch)
        grid = self.features.new_zeros((batch, *shape, self.channels))
        grid = grid.index_put(tuple(coords.long().T), self.features[rows.long()])
        return grid.permute(0, 4, 1, 2, 3).contiguous()

    def __len__(self) -> int:
        """The number of batch items, as `batch_size`; `voxels` counts rows."""
        return self.batch_size

    def __iter__(self) -> Iterator[SparseTensor]:
        """The batch items, each alone with batch number 0. Waits for the device once."""
        size = self.counted()
        batch = self.coords[:, 0].clamp(min=-1) + 1  # 0 of rows that are padding
        order = batch.argsort(stable=True)
        counts = batch.bincount(minlength=size + 1).tolist()
        places = self.coords[order]
        places[:, 0] = 0
        rows = self.features[order].split(counts)
        for features, coords in list(zip(rows, places.split(counts), strict=True))[1:]:
            yield self.moved(features, coords, batch_size=1)

    def __getitem__(self, item: int | slice) -> SparseTensor:
        """Batch item number `item`, or those of a slice, numbered from 0. Waits for the device.

        >>> x = vg.SparseTensor(torch.ones(2, 1), torch.tensor([[0] * 4, [3] * 4]).int())
        >>> len(x), x[3].coords.tolist(), x[-2:].coords.tolist(), x[1].voxels
        (4, [[0, 3, 3, 3]], [[1, 3, 3, 3]], 0)
        """
        number = 0 if isinstance(item, slice) else whole(item)
        if number is None:
            raise ArgumentError(
                f"x[...] takes a batch item's number or a slice of them, got a "
                f"{type(item).__name__}; x.select takes masks and rows"
            )
        size = self.counted()
        if isinstance(item, slice):
            kept = range(size)[item]
        elif -size <= number < size:
            kept = range(number % size, number % size + 1)
        else:
            raise IndexError(f"batch item {number} of {size}")
        behind = self.coords[:, 0].long() - kept.start
        new = behind.div(kept.step, rounding_mode="floor")
        rows = ((new * kept.step == behind) & (new >= 0) & (new < len(kept))).nonzero()[:, 0]
        coords = torch.cat([new[rows, None].int(), self.coords[rows, 1:]], 1)
        return self.moved(self.features[rows], coords, batch_size=len(kept))

    def counted(self) -> int:
        """The batch size; raises where a batch number is negative."""
        size = self.batch_size
        if self._set.batch_size is None:
            call(ops._check_coords.default, self.coords, None, size)
        return size

    def to(self, *args: Any, **kwargs: Any) -> SparseTensor:
        """As Tensor.to, of the features. To another device coordinates follow, maps do not.

        Tensors on the same coordinates are on the same coordinates there, too.
        """
        features = self.features.to(*args, **kwargs)
        if features.device == self.coords.device:
            return self.replace(features)
        if torch.compiler.is_compiling():
            return self.moved(features, self.coords.to(features.device))
        there = self._maps.there(self._number, features.device, bool(kwargs.get("non_blocking")))
        return self._on(features, there)

    def cpu(self) -> SparseTensor:
        """As `to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: int | torch.device | None = None) -> SparseTensor:
        """As `to(device)`, of a CUDA device."""
        return self.to("cuda" if device is None else device)

    def float(self) -> SparseTensor:
        """Features as torch.float32; the maps are shared."""
        return self.to(torch.float32)

    def double(self) -> SparseTensor:
        """Features as torch.float64; the maps are shared."""
        return self.to(torch.float64)

    def half(self) -> SparseTensor:
        """Features as torch.float16; the maps are shared."""
        return self.to(torch.float16)

    def bfloat16(self) -> SparseTensor:
        """Features as torch.bfloat16; the maps are shared."""
        return self.to(torch.bfloat16)

    def detach(self) -> SparseTensor:
        """The same without a history of derivatives; the maps are shared."""
        return self.replace(self.features.detach())

    def pin_memory(self) -> SparseTensor:
        """In page-locked memory, for copies that do not wait; DataLoader calls it."""
        return self.moved(self.features.pin_memory(), self.coords.pin_memory())

    def __repr__(self) -> str:
        batch = self._set.batch_size
        return (
            f"SparseTensor({self.voxels} voxels, {self.channels} channels, "
            f"{self.features.dtype}, {self.features.device}, stride={self.stride}, "
            f"spatial_shape={self.spatial_shape}"
            + ("" if batch is None else f", batch_size={batch}")
            + ")"
        )


Operand = SparseTensor | Tensor | Number


def check_shared(name: str, tensors: Sequence[SparseTensor]) -> None:
    first = tensors[0]
    for tensor in tensors:
        if not tensor.shares_coords(first):
            raise ArgumentError(
                f"{name} of tensors on different coordinates: {first.voxels} voxels at stride "
                f"{first.stride}, and {tensor.voxels} at {tensor.stride}; coordinates are the same "
                "where one tensor was made of the other, and voxgemm.union_add adds any"
            )


class _Context:
    """What a pytree of a SparseTensor keeps beside features and coordinates.

    The maps are held weakly, and by no copy, so that a specification kept for long (an exported
    program's) keeps none of its example alive.
    """

    def __init__(self, here: CoordinateSet, maps: MapCache | None = None, number: int = 0):
        self.static = (here.spatial_shape, here.batch_size, here.stride)
        self.maps = None if maps is None else weakref.ref(maps)
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Context) and self.static == other.static

    def __hash__(self) -> int:
        return hash(self.static)

    def __repr__(self) -> str:
        return (
            f"spatial_shape={self.static[0]}, batch_size={self.static[1]}, stride={self.static[2]}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _context_of, (self.static,)


def _context_of(static: Sequence[Any]) -> _Context:
    """Of the spatial shape, batch size and stride, also as JSON gives them."""
    shape, size, stride = static
    shape = None if shape is None else tuple(shape)
    return _Context(CoordinateSet(torch.empty(0, 4), shape, size, tuple(stride)))


def _flatten(x: SparseTensor) -> tuple[list[Any], _Context]:
    return [x.features, x.coords], _Context(x._set, x._maps, x._number)


def _flatten_with_keys(x: SparseTensor) -> tuple[list[tuple[Any, Any]], _Context]:
    leaves, context = _flatten(x)
    keys = (pytree.GetAttrKey("features"), pytree.GetAttrKey("coords"))
    return list(zip(keys, leaves, strict=True)), context


def _unflatten(leaves: Any, context: _Context) -> SparseTensor:
    """On the same maps if the coordinates are the very same tensor."""
    features, coords = leaves
    maps = None if context.maps is None else context.maps()
    if maps is not None and maps.sets[context.number].coords is coords:
        return SparseTensor._on(features, maps, context.number)
    return SparseTensor._on(features, MapCache(CoordinateSet(coords, *context.static)))


pytree.register_pytree_node(
    SparseTensor,
    _flatten,
    _unflatten,
    serialized_type_name="voxgemm.SparseTensor",
    to_dumpable_context=lambda context: context.static,
    from_dumpable_context=_context_of,
    flatten_with_keys_fn=_flatten_with_keys,
)
# As maps are: files of exported programs hold example arguments.
torch.serialization.add_safe_globals([SparseTensor, MapCache, CoordinateSet])


def _shape(tensor: Tensor) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{tensor.dtype} {list(tensor.shape)}".removeprefix("torch.")


def _checked(features: Tensor, coords: Tensor | None) -> Tensor:
    """coords, if both are what they must be to each other; rules for their values are in C++."""
    if not isinstance(features, Tensor) or not isinstance(coords, Tensor):
        name, value = ("coords", coords) if isinstance(features, Tensor) else ("features", features)
        raise ArgumentError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if coords.dtype != torch.int32 or coords.ndim != 2 or coords.shape[1] != 4:
        nan = ""
        if coords.is_floating_point() and bool(coords.isnan().any()):
            nan = f" with NaN in row {int(coords.isnan().nonzero()[0, 0])}"
        raise ArgumentError(
            f"coords is {_shape(coords)}{nan}, expected int32 [n, 4]: "
            "(batch, x, y, z) of each voxel"
        )
    if features.ndim != 2 or not features.is_floating_point():
        raise ArgumentError(f"features is {_shape(features)}, expected floats [n, channels]")
    if features.shape[0] != coords.shape[0]:
        raise ArgumentError(f"features has {features.shape[0]} rows, coords {coords.shape[0]}")
    if features.device != coords.device:
        raise ArgumentError(f"features is on {features.device}, coords on {coords.device}")
    return coords
