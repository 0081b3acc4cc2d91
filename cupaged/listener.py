"""Open the socket that the server listens on."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from pathlib import Path


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Called before the model is loaded, to notice a port in use early.

    With SO_REUSEADDR, which a restart needs, Linux lets two sockets bind an address until one of them
    listens: binding alone would not keep another server away. Clients that connect while the model is loaded
    wait.

    Raises:
        RuntimeError: the address is not available; the message names the option to change.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RuntimeError(
            f"cannot listen on {host}:{port}: no address is known for the --host ({why}); give one of this "
            "machine's, or 0.0.0.0 for all"
        ) from error
    # Prefer IPv4.
    family, _, _, _, address = min(addresses, key=lambda info: info[0] != socket.AF_INET)
    try:
        listener = socket.socket(family)
    except OSError as error:
        raise RuntimeError(_refusal(host, port, error)) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        raise RuntimeError(_refusal(host, port, error)) from error
    return listener


@contextlib.contextmanager
def listen_on_path(path: str) -> Iterator[socket.socket]:
    """Hold a listening Unix socket, and remove it from the file system in the end.

    Raises:
        RuntimeError: a file is there, or there can be none.
    """
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(path)
        listener.listen()
    except OSError as error:
        listener.close()
        raise RuntimeError(
            f"cannot listen on {path!r} ({error.strerror or error}): remove what is there if no server uses "
            "it, or choose another --uds, in a directory that exists and of at most 107 bytes"
        ) from error
    try:
        yield listener
    finally:
        listener.close()
        Path(path).unlink(missing_ok=True)


def _refusal(host: str, port: int, error: OSError) -> str:
    """Return the error message for an address that the system refuses, with the remedy."""
    another_port = "choose another --port (make serve PORT=...)"
    remedies = {
        errno.EADDRINUSE: another_port,
        errno.EACCES: "this user may not take that port, as those below 1024 are often reserved; "
        + another_port,
        errno.EADDRNOTAVAIL: f"{host} is not an address of this machine; choose another --host, or 0.0.0.0 "
        "for all it has",
        errno.EAFNOSUPPORT: "this machine has no addresses of that kind; choose another --host",
    }
    remedy = remedies.get(error.errno or 0, "choose another --host or --port")
    return f"cannot listen on {host}:{port} ({error.strerror}): {remedy}"
