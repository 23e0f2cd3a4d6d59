// SPDX-License-Identifier: Apache-2.0
#pragma once

// Formulas that both backends compute, one item at a time.
#ifdef __CUDACC__
#define VOXGEMM_HOST_DEVICE __host__ __device__
#else
#define VOXGEMM_HOST_DEVICE
#endif
