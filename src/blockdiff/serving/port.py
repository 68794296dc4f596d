"""The address a server listens at, taken before anything heavy is imported."""

from __future__ import annotations

import socket

from blockdiff.errors import InputError, first_line


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; raises `InputError` for one that cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(2048)
    except OSError as error:
        raise InputError(
            f"cannot listen at {host}, `port` {port}: {first_line(error)}; give another `port`"
        ) from None
    return taken
