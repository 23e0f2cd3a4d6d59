# SPDX-License-Identifier: Apache-2.0
"""Coordinates, geometries and the kernel maps made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._library import call, ops
from .algorithms import DTYPES, OPERATIONS, OUTPUT_RULES, index_in
from .errors import ArgumentError
from .geometry import Geometry, Triple, three, triple
from .owned import Owned, owns
from .status import Status, status_of

Lists = tuple[list[Any], ...]  # KernelMap.lists
# Before a filter's numbers: measured times do not count.
_MODEL_ONLY = -2
# VOXGEMM_TUNE, read here so that a bad value is an error of the import.
_TUNES_AT_FIRST_USE = bool(call(ops._tunes_at_first_use.default).item())


# A row of coordinates with this batch number is padding: no voxel, whatever its other numbers.
PADDING_BATCH = -(2**31)


class Asked(NamedTuple):
    """A pass of a layer on a map, without the map.

    >>> vg.functional.Asked(0, 4, 8, torch.float32, 0, ()).c_out
    8
    """

    number: int  # of PASSES
    c_in: int
    c_out: int
    dtype: torch.dtype
    precision: int
    filter: tuple[int, ...]

    def numbers(self) -> list[int]:
        """The problem's, as operators take them."""
        dtype = index_in(DTYPES, self.dtype, "the dtype")
        return [self.number, dtype, self.c_in, self.c_out]


class Choice(NamedTuple):
    """What an operator of a pass takes beside its tensors and those of the map.

    >>> map = vg.build_map(torch.zeros(1, 4, dtype=torch.int32), 1)
    >>> filter = vg.functional.filters_of("explicit_gemm")[0]
    >>> asked = vg.functional.Asked(0, 4, 8, torch.float32, 0, filter)
    >>> map.choice(asked).kernel.partition("_cpu")[0]
    'explicit_gemm'
    """

    schedule: list[Tensor]
    layer: list[int]
    numbers: Tensor | None = None  # the layer's as a tensor; not while a graph is traced

    @property
    def kernel(self) -> str:
        """Its full name."""
        return bytes(self.layer[self.layer.index(-1) + 1 :]).decode()


