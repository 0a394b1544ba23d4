"""Who may use the drive page: checked before anything else is done with a request. Read `Access`.

A page of another origin can make a browser send requests here, but it cannot choose all of their headers:

    Host          names an address of this server; that of an attacker's name which leads here (DNS rebinding) does not
    Origin        names this page; browsers send it with every POST and with every request across origins
    Content-Type  of a POST is JSON; before browsers send that elsewhere they ask, and are never allowed here
    token         beyond loopback; it stands in the printed address behind #, which browsers never send by themselves
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from raev2.errors import SpecError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
MAX_BODY_BYTES = 4096
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Refused(Exception):
    """A request that is not carried out: HTTP status, and the reason in one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Access:
    """Who is let in.

    hosts   what a Host header may say, without port
    token   what every request for a ride must carry, or None
    """

    hosts: tuple[str, ...] = LOOPBACK
    token: str | None = None

    @classmethod
    def of(cls, host: str, bound: str, more: Iterable[str] = ()) -> Access:
        """Access to a server at the address `bound`, which was asked for as `host`, and is also known by `more` names.

        Beyond loopback there is a new token.
        """
        address = ip_address(bound)
        own = _names_of_this_machine() if address.is_unspecified else (host, bound)
        token = None if address.is_loopback else secrets.token_urlsafe(24)
        return cls((*LOOPBACK, *map(in_address, own), *map(_checked, more)), token)

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Refused, unless a request may reach the rides. Header names in lower case."""
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != headers.get("host"):
            raise Refused(403, "a page of another origin cannot drive here")
        if self.token is not None and not secrets.compare_digest(
            headers.get("authorization", "").encode(), f"Bearer {self.token}".encode()
        ):
            raise Refused(401, "the token is missing. Open the address that `raev2 nwm drive` printed.")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if method == "POST" and kind != "application/json":
            raise Refused(415, "the request is not JSON")


THIS_MACHINE = Access()


def in_address(host: str) -> str:
    """A name or address as it stands in a web address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _checked(name: str) -> str:
    if not name or set(name) & set("*/[]@ "):
        raise SpecError("--allow-host", "not usable", got=repr(name), expected="a name or an address, without port")
    return in_address(name)


def _names_of_this_machine() -> tuple[str, ...]:
    name = socket.gethostname()
    with suppress(OSError):  # a machine that does not know its own address
        return (name, *sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}))
    return (name,)
