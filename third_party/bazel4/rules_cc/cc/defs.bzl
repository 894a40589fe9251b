# SPDX-License-Identifier: Apache-2.0
"""The C rules under the names that current Bazel loads them by."""

def cc_binary(**attributes):
    native.cc_binary(**attributes)

def cc_import(**attributes):
    native.cc_import(**attributes)

def cc_library(**attributes):
    native.cc_library(**attributes)

def cc_test(**attributes):
    native.cc_test(**attributes)

# Bazel's own toolchain set-up loads these two.
def cc_toolchain(**attributes):
    native.cc_toolchain(**attributes)

def cc_toolchain_suite(**attributes):
    native.cc_toolchain_suite(**attributes)
