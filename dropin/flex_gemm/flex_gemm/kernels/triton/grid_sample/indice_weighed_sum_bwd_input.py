# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from torch import Tensor

from voxgemm import sampling

from ....errors import speaking


@speaking
def indice_weighed_sum_bwd_input(
    grad_output: Tensor, indices: Tensor, weight: Tensor, N: int
) -> Tensor:
    """The gradient of indice_weighed_sum_fwd in its input: [N, C]."""
    return sampling.weighted_sum_grad_features(grad_output.detach(), indices, weight.detach(), N)
