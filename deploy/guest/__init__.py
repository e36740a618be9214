"""The small guest that tests and the demo boot: Debian's cloud kernel and a busybox in an initramfs; see README.md."""

from .build import DEBIAN_PACKAGES, HOST_DEBIAN_PACKAGES, Guest, GuestError, build_guest, default_cache, package

__all__ = ["DEBIAN_PACKAGES", "HOST_DEBIAN_PACKAGES", "Guest", "GuestError", "build_guest", "default_cache", "package"]
