#!/bin/busybox sh
# All that runs in the small guest: brings up its address, says so on the console, and has a shell there until
# somebody presses the power button.
# The address is in the kernel's own form, ip=CLIENT:SERVER:GATEWAY:NETMASK:NAME:DEVICE:AUTOCONF (nfsroot.rst in the
# kernel's documentation), which Debian's cloud kernel leaves to its initramfs.

/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null

say() { echo "canopy-guest $*" >/dev/console; }

while read -r module; do
    insmod "/lib/modules/$module.ko" || say "could not load $module"
done </lib/modules/load

settings=
read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in ip=*) settings=${word#ip=} ;; esac
done
IFS=: read -r client _ gateway netmask name device _ <<END
$settings
END
if [ -n "$name" ]; then hostname "$name"; fi
if [ -z "$device" ]; then
    for path in /sys/class/net/*; do
        if [ "${path##*/}" != lo ]; then device=${path##*/}; fi
    done
fi

ip link set lo up
if [ -n "$device" ]; then
    if [ -n "$client" ]; then
        ifconfig "$device" "$client" netmask "${netmask:-255.255.255.255}" up
        if [ -n "$gateway" ]; then route add default gw "$gateway"; fi
    else
        ip link set "$device" up
    fi
fi
for path in /sys/block/vd*; do
    if [ -e "$path/size" ]; then
        say "${name:-?} disk ${path##*/} of $(($(cat "$path/size") / 2048)) MiB"
    fi
done
# A NoCloud disk, found as cloud-init finds it. Its files are JSON, each on one line.
seed=$(findfs LABEL=cidata 2>/dev/null)
if [ -n "$seed" ]; then
    mkdir -p /seed /root/.ssh
    mount -t iso9660 -o ro "$seed" /seed || say "could not mount $seed"
    field() { sed -n "s/.*\"$2\":\[*\"\([^\"]*\)\".*/\1/p" "/seed/$1"; }
    field meta-data public-keys >/root/.ssh/authorized_keys
    hostname "$(field meta-data local-hostname)"
    say "$(hostname) seed ${seed##*/}: $(field network-config addresses) of $(field network-config macaddress)," \
        "instance $(field meta-data instance-id), key $(cat /root/.ssh/authorized_keys)," \
        "user data $(tail -n 1 /seed/user-data)"
fi
acpid -d >/dev/null 2>&1 &
say "${name:-?} ready at ${client:-no address}"

# A shell on the serial console, for whoever sits in front of it.
while :; do
    setsid cttyhack sh </dev/ttyS0 >/dev/ttyS0 2>&1
    sleep 1
done
