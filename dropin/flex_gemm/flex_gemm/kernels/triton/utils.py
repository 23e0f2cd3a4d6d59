# SPDX-License-Identifier: Apache-2.0
"""What launchers ask about the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def get_gpu_name() -> str:
    return torch.cuda.get_device_name()


def get_platform_name() -> str:
    """'cuda' or 'hip', as torch was built; 'unknown' without a device."""
    if not torch.cuda.is_available():
        return "unknown"
    return "hip" if torch.version.hip else "cuda"


def get_num_sm() -> int:
    return torch.cuda.get_device_properties("cuda").multi_processor_count


def get_autotune_config(
    default: Any = None,
    platform: Mapping[str, Any] | None = None,
    device: Mapping[str, Any] | None = None,
) -> Any:
    """The entry of `device` for this GPU, else of `platform`, else the default."""
    if device and get_gpu_name() in device:
        return device[get_gpu_name()]
    if platform and get_platform_name() in platform:
        return platform[get_platform_name()]
    if default is None:
        raise ValueError("no configuration is for this GPU or platform, and there is no default")
    return default
