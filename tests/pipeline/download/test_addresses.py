"""Which addresses may be contacted: public ones alone, in whatever spelling they are given."""

from __future__ import annotations

import asyncio
import socket

import pytest
from eclipse.pipeline.download.addresses import Addresses, PrivateAddressError, is_public

PRIVATE = [
    "127.0.0.1", "127.8.9.10", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.1.1", "240.0.0.1", "255.255.255.255", "198.18.0.1", "192.0.2.1", "::", "::1", "::127.0.0.1", "fe80::1",
    "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
]  # fmt: skip
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address: str):
    assert not is_public(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are(address: str):
    assert is_public(address)


def test_the_machines_own_addresses_are_not_public(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("eclipse.pipeline.download.addresses._is_global", lambda ip: True)
    own = socket.gethostbyname(socket.gethostname())
    assert not is_public(own) and is_public("8.8.8.8")


def resolved(addresses: Addresses, name: str) -> list[str]:
    return [entry["host"] for entry in asyncio.run(addresses.resolve(name, 80))]


@pytest.mark.parametrize("name", ["localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "0x7f.0.0.1"])
def test_names_and_odd_spellings_of_private_addresses_are_refused(name: str):
    with pytest.raises(PrivateAddressError):
        resolved(Addresses([]), name)


def test_a_socket_is_opened_only_for_a_permitted_address():
    info = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))
    with pytest.raises(PrivateAddressError):
        Addresses([]).open_socket(info)
    Addresses(["127.0.0.0/8"]).open_socket(info).close()


def test_what_the_card_allows_is_permitted_by_name_address_or_network():
    assert resolved(Addresses(["localhost"]), "localhost")
    assert resolved(Addresses(["127.0.0.1", "::1"]), "localhost")
    assert Addresses(["10.0.0.0/8"]).permits("10.9.9.9")
    assert not Addresses(["10.0.0.0/8"]).permits("192.168.0.1")
    by_name = Addresses(["Localhost."])
    assert not by_name.permits("127.0.0.1"), "a name grants nothing before it is asked for"
    addresses = resolved(by_name, "localhost")
    assert all(map(by_name.permits, addresses)) and not by_name.permits("127.0.0.2")
    with pytest.raises(PrivateAddressError):
        resolved(Addresses(["other.example"]), "localhost")
