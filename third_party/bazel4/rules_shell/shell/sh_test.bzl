# SPDX-License-Identifier: Apache-2.0
"""sh_test where current Bazel loads it from."""

def sh_test(**attributes):
    native.sh_test(**attributes)
