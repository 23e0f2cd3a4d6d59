# SPDX-License-Identifier: Apache-2.0
from ._launchers import launcher

sparse_conv_bwd_implicit_gemm_splitk = launcher(__name__)
