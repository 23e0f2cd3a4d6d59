# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on: the facts that stand beside every number, and `voxgemm info`."""

from __future__ import annotations

import datetime
import json
import platform
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import _library, info

# The instruction sets that a kernel here may use.
_X86 = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16")
_FEATURES = (*_X86, "amx_tile", "amx_bf16", "amx_fp16", "asimd", "bf16", "sve")


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
        **({"cuda": torch.version.cuda} if gpu else {}),
        "device_type": device.type,
        "cpu_features": cpu_features(),
        "threads": torch.get_num_threads(),
        "voxgemm": info()["voxgemm"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def write_rows(path: str | None, rows: Sequence[dict[str, Any]], device: torch.device) -> None:
    """Results with their provenance as JSON lines; no path: nowhere."""
    if path:
        of_run = provenance(device)
        Path(path).write_text("".join(json.dumps(row | of_run) + "\n" for row in rows))


def compiler(library: Path) -> str:
    """Who compiled a library, as compilers note it in their files."""
    found = re.search(rb"(GCC: |clang version )[\x20-\x7e]+", library.read_bytes())
    return found[0].decode() if found else "unknown"


def architectures(library: Path) -> list[str]:
    """What a library has machine code (sm_90) or PTX (compute_90) for.

    CUDA keeps it in containers: a head of magic number, version, its own length and the length of
    what follows, which is parts of kind, length of the part's head, length and, at byte 28 of that
    head, architecture. This is no documented format; what is not of this form is passed over.
    """
    data, magic = library.read_bytes(), struct.pack("<IH", 0xBA55ED50, 1)
    found, place = set(), data.find(magic)
    while place >= 0:
        head, length = struct.unpack_from("<HQ", data, place + 6)
        part, end = place + head, min(place + head + length, len(data))
        while part + 32 <= end:
            kind, _, head, length = struct.unpack_from("<HHIQ", data, part)
            if kind in (1, 2) and head >= 32:
                found.add((struct.unpack_from("<I", data, part + 28)[0], kind))
            part += max(head + length, 32)
        place = data.find(magic, place + 16)
    return [f"{'compute' if kind == 1 else 'sm'}_{number}" for number, kind in sorted(found)]


def gpu_name(index: int) -> str:
    """One GPU as `voxgemm info` shows it."""
    facts = torch.cuda.get_device_properties(index)
    return (
        f"{facts.name}, sm_{facts.major}{facts.minor}, {facts.multi_processor_count} SMs, "
        f"{facts.total_memory / 2**30:.1f} GiB"
    )


def facts() -> dict[str, Any]:
    """Everything that `voxgemm info` prints."""
    own = info()
    first = {name: own.pop(name) for name in ("voxgemm", "torch")}
    own["gpus"] = [gpu_name(index) for index in range(len(own["gpus"]))]
    own["compiler"] = compiler(_library.PATH)
    cuda = _library.PATH.with_name(_library.CUDA_LIBRARY)
    own["cuda_architectures"] = architectures(cuda) if cuda.is_file() else []
    return {
        **first,
        "cuda": torch.version.cuda or "none",
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
