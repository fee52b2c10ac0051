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
#   buffer NAME RANGE, driving PAGES SIZE
#                     of the driver: see guest_driver.py
#   description BYTES exactly BYTES bytes of JSON follow, the machine's description
#   answer TEXT, did STATUS
#                     what a command of the host's said, and the status at its end
#   failed REASON     a number: the loader's exit status; else words. Nothing else follows
#
# and the host answers
#
#   driver ARGUMENT...  have the driver take its buffers and keep them
#   do COMMAND          have this shell do something, for a fault; it says `answer ...` if it is asked something
#   crash               die now
#
# What to do is in /etc/crashkernel, written by the image's builder (guest.py):
#
#   scenario          LOADER=crashkernel or LOADER=kexec-tools; TASK=crash, or TASK=describe: only describe this machine;
#                     DRIVER=none, late (it waits for the host) or early (it holds memory while the modules are loaded, too)
#   load-args         the loader's arguments, one a line
#   append            the capture kernel's command line, for kexec-tools
#   modules           kernel modules in the order to load them
#   nonce.0 nonce.1   the halves of the nonce
#
# /bin/sh is busybox; the applets used are links made by the image's builder (guest.py: CRASH_APPLETS).
export PATH=/bin:/sbin:/usr/bin

. /etc/crashkernel/common.sh
. /etc/crashkernel/scenario
mount -t tmpfs tmpfs /tmp
up=$(uptime)
export PYTHONPATH=/usr/lib/crashkernel PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
driver() { exec python3.11 -S $PYTHONPATH/driver.py "$@" 2>/dev/console; }

# K1 gives the first who asks the memory it has just freed, its init section's, and the modules would never give it back:
# until they are in, a driver of which nothing will be left has it.
if [ "$DRIVER" = early ]; then
    driver early /tmp/held &
    while [ ! -e /tmp/held ] && kill -0 $!; do
        sleep 0.1
    done
    open_port
    [ -e /tmp/held ] || fail "the driver holds nothing"
    kill $!
    wait $!
else
    open_port
fi

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

# The same as -m crashkernel, a quarter of a second sooner on an emulated CPU: nothing of so short a life is garbage to be
# collected, and the kernel takes a process's memory back faster than Python does.
crashkernel() {
    python3.11 -S -c 'import gc; gc.disable(); import os, sys; from crashkernel.cli import main
status = main(); sys.stdout.flush(); os._exit(status)' "$@"
}

load() {
    case $LOADER in
    crashkernel)
        set --
        while IFS= read -r argument; do
            set -- "$@" "$argument"
        done </etc/crashkernel/load-args
        crashkernel load "$@" --plan-out /tmp/plan.json
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

# A command must not hold the port: it gets a pipe, and its exit status comes by a file.
logged() {
    (
        "$@" </dev/null 2>&1 3>&-
        echo $? >/tmp/status
    ) | while IFS= read -r line; do
        say "log $line"
    done
    read -r status </tmp/status
    [ "$status" = 0 ] || fail "$status"
}

send() {
    size=$(stat -c %s "$2") || fail "there is no $2"
    say "$1 $size"
    cat "$2" >&3
}

if [ "$TASK" = describe ]; then
    logged crashkernel describe --out /tmp/machine.json
    send description /tmp/machine.json
    finish
fi

logged load
[ "$LOADER" != crashkernel ] || send plan /tmp/plan.json
read -r crash_loaded </sys/kernel/kexec_crash_loaded
[ "$crash_loaded" = 1 ] || fail "the loader exited with 0, but /sys/kernel/kexec_crash_loaded is $crash_loaded"
say "loaded $(uptime)"

# Only here do the halves meet, in the page cache: the archive this root came from never held the whole nonce, so finding it
# in a dump means finding memory written after the start.
cat /etc/crashkernel/nonce.0 /etc/crashkernel/nonce.1 >/tmp/nonce
# And in the kernel's log, which every dump has, when the page cache is left out of it.
echo "nonce $(hexdump -v -e '1/1 "%02x"' /tmp/nonce)" >/dev/kmsg

# What the loader itself held of these pages it gave up when it ended, and so did the first sweep.
if [ "$DRIVER" != none ] && [ -e /run/crashkernel/quarantine.json ]; then
    for sweep in 1 2; do
        crashkernel quarantine </dev/null 2>&1 3>&- | while IFS= read -r line; do
            say "log $line"
        done
    done
fi

say "armed $(uptime)"
while read -r word arguments <&3; do
    case $word in
    crash) break ;;
    # its lines go straight to the host; what it holds it holds until the crash
    driver) ( (driver $arguments >&3) || fail "the driver ended: exit $?") & ;;
    do)
        eval "$arguments"
        say "did $?"
        ;;
    *) say "log unknown command: $word" ;;
    esac
done
[ "$word" = crash ] || fail "the host hung up"

echo c >/proc/sysrq-trigger
fail "sysrq-trigger did not crash the kernel"
