"""Kernels launched a layer: at least a quarter fewer than PEFT's own forward launches."""

from __future__ import annotations

from benchmarks.launches import launches_a_layer

MOST = 0.75  # of PEFT's


def test_a_layer_launches_a_quarter_less_than_pefts_own() -> None:
    pefts, own, ligers = (sum(launches_a_layer(how).values()) for how in ("peft", "none", "liger"))
    assert ligers < own < MOST * pefts
    assert (pefts, own, ligers) == (321, 211, 198)  # docs/speed.md says so
