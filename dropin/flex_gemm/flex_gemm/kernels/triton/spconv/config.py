# SPDX-License-Identifier: Apache-2.0
"""Switches that programs assign; read at every call.

allow_tf32: until it is assigned it is torch's switch for float32 products on CUDA.
"""

from typing import Any

import torch

USE_ON_THE_FLY_WEIGHT_TRANSPOSE = True
autotune_config = []


def __getattr__(name: str) -> Any:
    if name == "allow_tf32":
        return torch.backends.cuda.matmul.fp32_precision == "tf32"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class KernelConfig:
    """How one branch of FlexGEMM spells the switch."""

    def configure(self, allow_tf32: bool = True, invalid_neigh: int = 0xFFFFFFFF) -> None:
        """invalid_neigh: absent neighbours are -1 or 0xffffffff, whatever is said here."""
        globals()["allow_tf32"] = allow_tf32
        self.invalid_neigh = invalid_neigh


_kernel_config = KernelConfig()
