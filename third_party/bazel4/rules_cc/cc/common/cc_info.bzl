# SPDX-License-Identifier: Apache-2.0
"""The provider of C libraries, where current rules_cc keeps it."""

load(":builtin.bzl", "builtin_CcInfo")

CcInfo = builtin_CcInfo
