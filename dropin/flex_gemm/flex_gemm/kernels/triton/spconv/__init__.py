# SPDX-License-Identifier: Apache-2.0
"""Launchers of convolutions, on neighbour matrices [rows, V] of input rows.

Forward: (input, weight [Co, V, Ci], bias or None, neighbor, ...) -> [rows, Co]. Backward:
(grad_output, input, weight, bias or None, neighbor, ...) -> the gradients of input, weight and
bias, None for what does not require grad. Those with _splitk take SPLITK as well.
"""

from . import config
from .sparse_conv_bwd_implicit_gemm import sparse_conv_bwd_implicit_gemm
from .sparse_conv_bwd_implicit_gemm_splitk import sparse_conv_bwd_implicit_gemm_splitk
from .sparse_conv_bwd_masked_implicit_gemm import sparse_conv_bwd_masked_implicit_gemm
from .sparse_conv_bwd_masked_implicit_gemm_splitk import sparse_conv_bwd_masked_implicit_gemm_splitk
from .sparse_conv_fwd_implicit_gemm import sparse_conv_fwd_implicit_gemm
from .sparse_conv_fwd_implicit_gemm_splitk import sparse_conv_fwd_implicit_gemm_splitk
from .sparse_conv_fwd_masked_implicit_gemm import sparse_conv_fwd_masked_implicit_gemm
from .sparse_conv_fwd_masked_implicit_gemm_splitk import sparse_conv_fwd_masked_implicit_gemm_splitk
from .sparse_submanifold_conv_bwd_implicit_gemm import sparse_submanifold_conv_bwd_implicit_gemm
from .sparse_submanifold_conv_bwd_implicit_gemm_splitk import (
    sparse_submanifold_conv_bwd_implicit_gemm_splitk,
)
from .sparse_submanifold_conv_bwd_masked_implicit_gemm import (
    sparse_submanifold_conv_bwd_masked_implicit_gemm,
)
from .sparse_submanifold_conv_bwd_masked_implicit_gemm_splitk import (
    sparse_submanifold_conv_bwd_masked_implicit_gemm_splitk,
)
from .sparse_submanifold_conv_fwd_implicit_gemm import sparse_submanifold_conv_fwd_implicit_gemm
from .sparse_submanifold_conv_fwd_implicit_gemm_splitk import (
    sparse_submanifold_conv_fwd_implicit_gemm_splitk,
)
from .sparse_submanifold_conv_fwd_masked_implicit_gemm import (
    sparse_submanifold_conv_fwd_masked_implicit_gemm,
)
from .sparse_submanifold_conv_fwd_masked_implicit_gemm_splitk import (
    sparse_submanifold_conv_fwd_masked_implicit_gemm_splitk,
)

__all__ = [
    "config",
    "sparse_conv_bwd_implicit_gemm",
    "sparse_conv_bwd_implicit_gemm_splitk",
    "sparse_conv_bwd_masked_implicit_gemm",
    "sparse_conv_bwd_masked_implicit_gemm_splitk",
    "sparse_conv_fwd_implicit_gemm",
    "sparse_conv_fwd_implicit_gemm_splitk",
    "sparse_conv_fwd_masked_implicit_gemm",
    "sparse_conv_fwd_masked_implicit_gemm_splitk",
    "sparse_submanifold_conv_bwd_implicit_gemm",
    "sparse_submanifold_conv_bwd_implicit_gemm_splitk",
    "sparse_submanifold_conv_bwd_masked_implicit_gemm",
    "sparse_submanifold_conv_bwd_masked_implicit_gemm_splitk",
    "sparse_submanifold_conv_fwd_implicit_gemm",
    "sparse_submanifold_conv_fwd_implicit_gemm_splitk",
    "sparse_submanifold_conv_fwd_masked_implicit_gemm",
    "sparse_submanifold_conv_fwd_masked_implicit_gemm_splitk",
]
