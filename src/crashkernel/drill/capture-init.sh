#!/bin/sh
# The capture kernel's whole userland (K2): finds /proc/vmcore, saves it, says what it does, powers off.
#
# It speaks to the host over the virtio-serial port named "crashkernel", one line a message:
#
#   k2-cpus LIST         the CPUs online, as in "0-3"
#   k2-up UPTIME        the capture kernel runs this script, UPTIME seconds after its start
#   vmcore BYTES        the size of /proc/vmcore
#   booted TEXT         a line of its log on what the kernel made of its memory at boot
#   memory NAME:KIB ... fields of /proc/meminfo before it saves, and again whenever less is available than ever before
#   progress BYTES      so much is on the disk; about once a second
#   saved BYTES STATUS  all BYTES are where they belong; STATUS is that of what saved them, 0
#   failed REASON       it did not work: words, or the exit status of `crashkernel capture`; nothing else follows
#
# It copies /proc/vmcore to the disk /dev/vda as it is, unless /etc/crashkernel, written by the image's builder (guest.py), has
#
#   capture-args        the arguments of `crashkernel capture`, one a line: this saves it then
#   fault               what the shell does before all that, for a drill with a fault
#   token               the dump goes over the network, and its receiver wants to be shown this
#
# Then these are said, too:
#
#   log TEXT            a line that `crashkernel capture` printed
#   peak KIB CHILD      resident memory of the capturing process, and of the largest of its children, at most
#
# With crashkernel.mode=bare on its command line it only says the first two, for measuring the way here.
#
# /bin/sh is busybox; the applets used are links made by the image's builder (guest.py: CAPTURE_APPLETS, NETWORK_APPLETS).
export PATH=/bin:/usr/bin

. /etc/crashkernel/common.sh
up=$(uptime)
[ -e /proc/vmcore ] || fail "no /proc/vmcore: this kernel was not started by a crash"
open_port

read -r online </sys/devices/system/cpu/online
say "k2-cpus $online"
say "k2-up $up"
read -r cmdline </proc/cmdline
case " $cmdline " in
*" crashkernel.mode=bare "*) finish ;;
esac

# shellcheck disable=SC1091
[ ! -e /etc/crashkernel/fault ] || . /etc/crashkernel/fault
size=$(stat -c %s /proc/vmcore) || fail "no size of /proc/vmcore"
say "vmcore $size"

/bin/busybox dmesg | while IFS= read -r line; do
    case $line in
    *"] Memory: "* | *"] percpu: Embedded "* | *" nr_cpu_ids:"*) say "booted ${line#*] }" ;;
    esac
done

# What of K2's memory is taken and by what, read by the shell itself: another process would be in the count. Sets `available`.
sample() {
    fields=
    while read -r name kib unit; do
        case $name in
        MemAvailable:) available=$kib ;;
        MemTotal: | MemFree: | Buffers: | Cached: | SwapCached: | AnonPages: | Slab: | KernelStack: | PageTables: | Percpu: | VmallocUsed:) ;;
        *) continue ;;
        esac
        fields="$fields $name$kib"
    done </proc/meminfo
}

# Says how it stands, then each new low of what is available, until it is killed. Leaves its number in `watcher`.
watch() {
    sample
    say "memory$fields"
    least=$available
    while sleep 0.2; do
        sample
        [ "$available" -lt "$least" ] || continue
        least=$available
        say "memory$fields"
    done &
    watcher=$!
}

# The seventh field of a disk's stat: sectors of 512 bytes written (Documentation/admin-guide/iostats.rst).
written() {
    read -r f1 f2 f3 f4 f5 f6 sectors_written rest </sys/block/vda/stat
    bytes=$((sectors_written * 512))
}

copy_whole() {
    [ -b /dev/vda ] || fail "no disk /dev/vda"
    read -r sectors </sys/block/vda/size
    # dd fills up the last block.
    block=4194304
    [ $((sectors * 512)) -ge $(((size + block - 1) / block * block)) ] ||
        fail "the disk holds $((sectors * 512)) bytes, too few for the $size bytes of /proc/vmcore in blocks of $block"

    watch
    (while sleep 1; do
        written
        say "progress $bytes"
    done) &
    counter=$!

    # Direct: a page cache would have to be filled and emptied, in a kernel with little memory.
    dd if=/proc/vmcore of=/dev/vda bs=$block iflag=fullblock oflag=direct conv=sync,fsync 2>/dd.log
    status=$?

    kill $watcher $counter
    wait $watcher $counter 2>/dev/null
    [ $status = 0 ] || fail "dd: exit $status: $(echo $(cat /dd.log))"
    written
    [ $bytes -ge $size ] || fail "dd wrote $bytes bytes of $size"
}

# The capturing process says at its end what it took; a peak is not to be had from outside once it is gone.
crashkernel() {
    PYTHONPATH=/usr/lib/crashkernel:/usr/lib/python3/dist-packages PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
        OPENBLAS_NUM_THREADS=1 python3.11 -S -c '
import sys
from resource import RUSAGE_CHILDREN, RUSAGE_SELF, getrusage
from crashkernel.cli import main
status = main()
with open("/tmp/peak", "w") as file:
    print(*(getrusage(who).ru_maxrss for who in (RUSAGE_SELF, RUSAGE_CHILDREN)), file=file)
sys.exit(status)
' "$@"
}

capture() {
    [ ! -e /etc/crashkernel/token ] || ifconfig eth0 10.0.2.15 netmask 255.255.255.0 up || fail "no network"
    set --
    while IFS= read -r argument; do
        set -- "$@" "$argument"
    done </etc/crashkernel/capture-args

    watch
    # It must not hold the port: it gets a pipe, and its exit status comes by a file.
    (
        crashkernel capture /proc/vmcore "$@" </dev/null 2>&1 3>&-
        echo $? >/tmp/status
    ) | while IFS= read -r line; do
        say "log $line"
    done
    kill $watcher
    wait $watcher 2>/dev/null
    [ ! -e /tmp/peak ] || say "peak $(cat /tmp/peak)"
    read -r status </tmp/status
    [ "$status" = 0 ] || fail "$status"
}

if [ -e /etc/crashkernel/capture-args ]; then
    capture
else
    copy_whole
fi
say "saved $size $status"
finish
