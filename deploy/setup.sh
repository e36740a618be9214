#!/bin/bash
# Prepares a machine for `make test` and `make demo`: system packages where it may (root, apt-get), a Python
# virtual environment with locked packages everywhere. Quick when all is there.
#
#   deploy/setup.sh          both
#   deploy/setup.sh venv     the virtual environment alone
#   deploy/setup.sh bench    both, and the tools that the benchmarks compare with
set -euo pipefail
cd "$(dirname "$0")/.."

what=${1:-all}
venv=${VENV:-.venv}

say() { printf 'setup: %s\n' "$*"; }
fail() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

# Two set-ups of one checkout at the same time (make test beside make demo) would write the same files.
exec 9<"$0"
flock 9

case $what in all | venv | bench) ;; *) fail "unknown part '$what'; say nothing, venv or bench" ;; esac

# --- Python ------------------------------------------------------------------------------------------------

# One start of the interpreter answers all: new enough? (else it fails), its path and build, and what Debian
# keeps in packages of their own for its Python (any other brings them): venv, and the C headers.
probe='import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    sys.exit(1)
print(sys.executable)
print(sys.version.replace(chr(10), " "))
print(importlib.util.find_spec("ensurepip") is not None)
print(os.path.exists(sysconfig.get_path("include") + "/Python.h"))'

