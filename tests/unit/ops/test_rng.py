"""Every generator is captured, through JSON, and put back."""

from __future__ import annotations

import json
import random

import numpy
import torch

from lorafit.ops.rng import capture_rng, preserved_rng, restore_rng, seed_rng


def draw() -> tuple[float, float, float]:
    return random.gauss(0, 1), float(numpy.random.normal()), float(torch.randn(()))


def test_restored_through_json() -> None:
    seed_rng(7)
    draw()  # leaves a second gaussian waiting in python's and numpy's generator
    saved = json.loads(json.dumps(capture_rng()))
    first = [draw() for _ in range(3)]
    restore_rng(saved)
    assert [draw() for _ in range(3)] == first


def test_preserved_even_when_it_fails() -> None:
    seed_rng(7)
    wanted = draw()
    seed_rng(7)
    try:
        with preserved_rng():
            draw()
            raise KeyError
    except KeyError:
        pass
    assert draw() == wanted
