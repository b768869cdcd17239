"""How large a host pool may be: by its settings, and by the memory that is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hicache_core.errors import NotEnoughMemory, SpecError

GB = 10**9
_NO_LIMIT = 1 << 62
"""A cgroup of version 1 without a limit has the greatest number of bytes, in whole pages."""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit on memory and what is left of it.

    Attributes:
        name: whose limit it is, and where it was read.
        available_nbytes: bytes that may still be allocated.
    """

    name: str
    available_nbytes: int


def host_pages(*, ratio: float, size_gb: float, device_pages: int, page_nbytes: int) -> int:
    """How many pages the host pool gets.

    Args:
        ratio: host pages for each device page; used unless ``size_gb`` is given.
        size_gb: size of the host pool in GB (10**9 bytes); overrides ``ratio`` if not 0.
        device_pages: pages of the device pool.
        page_nbytes: bytes of a page; 0 for one without payload, of which ``ratio`` decides.

    Raises:
        SpecError: the result is not a single page.
    """
    by_size = size_gb and page_nbytes
    pages = int(size_gb * GB) // page_nbytes if by_size else int(ratio * device_pages)
    if pages < 1:
        asked = f"hicache_size {size_gb} GB" if by_size else f"hicache_ratio {ratio}"
        raise SpecError(
            f"{asked} gives no host page: a page has {page_nbytes} bytes and the device "
            f"pool {device_pages} pages"
        )
    return pages


def memory_limits(root: Path = Path("/")) -> list[MemoryLimit]:
    """All limits on the memory of this process that can be read, in no particular order.

    Page cache that the kernel can drop counts as available, for the machine and for cgroups.

    Args:
        root: where ``proc`` and ``sys`` are found.
    """
    return [*_machine(root), *_cgroups(root)]


def check_memory(nbytes: int, what: str, root: Path = Path("/")) -> None:
    """Checks that ``nbytes`` are available, before anything is allocated.

    Args:
        nbytes: bytes asked for.
        what: whose bytes, for the message.
        root: where ``proc`` and ``sys`` are found.

    Raises:
        NotEnoughMemory: the message names the limit, what is left, and the settings to lower.
    """
    limits = memory_limits(root)
    if not limits:
        return
    tightest = min(limits, key=lambda limit: limit.available_nbytes)
    if nbytes > tightest.available_nbytes:
        raise NotEnoughMemory(
            f"the {what} needs {nbytes / GB:.2f} GB, but {tightest.available_nbytes / GB:.2f} GB "
            f"are left ({tightest.name}); lower hicache_size or hicache_ratio, or free memory"
        )


def _machine(root: Path) -> Iterator[MemoryLimit]:
    for key, nbytes in _pairs(root / "proc/meminfo"):
        if key == "MemAvailable:":
            yield MemoryLimit("the machine, MemAvailable of /proc/meminfo", nbytes * 1024)


def _cgroups(root: Path) -> Iterator[MemoryLimit]:
    """The limits of this process's memory cgroups and all their parents, v1 and v2."""
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts = [base, base / "unified"]
            files = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounts = [base / "memory"]
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for mount in mounts:
            for directory in _with_parents(mount, path):
                yield from _cgroup(root, directory, *files)


def _with_parents(mount: Path, path: str) -> Iterator[Path]:
    """From the cgroup up to the mount. In a container ``path`` may lie outside of what is mounted:
    then only the mount itself exists, and it is the container's own cgroup."""
    directory = mount / path.lstrip("/")
    while directory != mount:
        yield directory
        directory = directory.parent
    yield mount


def _cgroup(
    root: Path, directory: Path, limit_file: str, usage_file: str, cache_key: str
) -> Iterator[MemoryLimit]:
    limit, usage = _text(directory / limit_file).strip(), _text(directory / usage_file).strip()
    if not (limit.isdigit() and usage.isdigit()):  # no such cgroup, or "max": no limit
        return
    if int(limit) >= _NO_LIMIT:
        return
    reclaimable = dict(_pairs(directory / "memory.stat")).get(cache_key, 0)
    left = max(0, int(limit) - int(usage) + reclaimable)
    shown = "/" / (directory / limit_file).relative_to(root)
    yield MemoryLimit(f"the cgroup, {shown}", left)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not on this kernel, or hidden from this process
        return ""


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    """Lines of a name and a number, a unit behind them or not."""
    for line in _text(path).splitlines():
        name, _, rest = line.partition(" ")
        value = rest.split()
        if value and value[0].isdigit():
            yield name, int(value[0])
