"""Files and folders that are written whole or not at all, while somebody removes what they are written in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.errors import ResourceError
from lorafit.files.atomic import atomic_dir, atomic_file


@pytest.mark.parametrize("removed", ["run", "run/checkpoints", "run/checkpoints/.tmp*"])
@pytest.mark.parametrize("when", ["before a file is written", "after"])
def test_a_folder_that_is_removed_meanwhile(tmp_path: Path, removed: str, when: str) -> None:
    target = tmp_path / "run" / "checkpoints" / "step-000001"
    with (
        pytest.raises(ResourceError, match=r"step-000001: disappeared while it was written; was its folder removed\?"),
        atomic_dir(target) as temporary,
    ):
        (temporary / "one").write_text("1")
        if when == "after":
            (temporary / "two").write_text("2")
        for folder in list(tmp_path.glob(removed)):
            shutil.rmtree(folder)
        if when != "after":
            (temporary / "two").write_text("2")
    assert not target.exists()


def test_a_file_whose_folder_is_removed_meanwhile(tmp_path: Path) -> None:
    with (
        pytest.raises(ResourceError, match=r"best\.json: disappeared while it was written"),
        atomic_file(tmp_path / "run" / "best.json") as temporary,
    ):
        temporary.write_text("{}")
        shutil.rmtree(tmp_path / "run")


def test_errors_of_rust_libraries_are_errors_of_the_disk(tmp_path: Path) -> None:
    """safetensors raises an error of its own that only names the errno."""
    code = (
        "import resource, numpy; from pathlib import Path; from safetensors.numpy import save_file\n"
        "from lorafit.files.atomic import atomic_dir\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"with atomic_dir(Path({str(tmp_path)!r}) / 'x') as folder:\n"
        "    save_file({'a': numpy.zeros(10_000)}, folder / 'a.safetensors')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ResourceError" in ended.stderr.splitlines()[-1] and "file too large" in ended.stderr, ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError("a"), FileNotFoundError(2, "no such file", "elsewhere")])
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    for write in (atomic_dir, atomic_file):
        with pytest.raises(type(error)) as caught, write(tmp_path / "target"):
            raise error
        assert caught.value is error
    assert list(tmp_path.iterdir()) == []
