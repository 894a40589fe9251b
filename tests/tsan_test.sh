#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# tests/tsan.supp hides gRPC's races and none of ours: a program built and linked like every other one still
# fails on a race of its own under ThreadSanitizer, and passes without one. In other builds there is no one
# to see a race, and then all three must pass.
program=$1
if grep -q __tsan_init "$program"; then raced=66; else raced=0; fi
failed=0
expect() { # expect CODE KIND
    "$program" "$2" >"$TEST_TMPDIR/said" 2>&1
    code=$?
    if [ "$code" -ne "$1" ]; then
        echo "$2: exit code $code instead of $1:"
        cat "$TEST_TMPDIR/said"
        failed=1
    fi
}
expect 0 none
expect "$raced" plain
expect "$raced" copied
exit "$failed"
