#!/bin/sh
# Long random exploration, with fresh seeds (printed).
# Usage: tests/explore.sh [SECONDS]   turns of everything: hypothesis, the C fuzzers under sanitizers, odd peers
#        tests/explore.sh peers       once, and for long: what odd, hostile, late and dying peers can do
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python

peers() { # MESSAGES RECORDS COMMANDS MIGRATIONS SCENES [SEED]
    $python tests/explore_messages.py "$1" ${6:+"$6"}
    $python tests/explore_streams.py "$2" ${6:+"$6"}
    $python tests/explore_qmp.py "$3" ${6:+"$6"}
    $python tests/explore_late_freezes.py "$4" ${6:+"$6"}
    $python tests/explore_handover.py "$5" ${6:+"$6"}
}

if [ "${1:-}" = peers ]; then
    peers 1000000 100000 10000 200 300
    exit
fi
seconds=${1:-600}
end=$(($(date +%s) + seconds))
export HYPOTHESIS_PROFILE=dev
while [ "$(date +%s)" -lt "$end" ]; do
    seed=$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')
    echo "explore: seed $seed"
    sh tests/sanitize.sh "$seed" 20
    $python -m pytest -q --hypothesis-seed="$seed" tests/test_migration_machine.py tests/test_ring_model.py \
        tests/test_page_alloc_model.py tests/test_stream.py tests/test_bitmap.py tests/test_pages.py \
        -k "not test_machine_finds"
    peers 50000 3000 1000 10 10 "$seed"
done
