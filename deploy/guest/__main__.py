"""python -m deploy.guest --out DIR: build the small guest's kernel and initramfs into a directory."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from .build import GuestError, build_guest, default_cache


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.guest", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where vmlinuz and initrd.img go")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="packages and guests of earlier runs")
    options = parser.parse_args()
    try:
        guest = build_guest(options.cache)
        options.out.mkdir(parents=True, exist_ok=True)
        for file in (guest.kernel, guest.initrd):
            shutil.copyfile(file, options.out / file.name)
            print(options.out / file.name)
    except (GuestError, OSError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
