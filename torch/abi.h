// SPDX-License-Identifier: Apache-2.0
#pragma once

// The only place that includes torch: its stable headers and C shims, nothing else of it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
