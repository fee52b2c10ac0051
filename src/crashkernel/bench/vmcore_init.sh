#!/bin/sh
# The kernel whose dump the capture bench is measured on, from its first process: mounts the disk with Debian's Python on it and
# leaves everything else to vmcore_filler.py there, whose head describes the protocol on the port.
#
# /bin/sh is busybox; common.sh is the drill's guest-common.sh.
export PATH=/bin

. /etc/crashkernel/common.sh
open_port

/bin/busybox mkdir /root
mount -t ext4 /dev/vdb /root || fail "mount /dev/vdb: exit $?"
for directory in proc sys dev; do
    mount -o bind /$directory /root/$directory || fail "mount $directory: exit $?"
done
mount -t tmpfs -o size=2g,nr_inodes=2000000 tmpfs /root/tmp || fail "mount tmpfs: exit $?"

read -r arguments </etc/crashkernel/filler
/bin/busybox chroot /root /usr/bin/python3.11 -S /vmcore_filler.py $arguments <&3 >&3
fail "the filler ended: exit $?"
