# SPDX-License-Identifier: Apache-2.0
"""Where programs look for the convolution's operators."""

from .submanifold_conv3d import SpConvConfig, SubMConv3dCompiledFunction

__all__ = ["SpConvConfig", "SubMConv3dCompiledFunction"]
