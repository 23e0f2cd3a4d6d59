# SPDX-License-Identifier: Apache-2.0
"""Layers that reduce voxels, and that undo it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .algorithms import OUTPUT_RULES, index_in
from .containers import SparseModule
from .geometry import Geometry, Triple, triple
from .map_cache import way_back
from .pooling import REDUCTIONS, global_pool, pool
from .tensor import SparseTensor


class _Pool3d(SparseModule):
    """A reduction of the voxels that a kernel reaches; a subclass knows which."""

    reduction: ClassVar[str]

    def __init__(
        self,
        kernel_size: int | Triple,
        stride: int | Triple | None = None,
        padding: int | Triple = 0,
        dilation: int | Triple = 1,
        output_rule: str = "reached",
    ):
        super().__init__()
        size = triple(kernel_size, "kernel_size")
        steps = size if stride is None else triple(stride, "stride")
        margins, spread = triple(padding, "padding"), triple(dilation, "dilation")
        index_in(OUTPUT_RULES, output_rule, "output_rule")
        self.output_rule = output_rule
        self.geometry = Geometry(size, steps, margins, spread)

    def forward(self, x: SparseTensor) -> SparseTensor:
        number, map = x.maps.strided(x.number, self.geometry, self.output_rule)
        return x.replace(pool(x.features, map, self.reduction), number)

    if TYPE_CHECKING:

        def __call__(self, x: SparseTensor) -> SparseTensor: ...

    def extra_repr(self) -> str:
        size, stride, padding, dilation = self.geometry
        return f"kernel_size={size}, stride={stride}, padding={padding}, dilation={dilation}"


class SparseMaxPool3d(_Pool3d):
    """By channel the largest value among the voxels that the kernel reaches; NaN wins.

    Arguments as torch.nn.MaxPool3d's, stride is the kernel's size if not given. Outputs, and their
    map, are those of a SparseConv3d with the same geometry; voxels that are not there count for
    nothing. Differentiable any number of times.

    >>> coords = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.int32)
    >>> x = vg.SparseTensor(torch.tensor([[-3.0], [-2.0]]), coords)
    >>> vg.nn.SparseMaxPool3d(2)(x).features
    tensor([[-2.]])
    """

    reduction = "max"


class SparseAvgPool3d(_Pool3d):
    """By channel the mean over the voxels that are there of those that the kernel reaches.

    Otherwise as SparseMaxPool3d; means are taken in float32 (float64 of float64).

    >>> coords = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.int32)
    >>> x = vg.SparseTensor(torch.tensor([[1.0], [2.0]]), coords)
    >>> vg.nn.SparseAvgPool3d(2)(x).features
    tensor([[1.5000]])
    """

    reduction = "mean"


class SparseUnpool3d(SparseModule):
    """Back to where a pool or SparseConv3d with this kernel came from, with the parents' features.

    Where kernels overlap, the sum of all parents. Stride, padding and dilation choose between
    several ways, as in SparseInverseConv3d.

    >>> coords = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]], dtype=torch.int32)
    >>> x = vg.SparseTensor(torch.tensor([[1.0], [2.0]]), coords)
    >>> vg.nn.SparseUnpool3d(2)(vg.nn.SparseMaxPool3d(2)(x)).features
    tensor([[2.],
            [2.]])
    """

    def __init__(
        self,
        kernel_size: int | Triple,
        stride: int | Triple | None = None,
        padding: int | Triple | None = None,
        dilation: int | Triple | None = None,
    ):
        super().__init__()
        self.asked = way_back(kernel_size, stride, padding, dilation)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """[n, channels] on the rows from which the pool came."""
        number, map = x.maps.inverse(x.number, self.asked)
        return x.replace(pool(x.features, map, "sum"), number)

    if TYPE_CHECKING:

        def __call__(self, x: SparseTensor) -> SparseTensor: ...


class SparseGlobalPool(SparseModule):
    """A Tensor [batch size, channels]: the rows of each batch item reduced.

    By 'max', 'min', 'sum' or 'mean'. An item without voxels gives zeros. Waits for the device where
    the batch size was not given.

    >>> x = vg.SparseTensor(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 4).int(), batch_size=2)
    >>> vg.nn.SparseGlobalPool("mean")(x)
    tensor([[1.5000],
            [0.0000]])
    """

    def __init__(self, reduction: str = "mean"):
        super().__init__()
        index_in(REDUCTIONS, reduction, "reduction")
        self.reduction = reduction

    def forward(self, x: SparseTensor) -> Tensor:
        """A Tensor [batch size, channels]."""
        return global_pool(x.features, x.coords, x.batch_size, self.reduction)

    def extra_repr(self) -> str:
        return repr(self.reduction)
