# SPDX-License-Identifier: Apache-2.0
"""scikit-build-core, plus torch as a build requirement where its headers are not at hand.

docs/decisions/0002-torch-headers-in-wheel-builds.md says why.
"""

import pathlib
import subprocess
import sys

from scikit_build_core import build
from scikit_build_core.build import *  # noqa: F403  (every other hook is scikit-build-core's)

FINDER = pathlib.Path(__file__).parent.parent / "cmake" / "find_torch_include.py"
TORCH_INCLUDE = "VOXGEMM_TORCH_INCLUDE"


def torch_requirement(config_settings: dict | None) -> list[str]:
    """["torch>=2.14"], or [] if CMake will find torch's headers without it."""
    if any(TORCH_INCLUDE in key for key in config_settings or {}):
        return []
    found = subprocess.run(
        [sys.executable, "-I", FINDER], capture_output=True, text=True, check=True
    )
    return [] if found.stdout.strip() else ["torch>=2.14"]


def get_requires_for_build_wheel(config_settings=None):
    requirements = build.get_requires_for_build_wheel(config_settings)
    return requirements + torch_requirement(config_settings)


def get_requires_for_build_editable(config_settings=None):
    requirements = build.get_requires_for_build_editable(config_settings)
    return requirements + torch_requirement(config_settings)
