"""`lorafit export`: which target, what may be asked of it, where its file or folder goes."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.nearest import did_you_mean
from lorafit.contracts import Reporter, Silent
from lorafit.errors import UsageError
from lorafit.exporting.exported import REPOSITORY, Exported, Wish
from lorafit.run.output_folder import check_output
from lorafit.run.workspace import check_answerable

if TYPE_CHECKING:
    from lorafit.exporting.source import Source

TARGETS = {
    "peft": ("peft", ("base_id",)),
    "gguf": ("gguf", ("base", "dtype")),
    "gguf-lora": ("gguf_lora", ()),
    "ollama": ("ollama", ("base", "dtype", "from_base")),
    "vllm": ("vllm", ("base_id",)),
    "hub": ("hub", ("base_id", "repo", "private", "license", "dry_run")),
}
"""By `--to`: its module, and the flags that not every target takes."""
_ENDINGS = {"gguf": ".gguf", "gguf-lora": "-lora.gguf"}


def export(
    run: Path,
    *,
    to: str,
    output: Path | None = None,
    checkpoint: str | None = None,
    base_model: str | None = None,
    base_id: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    from_base: str | None = None,
    repo: str | None = None,
    private: bool = False,
    license: str | None = None,
    dry_run: bool = False,
    verify: bool = False,
    reporter: Reporter | None = None,
) -> Exported:
    """Writes a trained adapter in the form that another program reads."""
    wish = Wish(
        to, output, checkpoint, base_model, base_id, base, dtype, from_base, repo, private, license, dry_run, verify
    )
    _check_wish(wish)
    check_answerable(run, checkpoint)  # said before the libraries are loaded
    from lorafit.exporting.source import inputs_of, open_source

    source = open_source(run, wish, reporter or Silent())
    place = output or _usual_output(source)
    if to in _ENDINGS and place.is_dir():
        todo = f"name a file, such as {place / _usual_output(source).name}"
        raise UsageError("is a folder, and this target is one file", file=str(place), key="output", todo=todo)
    is_kept = to != "hub" or dry_run or output is not None  # a push leaves nothing here
    if is_kept and place.exists() and (place.is_file() or any(place.iterdir())):
        raise UsageError("exists already", file=str(place), key="output", todo="choose another --output")
    check_output(place, inputs_of(source))
    made: Exported = import_module(f"lorafit.exporting.{TARGETS[to][0]}").export(source, place)
    return made


def _check_wish(wish: Wish) -> None:
    """Raises UsageError for an unknown target, and for a flag that it does not read."""
    if wish.to not in TARGETS:
        todo = f"{did_you_mean(wish.to, list(TARGETS))}use one of {', '.join(TARGETS)}"
        raise UsageError(f"'{wish.to}' is no target", key="--to", todo=todo)
    if wish.base not in (None, "dequantized", "original"):
        raise UsageError(f"'{wish.base}' is no base", key="--base", todo="use dequantized or original")
    given = {name for name, value in asdict(wish).items() if value not in (None, False)}
    for name in sorted({name for _, flags in TARGETS.values() for name in flags} & given):
        known = [to for to, (_, flags) in TARGETS.items() if name in flags]
        if wish.to not in known:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"is of --to {' and '.join(known)}", key=flag, todo="leave it out")
    if wish.base_id is not None and not REPOSITORY.fullmatch(wish.base_id):
        raise UsageError(f"'{wish.base_id}' is no id of the hub", key="--base-id", todo="name it OWNER/NAME")
    if wish.from_base is not None:
        for name in ("base", "dtype"):
            if getattr(wish, name) is not None:
                raise UsageError("is of a merge, and --from-base merges nothing", key=f"--{name}", todo="leave it out")


def _usual_output(source: Source) -> Path:
    place, to = source.place, source.wish.to
    return place.with_name(f"{place.name}{_ENDINGS.get(to, f'-{to}')}")
