#!/bin/sh
# Long random exploration: hypothesis with fresh seeds (printed), and the C fuzzers under sanitizers.
# Usage: tests/explore.sh [SECONDS]
set -eu
cd "$(dirname "$0")/.."
seconds=${1:-600}
end=$(($(date +%s) + seconds))
export HYPOTHESIS_PROFILE=dev
while [ "$(date +%s)" -lt "$end" ]; do
    seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')
    echo "explore: seed $seed"
    sh tests/sanitize.sh "$seed" 20
    .venv/bin/python -m pytest -q --hypothesis-seed="$seed" tests/test_migration_machine.py tests/test_ring_model.py \
        tests/test_page_alloc_model.py tests/test_stream.py tests/test_bitmap.py -k "not test_machine_finds"
done
