#!/bin/busybox sh
# First process of the Linux guest: mounts what is needed, then runs the console's lines as commands.
# A line is "<tag> <command>"; the answer is "\036B <tag>", the command's output, "\036E <tag> <exit code>".
B=/bin/busybox
export PATH=/bin:/sbin HOME=/ TERM=dumb
$B mount -t proc proc /proc
$B --install -s /bin
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null || mount -t tmpfs tmpfs /dev
mount -t tmpfs -o size=100%,nr_inodes=0 tmpfs /fill
stty raw -echo
# Kernel messages would come between a command and its end marker; dmesg still has them.
dmesg -n 1
# A moved page leaves a copy of itself behind; locked (tagged) pages stay where they are.
echo 0 >/proc/sys/vm/compact_unevictable_allowed 2>/dev/null
echo 0 >/proc/sys/vm/panic_on_oom 2>/dev/null
printf '\n\036R %s\n' "$(uname -r)"
while read -r tag line; do
    printf '\n\036B %s\n' "$tag"
    (eval "$line") </dev/null 2>&1
    printf '\n\036E %s %d\n' "$tag" $?
done
poweroff -f
