# SPDX-License-Identifier: Apache-2.0
"""Launchers of weighted sums of rows."""

from . import config
from .indice_weighed_sum_bwd_input import indice_weighed_sum_bwd_input
from .indice_weighed_sum_fwd import indice_weighed_sum_fwd

__all__ = ["config", "indice_weighed_sum_bwd_input", "indice_weighed_sum_fwd"]
