"""Shipped files are found in a wheel, else in the checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafit.machine import shipped


def test_in_the_checkout() -> None:
    assert shipped.shipped("presets", "code.yaml").is_file()
    assert shipped.shipped("presets", "code.yaml").parent.parent == shipped.shipped()


def test_in_a_wheel_they_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lorafit" / "_configs").mkdir(parents=True)
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "lorafit")
    assert shipped.shipped("a.yaml") == tmp_path / "lorafit" / "_configs" / "a.yaml"


def test_a_broken_installation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "lorafit")
    with pytest.raises(FileNotFoundError, match="install it again"):
        shipped.shipped("presets")
