# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on: the facts that stand beside every number, and `voxgemm info`."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch

from . import info

# The instruction sets that a kernel here may use.
_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16")
_FEATURES += ("amx_tile", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")


def _cpu_fields() -> dict[str, str]:
    """Name and feature words of the first processor, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    pairs = (line.partition(":") for line in reversed(lines) if ":" in line)
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    fields = _cpu_fields()
    return fields.get("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    fields = _cpu_fields()
    words = set((fields.get("flags") or fields.get("features") or "").split())
    return [feature for feature in _FEATURES if feature in words]


def provenance(device: torch.device) -> dict[str, Any]:
    """Device, versions, threads and the time in UTC."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else cpu_name(),
        "device_type": device.type,
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "voxgemm": info()["voxgemm"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def facts() -> dict[str, Any]:
    """Everything that `voxgemm info` prints."""
    own = info()
    first = {name: own.pop(name) for name in ("voxgemm", "torch")}
    return {
        **first,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_name": cpu_name(),
        "cpu_features": cpu_features(),
        **own,
    }


def in_words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {in_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
