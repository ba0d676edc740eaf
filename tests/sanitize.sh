#!/bin/sh
# Compile every csrc/tests/*.c with the C rooms it names, under AddressSanitizer and UBSan, and run it.
# A test says what it needs by its #include lines: "vring/..." links csrc/vring/*.c, and so on.
# Usage: tests/sanitize.sh [SEED [SECONDS]]
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cd "$root"
for test in csrc/tests/*.c; do
    name=$(basename "$test" .c)
    sources=$test
    for room in $(sed -n 's|^#include "\([a-z_]*\)/.*|\1|p' "$test" | sort -u); do
        sources="$sources $(echo csrc/"$room"/*.c)"
    done
    # shellcheck disable=SC2086 # a list of files, none with spaces
    ${CC:-cc} -std=c11 -g -O1 -Wall -Wextra -Werror -D_GNU_SOURCE -Icsrc \
        -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
        $sources -pthread -o "$out/$name"
    "$out/$name" "${1:-1}" "${2:-5}"
done
