# SPDX-License-Identifier: Apache-2.0
"""Kept, and without effect: nothing here is tuned."""

autotune_config = []