probe_python() {
    local answers=() candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        mapfile -t answers < <("$candidate" -c "$probe" 2>/dev/null)
        if [ ${#answers[@]} -eq 4 ]; then
            python=${answers[0]} version=${answers[1]} has_venv=${answers[2]} has_headers=${answers[3]}
            return
        fi
    done
    local asked=${PYTHON:-python3} found
    found=$("$asked" --version 2>/dev/null) || found="no Python"
    fail "Python 3.11 or later is needed, and $asked is $found;" \
        "install one and say which: make PYTHON=/path/to/python3.11 ..."
}
probe_python

# --- System packages ---------------------------------------------------------------------------------------

needs=() # "reason: package...", in the order in which a person is told
list_needs() {
    if [ "$has_venv" = False ]; then needs+=("the virtual environment: python3-venv"); fi
    if [ "$what" = venv ]; then return; fi
    if ! command -v cc >/dev/null; then needs+=("a C compiler for libvirt's Python binding: gcc libc6-dev"); fi
    if [ "$has_headers" = False ]; then needs+=("C headers for libvirt's Python binding: python3-dev"); fi
    needs+=(
        "libvirt's Python binding in $venv: pkg-config libvirt-dev"
        "test hosts (network, init, sshd): iproute2 iputils-ping tini openssh-server openssh-client"
        "libvirt on test hosts: libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients"
        "VMs on test hosts: qemu-system-x86 qemu-utils"
        "libvirt's binding for test hosts' own Python: python3-libvirt"
        "the VMs' small guest system: busybox-static cpio"
    )
    if [ "$what" = bench ]; then needs+=("what the benchmarks compare with: clustershell pdsh taktuk"); fi
}

missing=() # packages
why=()     # the same, with the reason for each group
list_missing() {
    local installed need package packages absent
    read -ra packages <<<"${needs[*]#*: }"
    # dpkg-query fails when it has never heard of one of them; it prints the others all the same.
    installed=$(dpkg-query --show --showformat='${Package}:${db:Status-Status} ' "${packages[@]}" 2>/dev/null || true)
    for need in "${needs[@]}"; do
        absent=()
        for package in ${need#*: }; do
            if [[ " $installed" != *" $package:installed "* ]]; then absent+=("$package"); fi
        done
        if [ ${#absent[@]} -gt 0 ]; then
            missing+=("${absent[@]}")
            why+=("${need%%: *}: ${absent[*]}")
        fi
    done
}

# --root=/ reads and writes the links alone, so that it works where systemd is installed and not running, too.
enabled_units() {
    command -v systemctl >/dev/null || return 0
    # It fails when there is none to list.
    { systemctl --root=/ list-unit-files --state=enabled --no-legend --plain 'ssh*' 'virt*' 'libvirt*' || true; } |
        cut -d' ' -f1 | sort
}

install_missing() {
    local log policy=/usr/sbin/policy-rc.d own_policy='' before=''
    log=$(mktemp --tmpdir canopy-setup-XXXXXX.log)
    say "installing system packages with apt-get, some minutes the first time:"
    printf 'setup:   %s\n' "${why[@]}"

    # The tests start their own sshd and libvirtd inside their hosts; this machine gets none from here. dpkg asks
    # policy-rc.d before it starts a service; ours says no for as long as this script lives, also if it is killed.
    if [ ! -e "$policy" ]; then
        own_policy=yes
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nkill -0 %d 2>/dev/null || exit 0\nexit 101\n' $$ >"$policy"
        chmod 755 "$policy"
    fi
    before=$(enabled_units)

    export DEBIAN_FRONTEND=noninteractive
    local apt=(apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=2)
    # One source out of reach does not matter as long as the others have the packages: install decides.
    "${apt[@]}" update >"$log" 2>&1 9<&- || true
    if ! "${apt[@]}" install --yes --no-install-recommends "${missing[@]}" >>"$log" 2>&1 9<&-; then
        tail -n 15 "$log" >&2
        say "apt-get could not install them (all it said: $log); going on without: ${missing[*]}" >&2
    else
        rm -f "$log"
    fi

    if [ -n "$own_policy" ]; then
        rm -f "$policy"
        trap - EXIT
    fi
    local fresh
    mapfile -t fresh < <(comm -13 <(echo "$before") <(enabled_units))
    if [ ${#fresh[@]} -gt 0 ]; then
        systemctl --root=/ disable --quiet "${fresh[@]}"
        say "installed, but neither started nor enabled at boot: ${fresh[*]}"
    fi
}

list_needs
if [ ${#needs[@]} -eq 0 ]; then
    :
elif command -v dpkg-query >/dev/null; then
    list_missing
    if [ ${#missing[@]} -eq 0 ]; then
        :
    elif [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        install_missing
        probe_python
    else
        say "going on without what only root can install; ask for: apt-get install --no-install-recommends" \
            "${missing[*]}"
    fi
else
    say "not a Debian-like system: install by hand what these Debian packages hold: ${needs[*]#*: }"
fi

# --- The virtual environment -------------------------------------------------------------------------------

# libvirt-python has no wheels: it is built here against the installed libvirt, or left out where there is none.
vm=no
if [ "$has_headers" = True ] && command -v cc >/dev/null && pkg-config --exists libvirt 2>/dev/null; then
    vm=yes
fi

stamp=$venv/canopy-setup
state="$version vm=$vm $(cat pyproject.toml deploy/setup.sh deploy/lock/*.txt | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null)" = "$state" ] && [ -x "$venv/bin/python" ]; then
    exit 0
fi

if [ "$has_venv" = False ]; then
    fail "$python cannot make virtual environments; ask for: apt-get install python3-venv"
fi
say "installing locked Python packages into $venv"
rm -f "$stamp"
# An environment of another Python, or one whose Python has gone, is made anew.
made_by=$("$venv/bin/python" -c 'import pip, sys; print(sys.version.replace(chr(10), " "))' 2>/dev/null || true)
if [ "$made_by" != "$version" ]; then
    "$python" -m venv --clear "$venv"
fi
pip() {
    "$venv/bin/python" -m pip -qq --disable-pip-version-check --no-input "$@" 9<&- ||
        fail "pip could not install what the locks name, see above; look at the network and pip's configuration," \
            "then run the same again"
}
pip install --require-hashes --only-binary :all: -r deploy/lock/dev.txt
if [ "$vm" = yes ]; then
    # Without isolation, so that it is built by the setuptools that the lock names, and by no other.
    pip install --require-hashes --no-build-isolation -r deploy/lock/vm.txt
elif [ "$what" != venv ]; then
    say "no libvirt binding in $venv: it takes libvirt-dev, pkg-config, a C compiler and Python's headers"
fi
# Found by a plain path: the other way, a finder of setuptools' own, loads 3 ms of modules at each start of ctl.
pip install --no-index --no-deps --no-build-isolation --config-settings editable_mode=compat --editable .
echo "$state" >"$stamp"
