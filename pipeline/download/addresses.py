"""Which addresses a download may connect to: public ones, and those the card allows. Used by http.py.

A list of URLs is written by strangers, and a page may redirect anywhere: without this, either could make the machine
ask its own services, its neighbours, or a cloud's metadata address. What counts is the address that a socket is about
to connect to, so that no spelling, name or redirect matters.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import time
from collections.abc import Iterable
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # RFC 4291: deprecated, the same
FAILED_NAMES_S = 60.0  # a name that does not resolve is not asked for again so soon


class PrivateAddressError(OSError):
    """The host's address is none of the public internet, and the card does not allow it."""


def is_public(address: str) -> bool:
    """Whether an address belongs to the public internet, and not to this machine.

    Loopback, private, link-local, shared (CGNAT), multicast, reserved and unspecified addresses do not, nor do IPv6
    addresses that carry such an IPv4 address (mapped, compatible, NAT64, 6to4, Teredo).
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    return all(_is_global(part) for part in (ip, *_carried(ip))) and not _is_own(str(ip))


def _is_global(ip: IPAddress) -> bool:
    if isinstance(ip, ipaddress.IPv6Address) and (ip in _NAT64 or ip.sixtofour or ip.ipv4_mapped):
        return True  # what these carry is judged by itself
    site_local = isinstance(ip, ipaddress.IPv6Address) and ip.is_site_local
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or site_local)


def _carried(ip: IPAddress) -> list[IPAddress]:
    """The IPv4 addresses inside an IPv6 address."""
    if isinstance(ip, ipaddress.IPv4Address):
        return []
    found: list[IPAddress | None] = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64 or ip in _COMPATIBLE:
        found.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [address for address in found if address is not None]


@functools.lru_cache(65_536)
def _is_own(address: str) -> bool:
    """Whether an interface of this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


class Addresses(AbstractResolver):
    """Resolves names and opens sockets for aiohttp, refusing addresses that are not public.

    allowed: host names, addresses and networks that may be contacted all the same. proxies: hosts of the machine's
    proxies, which may be contacted too.
    """

    def __init__(self, allowed: Iterable[str], proxies: Iterable[str] = ()) -> None:
        self._names: set[str] = set(proxies)
        self._networks = []
        for entry in allowed:
            try:
                self._networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                self._names.add(entry.rstrip(".").lower())
        self._granted: set[str] = set()  # addresses of the allowed names
        self._failed: dict[str, tuple[float, socket.gaierror]] = {}

    def allows(self, host: str) -> bool:
        """Whether the card allows this host by its name, or by an address that stands in its name's place."""
        try:
            ip = ipaddress.ip_address(host)
        except ValueError:
            return host.rstrip(".").lower() in self._names
        return any(ip.version == network.version and ip in network for network in self._networks)

    def permits(self, address: str) -> bool:
        """Whether a connection to this address may be made."""
        return address in self._granted or is_public(address) or self.allows(address.partition("%")[0])

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[ResolveResult]:
        """The permitted addresses of a name. Raises PrivateAddressError if it has none such, gaierror if it has none.

        aiohttp keeps what is found for a while; what is not found is kept here.
        """
        at, error = self._failed.get(host, (0.0, None))
        if error is not None and time.monotonic() - at < FAILED_NAMES_S:
            raise error
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        except socket.gaierror as failure:
            if failure.errno != socket.EAI_AGAIN:
                self._failed[host] = time.monotonic(), failure
            raise
        if host.rstrip(".").lower() in self._names:
            self._granted.update(str(info[4][0]) for info in infos)
        found: list[ResolveResult] = []
        for kind, _, protocol, _, address in infos:
            if self.permits(str(address[0])):
                numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
                entry = {"hostname": host, "host": str(address[0]), "port": port}
                found.append({**entry, "family": kind, "proto": protocol, "flags": numeric})  # type: ignore[typeddict-item]
        if not found:
            raise PrivateAddressError(f"{host} is {infos[0][4][0]}")
        return found

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """A socket for an address as getaddrinfo gives it: the last gate, through which literals come too."""
        family, kind, protocol, _, address = info
        if not self.permits(str(address[0])):
            raise PrivateAddressError(str(address[0]))
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Nothing is held open."""
