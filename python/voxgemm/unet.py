# SPDX-License-Identifier: Apache-2.0
"""A small sparse U-Net, as for segmentation: what the demo trains and what the layers are for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .joins import cat
from .kernel_map import KernelMap
from .nn import SparseConv3d, SparseInverseConv3d, SubmConv3d
from .norm import BatchNorm, fold_batch_norm
from .tensor import SparseTensor


class ConvNorm(nn.Module):
    """A convolution without bias, the batch norm after it, and optionally a residual and ReLU."""

    def __init__(self, conv: nn.Module, channels: int, relu: bool = True):
        super().__init__()
        self.conv = conv
        self.norm: BatchNorm | None = BatchNorm(channels)
        self.relu = relu

    def fold(self) -> None:
        """For inference: one kernel for all of it."""
        if self.norm is not None:
            self.conv, self.norm = fold_batch_norm(self.conv, self.norm), None

    def forward(self, x: SparseTensor, residual: SparseTensor | None = None) -> SparseTensor:
        y: SparseTensor
        if self.norm is None:
            y = self.conv(x, residual, self.relu)
            return y
        y = self.conv(x)
        features = self.norm(y.features)
        if residual is not None:
            features = features + residual.features
        return y.replace(features.relu() if self.relu else features)


def _subm(c_in: int, c_out: int, relu: bool = True) -> ConvNorm:
    return ConvNorm(SubmConv3d(c_in, c_out, 3, bias=False), c_out, relu)


class Residual(nn.Module):
    """Two 3^3 submanifold convolutions around a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = _subm(channels, channels)
        self.second = _subm(channels, channels)

    def forward(self, x: SparseTensor) -> SparseTensor:
        y: SparseTensor = self.second(self.first(x), residual=x)
        return y


class UNet(nn.Module):
    """Features [n, c_in] to predictions [n, c_out]; `levels` resolutions, each half the one before.

    Widths are channels times 1, 2, 3, 4 ...: strided 2^3 convolutions go down, inverse ones on the
    same maps go up, and what went down is joined to what comes up.
    """

    def __init__(self, c_in: int, c_out: int, channels: int = 16, levels: int = 4):
        super().__init__()
        widths = [channels * (k + 1) for k in range(levels)]
        steps = list(zip(widths[:-1], widths[1:], strict=True))
        self.stem = _subm(c_in, channels)
        self.encoders = nn.ModuleList(Residual(width) for width in widths)
        self.downs = nn.ModuleList(
            ConvNorm(SparseConv3d(fine, coarse, 2, stride=2, bias=False), coarse)
            for fine, coarse in steps
        )
        self.ups = nn.ModuleList(
            ConvNorm(SparseInverseConv3d(coarse, fine, 2, bias=False), fine)
            for fine, coarse in steps
        )
        self.decoders = nn.ModuleList(_subm(2 * fine, fine) for fine, _ in steps)
        self.head = nn.Linear(channels, c_out)

    def convolutions(self) -> list[Any]:
        """The sparse layers, in the order of the forward pass."""
        first, *encoders = self.encoders
        blocks: list[Any] = [self.stem, first.first, first.second]
        for down, encoder in zip(self.downs, encoders, strict=True):
            blocks += [down, encoder.first, encoder.second]
        for up, decoder in zip(reversed(self.ups), reversed(self.decoders), strict=True):
            blocks += [up, decoder]
        return [block.conv for block in blocks]

    def maps(self, x: SparseTensor) -> list[KernelMap]:
        """The map of every sparse layer; x has them all from now on, so no layer builds one."""
        maps = []
        for conv in self.convolutions():
            number, map = conv.target(x)
            x = x.replace(x.features.new_empty((map.n_out, 0)), number)
            maps.append(map)
        return maps

    def forward(self, x: SparseTensor) -> torch.Tensor:
        first, *encoders = self.encoders
        x = first(self.stem(x))
        skips = []
        for down, encoder in zip(self.downs, encoders, strict=True):
            skips.append(x)
            x = encoder(down(x))
        for up, decoder in zip(reversed(self.ups), reversed(self.decoders), strict=True):
            x = decoder(cat([skips.pop(), up(x)]))
        predictions: torch.Tensor = self.head(x.features)
        return predictions
