"""Every architecture that transformers registers as a language model, tiny and random, through all of lorafit.

    python benchmarks/zoo.py                            the whole table, on one core in well under 40 minutes
    python benchmarks/zoo.py llama qwen3_next gemma3    some of it
    python benchmarks/zoo.py --rows rows.jsonl          keep each row as it is made; called again, it goes on
    python benchmarks/zoo.py --rows rows.jsonl llama    try these again, then show the whole table
    python benchmarks/zoo.py --write docs/models.md     the page that shows it

What a row goes through is `tests/support/zoo_path.py`; its model is made by `tests/support/zoo_models.py`. A row works,
or lorafit refused it before step 1, for the reason that is shown; anything else is a failure, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PRECISIONS = ("none", "nf4")
GROUPS = {
    "text": "decoder-only language models",
    "multimodal": "models of several modalities, trained on text",
    "encoder-decoder": "encoder-decoders, counted apart",
    "audio": "audio models, counted apart",
    "encoder": "encoders that are registered as causal, counted apart",
}
COUNTED = ("text", "multimodal")
VERSIONS = ("transformers", "peft", "bitsandbytes", "torch", "accelerate")


@dataclass(frozen=True)
class Row:
    """What became of one architecture.

    Attributes:
        group: A key of GROUPS.
        result: `works`, `refused` before step 1, or `fails`.
        why: The reason of a refusal or failure.
        quantised: Share of the parameters that NF4 reaches, 0 to 1.
        left_out: What takes no adapter, by name.
        exact: `--exact` over the bytes counted while training, the worse of both precisions; None: it cannot be asked.
        seconds: Of processor time.
    """

    architecture: str
    group: str
    result: str
    why: str = ""
    quantised: float = 0.0
    left_out: tuple[str, ...] = ()
    exact: float | None = None
    seconds: float = 0.0


def try_architecture(
    architecture: str, folder: Path, precisions: Sequence[str] = PRECISIONS, *, exact: bool = True
) -> Row:
    """Walks its whole way in a folder, once a precision; the dry run with it where `exact`."""
    from lorafit.errors import LorafitError
    from tests.support.zoo_models import group_of
    from tests.support.zoo_path import Walk, go, make_world, refuse_unbuilt

    began, group, walks = time.process_time(), group_of(architecture), []

    def row(result: str, why: str = "") -> Row:
        shown = " ".join(why.replace(f"{folder}/", "").split())
        ratios = [walk.exact_ratio for walk in walks if walk.exact_ratio]
        last = walks[-1] if walks else Walk()
        exact = max(ratios, key=lambda ratio: abs(ratio - 1)) if ratios else None
        spent = time.process_time() - began
        return Row(architecture, group, result, shown, last.quantised_share, last.left_out, exact, round(spent, 1))

    try:
        if not make_world(architecture, folder):  # transformers itself cannot build it: what does lorafit say?
            return row("refused", refuse_unbuilt(folder))
        for precision in precisions:
            walks.append(Walk())
            go(folder, precision, walks[-1], exact=exact)
    except LorafitError as error:
        began_well = len(walks) > 1 or (bool(walks) and walks[-1].steps > 0)
        return row("fails" if began_well else "refused", str(error))
    except Exception as error:
        stage = f"{walks[-1].stage}: " if walks else ""
        return row("fails", f"{stage}{type(error).__name__}: {error}")
    return row("works")


def try_all(architectures: Iterable[str], kept: Path | None = None) -> list[Row]:
    """One after the other, in this process; each row is said on stderr, and added to a file of rows where one is."""
    rows = []
    for architecture in architectures:
        with tempfile.TemporaryDirectory(prefix="zoo-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows.append(try_architecture(architecture, Path(folder)))
        shown = rows[-1]
        print(f"{shown.architecture:28} {shown.result:8} {shown.seconds:5.1f} s  {shown.why[:160]}", file=sys.stderr)
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(shown)) + "\n")
    return rows


def read_rows(kept: Path) -> dict[str, Row]:
    """The rows of a file by architecture, sorted; of those tried again, the last."""
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    rows = [Row(**{**row, "left_out": tuple(row["left_out"])}) for row in map(json.loads, lines)]
    return {row.architecture: row for row in sorted(rows, key=lambda row: row.architecture)}


def counts(rows: Sequence[Row]) -> list[tuple[str, int, int, int]]:
    """By group: works, refused, fails."""
    found = Counter((row.group, row.result) for row in rows)
    results = ("works", "refused", "fails")
    return [(group, *(found[group, result] for result in results)) for group in GROUPS]  # type: ignore[misc]


def share_that_works(rows: Sequence[Row]) -> float:
    """Of decoder-only text architectures and of the text parts of others, 0 to 1."""
    counted = [row for row in rows if row.group in COUNTED]
    return sum(row.result == "works" for row in counted) / max(1, len(counted))


def render(rows: Sequence[Row]) -> str:
    """The table as Markdown: counts, then each group."""
    lines = ["| | work | refused before step 1 | fail |", "|---|---|---|---|"]
    lines += [f"| {GROUPS[group]} | {works} | {refused} | {fails} |" for group, works, refused, fails in counts(rows)]
    lines += ["", f"{share_that_works(rows):.1%} of the first two rows work.", ""]
    for group, title in GROUPS.items():
        members = [row for row in rows if row.group == group]
        if members:
            lines += [f"### {title[0].upper()}{title[1:]}", ""]
            lines += _works([row for row in members if row.result == "works"])
            lines += _others([row for row in members if row.result != "works"])
    return "\n".join(lines)


def _works(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = ["| architecture | NF4 reaches | takes no adapter | `--exact` |", "|---|---|---|---|"]
    body = []
    for row in rows:
        exact = "needs values" if row.exact is None else f"{row.exact:.3f}"
        body.append(f"| {row.architecture} | {row.quantised:.0%} | {', '.join(row.left_out) or '-'} | {exact} |")
    return [*head, *body, ""]


def _others(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    head = ["| architecture | | why |", "|---|---|---|"]
    return [*head, *(f"| {row.architecture} | {row.result} | {_as_cell(row.why)} |" for row in rows), ""]


def _as_cell(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("|", "/").replace("<", "&lt;")


def versions() -> str:
    """What the table was made with."""
    parts = [f"{name} {importlib.metadata.version(name).split('+')[0]}" for name in VERSIONS]
    return ", ".join([*parts, f"Python {platform.python_version()}"])


def write_page(page: Path, rows: Sequence[Row], minutes: float) -> None:
    """Replaces what stands between the page's two marks."""
    text = page.read_text(encoding="utf-8")
    begin, end = "<!-- zoo begins -->", "<!-- zoo ends -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    made = f"Made with {versions()}; {minutes:.0f} minutes of one core.\n\n{render(rows)}"
    page.write_text(f"{before}{begin}\n{made}\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Runs the zoo; 1 where an architecture fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="architectures; all that transformers registers by default")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="add each row to a JSON Lines file; skip what it has")
    parser.add_argument("--json", action="store_true", help="rows as one JSON object instead of the table")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the marks of a page")
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    from transformers.utils import logging

    from lorafit.machine.library_settings import set_library_defaults
    from tests.support.zoo_models import architectures

    set_library_defaults()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)  # products this small only wait for each other on several
    known = read_rows(options.rows) if options.rows else {}
    rows = try_all(options.names or [name for name in architectures() if name not in known], options.rows)
    rows = list(read_rows(options.rows).values()) if options.rows else rows
    minutes = sum(row.seconds for row in rows) / 60
    if options.json:
        print(json.dumps({"versions": versions(), "minutes": minutes, "rows": [asdict(row) for row in rows]}, indent=1))
    else:
        print(render(rows))
    if options.write is not None:
        write_page(options.write, rows, minutes)
    return int(any(row.result == "fails" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
