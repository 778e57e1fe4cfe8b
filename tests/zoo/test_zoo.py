"""The zoo: every architecture works or is refused before step 1; the ones people use today all the way, each time.

The table itself is `benchmarks/zoo.py`'s, on docs/models.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from benchmarks.zoo import COUNTED, try_architecture
from lorafit import pipeline
from lorafit.errors import ModelError
from tests.support.tiny_model import make_tokenizer
from tests.support.zoo_models import EXCEPTIONS, architectures, group_of, make_base
from tests.support.zoo_path import learns_from_rounding, make_world, recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
FAST = (
    "llama llama4_text mistral mistral3 mixtral qwen2 qwen3 qwen3_moe qwen3_next qwen3_5 gemma2 gemma3 "
    "phi3 gpt2 gpt_neox opt falcon deepseek_v3 cohere2 glm4 smollm3 gpt_oss zamba2"
)


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing cached by anybody, and products that do not wait for each other."""
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


@pytest.mark.parametrize("architecture", FAST.split())
def test_it_trains_in_nf4_merges_and_loads_elsewhere(architecture: str, tmp_path: Path) -> None:
    """Two steps on a 4-bit base, then PEFT alone and plain transformers, with equal logits."""
    row = try_architecture(architecture, tmp_path, ("nf4",), exact=False)
    assert (row.result, row.why) == ("works", "")
    assert (row.quantised > 0) is (architecture != "falcon")  # whose linears transformers leaves alone


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        ("bert", "BertLMHeadModel sees the tokens that it is to predict"),
        ("git", "GitForCausalLM does not run on text alone"),
        ("bart", "is an encoder-decoder"),
        ("reformer", "cannot take a training step"),
    ],
)
def test_what_cannot_be_trained_so_is_refused_before_step_1(architecture: str, said: str, tmp_path: Path) -> None:
    row = try_architecture(architecture, tmp_path, ("none",))
    assert row.result == "refused" and said in row.why


def test_a_dry_run_says_already_what_peft_would_not_load(tmp_path: Path) -> None:
    """And is silent about what can be shipped."""
    for architecture in ("qwen2", "deepseek_ocr2"):
        (tmp_path / architecture).mkdir()
        make_world(architecture, tmp_path / architecture)
    assert pipeline.train(recipe(tmp_path / "qwen2", "nf4"), dry_run=True).fit is None
    with pytest.raises(ModelError, match="PEFT renames the layers of this class"):
        pipeline.train(recipe(tmp_path / "deepseek_ocr2", "nf4"), dry_run=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_patches_of_one_token_teach_a_query_rounding_alone(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero or 1e-8 by attention, hence works or fails by chance: the zoo sees both, and its blt has real gradients."""
    several, one = tmp_path / "several", tmp_path / "one"
    make_base("blt", several, make_tokenizer())
    shared = {key: value for key, value in EXCEPTIONS["blt"].items() if key != "patching_threshold"}
    monkeypatch.setitem(EXCEPTIONS, "blt", shared)
    make_base("blt", one, make_tokenizer())
    idle = [f"local_encoder.cross_attn_layers.0.{name}" for name in ("q_proj", "k_proj")]
    for folder, expected in ((several, []), (one, idle)):
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention)
        adapter = LoraConfig(target_modules=r".*local_encoder\.cross_attn_layers.*_proj")
        found = learns_from_rounding(get_peft_model(base, adapter))
        assert [name.split(".lora_B")[0].removeprefix("base_model.model.model.") for name in found] == expected


def results_on_the_page() -> dict[str, str]:
    """Of each architecture on docs/models.md; a table of those that work has no such column."""
    rows = [[cell.strip() for cell in line.split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")]
    works = {row[0][2:]: "works" for row in rows if len(row) == 4 and row[1].endswith("%")}
    return works | {row[0][2:]: row[1] for row in rows if len(row) == 3 and row[1] in ("refused", "fails")}


def test_the_page_shows_every_architecture_and_no_failure() -> None:
    """As many as the installed transformers registers, where the table was made with it."""
    shown = results_on_the_page()
    assert {"works", "refused"} == set(shown.values())
    counted = [result for name, result in shown.items() if group_of(name) in COUNTED]
    assert counted.count("works") / len(counted) >= 0.9
    if f"transformers {transformers.__version__}," in PAGE:
        assert sorted(shown) == architectures()


def test_every_model_whose_shape_is_shipped_works() -> None:
    shapes = sorted((ROOT / "configs" / "models").glob("*.json"))
    shipped = [json.loads(file.read_text(encoding="utf-8")) for file in shapes]
    configs = [facts["config"] for facts in shipped if not facts.get("is_encoder")]
    kinds = {config["model_type"] for config in configs if not config.get("is_encoder_decoder")}
    shown = results_on_the_page()
    assert {kind: shown.get(kind) for kind in kinds} == dict.fromkeys(kinds, "works")


@pytest.mark.slow  # all of them: half an hour of one core
@pytest.mark.parametrize("architecture", architectures())
def test_an_architecture_does_what_the_page_says(architecture: str, tmp_path: Path) -> None:
    row = try_architecture(architecture, tmp_path)
    assert row.result in ("works", "refused") and (row.why or row.result == "works"), row.why
    if f"transformers {transformers.__version__}," in PAGE:
        assert row.result == results_on_the_page()[architecture], row.why
