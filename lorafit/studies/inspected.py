"""What `lorafit inspect` found: figures of each module, what stands out, importances; shown, and written as files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, full_block, say, show_table
from lorafit.console.wording import counted, list_names, near
from lorafit.contracts import JsonObject
from lorafit.studies.findings import find_dead, find_exploded, layer_of, name_layers, name_linears, name_modules
from lorafit.studies.heat_map import HeatMap, draw_heat_map, is_dark, shade

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from lorafit.evaluation.ablation import Ablation, Importance

_SHOWN = 12
_BAR = 10
PICTURE, FIGURES = "heat_map.svg", "inspect.json"


@dataclass(frozen=True)
class Module:
    """Figures of one matrix that an adapter changes.

    Attributes:
        name: Its path; of several stacked in one weight with the number behind.
        shape: Rows and columns as they lie in the base's files.
        weight_norm: Frobenius norm of the base's weight, as it was trained on.
        update_norm: Of what the adapter adds; None where it holds NaN or Inf.
        spectral_norm: Largest singular value of that; None where it is not computed, as the next.
        effective_rank: exp of the entropy of its singular values' shares.
        rank: The most that it can have.
    """

    name: str
    shape: tuple[int, int]
    weight_norm: float
    update_norm: float | None
    spectral_norm: float | None
    effective_rank: float | None
    rank: int | None

    @property
    def ratio(self) -> float | None:
        """||update|| / ||weight||; None where either is not known."""
        return None if self.update_norm is None or not self.weight_norm else self.update_norm / self.weight_norm

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {**asdict(self), "shape": list(self.shape), "ratio": self.ratio}


@dataclass(frozen=True)
class Pair:
    """One module of two adapters on the same base.

    Attributes:
        name: Its path.
        ratio: ||update|| / ||weight|| of the first.
        other_ratio: Of the second.
        cosine: Between both updates; None where one is zero, as the next.
        reads: Overlap of the subspaces that they read.
        writes: Of those that they write.
    """

    name: str
    ratio: float | None
    other_ratio: float | None
    cosine: float | None
    reads: float | None
    writes: float | None


@dataclass(frozen=True)
class Other:
    """The adapter that another one is compared with.

    Attributes:
        path: Its run or folder.
        kind: Its method.
        pairs: Modules that both change.
        missing: Modules that only the first changes.
        added: Modules that only the second changes.
    """

    path: Path
    kind: str
    pairs: tuple[Pair, ...]
    missing: tuple[str, ...]
    added: tuple[str, ...]


@dataclass(frozen=True)
class Inspected(Printed):
    """What is known of one adapter.

    Attributes:
        adapter: Its folder.
        kind: Its method.
        base: Its base.
        base_proof: How that is known to be what it was trained on.
        base_digest: Of the base's files.
        modules: In the order of the base's files.
        same_modules: Pairs of modules whose updates have one direction.
        same_ranks: Pairs of ranks with one direction, by their module.
        beside: Tensors that are no update of a weight, and are not measured.
        ablation: Importances; None where none were measured.
        not_ablated: Why not, where it was not asked for.
        other: What it was compared with.
        output: Folder that the files went to.
    """

    adapter: Path
    kind: str
    base: str
    base_proof: str
    base_digest: str | None
    modules: tuple[Module, ...]
    same_modules: tuple[tuple[str, str], ...]
    same_ranks: dict[str, list[tuple[int, int]]]
    beside: tuple[str, ...]
    ablation: Ablation | None = None
    not_ablated: str = ""
    other: Other | None = None
    output: Path | None = None

    @cached_property
    def not_finite(self) -> tuple[str, ...]:
        """Modules with NaN or Inf."""
        return tuple(module.name for module in self.modules if module.update_norm is None)

    @cached_property
    def dead(self) -> tuple[str, ...]:
        """Modules that add nothing, or next to nothing."""
        return tuple(find_dead(self._ratios))

    @cached_property
    def exploded(self) -> tuple[str, ...]:
        """Modules that add far more than the others."""
        return tuple(find_exploded(self._ratios))

    @property
    def _ratios(self) -> dict[str, float]:
        return {module.name: module.ratio for module in self.modules if module.ratio is not None}

    def to_json(self) -> JsonObject:
        """Plain values; also what `inspect.json` holds."""
        other = self.other
        return {
            "adapter": str(self.adapter),
            "kind": self.kind,
            "base": self.base,
            "base_proof": self.base_proof,
            "base_digest": self.base_digest,
            "modules": [module.to_json() for module in self.modules],
            "not_finite": list(self.not_finite),
            "dead": list(self.dead),
            "exploded": list(self.exploded),
            "duplicated": [list(pair) for pair in self.same_modules],
            "duplicated_ranks": {name: [list(pair) for pair in pairs] for name, pairs in self.same_ranks.items()},
            "not_measured": list(self.beside),
            "ablation": None if self.ablation is None else self.ablation.to_json(),
            "not_ablated": self.not_ablated or None,
            "other": None if other is None else {**asdict(other), "path": str(other.path)},
            "output": None if self.output is None else str(self.output),
        }

    def heat_map(self) -> HeatMap:
        """||update|| / ||weight|| in per cent, of all matrices of one name in a layer together."""
        layers = {module.name: layer_of(module.name) for module in self.modules}
        short, linears = name_layers(dict.fromkeys(layers.values())), name_linears(layers)
        squares: dict[tuple[str, str], list[float]] = {}
        words: dict[tuple[str, str], str] = {}
        marks = {**dict.fromkeys(self.dead, "dead"), **dict.fromkeys(self.not_finite, "NaN")}
        for module in self.modules:
            place = short[layers[module.name]], linears[module.name]
            sums = squares.setdefault(place, [0.0, 0.0])
            sums[0] += (module.update_norm or 0.0) ** 2
            sums[1] += module.weight_norm**2
            if module.name in marks:
                words[place] = marks[module.name]
        values = {place: 100 * (add / own) ** 0.5 if own else 0.0 for place, (add, own) in squares.items()}
        for name in self.exploded:
            place = short[layers[name]], linears[name]
            words[place] = f"{values[place]:,.0f} !"
        bars = {}
        if self.ablation is not None and self.ablation.unit == "layers":
            bars = {short.get(part.name, "-"): part.value for part in self.ablation.parts}
        rows, columns = (tuple(dict.fromkeys(place[side] for place in values)) for side in (0, 1))
        return HeatMap(tuple(sorted(rows, key=_by_number)), columns, values, words, bars)

    def write(self, folder: Path) -> None:
        """inspect.json and the heat map into an empty folder."""
        import json

        text = json.dumps(self.to_json(), indent=2, allow_nan=False, ensure_ascii=False)
        (folder / FIGURES).write_text(text + "\n", encoding="utf-8")
        picture = draw_heat_map(f"{self.kind} on {self.base}", _SCALE, self.heat_map())
        (folder / PICTURE).write_text(picture, encoding="utf-8")

    def render(self, console: Console) -> None:
        """What stands out, the heat map, and a ranking; of two adapters these beside each other first.

        Of two the first one's own map and ranking are shown only with importances, which were asked for then.
        """
        say(console, f"{near(self.adapter)}: {self.kind}, {counted(len(self.modules), 'module')}")
        say(console, f"base: {self.base}; {self.base_proof}")
        for line in self._findings():
            say(console, line)
        if self.beside:
            what = f"{counted(len(self.beside), 'tensor')} beside the layers ({list_names(self.beside)})"
            say(console, f"not measured: {what}: no change of a weight")
        if self.other is not None:
            _show_other(console, self.other)
        if self.other is None or self.ablation is not None:
            say(console, f"\n{_SCALE}")
            console.print(_show_heat_map(self.heat_map(), full_block(console)))
            console.print()
            self._show_ranking(console)
        if self.ablation is not None:
            say(console, f"\n{_explain(self.ablation)}")
        elif self.not_ablated:
            say(console, f"\nno importances: {self.not_ablated}")
        if self.output is not None:
            say(console, f"\nwritten: {near(self.output / FIGURES)}, {near(self.output / PICTURE)}")

    def _findings(self) -> list[str]:
        exploded = [f"{name} ({100 * self._ratios[name]:,.0f} %)" for name in self.exploded]
        same = [f"{one} = {other}" for one, other in self.same_modules]
        ranks = [f"{name} ({counted(len(pairs), 'pair')})" for name, pairs in self.same_ranks.items()]
        found = {
            "NaN or Inf": self.not_finite,
            "dead (no update, or under 1 % of the median)": self.dead,
            "exploded (far more than the others)": exploded,
            "duplicated (one direction in two modules)": same,
            "ranks of one direction": ranks,
        }
        lines = [f"{what}: {len(names)}: {list_names(names)}" for what, names in found.items() if names]
        return lines or ["nothing stands out: no NaN or Inf, no module dead, duplicated or exploded"]

    def _show_ranking(self, console: Console) -> None:
        """Modules by importance, else by ratio; layers where those were switched off."""
        ablation, own = self.ablation, {module.name: module for module in self.modules}
        if ablation is None:
            best = sorted(self.modules, key=lambda module: -(module.ratio or 0.0))[:_SHOWN]
            short = name_modules(own)
            say(console, f"by % of weight, the largest first{_of_all(len(own), 'modules')}:")
            show_table(
                console, ("module", *_OF_MODULES), [(short[module.name], *_show_module(module)) for module in best]
            )
            return
        say(console, f"by importance, the largest first{_of_all(len(ablation.parts), ablation.unit)}:")
        parts = sorted(ablation.parts, key=lambda part: -part.value)[:_SHOWN]
        if ablation.unit == "layers":
            show_table(console, ("layer", *_OF_PARTS), [(part.name, *_show_part(part, ablation)) for part in parts])
            return
        short = name_modules(part.name for part in ablation.parts)
        ratios = [_figure(_percent(own[part.name].ratio)) if part.name in own else "-" for part in parts]
        lines = [(short[p.name], *_show_part(p, ablation), ratio) for p, ratio in zip(parts, ratios, strict=True)]
        show_table(console, ("module", *_OF_PARTS, "% of weight"), lines)


_SCALE = "||update|| / ||weight|| in per cent, Frobenius norms, by layer and linear"
_OF_MODULES = ("||update||", "% of weight", "spectral", "effective rank", "of rank")
_OF_PARTS = ("loss when off", "importance", "95 % interval", "of the gain")


def _show_part(part: Importance, ablation: Ablation) -> tuple[str, ...]:
    share, worth = f"{100 * part.value / ablation.gain:.1f} %" if ablation.gain else "-", part.worth
    return worth.show(part.off), worth.show_change(part.value), worth.span, share


def _show_module(module: Module) -> tuple[str, ...]:
    figures = module.update_norm, _percent(module.ratio), module.spectral_norm, module.effective_rank, module.rank
    return tuple(map(_figure, figures))


def _percent(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * ratio


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _explain(ablation: Ablation) -> str:
    """The whole gain, which importances sum to, and how little of it each part costs by itself."""
    few = f" of {ablation.all_rows}" if ablation.rows < ablation.all_rows else ""
    what = f"{counted(ablation.rows, 'row')}{few} of {ablation.split}: loss {ablation.base_loss:.4g} of the base, "
    what += (
        f"{ablation.tuned_loss:.4g} tuned: a gain of {ablation.gain:.4g}, which the importances sum to; each of the "
    )
    what += f"{ablation.unit} off by itself costs {ablation.off_together:.4g} together"
    if ablation.gain <= 0:
        return what
    left = 100 * (1 - ablation.off_together / ablation.gain)
    why = "they do each other's work" if left > 0 else "they need each other"
    return f"{what}, which leaves {left:.1f} % of the gain unexplained: {why}"


def _of_all(count: int, what: str) -> str:
    return f"; {_SHOWN} of {count} {what}, all of them with --json or --output" if count > _SHOWN else ""


def _show_heat_map(heat: HeatMap, block: str) -> Table:
    """Cells with a background where the terminal has colours; numbers everywhere."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 0), pad_edge=False)
    table.add_column("layer ", justify="right")
    ends = {column.rpartition("_")[2] for column in heat.columns}
    shared = f"_{min(ends)}" if len(ends) == 1 else ""  # seven times `_proj` would not fit beside the importances
    for column in heat.columns:
        table.add_column(f" {column.removesuffix(shared)} ", justify="center", overflow="fold")
    if heat.bars:
        table.add_column("  importance", no_wrap=True)
    longest = max(map(abs, heat.bars.values()), default=0.0) or 1.0
    for row in heat.rows:
        cells: list[RenderableType] = [f"{row} "]
        for place in ((row, column) for column in heat.columns):
            if place not in heat.values:
                cells.append("")
                continue
            share = heat.share(place)
            red, green, blue = shade(share)
            style = f"{'white' if is_dark(share) else 'black'} on rgb({red},{green},{blue})"
            text = heat.words.get(place) or f"{heat.values[place]:.2f}"
            cells.append(Text(f" {text} ", style="bold white on red" if place in heat.words else style))
        if row in heat.bars:
            value = heat.bars[row]
            cells.append(f"  {block * max(1, round(_BAR * abs(value) / longest))} {value:+.3g}")
        table.add_row(*cells)
    return table


