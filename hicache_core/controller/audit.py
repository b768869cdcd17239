"""The check that every page of both pools is free, or has an owner; for tests."""

from __future__ import annotations

from hicache_core.controller.parts import Parts
from hicache_core.errors import IntegrityError


def check_owners(parts: Parts, n_orphaned: int) -> None:
    """Checks tree and pools, in time proportional to them. Owner thread only.

    Args:
        parts: of the cache.
        n_orphaned: host pages that belong to stores and reads under way, and to the tree no more.

    Raises:
        IntegrityError: with what does not add up.
    """
    parts.tree.check_integrity()
    parts.device.allocator.check_integrity()
    n_device = parts.device.allocator.n_pages - parts.device.allocator.n_free
    if parts.tree.n_device_pages > n_device:
        raise IntegrityError(
            f"the tree holds {parts.tree.n_device_pages} device pages, {n_device} are allocated"
        )
    if parts.host is None:
        return
    parts.host.allocator.check_integrity()
    n_host = parts.host.allocator.n_pages - parts.host.allocator.n_free
    n_quarantined = 0 if parts.storage is None else parts.storage.quarantine.n_pages
    if parts.tree.n_host_pages + n_quarantined + n_orphaned != n_host:
        raise IntegrityError(
            f"the tree holds {parts.tree.n_host_pages} host pages, {n_quarantined} are in "
            f"quarantine and {n_orphaned} being stored or read, but {n_host} are allocated"
        )
