"""Writes configs/model_shapes.json: what the class of each config of configs/models tells. `make docs` runs it."""

from __future__ import annotations

import json
from pathlib import Path

from lorafit.model.class_shape import read_class_shape
from lorafit.model.classes import usual_class

CONFIGS = Path(__file__).parents[1] / "configs"


def written_shapes() -> str:
    """The file's text: a model a line."""
    lines = []
    for file in sorted((CONFIGS / "models").glob("*.json")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts.get("is_encoder"):  # its shape is that of a task, whose head is its own
            continue
        config = facts["config"]
        shape = read_class_shape(config, usual_class(config))
        lines.append(f"{json.dumps(file.stem)}: {json.dumps(shape.to_json())}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    (CONFIGS / "model_shapes.json").write_text(written_shapes(), encoding="utf-8")
