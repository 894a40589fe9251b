#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# The committed example is the one the daemon's table makes, and the daemon takes it as it is.
set -euo pipefail
kivid=$1 example=$2

diff -u "$example" <("$kivid" --example-config) || {
    echo "write it anew: kivid --example-config > deploy/kivid.yaml"
    exit 1
}
"$kivid" --config "$example" --check-config | grep -q "^arena_bytes: 1GiB .* # default$"
echo "the example is up to date"
