#!/bin/sh
# The first kernel's whole userland (K1): loads the capture kernel the way the scenario says, plants the nonce, crashes on
# command.
#
# It speaks to the host over the virtio-serial port named "crashkernel", one line a message:
#
#   k1-up UPTIME      the kernel runs this script, UPTIME seconds after its start
#   region NAME HEX   memory as the kernel has it in /proc/device-tree: 64-bit addresses and sizes
#   log TEXT          a line the loader printed
#   plan BYTES        exactly BYTES bytes of JSON follow, the loader's plan (not with kexec-tools)
#   loaded UPTIME     the capture kernel is loaded
#   armed UPTIME      the nonce is in memory; the next word is the host's
#   failed REASON     a number: the loader's exit status; else words. Nothing else follows
#
# and the host answers
#
#   crash             die now
#
# What to do is in /etc/crashkernel, written by the image's builder (guest.py):
#
#   scenario          LOADER=crashkernel or LOADER=kexec-tools
#   load-args         the loader's arguments, one a line
#   append            the capture kernel's command line, for kexec-tools
#   modules           kernel modules in the order to load them
#   nonce.0 nonce.1   the halves of the nonce
#
# /bin/sh is busybox; the applets used are links made by the image's builder (guest.py: CRASH_APPLETS).
export PATH=/bin:/sbin:/usr/bin

. /etc/crashkernel/common.sh
mount -t tmpfs tmpfs /tmp
up=$(uptime)
open_port

say "k1-up $up"

# What the kernel itself says of its memory, for the host: the loader's word is not taken for it.
region() {
    name=$1
    shift
    say "region $name $(cat "$@" | hexdump -v -e '1/1 "%02x"')"
}
tree=/proc/device-tree
if [ -e $tree/chosen/linux,crashkernel-base ]; then
    region crashkernel $tree/chosen/linux,crashkernel-base $tree/chosen/linux,crashkernel-size
fi
[ ! -e $tree/ibm,opal/opal-runtime-size ] ||
    region OPAL $tree/ibm,opal/opal-base-address $tree/ibm,opal/opal-runtime-size
for node in $tree/reserved-memory/*@*; do
    name=${node##*/}
    [ ! -e "$node/reg" ] || region "${name%@*}" "$node/reg"
done

LOADER=crashkernel
. /etc/crashkernel/scenario

load() {
    case $LOADER in
    crashkernel)
        set --
        while IFS= read -r argument; do
            set -- "$@" "$argument"
        done </etc/crashkernel/load-args
        export PYTHONPATH=/usr/lib/crashkernel PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
        # the same as -m crashkernel, a sixth of a second sooner on an emulated CPU
        python3.11 -S -c 'import sys; from crashkernel.cli import main; sys.exit(main())' load "$@" --plan-out /tmp/plan.json
        ;;
    kexec-tools)
        kexec -p /boot/vmlinux --initrd=/boot/initrd --append="$(cat /etc/crashkernel/append)"
        ;;
    *)
        echo "unknown loader $LOADER"
        false
        ;;
    esac
}

# The loader must not hold the port: it gets a pipe, and its exit status comes by a file.
(
    load </dev/null 2>&1 3>&-
    echo $? >/tmp/status
) | while IFS= read -r line; do
    say "log $line"
done
read -r status </tmp/status
[ "$status" = 0 ] || fail "$status"

if [ "$LOADER" = crashkernel ]; then
    size=$(stat -c %s /tmp/plan.json) || fail "the loader wrote no plan"
    say "plan $size"
    cat /tmp/plan.json >&3
fi
read -r crash_loaded </sys/kernel/kexec_crash_loaded
[ "$crash_loaded" = 1 ] || fail "the loader exited with 0, but /sys/kernel/kexec_crash_loaded is $crash_loaded"
say "loaded $(uptime)"

# Only here do the halves meet, in the page cache: the archive this root came from never held the whole nonce, so finding it
# in a dump means finding memory written after the start.
cat /etc/crashkernel/nonce.0 /etc/crashkernel/nonce.1 >/tmp/nonce

say "armed $(uptime)"
while read -r word <&3; do
    [ "$word" = crash ] && break
    say "log unknown command: $word"
done
[ "$word" = crash ] || fail "the host hung up"

echo c >/proc/sysrq-trigger
fail "sysrq-trigger did not crash the kernel"
