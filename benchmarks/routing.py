"""How well `serve --route` routes, and what it costs: who gets held-out prompts and prompts of no adapter, and when.

    python -m benchmarks.routing BASE --adapter shop=RUN --adapter gsm8k=RUN --own shop=ROWS --own gsm8k=ROWS
                                 [--other mbpp=ROWS ...] [--limit 100] [--share 0.95] [--lengths 16 64 256 1024]
                                 [--known 16 32 64 128 256] [--draws 9] [--repeats 9] [--picture FILE.svg]

ROWS are JSON lines; what each asks is read from `question`, `prompt`, `instruction` with `input`, `text`, `source`,
`document` or the first turn of the user. Of more than `--limit` rows some are drawn. Printed are

    who gets what       by set of rows: the share of each adapter and of the base, and how far it has drifted from each
    abstention          by `--route`: right among held-out prompts of the adapters, and the others that go to the base
    known prompts       with `--known`: of one adapter so many, of the others all; its held-out prompts that get
                        it (mean and worst of `--draws`) or another adapter, and its share of the other sets
    the classifier      its time alone, from a state to a name
    the first token     by the prompt's length: its time, and what routing adds, alone and with seven others waiting

Times are medians, taken in turns; `--picture` draws the second table. `--repeats 0` takes no times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lorafit.answering.batched import BatchedEngine
from lorafit.answering.sampling import GREEDY
from lorafit.answering.several import open_several
from lorafit.answering.states import StateReader
from lorafit.answering.ticket import LiveRequest
from lorafit.answering.trained_prompts import read_prompts
from lorafit.contracts import JsonObject, Silent
from lorafit.data.prompt_texts import LONGEST_PROMPT
from lorafit.ops.domain_chooser import DomainChooser, drift_of, fit_domains
from lorafit.serving.routing import read_background
from lorafit.studies.plot import INK, svg_text

SHARES = (0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99)
FIELDS = ("question", "prompt", "text", "source", "document")
TOGETHER = 8
COLOURS = ("#1f6f8b", "#b0532f", "#5b8c3a", "#7a4fa3", "#c79a1b", "#444444", "#c04a7a", "#3a8c8c", "#8a6d3b", "#999999")
DASHES = ("none", "5 3")
"""The second of a second round of the colours."""


def asked(row: JsonObject) -> str:
    """What a row asks."""
    if "instruction" in row:
        return "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    if "messages" in row:
        return str(next(turn["content"] for turn in row["messages"] if turn["role"] == "user"))
    return str(next(row[field] for field in FIELDS if field in row))


def read_texts(file: Path, limit: int) -> list[str]:
    """What at most so many rows of a file ask."""
    lines = file.read_text(encoding="utf-8").strip().split("\n")  # a text may hold other ends of a line
    texts = [asked(json.loads(line))[:LONGEST_PROMPT] for line in lines]
    return random.Random(0).sample(texts, min(limit, len(texts)))


def shares_of(chooser: DomainChooser, states: torch.Tensor) -> dict[str | None, float]:
    """How many go to whom."""
    chosen = chooser.choose(states)
    return {name: chosen.count(name) / len(chosen) for name in (*chooser.names, None)}


def tell_who(chooser: DomainChooser, sets: Mapping[str, torch.Tensor]) -> None:
    """The first table."""
    names = chooser.names
    print(f"\n| prompts | rows | {' | '.join(names)} | base | {' | '.join(f'drift of {name}' for name in names)} |")
    print("|---" * (3 + 2 * len(names)) + "|")
    for kind, states in sets.items():
        got, odds = shares_of(chooser, states), chooser.log_odds(states)
        cells = [f"{got[name]:.2f}" for name in (*names, None)]
        cells += [f"{drift_of(odds[:, place].tolist(), chooser.known[name]):.2f}" for place, name in enumerate(names)]
        print(f"| {kind} | {len(states)} | {' | '.join(cells)} |")


def tell_abstention(
    chooser: DomainChooser, own: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]
) -> dict[str, list[float]]:
    """The second table, by column: one value for each of `SHARES`."""
    columns: dict[str, list[float]] = {name: [] for name in (*own, *others)}
    for share in SHARES:
        at = chooser.with_share(share)
        for name, states in own.items():
            columns[name].append(shares_of(at, states)[name])
        for name, states in others.items():
            columns[name].append(shares_of(at, states)[None])
    heads = [f"{name} right" for name in own] + [f"{name} to the base" for name in others]
    print(f"\n| --route | {' | '.join(heads)} |")
    print("|---" * (1 + len(columns)) + "|")
    for place, share in enumerate(SHARES):
        print(f"| {share:g} | {' | '.join(f'{values[place]:.2f}' for values in columns.values())} |")
    print(f"\nbetween the adapters alone, without abstention: {_told_apart(chooser, own):.3f} right")
    return columns


def _told_apart(chooser: DomainChooser, own: Mapping[str, torch.Tensor]) -> float:
    """How many held-out prompts of the adapters have the right one for the likeliest."""
    right = [chooser.log_odds(states).argmax(1) == chooser.names.index(name) for name, states in own.items()]
    return float(torch.cat(right).double().mean())


def tell_known(
    trained: Mapping[str, torch.Tensor],
    background: torch.Tensor,
    share: float,
    own: Mapping[str, torch.Tensor],
    others: Mapping[str, torch.Tensor],
    numbers: Sequence[int],
    draws: int,
) -> None:
    """The third table: of one adapter so many training prompts are known, drawn anew each time, of the others all."""
    heads = [f"{name} {what}" for name in own for what in ("right", "least", "to another", "gets of others")]
    print(f"\n| known of one | {' | '.join(heads)} |")
    print("|---" * (1 + len(heads)) + "|")
    generator, strange = torch.Generator().manual_seed(0), torch.cat([*others.values()])
    for number in numbers:
        cells: list[float] = []
        for name, states in own.items():
            right, wrong, taken = list[float](), list[float](), list[float]()
            for _ in range(draws):
                few = trained[name][torch.randperm(len(trained[name]), generator=generator)[:number]]
                chooser = fit_domains({**trained, name: few}, background, share)
                got = shares_of(chooser, states)
                right.append(got[name])
                wrong.append(sum(part for other, part in got.items() if other not in (name, None)))
                taken.append(shares_of(chooser, strange)[name])
            cells += [statistics.mean(right), min(right), statistics.mean(wrong), statistics.mean(taken)]
        print(f"| {number} | {' | '.join(f'{value:.2f}' for value in cells)} |", flush=True)


def draw(own: Sequence[str], columns: Mapping[str, list[float]]) -> str:
    """Prompts of no adapter that go to the base, against prompts of the adapters that get theirs."""
    left, top, size = 60, 44, 300
    right = [sum(columns[name][place] for name in own) / len(own) for place in range(len(SHARES))]
    first = min(0.8, *right)

    def at(x: float, y: float) -> str:
        return f"{left + (x - first) / (1 - first) * size:.1f} {top + (1 - y) * size:.1f}"

    parts = [f'<path d="M{left} {top}V{top + size}H{left + size}" fill="none" stroke="{INK}"/>']
    parts += [svg_text(left - 6, top + (1 - mark) * size + 4, f"{mark:g}", "end") for mark in (0, 0.25, 0.5, 0.75, 1)]
    marks = [mark / 20 for mark in range(21) if mark / 20 >= first]
    parts += [svg_text(float(at(mark, 0).split()[0]), top + size + 16, f"{mark:g}", "middle") for mark in marks]
    parts.append(svg_text(left, 18, "Prompts of no adapter that go to the base, by what they are"))
    parts.append(svg_text(left + size / 2, top + size + 36, "held-out prompts that get their adapter (mean)", "middle"))
    for number, name in enumerate(name for name in columns if name not in own):
        ink, height = COLOURS[number % len(COLOURS)], top + 12 + 16 * number
        line = f'fill="none" stroke="{ink}" stroke-dasharray="{DASHES[number // len(COLOURS) % len(DASHES)]}"'
        points = "L".join(at(x, y) for x, y in zip(right, columns[name], strict=True))
        parts.append(f'<path d="M{points}" {line} stroke-width="1.6"/>')
        parts.append(f'<path d="M{left + size + 16} {height - 4}h18" {line} stroke-width="3"/>')
        parts.append(svg_text(left + size + 40, height, name))
    box = f'width="{left + size + 160}" height="{top + size + 50}"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} font-family="sans-serif" font-size="11" fill="{INK}">\n'
        f'<rect {box} fill="white"/>\n{body}\n</svg>\n'
    )


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tell_times(
    engine: BatchedEngine,
    reader: StateReader,
    chooser: DomainChooser,
    adapter: str,
    lengths: Sequence[int],
    repeats: int,
) -> None:
    """The fourth and fifth tables."""
    words = "the shop sells mugs and plates on monday and it opens at nine " * 100
    state = reader.submit(reader.ids(words)).result()[None]
    alone = statistics.median(seconds_of(lambda: chooser.choose(state)) for _ in range(1000))
    print(
        f"\nthe classifier alone: {1000 * alone:.3f} ms ({len(chooser.names)} adapters, states of {state.shape[1]})\n"
    )
    print("| tokens of the prompt | first token ms | routing adds ms | of it | each of 8 at once ms |")
    print("|---|---|---|---|---|")
    tokens = engine.engine.tokenizer(words, add_special_tokens=False).input_ids
    for length in lengths:
        ids = (tokens * (1 + length // len(tokens)))[:length]
        looked_at = [ids[0], *ids[: reader.longest]]

        def first_token(ids: list[int] = ids) -> None:
            list(engine.submit(LiveRequest(ids, adapter, replace(GREEDY, max_new_tokens=1))))

        def route(looked_at: list[int] = looked_at) -> None:
            chooser.choose(reader.submit(looked_at).result()[None])

        def route_together(looked_at: list[int] = looked_at) -> None:
            for future in [reader.submit(looked_at) for _ in range(TOGETHER)]:
                future.result()

        ways = (first_token, route, route_together)
        taken = [[seconds_of(way) for way in ways] for _ in range(repeats + 1)][1:]
        token, added, together = (1000 * statistics.median(part) for part in zip(*taken, strict=True))
        print(f"| {length} | {token:.1f} | {added:.1f} | {added / token:.0%} | {together / TOGETHER:.1f} |", flush=True)


def main() -> None:
    """Prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    for name in ("adapter", "own", "other"):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="NAME=PATH", required=name != "other")
    for name, number in (("limit", 100), ("draws", 9), ("repeats", 9)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--share", type=float, default=0.95)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--known", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.known and not given.other:
        parser.error("--known counts what an adapter gets of other sets: give --other")
    adapters, own, others = (
        {n: Path(p) for n, _, p in (one.partition("=") for one in part)}
        for part in (given.adapter, given.own, given.other)
    )
    opened = open_several(given.base, adapters, None, None, Silent())
    engine = BatchedEngine(opened.first.load_base())
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{machine}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    try:
        for name, answerer in opened.adapters.items():
            assert answerer.folder is not None
            engine.load_adapter(name, answerer.folder)
        reader, began = StateReader(engine), time.perf_counter()
        trained = {
            name: reader.read_all(read_prompts(folder, Silent()), lambda _: None) for name, folder in adapters.items()
        }
        background = reader.read_all(read_background(), lambda _: None)
        read, began = time.perf_counter() - began, time.perf_counter()
        chooser = fit_domains(trained, background, given.share)
        rows = ", ".join(f"{len(states)} of {name}" for name, states in trained.items())
        told = f"{rows}, {len(background)} of none; fitted in {time.perf_counter() - began:.1f} s"
        print(f"read in {read:.1f} s: {told}; --route {given.share:g}")
        states = {
            name: reader.read_all(read_texts(file, given.limit), lambda _: None)
            for name, file in {**own, **others}.items()
        }
        tell_who(chooser, states)
        held, outside = ({name: states[name] for name in part} for part in (own, others))
        columns = tell_abstention(chooser, held, outside)
        if given.known:
            tell_known(trained, background, given.share, held, outside, given.known, given.draws)
        if given.picture is not None:
            given.picture.write_text(draw([*own], columns), encoding="utf-8")
        if given.repeats:
            tell_times(engine, reader, chooser, next(iter(adapters)), given.lengths, given.repeats)
    finally:
        engine.close(finish=False)


if __name__ == "__main__":
    main()
