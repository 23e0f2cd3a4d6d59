# SPDX-License-Identifier: Apache-2.0
"""Base of the modules."""

from __future__ import annotations

import torch
from torch import nn


class BaseSpatialModule(nn.Module):
    """A module that takes Voxels."""

    @property
    def device(self) -> torch.device:
        """Of the first parameter."""
        return next(self.parameters()).device
