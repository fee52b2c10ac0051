#!/bin/sh
# The capture kernel's whole userland (K2): finds /proc/vmcore, copies it to the disk /dev/vda, says what it does, powers off.
#
# It speaks to the host over the virtio-serial port named "crashkernel", one line a message:
#
#   k2-cpus LIST         the CPUs online, as in "0-3"
#   k2-up UPTIME        the capture kernel runs this script, UPTIME seconds after its start
#   vmcore BYTES        the size of /proc/vmcore
#   progress BYTES      so much is on the disk; about once a second
#   saved BYTES STATUS  all BYTES are on the disk and flushed; STATUS is dd's, 0
#   failed REASON       it did not work; nothing else follows
#
# With crashkernel.mode=bare on its command line it only says these two, for measuring the way here.
#
# /bin/sh is busybox; the applets used are links made by the image's builder (guest.py: CAPTURE_APPLETS).
export PATH=/bin

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

size=$(stat -c %s /proc/vmcore) || fail "no size of /proc/vmcore"
say "vmcore $size"

[ -b /dev/vda ] || fail "no disk /dev/vda"
read -r sectors </sys/block/vda/size
# dd fills up the last block.
block=4194304
[ $((sectors * 512)) -ge $(((size + block - 1) / block * block)) ] ||
    fail "the disk holds $((sectors * 512)) bytes, too few for the $size bytes of /proc/vmcore in blocks of $block"

# The seventh field of a disk's stat: sectors of 512 bytes written (Documentation/admin-guide/iostats.rst).
written() {
    read -r f1 f2 f3 f4 f5 f6 sectors_written rest </sys/block/vda/stat
    bytes=$((sectors_written * 512))
}

(while sleep 1; do
    written
    say "progress $bytes"
done) &
watcher=$!

# Direct: a page cache would have to be filled and emptied, in a kernel with little memory.
dd if=/proc/vmcore of=/dev/vda bs=$block iflag=fullblock oflag=direct conv=sync,fsync 2>/dd.log
status=$?

kill $watcher
wait $watcher 2>/dev/null
[ $status = 0 ] || fail "dd: exit $status: $(tail -n 1 /dd.log)"
written
[ $bytes -ge $size ] || fail "dd wrote $bytes bytes of $size"
say "saved $size $status"
finish
