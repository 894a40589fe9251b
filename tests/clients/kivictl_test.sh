#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Every command of kivictl against a real kivid, on real K and V.
#
# What could go wrong: an exit code that says done when it is not, an error without its field, JSON that is
# none, tensors turned the wrong way round, a session that is not there after kill -9. What attends answer is
# held against tests/reference/attention.py, which shares no code with kivid.
set -uo pipefail
kivid=$1 kivictl=$2 file=$3 reference=$4
work=$(mktemp -d /tmp/k.XXXXXX) # not below TEST_TMPDIR: the path of a socket has at most 107 bytes
export KIVID_TARGET=unix://$work/s
failed=0
daemon=

cleanup() {
    [[ -z $daemon ]] || { kill -9 "$daemon" && wait "$daemon"; } 2>/dev/null
    rm -rf "$work"
}
trap cleanup EXIT

say() { printf '%s %s\n' "$1" "$2"; }
# is WHAT EXPECTED ACTUAL
is() {
    if [[ $2 == "$3" ]]; then say ok "$1"; else say FAIL "$1: '$3', not '$2'" && failed=$((failed + 1)); fi
}
# exits CODE COMMAND...: kivictl with these arguments, its JSON in $work/out
exits() {
    local code=$1 got=0
    shift
    "$kivictl" "$@" --json --quiet >"$work/out" 2>"$work/err" || got=$?
    is "kivictl $*" "$code" "$got"
    [[ $got -eq $code ]] || cat "$work/err"
}
# json EXPRESSION, of `it`
json() { /usr/bin/python3 -c "import json, sys; it = json.load(open('$work/out')); print($1)"; }
close_to() { /usr/bin/python3 -c "print(abs($1) <= $2)"; }

start() {
    "$kivid" --listen="$KIVID_TARGET" --disk-path="$work/data" --arena-bytes=32MiB --tail-bytes-max=16MiB \
        --disk-bytes=256MiB --segment-bytes=16MiB --log-level=warn >>"$work/log" 2>&1 &
    daemon=$!
    for _ in $(seq 500); do
        "$kivictl" ping >/dev/null 2>&1 && return
        sleep 0.02
    done
    cat "$work/log"
    say FAIL "kivid did not get ready"
    exit 1
}

exits 2 nonsense
exits 2 bench
is "half a command lists the whole ones" 1 "$(grep -c '^  bench put' "$work/err")"
exits 2 bench put --nonsense
exits 2 append "$file"
exits 3 ping
is "an unreachable service may be asked again" True "$(json "it['error']['retry']")"
exits 2 append missing/exist --session a

start
exits 0 ping
exits 0 status
is "a fresh service holds no session" 0 "$(json "it['sessions_known']")"
exits 0 append "$file" --session a --salt s --commit synced
is "it is as durable as asked" synced "$(json "it['durability']")"
is "three layers of the file" 3 "$(json "it['layout']['layers']")"
exits 0 append "$file" --session b --salt s --tokens 300
exits 0 append "$file" --session b --salt s
is "the rest is appended" 340 "$(json "it['tokens']")"
is "and shared" True "$(json "it['blocks_shared'] > 0")"
exits 0 append "$file" --session raw --codec raw16
exits 1 append "$file" --session a --codec raw16
is "a name with another layout" FAILED_PRECONDITION "$(json "it['error']['name']")"
exits 1 append "$file" --session c --codec kivi9
is "the field at fault" layout.codec.preset "$(json "it['error']['field']")"
exits 1 sessions show nobody
is "and what was missing" NOT_FOUND "$(json "it['error']['name']")"

exits 0 attend "$file" --session raw --out "$work/raw"
is "attention on 16 bits is attention" True \
    "$(close_to "$(/usr/bin/python3 "$reference" "$file" "$work/raw")" 1e-3)"
exits 0 attend "$file" --session a --salt s --out "$work/a.1"
exits 0 fetch --session a --salt s --out "$work/a.kv"
is "attention on what is held, to rounding" True \
    "$(close_to "$(/usr/bin/python3 "$reference" "$file" "$work/a.1" "$work/a.kv")" 1e-3)"
exits 0 fetch --session a --salt s --f32 --out "$work/a.f32"
is "or to less of it" True \
    "$(close_to "$(/usr/bin/python3 "$reference" "$file" "$work/a.1" "$work/a.f32")" 5e-4)"
exits 0 fetch --session a --salt s --begin 100 --end 200 --out "$work/part"
exits 0 sessions ls
is "all sessions" "['a', 'b', 'raw']" "$(json "[s['name'] for s in it['sessions']]")"
exits 0 sessions show a --digests
is "their blocks by digest" True "$(json "len(it['digests']) == it['sealed_tokens'] // 128 > 0")"
exits 0 put "$file" --salt s
is "whole blocks of the text" 5 "$(json "it['blocks']")"
exits 0 lookup "$file" --salt s
is "are found" 640 "$(json "it['tokens']")"
exits 0 lookup "$file" --salt other
is "under their own salt" 0 "$(json "it['tokens']")"
exits 0 layouts
exits 0 stats
exits 0 stats --watch --count 2 --interval-ms 10

kill -9 "$daemon" && wait "$daemon" 2>/dev/null
exits 3 ping
start
exits 0 attend "$file" --session a --salt s --out "$work/a.2"
if cmp -s "$work/a.1" "$work/a.2"; then same=yes; else same=no; fi
is "after kill -9 the same to the bit" yes "$same"
exits 0 sessions rm a b raw
exits 0 sessions ls
is "all removed" "[]" "$(json "it['sessions']")"

say "" "$failed failed"
[[ $failed -eq 0 ]]
