"""What bounds a server: whom it listens to, how much it takes, how long it waits."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from lorafit.errors import SafetyError

KEY_VARIABLE = "LORAFIT_API_KEY"
LARGEST_BODY_BYTES = 4 << 20
"""A chat that fills a million tokens has about this size."""


@dataclass(frozen=True)
class Settings:
    """Of a server, as its flags say.

    Attributes:
        host: Address that it listens at.
        port: 0: any that is free.
        key: What clients must send as `Authorization: Bearer KEY`; None: nothing, and only this machine may ask.
        allow_loading: Whether clients may load and unload adapters.
        max_new_tokens: Longest answer of a request that names no length.
        timeout_seconds: Most time of an answer, its wait included.
        grace_seconds: How long running answers may go on when the server is asked to end.
    """

    host: str
    port: int
    key: str | None
    allow_loading: bool
    max_new_tokens: int
    timeout_seconds: float
    grace_seconds: float


def read_key(host: str) -> str | None:
    """The key of the environment, which alone may hold it: arguments of a process are seen by all users of a machine.

    Raises:
        SafetyError: There is none, and the host is not this machine alone.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and not is_this_machine(host):
        what = f"whoever reaches '{host}' could use the model, and no key is set"
        raise SafetyError(what, key="--host", todo=f"set {KEY_VARIABLE} in the environment, or listen at 127.0.0.1")
    return key or None


def is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
