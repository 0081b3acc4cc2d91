"""Say who may use the server, and check that it can be so. FastAPI is not imported."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+")


@dataclass(frozen=True)
class Access:
    """Say which requests reach the application, and under which path.

    Args:
        allowed_hosts: names that the Host header may have; None: any.
        allowed_origins: origins whose pages may send requests from browsers (CORS); "*": all.
        api_keys: keys, of which a request needs one; none: it needs none.
        root_path: prefix of all paths, which a proxy in front may have removed.

    Raises:
        ValueError: a key cannot be sent, an origin is none, or the prefix is no path. The message never
            contains a key.
    """

    allowed_hosts: frozenset[str] | None = None
    allowed_origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    root_path: str = ""

    def __post_init__(self) -> None:
        for key in self.api_keys:
            if not key or not all("!" <= character <= "~" for character in key):
                raise ValueError(
                    "api_key must have characters, and only visible ASCII ones without spaces, so that "
                    "clients can send it: choose another key"
                )
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    "allowed_origins must be as browsers send them, in lower case and without a path, such "
                    f"as https://app.example.com or http://localhost:3000, or *; got {origin!r}"
                )
        if self.root_path and not re.fullmatch(r"(/[^/\s?#]+)+", self.root_path):
            raise ValueError(
                f"root_path must begin with a slash and end without one, such as /llm, got {self.root_path!r}"
            )


def check_certificate(certificate: Path, key: Path) -> None:
    """Check that HTTPS can be served with these files, without asking for a password on the terminal.

    Args:
        certificate: file with the certificate and those of the authorities between, in PEM.
        key: file with its private key.

    Raises:
        ValueError: they cannot be read, or do not belong together.
    """
    for option, path in (("ssl_certfile", certificate), ("ssl_keyfile", key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ValueError(f"{option} {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"ssl_certfile {str(certificate)!r} and ssl_keyfile {str(key)!r} must be a certificate and its "
            f"private key without a password, in PEM: {error}"
        ) from error
