# SPDX-License-Identifier: Apache-2.0
"""Bazel 4's global CcInfo under a second name: a file may not define a name that it also reads."""

builtin_CcInfo = CcInfo
