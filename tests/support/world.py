"""The world of a test of commands: a folder with a recipe and rows, the command line, and how a command ended."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.processes import PROGRAM, Process, start
from tests.support.tiny_recipe import make_rows, write_rows

RECIPE = """\
name: tiny
model:
  base: {base}
  dtype: fp32
  attention: eager
  quantization: none
adapter:
  kind: lora
  r: 4
  alpha: 8
  dropout: 0.0
data:
  train: d.jsonl
  max_length: 128
training:
  max_steps: 2
  batch_size: 4
  micro_batch_tokens: 256
  learning_rate: 1.0e-2
  optimizer: adamw
  gradient_checkpointing: false
evaluation:
  final: [perplexity]
  max_new_tokens: 8
checkpoints:
  every_steps: 1
output: run
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def last(self) -> str:
        """The last line on stderr: what a user is owed."""
        return next((line for line in reversed(self.stderr.splitlines()) if line.strip()), "")

    @property
    def json(self) -> Any:
        """The one JSON object that `--json` prints."""
        return json.loads(self.stdout)


def say_all(outcome: Outcome, exit_code: int, *parts: str) -> None:
    """The exit code, the form of the last line, and that it says each part, in any case."""
    shown = f"exit {outcome.code}\n{outcome.stderr}"
    assert outcome.code == exit_code, shown
    assert "Traceback" not in outcome.stderr, shown
    if exit_code == 0:
        text = (outcome.stdout + outcome.stderr).lower()
    else:
        text = outcome.last.lower()
        assert outcome.last.startswith("error: "), shown
        assert len(outcome.last) <= 300, shown
    assert [part for part in parts if part.lower() not in text] == [], shown


def stop_after(run: Path, step: int) -> None:
    """Takes away what came behind a checkpoint of a run, as if the process had been killed there."""
    for folder in (run / "checkpoints").iterdir():
        if folder.name > f"step-{step:06d}":
            shutil.rmtree(folder)
    shutil.rmtree(run / "adapter")
    (run / "result.json").unlink()


@cache
def without_network() -> tuple[str, ...]:
    """What runs a command where there is no network; nothing where this machine does not let one."""
    before = ("unshare", "-rn")
    if shutil.which("unshare") is None:
        return ()
    allowed = subprocess.run([*before, "true"], capture_output=True, check=False).returncode == 0
    return before if allowed else ()


@dataclass
class World:
    """A folder to work in, with `r.yaml` and `d.jsonl`, and the command line to work with."""

    root: Path
    base: Path
    invoke: Callable[[Sequence[str]], Outcome]
    environment: dict[str, str]
    loaded: list[str] = field(default_factory=list)  # an entry for each time that weights were loaded

    def recipe(self, *changes: tuple[str, str], name: str = "r.yaml") -> int:
        """Writes the recipe with pieces of its text replaced; gives the line of the first replacement's last line."""
        text, line = RECIPE.format(base=self.base), 0
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in the recipe"
            line = line or text[: text.index(old)].count("\n") + new.count("\n") + 1
            text = text.replace(old, new)
        (self.root / name).write_text(text, encoding="utf-8")
        return line

    def rows(self, count: int = 12, name: str = "d.jsonl", *, first: int = 0) -> Path:
        """Writes good rows."""
        return write_rows(self.root / name, make_rows(count, first=first))

    def run(self, *arguments: str) -> Outcome:
        """`lorafit ...` in this process."""
        return self.invoke(arguments)

    def spawn(self, *arguments: str, **options: Any) -> Outcome:
        """`lorafit ...` in a process of its own; `env` adds to the environment, the rest is for `processes.start`."""
        process = self.start(*arguments, **options)
        try:
            stdout, stderr = process.communicate(timeout=300)
        except BaseException:
            process.kill()
            raise
        assert process.returncode is not None
        return Outcome(process.returncode, stdout, stderr)

    def start(self, *arguments: str, **options: Any) -> Process:
        """The same, left running."""
        environment = {**self.environment, **options.pop("env", {})}
        return start(PROGRAM, *arguments, **{"cwd": self.root, "env": environment, **options})

    def digests(self, below: str = ".") -> Mapping[str, str]:
        """The hash of every file and the place of every folder and link below a folder, as a test of 'unchanged'."""
        folder = self.root / below
        return {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            if path.is_file()
            else "folder or broken link"
            for path in sorted(folder.rglob("*"))
        }

    def weights(self, run: str = "run") -> str:
        """The hash of a run's adapter weights."""
        return hashlib.sha256((self.root / run / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
