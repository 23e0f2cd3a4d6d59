# SPDX-License-Identifier: Apache-2.0
"""The launchers: convolutions of a neighbour matrix, without autograd. Weights are [Co, V, Ci]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from voxgemm import passes
from voxgemm.kernel_map import KernelMap

from ....errors import expect, speaking
from ....utils.autotuner import PersistentCacheAutoTuner
from ... import _tables

# Maps of the matrices that programs hold, as long as these live unchanged.
_MAPS = WeakIdKeyDictionary()


def map_of(neighbor: Tensor, rows: int) -> KernelMap:
    from ....ops.spconv._cache import user_map

    if torch.compiler.is_compiling():
        return user_map(_tables.to_table(neighbor), rows)
    version, map = _MAPS.get(neighbor, (None, None))
    if version != neighbor._version or map.n_in != rows:
        map = user_map(_tables.to_table(neighbor), rows)
        _MAPS[neighbor] = (neighbor._version, map)
    return map


def as_kernel(weight: Tensor, channels: int) -> Tensor:
    """[Co, V, 1, 1, Ci]."""
    expect(weight.ndim == 3, f"weight has {weight.ndim} dimensions, expected [Co, V, Ci]")
    expect(
        weight.shape[2] == channels,
        f"Input channels ({channels}) should match weight channels ({weight.shape[2]})",
    )
    return weight[:, :, None, None, :]


def forward(
    algorithm: str, input: Tensor, weight: Tensor, bias: Tensor | None, neighbor: Tensor
) -> Tensor:
    from ....ops.spconv._passes import how_of

    kernel = as_kernel(weight, input.shape[1])
    how = how_of(input, algorithm)
    with torch.no_grad():
        return passes.run_forward(input, kernel, bias, map_of(neighbor, len(input)), how)


def backward(
    algorithm: str,
    grad_output: Tensor,
    tensors: tuple[Any, ...],
    neighbor: Tensor,
    wanted: tuple[bool, ...] | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias: those asked for, or of what requires one."""
    from ....ops.spconv._passes import gradients, how_of

    input, weight, bias = tensors
    kernel = as_kernel(weight, input.shape[1])
    if wanted is None:
        wanted = tuple(t is not None and t.requires_grad for t in tensors)
    map, how = map_of(neighbor, len(input)), how_of(input, algorithm)
    with torch.no_grad():
        dx, dw, db = gradients(grad_output, input, kernel, map, how, wanted)
    return dx, None if dw is None else dw.view(weight.shape), db


def with_split(algorithm: str, split: int | None) -> str:
    """One slice is the algorithm without slices; how many more is voxgemm's choice."""
    return algorithm.removesuffix("_splitk") if split == 1 else algorithm


def _forward_launcher(algorithm: str, strided: bool) -> Callable[..., Tensor]:
    if not algorithm.endswith("_splitk"):

        def launch(input, weight, bias, neighbor, *order):
            return forward(algorithm, input, weight, bias, neighbor)

    elif strided:

        def launch(input, weight, bias, neighbor, *order, SPLITK=None, TRANSPOSE_WEIGHT=False):
            if TRANSPOSE_WEIGHT:
                weight = weight.permute(2, 1, 0)
            return forward(with_split(algorithm, SPLITK), input, weight, bias, neighbor)

    else:

        def launch(input, weight, bias, neighbor, *order, SPLITK=None):
            return forward(with_split(algorithm, SPLITK), input, weight, bias, neighbor)

    return launch


def _backward_launcher(algorithm: str) -> Callable[..., Any]:
    if not algorithm.endswith("_splitk"):

        def launch(grad_output, input, weight, bias, neighbor, *derived):
            return backward(algorithm, grad_output, (input, weight, bias), neighbor)

    else:

        def launch(grad_output, input, weight, bias, neighbor, *derived, SPLITK=None):
            name = with_split(algorithm, SPLITK)
            return backward(name, grad_output, (input, weight, bias), neighbor)

    return launch


def launcher(module: str) -> Callable[..., Any]:
    """The one a module is named after: sparse[_submanifold]_conv_{fwd,bwd}_ALGORITHM.

    What it is given beside the neighbour matrix (an order of rows, tap lists, pairs) describes the
    same map, and is not read.
    """
    name = module.rpartition(".")[2]
    kind, _, algorithm = name.partition("_fwd_" if "_fwd_" in name else "_bwd_")
    if "_fwd_" in name:
        launch = _forward_launcher(algorithm, kind == "sparse_conv")
    else:
        launch = _backward_launcher(algorithm)
    launch = speaking(launch)
    launch.__name__ = launch.__qualname__ = name
    launch.__doc__ = f"`{algorithm}` of a neighbour matrix; see flex_gemm.kernels.triton.spconv."
    if algorithm.endswith("_splitk"):
        return PersistentCacheAutoTuner(launch)
    return launch
