# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from torch import Tensor

from voxgemm import sampling

from ....errors import speaking


@speaking
def indice_weighed_sum_fwd(input: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """[M, C]: sums over v of weight[m, v] * input[indices[m, v]], absent rows left out."""
    return sampling.weighted_sum(input.detach(), indices, weight.detach())
