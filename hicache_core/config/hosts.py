"""Hosts: which addresses name no host, or this machine alone, and where a peer is then."""

from __future__ import annotations

import ipaddress

WILDCARDS = ("", "0.0.0.0", "::")
"""Addresses to listen at that tell nobody where."""


def is_loopback(host: str) -> bool:
    """Whether an address or name can only be this machine's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def as_reached(told: str, reached: str) -> str:
    """The host of a peer that names itself ``told`` and was reached at ``reached``.

    What it says counts, unless that names no host, or its loopback is not ours.
    """
    host = told.strip("[]")
    says_nothing = host in WILDCARDS or (is_loopback(host) and not is_loopback(reached))
    return reached if says_nothing and reached else told


def joined(host: str, port: int | str) -> str:
    """``host:port``; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
