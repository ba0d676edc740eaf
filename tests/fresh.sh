#!/bin/sh
# The README followed to the letter in a new minimal Debian by a user who may use sudo: clone, ./run migrate, ./run test.
# There is no Python, no compiler, no peer: ./run has to bring them. A skipped test fails there, as in CI.
# Usage: tests/fresh.sh [--keep] SUITE [PYTEST OPTIONS]
#
# What this machine needs to reach archives goes along: proxies, certificates, the settings of apt and pip.
# FRESH_MIRROR names another mirror than debootstrap's own. Mounts and processes are in namespaces that end with this.
set -eu
root=$(dirname "$(dirname "$(readlink -f "$0")")")
user=tester

outside() {
    keep=
    if [ "${1:-}" = --keep ]; then keep=yes; shift; fi
    case ${1:-} in
        "" | -*) echo "usage: ./run test-fresh [--keep] SUITE [PYTEST OPTIONS]" >&2; exit 2 ;;
    esac
    # Nobody else may enter: there is a user who becomes root without a password. /var/tmp: /tmp may be in memory.
    base=$(mktemp -d /var/tmp/fresh.XXXXXX)
    if [ -z "$keep" ]; then
        trap 'rm -rf --one-file-system "$base"' EXIT
    else
        trap 'echo "fresh: kept in $base"' EXIT
    fi
    trap 'exit 130' INT TERM HUP
    git -c safe.directory='*' -C "$root" bundle create --quiet "$base/bundle" HEAD
    code=0
    unshare --mount --pid --fork --kill-child sh "$0" --inside "$base" "$@" || code=$?
    exit $code
}

inside() {
    base=$1 suite=$2
    shift 2
    trap 'exit 130' INT TERM HUP
    new=$base/root
    # shellcheck disable=SC2086 # none or one
    debootstrap --variant=minbase --include=ca-certificates,git,sudo "$suite" "$new" ${FRESH_MIRROR:-}
    mount -t proc proc "$new/proc"
    mount --rbind /sys "$new/sys"
    mount --rbind /dev "$new/dev"
    mount -t tmpfs tmpfs "$new/dev/shm"
    carry_over
    chroot "$new" useradd --create-home --shell /bin/bash $user
    echo "$user ALL=(ALL) NOPASSWD: ALL" >"$new/etc/sudoers.d/$user"
    cp "$base/bundle" "$new/tmp/virtio-balloon"
    as_user "git clone --quiet /tmp/virtio-balloon virtio-balloon"

    options=
    for option; do options="$options '$option'"; done
    failed=0
    step migrate "./run migrate"
    step test "CI=true HYPOTHESIS_PROFILE=ci ./run test$options"
    for name in migrate test; do
        printf '\n== %s in a new %s: %s\n' "$name" "$suite" "$(cat "$base/$name.end")"
        tail -n 12 "$base/$name.log"
    done
    return $failed
}

# What a machine of this network has.
carry_over() {
    cp -L /etc/hosts /etc/resolv.conf "$new/etc/"
    apt-config dump | grep -E '^Acquire::(https?|ftp|Check-)' >"$new/etc/apt/apt.conf.d/90carried-over" || :
    env | grep -Ei '^(https?|ftp|all|no)_proxy=|^PIP_|^(SSL_CERT_FILE|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|GIT_SSL_CAINFO)=' |
        tee "$new/etc/environment" | sed 's/^[^=]*=//' >"$base/values"
    for file in /etc/ssl/certs/ca-certificates.crt /etc/pip.conf /etc/xdg/pip/*; do echo "$file"; done >>"$base/values"
    while read -r file; do
        case $file in /*) [ ! -f "$file" ] || install -D -m 644 "$file" "$new$file" ;; esac
    done <"$base/values"
}

as_user() { chroot "$new" su - $user -c "$1"; }

step() {
    printf '\n== %s\n' "$2"
    began=$(date +%s)
    {
        code=0
        as_user "cd virtio-balloon && $2" 2>&1 || code=$?
        echo "exit $code after $(($(date +%s) - began)) s" >"$base/$1.end"
    } | tee "$base/$1.log"
    case $(cat "$base/$1.end") in "exit 0 "*) ;; *) failed=1 ;; esac
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
elif [ "$(id -u)" = 0 ]; then
    outside "$@"
else
    exec sudo -E sh "$0" "$@" # with the variables that are carried over
fi
