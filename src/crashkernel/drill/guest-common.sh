# What both guests of the drill do first: the kernel's file systems, the modules that reach the host, and the port.
# Sourced by crash-init.sh and capture-init.sh. After open_port, file descriptor 3 is the host.

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev

say() { echo "$*" >&3; }

uptime() {
    read -r now rest </proc/uptime
    echo "$now"
}

finish() {
    # The port's write is done when the host's QEMU has been told, not when the host has read it.
    sleep 0.1
    poweroff -f
    sleep 60 # poweroff does not return; a script that ends would panic the kernel, and K1's panic would start K2
}

fail() {
    say "failed $*"
    finish
}

open_port() {
    while read -r module; do
        insmod "/modules/$module" || fail "insmod $module: exit $?"
    done </etc/crashkernel/modules

    # devtmpfs makes /dev/vportNpM; nobody here makes the link by name. The name arrives with a message from the host.
    port=
    tries=0
    while [ -z "$port" ]; do
        for name in /sys/class/virtio-ports/*/name; do
            [ -e "$name" ] && read -r text <"$name" && [ "$text" = crashkernel ] && name=${name%/name} &&
                [ -c "/dev/${name##*/}" ] && port=/dev/${name##*/}
        done
        tries=$((tries + 1))
        [ -n "$port" ] || [ $tries -lt 300 ] || fail "no virtio-serial port named crashkernel"
        [ -n "$port" ] || sleep 0.05
    done
    # Once, for both directions: a port has one opener at a time.
    exec 3<>"$port"
}

exec 3>/dev/console # until the port is there; silence is never an answer
