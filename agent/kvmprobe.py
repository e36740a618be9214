"""Whether /dev/kvm runs guests, found out by running one.

A /dev/kvm can be there, open and make VMs and vCPUs, and yet run no guest to any purpose: a kernel that emulates each
instruction in software where the machine has no virtualisation does so. Therefore the probe runs code. The guest is
one page at the x86 reset vector that counts down in a register a million times and halts. A vCPU on hardware does that
in about a millisecond of CPU time and QEMU without KVM in a few; an emulating kernel took 2,400 ms. The probe has
200 ms of CPU time, which a loaded machine does not shorten. A whole probe takes some 20 ms.

This file runs by itself as a child process, since a vCPU that hangs can be ended only with its process:
exit code 0 means that it works, 1 that it does not, 2 that it can't be told; the reason is on standard output.

Source of the numbers and structs: Linux, Documentation/virt/kvm/api.rst and include/uapi/linux/kvm.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import platform
import signal
import struct
import sys
from typing import NamedTuple

_DEVICE = "/dev/kvm"
_CREATE_VM = 0xAE01
_GET_VCPU_MMAP_SIZE = 0xAE04
_CREATE_VCPU = 0xAE41
_SET_USER_MEMORY_REGION = 0x4020AE46
_SET_TSS_ADDR = 0xAE47
_RUN = 0xAE80
_EXIT_HLT = 5
_EXIT_REASON_OFFSET = 8

_PAGE = 4096
# An x86 CPU begins 16 bytes below 4 GiB.
_PAGE_ADDRESS = 0xFFFFF000
_RESET_OFFSET = 0xFF0
# Intel's need three pages for themselves, anywhere that has no memory.
_TSS_ADDRESS = 0x40000000
_ROUNDS = 1_000_000
_CPU_SECONDS = 0.2
# Starting Python on a machine that is short of CPU; what is probed has its own limit.
_WALL_SECONDS = 20.0


class KvmAnswer(NamedTuple):
    """`usable` None: it can't be told from here, for this user may not open the device."""

    usable: bool | None
    why: str


async def probe_kvm() -> KvmAnswer:
    """Try KVM in a child process. Never raises; a probe that fails or hangs is an answer."""
    from agent.lanes import within  # the child imports this file with the standard library alone

    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", __file__),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await within(_WALL_SECONDS, child.communicate())
    except asyncio.TimeoutError:
        return KvmAnswer(False, f"{_DEVICE} did not run a guest of 5 instructions within {_WALL_SECONDS:g} s")
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    said = output.decode(errors="replace").strip()
    if child.returncode == -signal.SIGPROF:
        return KvmAnswer(False, f"{_DEVICE} emulates instructions in software, slower than QEMU does without it")
    if child.returncode == 2:
        return KvmAnswer(None, said)
    return KvmAnswer(child.returncode == 0, said)


def _main() -> int:
    try:
        device = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        print(f"this user may not open {_DEVICE}; let it join the group that owns the device")
        return 2
    except OSError as error:
        print(f"{_DEVICE}: {error.strerror}")
        return 1
    try:
        reason = _run_guest(device)
    except OSError as error:
        print(f"{_DEVICE} opens and runs no guest: {error.strerror}")
        return 1
    if reason not in (None, _EXIT_HLT):
        print(f"{_DEVICE} gave up on a guest of 5 instructions with exit reason {reason}")
        return 1
    print(f"{_DEVICE} works")
    return 0


def _run_guest(device: int) -> int | None:
    """The exit reason of the first KVM_RUN. None where there is no guest code for the architecture, and a VM and a
    vCPU could be made."""
    import ctypes  # half a megabyte that an agent has no other use for
    import mmap

    vm = fcntl.ioctl(device, _CREATE_VM, 0)
    if platform.machine() not in ("x86_64", "i686"):
        fcntl.ioctl(vm, _CREATE_VCPU, 0)
        return None
    with contextlib.suppress(OSError):
        fcntl.ioctl(vm, _SET_TSS_ADDR, _TSS_ADDRESS)
    page = mmap.mmap(-1, _PAGE)
    # In 16-bit mode: mov ecx, rounds; again: dec ecx; jnz again; hlt
    code = b"\x66\xb9" + struct.pack("<I", _ROUNDS) + b"\x66\x49" + b"\x75\xfc" + b"\xf4"
    page[_RESET_OFFSET : _RESET_OFFSET + len(code)] = code
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    region = struct.pack("=IIQQQ", 0, 0, _PAGE_ADDRESS, _PAGE, address)
    fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, region)
    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    shared = mmap.mmap(vcpu, fcntl.ioctl(device, _GET_VCPU_MMAP_SIZE, 0))
    # Its default is to end the process, whatever the kernel is at.
    signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
    fcntl.ioctl(vcpu, _RUN, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    (reason,) = struct.unpack_from("=I", shared, _EXIT_REASON_OFFSET)
    return int(reason)


if __name__ == "__main__":
    sys.exit(_main())
