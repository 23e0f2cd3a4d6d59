# SPDX-License-Identifier: Apache-2.0
"""Modules of SparseTensors, and what chains them with modules of plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .norm import without_branches
from .tensor import SparseTensor


class SparseModule(nn.Module):
    """A module that takes a SparseTensor; derive from it what `Sequential` is to give one.

    >>> class Double(vg.nn.SparseModule):
    ...     def forward(self, x):
    ...         return x + x
    >>> x = vg.SparseTensor(torch.ones(1, 1), torch.zeros(1, 4, dtype=torch.int32))
    >>> vg.nn.Sequential(Double(), torch.nn.Identity())(x).features
    tensor([[2.]])
    """


class Sequential(SparseModule, nn.Sequential):
    """torch.nn.Sequential on a SparseTensor: modules of plain tensors act on its features [n, c].

    A module is given the SparseTensor if it is a SparseModule or has one inside.

    >>> net = vg.nn.Sequential(vg.nn.SubmConv3d(2, 4, 3), torch.nn.LayerNorm(4), torch.nn.GELU())
    >>> net(vg.SparseTensor(torch.ones(1, 2), torch.zeros(1, 4, dtype=torch.int32))).features.shape
    torch.Size([1, 4])
    """

    def forward(self, x: SparseTensor | Tensor) -> SparseTensor | Tensor:
        """Module after module; of a Tensor, as torch.nn.Sequential."""
        for module in self:
            if not isinstance(x, SparseTensor) or _takes_sparse(module):
                x = module(x)
            elif torch.compiler.is_compiling() and type(module) is nn.BatchNorm1d:
                # Torch's cannot be traced where coordinates decide how many rows there are.
                if module.training:
                    torch._check(x.features.shape[0] != 1, lambda: "one row has no variance")
                x = x.replace(without_branches(module, x.features))
            else:
                x = x.replace(module(x.features))
        return x


def _takes_sparse(module: nn.Module) -> bool:
    if isinstance(module, SparseModule):
        return True
    # len: torch 2.10 cannot trace bool() of these.
    return len(module._modules) > 0 and any(isinstance(m, SparseModule) for m in module.modules())
