"""Shapes of models by arithmetic from a config.json alone, and the configs of well-known models."""

from __future__ import annotations

from lorafit.model_shapes.arithmetic import (
    EXPERTS,
    EXPERTS_ARE_FUSED,
    ROUTERS_CHOOSE,
    known_config,
    known_families,
    like_known,
    read_shape,
)

__all__ = [
    "EXPERTS",
    "EXPERTS_ARE_FUSED",
    "ROUTERS_CHOOSE",
    "known_config",
    "known_families",
    "like_known",
    "read_shape",
]