def _show_other(console: Console, other: Other) -> None:
    """Both adapters side by side: the modules whose updates are most alike first."""
    say(console, f"\nbeside {near(other.path)} ({other.kind}), {counted(len(other.pairs), 'module')} in both,")
    say(console, f"by cosine, the most alike first{_of_all(len(other.pairs), 'modules')}:")
    short, lines = name_modules(pair.name for pair in other.pairs), []
    for pair in sorted(other.pairs, key=lambda pair: -abs(pair.cosine or 0.0))[:_SHOWN]:
        norms = pair.other_ratio / pair.ratio if pair.ratio and pair.other_ratio is not None else None
        figures = _percent(pair.ratio), _percent(pair.other_ratio), norms, pair.cosine, pair.reads, pair.writes
        lines.append((short[pair.name], *map(_figure, figures)))
    headings = ("module", "% of weight", "other's", "other / this", "cosine", "overlap: reads", "writes")
    show_table(console, headings, lines)
    for what, names in {"only here": other.missing, "only there": other.added}.items():
        if names:
            say(console, f"{what}: {len(names)}: {list_names(names)}")


def _by_number(row: str) -> tuple[str, int]:
    """Layers in order, those of no number last."""
    stack, _, number = row.rpartition(" ")
    return (stack, int(number)) if number.isdigit() else ("~", 0)