class KernelMap:
    """Which input row feeds which output row through which tap; what every convolution runs on.

    Made by `build_map`, shared by all layers and passes with the same coordinates and geometry. A
    pytree of tensors and ints; the transposed map, kept from its first use on, is no part of that.

    >>> coords = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
    >>> map = vg.build_map(coords, (1, 1, 3))
    >>> map.neighbours.tolist(), map.pairs_per_tap.tolist()
    ([[-1, 0], [0, 1], [1, -1]], [1, 2, 1])
    """

    neighbours: Tensor  # int32 [taps, n_out]: the input row, or -1
    pairs_per_tap: Tensor  # int64 [taps]
    in_first: Tensor  # int32 [n_in]: the lowest row of the same voxel; empty if no voxel repeats
    out_first: Tensor  # int32 [n_out], likewise
    n_in: int
    geometry: Geometry
    operation: int  # of OPERATIONS
    symmetric: bool  # transposing only mirrors the taps
    is_transposed: bool
    _transposed: KernelMap | None
    # By options the tensors of a schedule; by what is asked for what runs.
    _schedules: dict[tuple[int, ...], list[Tensor]]
    _choices: dict[Asked, Choice]
    _status: Status | None
    _owned: Owned | None
    # int32 [n_out]: the taps of each row, for building schedules; empty or None where not known.
    _masks: Tensor | None
    # Views of schedules by options, of the map by (), and "layer"; what passes.py keeps of them.
    _numbers: dict[object, Tensor]
    _lists: dict[object, Lists]

    def __init__(
        self,
        *fields: Any,
        masks: Tensor | None = None,
        status: Status | None = None,
        owned: Owned | None = None,
    ):
        """Of the nine fields above, in their order."""
        made: dict[str, Any] = dict(zip(_FIELDS, fields, strict=True))
        made |= {"_transposed": None, "_status": status, "_masks": masks, "_owned": owned}
        made |= {"_schedules": {}, "_choices": {}, "_numbers": {}, "_lists": {}}
        if torch.compiler.is_compiling():  # torch 2.11 cannot trace the other
            for name, value in made.items():
                super().__setattr__(name, value)
        else:
            # One by one they take a tenth of an eager map of a small cloud.
            vars(self).update(made)

    def __setattr__(self, name: str, value: object) -> None:
        """An address goes with its tensor."""
        super().__setattr__(name, value)
        if name in _TENSORS and "_lists" in vars(self):
            self._numbers.pop((), None)
            self._lists.clear()

    def __getstate__(self) -> dict[str, object]:
        """For pickle and copy: what is on its way from a device is waited for, as a copy would
        never hear of it and take every row for one that may repeat. Addresses stay here."""
        self.settle(wait=True)
        return {**vars(self), "_status": None, "_owned": None, "_numbers": {}, "_lists": {}}

    @property
    def n_out(self) -> int:
        """Output rows."""
        return self.neighbours.shape[1]

    @property
    def taps(self) -> int:
        """Of the kernel: the product of its sizes."""
        return self.neighbours.shape[0]

    @property
    def pairs(self) -> int:
        """The sum of pairs_per_tap. Waits for a CUDA device."""
        return int(call(ops._pairs.default, self.tensors(), self.layer()))

    @property
    def nbytes(self) -> int:
        """Memory that the map keeps: tables, schedules built so far, the transposed map.

        A table takes 4 bytes per tap and output row, a schedule by mask 4 per pair and some more,
        or on a CUDA device where it is small or made during a capture as much as a table. Building
        takes up to 48 bytes a row more for a while.
        """
        maps = [self] if self._transposed is None else [self, self._transposed]
        tensors = [t for map in maps for t in (*map.tensors(), map._masks) if t is not None]
        tensors += [t for map in maps for parts in map._schedules.values() for t in parts]
        tensors += [t for map in maps for t in call(ops._kept.default, map.neighbours)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def tensors(self, schedule: Iterable[Tensor] = ()) -> list[Tensor]:
        """What crosses to C++; a schedule of the map comes behind it."""
        return [self.neighbours, self.pairs_per_tap, self.in_first, self.out_first, *schedule]

    def layer(
        self,
        precision: int = 0,
        schedule: tuple[int, ...] = (0, 1, 128, 128),
        filter: tuple[int, ...] = (),
    ) -> list[int]:
        """The numbers that cross to C++ beside the tensors (struct Layer)."""
        flags = [self.n_in, self.operation, int(self.symmetric), int(self.is_transposed)]
        return [*flags, *self.geometry.numbers(), precision, *schedule, *filter]

    def choice(self, asked: Asked) -> Choice:
        """What a pass runs, found once: while a graph is traced, the operator finds it itself."""
        if torch.compiler.is_compiling():
            filter = _admitted(asked).filter
            return Choice([], self.layer(asked.precision, filter=filter))
        return self.choices([asked])[0]

    def choices(self, passes: Sequence[Asked]) -> list[Choice]:
        """Of passes with the same precision; what is not known yet is found in one call, which also
        builds the schedules of a map that has none."""
        passes = [_admitted(asked) for asked in passes]
        if _TUNES_AT_FIRST_USE:
            for asked in passes:
                if asked not in self._choices:
                    self._measure_once(asked)
        unknown = [asked for asked in passes if asked not in self._choices]
        if unknown:
            problems: list[int] = []
            for asked in unknown:
                problems += [4 + len(asked.filter), *asked.numbers(), *asked.filter]
            wanted = self.tensors(), self.layer(unknown[0].precision), problems
            builds = not self._schedules
            found = call(ops._choice.default, *wanted, self._masks, builds)
            built = iter(found[len(unknown) :])
            for asked, numbers in zip(unknown, found, strict=False):
                layer = numbers.tolist()
                options, walked = _schedule_of(layer), self._walked(asked.number == 1)
                if builds and walked is self and options not in self._schedules:
                    self._schedules[options] = list(islice(built, 6 if options[0] else 0))
                self._choices[asked] = Choice(walked.schedule(options), layer, numbers)
        return [self._choices[asked] for asked in passes]

    def _walked(self, back: bool) -> KernelMap:
        """The map whose schedule a pass takes."""
        return self.transposed() if back and not self.symmetric else self

    def lists(self, choice: Choice | None = None, *, back: bool = False) -> Lists:
        """What an operator takes of the map and, where `back`, of the transposed one.

        The lists of their tensors, a schedule among them, and of the layer's numbers; or where no
        graph is traced host tensors that say the same (struct Maps in torch/convert.h).
        """
        walked = self._walked(back)
        schedule = [] if choice is None else choice.schedule
        has_addresses = type(self.neighbours) is Tensor and not self.neighbours.is_meta
        if torch.compiler.is_compiling() or not has_addresses:
            layer = self.layer() if choice is None else choice.layer
            if back:
                return *self.backward_tensors(schedule), layer
            return self.tensors(schedule), layer
        numbers = self._numbers.get("layer") if choice is None else choice.numbers
        if numbers is None:
            numbers = self._numbers["layer"] = torch.tensor(self.layer(), device="cpu")
        transposed = _NO_NUMBERS if walked is self else walked._views()
        options = _schedule_of(choice.layer) if choice is not None else ()
        of_schedule = walked._views(options) if schedule else _NO_NUMBERS
        map = [numbers, self._views(), transposed, of_schedule]
        return (map, [], []) if back else (map, [])

    def _views(self, options: tuple[int, ...] = ()) -> Tensor:
        """Of the schedule with these options, or without any of the map itself."""
        if options not in self._numbers:
            tensors = self._schedules[options] if options else self.tensors()
            self._numbers[options] = call(ops._views.default, tensors)
        return self._numbers[options]

    def _measure_once(self, asked: Asked) -> None:
        """What a choice lacks, unless nothing may be timed now."""
        from . import tuning

        fixed = asked.filter[:1] in ((_MODEL_ONLY,), (-1,))
        on_gpu = self.neighbours.is_cuda
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if fixed or distributed or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return
        layer = self.layer(asked.precision, filter=asked.filter)
        if not call(ops._is_tuned.default, self.tensors(), layer, asked.numbers()).item():
            tuning.measure(self, asked)

    def forget_choices(self) -> None:
        """For when more is known: the next pass of a layer chooses anew."""
        for map in (self, self._transposed):
            if map is not None:
                map._choices.clear()
                map._lists.clear()

    def schedule(self, options: tuple[int, ...]) -> list[Tensor]:
        """The tensors of a schedule with these options, built once; none of natural order."""
        parts = self._schedules.get(options)
        if parts is None:
            parts = []
            if options[0] != 0:
                wanted = self.tensors(), self.layer(), list(options), self._masks
                parts = call(ops._schedule.default, *wanted)
            self._schedules[options] = parts
        return parts

    def settle(self, wait: bool) -> None:
        """Raises if a CUDA map could not be built; forgets the first rows if nothing repeats.

        Unless it is to wait, only where the device has already answered. `torch.export` makes the
        number of first rows part of a graph: maps that are arguments of one are settled before.
        """
        status = self._status
        if status is None or torch.compiler.is_compiling() or not status.arrived(wait):
            return
        self._status = None
        pairs, *repeats = status.numbers
        if pairs < 0:
            self.pairs  # noqa: B018  raises with the reason
        if self.is_transposed != status.is_transposed:
            repeats.reverse()
        if repeats[0] == 0:
            self.in_first = self.in_first[:0]
        if repeats[1] == 0:
            self.out_first = self.out_first[:0]
        if self._transposed is not None:
            self._transposed.settle(wait)

    def transposed(self) -> KernelMap:
        """The same pairs with the sides exchanged: for inverse convolutions and gradients."""
        if self._transposed is None:
            owned = owns(self.neighbours)
            neighbours, pairs = call(ops._transpose.default, self.tensors(), self.layer(), owned)
            first = self.out_first.detach(), self.in_first.detach()
            operation = (0, 2, 1)[self.operation]
            there = KernelMap(
                *(neighbours, pairs, *first, self.n_out, self.geometry),
                *(operation, self.symmetric, not self.is_transposed),
                owned=Owned(neighbours) if owned else None,
            )
            # The way back is a copy of this map, not this map: no cycle keeps memory alive. Its
            # tensors are views: torch 2.10 cannot trace a function that sees one tensor twice.
            views = {name: getattr(self, name).detach() for name in _TENSORS}
            there._transposed, there._status = self._copy(**views), self._status
            self._transposed = there
        return self._transposed

    def _copy(self, **changes: Tensor) -> KernelMap:
        """Of the same pairs: schedules, choices and what is on its way are shared."""
        fields = (changes.get(name, getattr(self, name)) for name in _FIELDS)
        copy = KernelMap(*fields, masks=self._masks, status=self._status, owned=self._owned)
        copy._transposed = self._transposed
        copy._schedules, copy._choices = self._schedules, self._choices
        return copy

    def backward_tensors(
        self, schedule: Iterable[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The two maps of grad_input, the second empty where mirrored taps do; the schedule is of
        the one that is walked."""
        if self.symmetric:
            return self.tensors(schedule), []
        return self.tensors(), self.transposed().tensors(schedule)

    def __repr__(self) -> str:
        size, stride = self.geometry.size, self.geometry.stride
        return (
            f"KernelMap({OPERATIONS[self.operation]}, kernel_size={size}, stride={stride}, "
            f"n_in={self.n_in}, n_out={self.n_out})"
        )


_NO_NUMBERS = torch.empty(0, dtype=torch.int64, device="cpu")


def _admitted(asked: Asked) -> Asked:
    """Measured times do not count where only deterministic algorithms may run."""
    if torch.are_deterministic_algorithms_enabled():
        return asked._replace(filter=(_MODEL_ONLY, *asked.filter))
    return asked


def _schedule_of(layer: list[int]) -> tuple[int, ...]:
    """Of a layer's numbers, those that are the schedule's options."""
    return tuple(layer[17:21])


_TENSORS = ("neighbours", "pairs_per_tap", "in_first", "out_first")
_CONTEXT = ("geometry", "operation", "symmetric", "is_transposed")
_FIELDS = (*_TENSORS, "n_in", *_CONTEXT)


def _flatten(map: KernelMap) -> tuple[list[object], tuple[object, ...]]:
    return [*map.tensors(), map.n_in], tuple(getattr(map, name) for name in _CONTEXT)


def _flatten_with_keys(map: KernelMap) -> tuple[list[tuple[Any, object]], tuple[object, ...]]:
    leaves, context = _flatten(map)
    keys = [pytree.GetAttrKey(name) for name in (*_TENSORS, "n_in")]
    return list(zip(keys, leaves, strict=True)), context


pytree.register_pytree_node(
    KernelMap,
    _flatten,
    lambda leaves, context: KernelMap(*leaves, *context),
    serialized_type_name="voxgemm.KernelMap",
    to_dumpable_context=lambda context: [context[0].numbers(), *context[1:]],
    from_dumpable_context=lambda values: (
        Geometry(*(tuple(values[0][i : i + 3]) for i in range(0, 12, 3))),
        *values[1:],
    ),
    flatten_with_keys_fn=_flatten_with_keys,
)
# Files of exported programs hold example arguments.
torch.serialization.add_safe_globals([KernelMap, Geometry, Asked, Choice])


class UniqueCoords(NamedTuple):
    """What `unique` finds.

    >>> vg.unique(torch.zeros(2, 4, dtype=torch.int32)).inverse
    tensor([0, 0], dtype=torch.int32)
    """

    coords: Tensor  # int32 [m, 4], in order of first appearance
    first_row: Tensor  # int32 [m]: the lowest row of each
    inverse: Tensor  # int32 [n]: which of the m each row became


def unique(coords: Tensor) -> UniqueCoords:
    """The distinct rows of coords, int32 [n, 4], padding left out (its `inverse` is -1).

    Waits for the device; n may be 0.

    >>> coords = torch.tensor([[0, 7, 7, 7], [0, 1, 1, 1], [0, 7, 7, 7]], dtype=torch.int32)
    >>> vg.unique(coords).first_row.tolist(), vg.unique(coords).inverse.tolist()
    ([0, 1], [0, 1, 0])

    Raises ArgumentError: another shape or dtype.
    """
    return UniqueCoords(*call(ops._unique.default, coords))


def output_coords(
    coords: Tensor,
    geometry: Geometry,
    output_rule: str = "reached",
    spatial_shape: Triple | None = None,
    max_voxels: int | None = None,
) -> Tensor:
    """The output voxels, int32 [m, 4], of a strided convolution on coords, int32 [n, 4].

    By output_rule, 'reached': every voxel some input reaches through some tap, inside
    `geometry.out_shape(spatial_shape)` if a shape is given. 'floor': floor(in / stride). In
    ascending order, none twice. n may be 0.

    The number m depends on the data, so a CUDA device is waited for, unless `max_voxels` is given:
    then m is that, and rows of padding (batch number `PADDING_BATCH`) stand behind the voxels. A
    CUDA graph can hold it and be replayed with other coordinates. More voxels than `max_voxels`
    are an error: on the CPU here; on a CUDA device the rows are all padding, the maps from and to
    them have no pairs, and `KernelMap.settle`, `.pairs` and `MapCache.settle` raise.

    >>> coords = torch.tensor([[0, 4, 5, 6], [0, 5, 5, 6]], dtype=torch.int32)
    >>> vg.output_coords(coords, vg.Geometry((2, 2, 2), (2, 2, 2))).tolist()
    [[0, 2, 2, 3]]
    >>> vg.output_coords(coords, vg.Geometry((2, 2, 2), (2, 2, 2)), max_voxels=2).tolist()
    [[0, 2, 2, 3], [-2147483648, 0, 0, 0]]

    Raises ArgumentError: another shape or dtype, a geometry that is none, an unknown rule.
    """
    rule = index_in(OUTPUT_RULES, output_rule, "output_rule")
    if not isinstance(geometry, Geometry):
        raise ArgumentError(f"geometry is {geometry!r}, expected a Geometry")
    numbers = geometry.numbers()
    return call(ops._output_coords.default, coords, numbers, rule, spatial_shape, max_voxels)


def generated_coords(
    coords: Tensor, geometry: Geometry, spatial_shape: Triple | None = None
) -> Tensor:
    """The output voxels, int32 [m, 4], of a transposed convolution on coords, int32 [n, 4].

    Every coords * stride - padding + tap * dilation of the geometry, inside spatial_shape if one
    is given. In ascending order, none twice. Waits for the device; n may be 0.

    >>> coords = torch.tensor([[0, 4, 5, 6]], dtype=torch.int32)
    >>> vg.functional.generated_coords(coords, vg.Geometry((1, 1, 2), (2, 2, 2))).tolist()
    [[0, 8, 10, 12], [0, 8, 10, 13]]

    Raises ArgumentError: as output_coords, and where a coordinate would need more than 32 bits.
    """
    # The taps in reverse are those of a convolution with stride 1 on moved voxels.
    spread = [d * (k - 1) for k, d in zip(geometry.size, geometry.dilation, strict=True)]
    moved = [0, *(r - p for r, p in zip(spread, geometry.padding, strict=True))]
    steps = torch.tensor([1, *geometry.stride], device=coords.device)
    wide = coords * steps + torch.tensor(moved, device=coords.device)
    narrow = wide.int()
    if not torch.compiler.is_compiling():
        rows = ((narrow != wide).any(1) & (coords[:, 0] != PADDING_BATCH)).nonzero()
        if len(rows):
            row = int(rows[0, 0])
            raise ArgumentError(
                f"row {row} of the coordinates is {coords[row].tolist()}, from which a transposed "
                f"convolution with stride {geometry.stride} leads to coordinates that int32 does "
                "not hold"
            )
    shape = None
    if spatial_shape is not None:
        shape = three(n + r for n, r in zip(spatial_shape, spread, strict=True))
    reach = Geometry(geometry.size, dilation=geometry.dilation)
    return output_coords(narrow, reach, "reached", shape)


def build_map(
    coords: Tensor,
    kernel_size: int | Triple,
    *,
    out_coords: Tensor | None = None,
    stride: int | Triple = 1,
    padding: int | Triple = 0,
    dilation: int | Triple = 1,
) -> KernelMap:
    """The map of a convolution on coords, int32 [n, 4]: which row feeds which through which tap.

    Without out_coords, int32 [m, 4], outputs are the inputs (submanifold), and tap size // 2 of
    each axis reads the output's own voxel. With them, per axis: in = out * stride - padding +
    tap * dilation. Waits for no device; n and m may be 0.

    >>> coords = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 2]], dtype=torch.int32)
    >>> map = vg.build_map(coords, 3)
    >>> map, map.pairs
    (KernelMap(submanifold, kernel_size=(3, 3, 3), stride=(1, 1, 1), n_in=2, n_out=2), 4)
    >>> half = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    >>> vg.build_map(coords, 2, out_coords=half, stride=2).pairs
    2

    Raises ArgumentError: another shape or dtype, a geometry that is none, more than 4096 taps.
    """
    size = triple(kernel_size, "kernel_size")
    spread = triple(dilation, "dilation")
    if out_coords is not None:
        steps, margins = triple(stride, "stride"), triple(padding, "padding")
        return strided_map(coords, out_coords, Geometry(size, steps, margins, spread))
    if stride not in (1, (1, 1, 1)) or padding not in (0, (0, 0, 0)):
        raise ArgumentError(
            f"stride is {stride} and padding {padding} without out_coords; a submanifold map has "
            "stride 1 and the padding that centres its kernel"
        )
    return submanifold_map(coords, Geometry.submanifold(size, spread))


def submanifold_map(coords: Tensor, geometry: Geometry) -> KernelMap:
    """The map of coords int32 [n, 4] to themselves, by a geometry of `Geometry.submanifold`.

    >>> geometry = vg.Geometry.submanifold((3, 1, 1), (1, 1, 1))
    >>> coords = torch.tensor([[0, 4, 0, 0], [0, 5, 0, 0]], dtype=torch.int32)
    >>> vg.functional.submanifold_map(coords, geometry).neighbours.tolist()
    [[-1, 0], [0, 1], [1, -1]]

    Raises ArgumentError: as build_map.
    """
    status = status_of(coords)
    answer = 0 if status is None else status.address
    owned = owns(coords)
    table, pairs, first, masks = call(
        ops._submanifold_map.default, coords, geometry.numbers(), answer, owned
    )
    owner = Owned(table) if owned else None
    odd = all(k % 2 == 1 for k in geometry.size)
    parts = (table, pairs, first, first.detach())  # not one tensor twice, as in transposed()
    fields = (*parts, coords.shape[0], geometry, 0, odd, False)
    return KernelMap(*fields, status=status, masks=masks, owned=owner)


def strided_map(coords: Tensor, out_coords: Tensor, geometry: Geometry) -> KernelMap:
    """The map from coords int32 [n, 4] to out_coords int32 [m, 4] by a geometry.

    >>> coords = torch.tensor([[0, 4, 0, 0], [0, 5, 0, 0]], dtype=torch.int32)
    >>> half = torch.tensor([[0, 2, 0, 0]], dtype=torch.int32)
    >>> geometry = vg.Geometry((2, 1, 1), (2, 1, 1))
    >>> vg.functional.strided_map(coords, half, geometry).neighbours.tolist()
    [[0], [1]]

    Raises ArgumentError: as build_map.
    """
    status = status_of(coords)
    answer = 0 if status is None else status.address
    owned = owns(coords)
    table, pairs, first, out_first, masks = call(
        ops._kernel_map.default, coords, out_coords, geometry.numbers(), answer, owned
    )
    fields = (table, pairs, first, out_first, coords.shape[0], geometry, 1, False, False)
    owner = Owned(table) if owned else None
    return KernelMap(*fields, status=status, masks=masks, owned=owner)


def table_map(neighbours: Tensor, n_in: int, geometry: Geometry) -> KernelMap:
    """The map that a table int32 [taps, n_out] of input rows in [0, n_in), -1 for none, describes.

    Its gradients are exact where no two rows of a tap have the same input row; of those the
    transposed map keeps one, on a CUDA device any. The values are not looked at.
    """
    if neighbours.dtype != torch.int32 or neighbours.ndim != 2:
        shape = list(neighbours.shape)
        raise ArgumentError(
            f"neighbours is {neighbours.dtype} {shape}, expected int32 [taps, n_out]"
        )
    table = neighbours.contiguous()
    # Two tensors: torch 2.10 cannot trace a function that sees one tensor twice.
    in_first, out_first = (table.new_empty((0,)) for _ in range(2))
    pairs = (table >= 0).sum(1)
    return KernelMap(table, pairs, in_first, out_first, n_in, geometry, 1, False, False)
