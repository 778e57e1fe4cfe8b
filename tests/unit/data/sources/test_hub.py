"""Data sets of the hub, from the cache that `datasets` keeps: the real library, offline, on a data set put there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lorafit.contracts import Silent
from lorafit.data.sources.hub import HubRows, is_hub_id
from lorafit.errors import SafetyError

MAKE = """
    import json, shutil, sys
    from pathlib import Path
    import datasets
    folder = Path(sys.argv[1])
    made = datasets.load_dataset("json", data_files={"train": str(folder / "rows.jsonl")})["train"]
    source = Path(made.cache_files[0]["filename"]).parent
    target = folder / "hf" / "datasets" / "owner___name" / "default" / "0.0.0" / source.name
    shutil.copytree(source, target)
    (target / "json-train.arrow").rename(target / "name-train.arrow")
    info = json.loads((target / "dataset_info.json").read_text())
    info["dataset_name"] = info["splits"]["train"]["dataset_name"] = "name"
    (target / "dataset_info.json").write_text(json.dumps(info))
"""
READ = """
    import json, sys
    from pathlib import Path
    from lorafit.contracts import Silent
    from lorafit.data.sources.sample_set import read_sources
    from lorafit.errors import LorafitError
    from lorafit.recipe.schema import BadRowsSection, SourceSection
    for section in json.loads(sys.argv[2]):
        try:
            samples = read_sources([SourceSection(**section)], Path(sys.argv[1]), BadRowsSection(), Silent())
            print([(s.line, s.messages) for s in samples], samples.sources[0].key(), samples.sources[0].guess_rows())
        except LorafitError as error:
            print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose `hf` is a cache that holds the data set owner/name."""
    folder = tmp_path_factory.mktemp("hub")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "name": None}]
    (folder / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 3, encoding="utf-8")
    run(MAKE, folder)
    return folder


def run(code: str, folder: Path, *arguments: str) -> list[str]:
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def read(folder: Path, *sections: dict[str, object]) -> list[str]:
    return run(READ, folder, json.dumps(sections))


def test_rows_of_a_cached_data_set(cached: Path) -> None:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    rows, limited = read(cached, {"path": "owner/name"}, {"path": "owner/name", "limit": 2})
    assert rows.startswith(repr([(1, turns), (2, turns), (3, turns)]))
    assert rows.endswith(" 3") and limited.endswith(" 2") and limited.startswith(repr([(1, turns), (2, turns)]))
    assert read(cached, {"path": "owner/name"}) == [rows]  # the key is the same in the next process


def test_what_is_not_there_is_named(cached: Path) -> None:
    sections = [
        {"path": "owner/name", "split": "tset"},
        {"path": "owner/name", "subset": "other"},
        {"path": "owner/nothing"},
    ]
    split, subset, missing = read(cached, *sections)
    assert split.startswith("DataError owner/name: split: Unknown split") and "['train']" in split
    assert subset.startswith("DataError owner/name: subset:") and "['default']" in subset
    assert missing.startswith("DataError owner/nothing: no such file, and HF_HUB_OFFLINE keeps the hub")


def test_a_folder_of_the_same_name_is_not_taken_for_it(cached: Path) -> None:
    """`datasets` would load a folder of the working directory."""
    folder = cached / "elsewhere"
    (cached / "owner" / "name").mkdir(parents=True)
    folder.mkdir(exist_ok=True)
    try:
        environment = os.environ | {"HF_HOME": str(cached / "hf"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-c", textwrap.dedent(READ), str(folder), json.dumps([{"path": "owner/name"}])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cached)
    finally:
        shutil.rmtree(cached / "owner")
    assert "is in the way" in done.stdout, done


def test_code_of_a_data_set_is_named_and_not_run() -> None:
    hub = HubRows("owner/name", subset=None, split="train", revision=None, reporter=Silent())
    script = hub._explain(RuntimeError("Dataset scripts are no longer supported, but found name.py"))
    assert isinstance(script, SafetyError) and "name.py" in str(script) and "not executed" in str(script)


@pytest.mark.parametrize("name", ["gsm8k", "openai/gsm8k", "a.b/c-d_e"])
def test_ids(name: str) -> None:
    assert is_hub_id(name)


@pytest.mark.parametrize("name", ["./a", "../a", "a/b/c", "/a", "~/a", "a b", "-a", ""])
def test_no_ids(name: str) -> None:
    assert not is_hub_id(name)
