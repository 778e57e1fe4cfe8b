"""Nobody but this machine is listened to without a key, and the environment alone holds it."""

from __future__ import annotations

import pytest

from lorafit.errors import SafetyError
from lorafit.serving.settings import KEY_VARIABLE, read_key


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_needs_no_key(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(host) is None
    monkeypatch.setenv(KEY_VARIABLE, " k ")
    assert read_key(host) == "k"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_others_need_one(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "  ")
    with pytest.raises(SafetyError, match=KEY_VARIABLE):
        read_key(host)
    monkeypatch.setenv(KEY_VARIABLE, "k")
    assert read_key(host) == "k"
