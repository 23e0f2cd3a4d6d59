# SPDX-License-Identifier: Apache-2.0
from ._launchers import launcher

sparse_conv_fwd_implicit_gemm = launcher(__name__)
