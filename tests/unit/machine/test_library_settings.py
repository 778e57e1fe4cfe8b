"""What the libraries are told before they are imported; the user's word goes first, by an older name too."""

from __future__ import annotations

import os

import pytest

from lorafit.machine.library_settings import LIBRARY_SETTINGS, set_library_defaults

NEW, OLD = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("theirs", "then"),
    [
        ({}, ("expandable_segments:True", None)),
        ({NEW: "max_split_size_mb:128"}, ("max_split_size_mb:128", None)),
        ({OLD: "expandable_segments:False"}, (None, "expandable_segments:False")),
    ],
)
def test_a_cards_segments_grow_unless_the_user_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, theirs: dict[str, str], then: tuple[str | None, str | None]
) -> None:
    for name in (*LIBRARY_SETTINGS, OLD):
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    set_library_defaults()
    assert (os.environ.get(NEW), os.environ.get(OLD)) == then
    assert os.environ["USE_HUB_KERNELS"] == "NO"
