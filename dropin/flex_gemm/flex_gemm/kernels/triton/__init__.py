# SPDX-License-Identifier: Apache-2.0
"""FlexGEMM's launchers by name; each runs voxgemm's schedule of that name, without Triton."""

from . import grid_sample, spconv, utils
from .grid_sample import *  # noqa: F403
from .spconv import *  # noqa: F403

__all__ = ["grid_sample", "spconv", "utils", *grid_sample.__all__, *spconv.__all__]
