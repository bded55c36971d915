"""How much memory is free, on a device or in the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from normswap.errors import OptionError

__all__ = ["half_of_free"]

_MEMINFO = Path("/proc/meminfo")
#: A container's limit and use, as its second and its first generation of control groups tell.
_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def half_of_free(device: torch.device) -> int:
    """Half of the memory that is free on a device, in bytes.

    Raises:
        OptionError: the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0]) // 2
    free = [room for limit, used in _GROUPS if (room := _room(limit, used)) is not None]
    free += [amount for amount in (_of_machine(),) if amount is not None]
    if not free:
        raise OptionError("the system does not tell how much memory is free; say memory= in bytes")
    return min(free) // 2


def _of_machine() -> int | None:
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if pages in names:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return None


def _room(limit: Path, used: Path) -> int | None:
    try:
        return int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):  # there is no such group, or no limit: "max"
        return None
