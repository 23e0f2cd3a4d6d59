# SPDX-License-Identifier: Apache-2.0
"""Prints the include folder of this interpreter's torch, if new enough, without importing torch."""

import importlib.util
import pathlib
import re

# Older headers leak memory on every string argument of an operator.
OLDEST = (2, 14)


def torch_include() -> str:
    spec = importlib.util.find_spec("torch")
    for folder in (spec and spec.submodule_search_locations) or []:
        include = pathlib.Path(folder) / "include"
        header = include / "torch" / "headeronly" / "version.h"
        if header.is_file():
            version = re.findall(r"#define TORCH_VERSION_M(?:AJ|IN)OR (\d+)", header.read_text())
            if tuple(map(int, version)) >= OLDEST:
                return include.as_posix()
    return ""


if __name__ == "__main__":
    print(torch_include())
