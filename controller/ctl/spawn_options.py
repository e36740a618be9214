"""The options of `ctl spawn` that say what is wanted, which `ctl plan` has as well."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from controller.ctl.commands import mistakes_of
from controller.placement import MemoryUnit, Strategy
from controller.profile import size_mib
from controller.shares import needed
from controller.spawn_plan import SpawnOptions
from controller.status import CtlError, ExitStatus, Mistakes
from protocol.limits import MAX_RANK

File = Path | None


def _option(help_: str, metavar: str | None = None, *names: str, **more: Any) -> Any:
    return typer.Option(*names, metavar=metavar, help=help_, **more)


#: Each option, with its type and what it is without being given.
_WANTED: dict[str, tuple[Any, Any]] = {
    "deployment": (
        Annotated[str | None, _option("The deployment (default: the file's name).", "NAME")],
        None,
    ),
    "profile": (
        Annotated[File, _option("A TOML file with images, kernels, disks… by VM name.", "FILE")],
        None,
    ),
    "kernel": (Annotated[File, _option("Boot this kernel directly: a file, or an image's name.", "FILE")], None),
    "initrd": (Annotated[File, _option("The kernel's initial RAM disk.", "FILE")], None),
    "cmdline": (Annotated[str, _option("Its command line; each VM's ip= is added.", "TEXT")], ""),
    "image": (
        Annotated[File, _option("A base disk: a file (qcow2 or raw) or an image's name; VMs get overlays.", "FILE")],
        None,
    ),
    "disk": (
        Annotated[str | None, _option("The size of each VM's disk, like 10G; else the image's.", "SIZE")],
        None,
    ),
    "user_data": (Annotated[File, _option("cloud-init user data; $name, $ip… are filled in.", "FILE")], None),
    "ssh_keys": (Annotated[File, _option("Public keys that may log in on the VMs, by cloud-init.", "FILE")], None),
    "subnet": (Annotated[str | None, _option("Take the VMs' addresses from this network.", "CIDR")], None),
    "g5k_subnets": (Annotated[File, _option("Take them from the output of `g5k-subnets -im`.", "FILE")], None),
    "skip_ips": (Annotated[int, _option("Leave out the first N addresses.", "N", min=0)], 0),
    "gateway": (Annotated[str | None, _option("The VMs' gateway.", "IP")], None),
    "bridge": (
        Annotated[
            str | None, _option("A bridge on the hosts; without one VMs can't be reached from outside.", "BRIDGE")
        ],
        None,
    ),
    "network": (
        Annotated[str | None, _option("A network of `ctl net`: its bridge, subnet and gateway.", "NAME")],
        None,
    ),
    "memory_unit": (Annotated[MemoryUnit, _option("The unit of the file's memory columns.")], MemoryUnit.AUTO),
    "overcommit": (Annotated[bool, _option("Let the file exceed a node's capacity.", None, "--overcommit")], False),
    "replace_offline": (
        Annotated[bool, _option("Place the VMs of offline nodes on others.", None, "--replace-offline")],
        False,
    ),
    "spread": (
        Annotated[bool, _option("VMs without a place go to as many hosts as there are.", None, "--spread")],
        False,
    ),
    "pack": (Annotated[bool, _option("They go to as few as will do, which is the default.", None, "--pack")], False),
    "min_hosts": (
        Annotated[
            str | None,
            _option("Go on where so many of the file's hosts can be used: 95% or a number (default: all).", "SHARE"),
        ],
        None,
    ),
}


def wanting(command: Callable[..., None]) -> Callable[..., None]:
    """A decorator: the command's parameter `wanted` is filled from these options, as SpawnOptions. Their deployment is
    empty where none was given. What is wrong with them is among `mistakes_of` the command's context."""

    @functools.wraps(command)
    def called(**given: Any) -> None:
        found = {name: given.pop(name) for name in _WANTED}
        command(**given, wanted=_options(found, mistakes_of(given["context"])))

    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type_)
        for name, (type_, default) in _WANTED.items()
    ]
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += options if parameter.name == "wanted" else [parameter]
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]  # inspect reads it
    return called


def _options(given: dict[str, Any], wrong: Mistakes) -> SpawnOptions:
    """The options. `deployment` is empty where none was given."""
    with wrong:
        if given["spread"] and given["pack"]:
            raise CtlError("either --spread or --pack, not both", ExitStatus.USAGE)
    size = None if given["disk"] is None else size_mib(given["disk"])
    with wrong:
        if given["disk"] is not None and size is None:
            raise CtlError(f"--disk {given['disk']}: give a size like 10G or 512M, up to 1024T", ExitStatus.USAGE)
    with wrong:
        needed("--min-hosts", given["min_hosts"] or "0", MAX_RANK)
    rest = {name: given[name] for name in _WANTED if name not in ("deployment", "disk", "spread", "pack")}
    return SpawnOptions(
        deployment=given["deployment"] or "",
        disk_mib=size,
        strategy=Strategy.SPREAD if given["spread"] else Strategy.PACK,
        **rest,
    )
