#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# libkivi.tar, unpacked somewhere: pkg-config finds it, a program compiles against it alone, and runs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/prefix"
tar -xf "$1" -C "$work/prefix"
export PKG_CONFIG_PATH=$work/prefix/lib/pkgconfig

cat >"$work/program.c" <<'C'
#include <kivi.h>
#include <stdio.h>
int main(void) {
    struct kivi_error error;
    struct kivi_options options = KIVI_OPTIONS_INIT;
    struct kivi_client *client = NULL;
    int code = kivi_client_open(&options, &client, &error);
    if (code == KIVI_OK) kivi_client_close(client);
    return puts(kivi_version()) < 0 || code != KIVI_OK;
}
C
read -r -a flags <<<"$(pkg-config --cflags --libs kivi)"
gcc -std=c11 -Wall -Wextra -Werror -o "$work/program" "$work/program.c" "${flags[@]}"
said=$(LD_LIBRARY_PATH=$work/prefix/lib "$work/program")
[[ $said == "$(pkg-config --modversion kivi)" ]]
# Nothing but the names of kivi.h leaves the library.
! nm -D --defined-only "$work/prefix/lib/libkivi.so" | grep -v ' kivi_\| A KIVI_0'
