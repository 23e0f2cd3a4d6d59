# SPDX-License-Identifier: Apache-2.0
from .indice_weighed_sum_bwd_input import indice_weighed_sum_bwd_input

__all__ = ["indice_weighed_sum_bwd_input"]
