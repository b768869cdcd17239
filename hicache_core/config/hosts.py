"""Hosts: which addresses name no host, or this machine alone, and where a peer is then."""

from __future__ import annotations

import ipaddress

WILDCARDS = ("", "0.0.0.0", "::")
"""Addresses for listening on all interfaces, which peers cannot connect to."""


def is_loopback(host: str) -> bool:
    """Whether an address or name is a loopback address of this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def as_reached(told: str, reached: str) -> str:
    """The host of a peer that calls itself ``told`` and was reached at ``reached``.

    This is ``told``, unless that is an address for all interfaces, or the loopback of another
    machine.
    """
    host = told.strip("[]")
    says_nothing = host in WILDCARDS or (is_loopback(host) and not is_loopback(reached))
    return reached if says_nothing and reached else told


def joined(host: str, port: int | str) -> str:
    """``host:port``, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
