#!/bin/sh
# Compile every csrc/tests/*.c with the C rooms it names, under AddressSanitizer and UBSan, and run it.
# A test says what it needs by its #include lines: "vring/..." links csrc/vring/*.c, and so on.
# Usage: [CC=COMPILER] [SANITIZERS=FLAGS] tests/sanitize.sh [SEED [SECONDS]]; SANITIZERS= for a compiler without any
set -eu
sanitizers=${SANITIZERS--fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer}
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
    echo "sanitize: $name"
    # shellcheck disable=SC2086 # lists of words
    ${CC:-cc} -std=c11 -g -O1 -Wall -Wextra -D_GNU_SOURCE -Icsrc \
        $sanitizers $sources -pthread -o "$out/$name"
    "$out/$name" "${1:-1}" "${2:-5}"
done
