# SPDX-License-Identifier: Apache-2.0
"""Several SparseTensors made one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import kernel_map
from .errors import ArgumentError
from .geometry import triple
from .pooling import segment_reduce
from .tensor import SparseTensor, check_shared


def cat(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """The channels of tensors on the same coordinates side by side: [n, c1 + c2 + ...].

    In the dtype that all promote to.

    Raises ArgumentError where the coordinates are not the same set.

    >>> x = vg.SparseTensor(torch.ones(2, 3), torch.arange(8, dtype=torch.int32).view(2, 4))
    >>> vg.cat([x, x * 2]).features.shape
    torch.Size([2, 6])
    """
    _check_some("cat", tensors)
    check_shared("cat", tensors)
    return tensors[0].replace(torch.cat([tensor.features for tensor in tensors], 1))


def union_add(*tensors: SparseTensor) -> SparseTensor:
    """The sum of tensors on every voxel that any has; one that a tensor lacks is zero there.

    Features are [n, channels], in the dtype that those of all promote to.
    Rows are the first tensor's, then those that each of the others adds, repeated voxels merged;
    where nothing is added they stand on the first one's coordinates and share its maps.
    Waits for the device, except where all share their coordinates.

    Raises ArgumentError: other strides, spatial shapes or numbers of channels.

    >>> coords = torch.arange(12, dtype=torch.int32).view(3, 4)
    >>> x = vg.SparseTensor(torch.ones(2, 1), coords[:2])
    >>> y = vg.SparseTensor(torch.ones(2, 1), coords[1:])
    >>> vg.union_add(x, y).features.flatten()
    tensor([1., 2., 1.])
    """
    _check_some("union_add", tensors)
    first = tensors[0]
    for name in ("stride", "spatial_shape", "channels", "device"):
        _check_equal("union_add", tensors, name)
    if all(tensor.shares_coords(first) for tensor in tensors):
        return sum(tensors[1:], first)
    coords, _, inverse = kernel_map.unique(torch.cat([tensor.coords for tensor in tensors]))
    rows = torch.cat([tensor.features for tensor in tensors])
    features = segment_reduce(rows, inverse, coords.shape[0])
    if coords.shape[0] == first.voxels:
        return first.replace(features)
    sizes = [tensor._set.batch_size for tensor in tensors]
    size = None if None in sizes else max(size for size in sizes if size is not None)
    return first.moved(features, coords, batch_size=size)


def collate(tensors: Sequence[SparseTensor]) -> SparseTensor:
    """One tensor with the batch items of all tensors, numbered on from one to the next.

    Features are [n, channels], in the dtype that those of all promote to.
    What iteration takes apart; made for DataLoader's collate_fn. The batch size of a tensor that
    was not given one is one more than its highest batch number. The spatial shape is the largest
    per axis, or none where one has none. Raises ArgumentError: other strides or channels.

    >>> x = vg.SparseTensor(torch.ones(2, 1), torch.tensor([[0] * 4, [1] * 4]).int())
    >>> vg.collate([x, x[0]]).coords[:, 0].tolist()
    [0, 1, 2]
    """
    _check_some("collate", tensors)
    for name in ("stride", "channels", "device"):
        _check_equal("collate", tensors, name)
    coords, size = [], 0
    for tensor in tensors:
        coords.append(tensor.coords.clone())
        coords[-1][:, 0] += size * (tensor.coords[:, 0] >= 0)  # rows of padding remain so
        size += tensor.counted()
    shapes = [tensor.spatial_shape for tensor in tensors]
    given = [shape for shape in shapes if shape is not None]
    largest = None
    if len(given) == len(shapes):
        largest = triple([max(axis) for axis in zip(*given, strict=True)], "the shape")
    if size > 2**31:
        raise ArgumentError(f"collate of {size} batch items, expected at most {2**31}")
    rows = torch.cat([tensor.features for tensor in tensors])
    return tensors[0].moved(rows, torch.cat(coords), batch_size=size, spatial_shape=largest)


def _check_some(name: str, tensors: Sequence[SparseTensor]) -> None:
    if not isinstance(tensors, Sequence):
        raise ArgumentError(f"{name} got a {type(tensors).__name__}, expected a list or tuple")
    if not tensors:
        raise ArgumentError(f"{name} of no tensors, expected one or more")
    for tensor in tensors:
        if not isinstance(tensor, SparseTensor):
            raise ArgumentError(f"{name} got a {type(tensor).__name__}, expected SparseTensors")


def _check_equal(name: str, tensors: Sequence[SparseTensor], what: str) -> None:
    first = getattr(tensors[0], what)
    for tensor in tensors:
        if getattr(tensor, what) != first:
            raise ArgumentError(
                f"{name} of tensors whose {what} is {first} and {getattr(tensor, what)}"
            )
