# SPDX-License-Identifier: Apache-2.0
from ._launchers import launcher

sparse_submanifold_conv_bwd_masked_implicit_gemm = launcher(__name__)
