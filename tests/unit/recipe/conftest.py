"""A recipe on disk, loaded, or found to be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lorafit.errors import LorafitError
from lorafit.recipe.load import LoadedRecipe, load_recipe
from tests.support.recipe_texts import Fails, Loads


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loads:
    """Writes a text to r.yaml in the working folder and loads it."""
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes, sets: Sequence[str] = (), output: str | None = None) -> LoadedRecipe:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(Path("r.yaml"), sets, output=output)

    return load


@pytest.fixture
def fails(loads: Loads) -> Fails:
    """Loads a text that must fail; checks the form of the last line and that nothing was created. Returns the error."""

    def fail(text: str | bytes, sets: Sequence[str] = ()) -> LorafitError:
        before = {path for path in Path().rglob("*") if path != Path("r.yaml")}
        with pytest.raises(LorafitError) as caught:
            loads(text, sets)
        after = {path for path in Path().rglob("*") if path != Path("r.yaml")}
        assert after == before, "a failed load created files"
        line = f"error: {caught.value.one_line}"
        assert len(line) < 300
        assert "\n" not in line
        return caught.value

    return fail
