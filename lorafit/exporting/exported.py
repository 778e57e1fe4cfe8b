"""What is asked of an export, and what it gives back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.console.reporting import Printed, say
from lorafit.console.wording import near
from lorafit.contracts import JsonObject

if TYPE_CHECKING:
    from rich.console import Console

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""What the hub calls one: OWNER/NAME."""
_MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Wish:
    """The command's flags, by their names there.

    Attributes:
        to: The target.
    """

    to: str
    output: Path | None = None
    checkpoint: str | None = None
    base_model: str | None = None
    base_id: str | None = None
    base: str | None = None
    dtype: str | None = None
    from_base: str | None = None
    repo: str | None = None
    private: bool = False
    license: str | None = None
    dry_run: bool = False
    verify: bool = False


@dataclass(frozen=True)
class EngineProof:
    """Logits of the program that reads an export, which computes in fp32, beside lorafit's of fp32 weights.

    Attributes:
        engine: The program.
        weights: On which both computed.
        tokens: Positions compared.
        largest: Largest |difference| of a logit.
        distance: Root mean square of the differences over the logits' own spread.
        bound: The most that `distance` may be.
        top1: Share of positions whose most likely token is the same, 0 to 1.
        texts: Chats, or texts, that the program's tokenizer read as lorafit's; None where it brings none.
        exact: `distance` of the same file in f32, made for the while; None where the file itself is, or has no base.
    """

    engine: str
    weights: str
    tokens: int
    largest: float
    distance: float
    bound: float
    top1: float
    texts: int | None = None
    exact: float | None = None

    def to_json(self) -> JsonObject:
        """Plain values."""
        return dict(self.__dict__)

    def describe(self) -> str:
        """For people."""
        exact = "" if self.exact is None else f"; in f32 {self.exact:.2g}"
        read = "" if self.texts is None else f"; {self.texts} texts become the same tokens"
        of_spread = f"{self.distance:.2g} of their spread (bound {self.bound:.2g}){exact}"
        return (
            f"{self.engine} beside lorafit on {self.weights}, {self.tokens} positions: largest difference of a logit "
            f"{self.largest:.2g}, {of_spread}, same first choice at {100 * self.top1:.1f} %{read}"
        )


@dataclass(frozen=True)
class Exported(Printed):
    """An export.

    Attributes:
        to: The target.
        output: File or folder; None where it was pushed and nothing is kept here.
        notes: What was changed for the target, and what it will not do.
        command: What starts the target with it; None where there is no such thing.
        proof: Where it was verified.
        url: Of what was pushed.
    """

    to: str
    output: Path | None
    notes: Sequence[str] = ()
    command: str | None = None
    proof: EngineProof | None = None
    url: str | None = None

    @property
    def files(self) -> dict[str, int]:
        """Bytes by name."""
        if self.output is None:
            return {}
        if self.output.is_file():
            return {self.output.name: self.output.stat().st_size}
        found = sorted(file for file in self.output.rglob("*") if file.is_file())
        return {file.relative_to(self.output).as_posix(): file.stat().st_size for file in found}

    def to_json(self) -> JsonObject:
        """Plain values."""
        return {
            "to": self.to,
            "output": None if self.output is None else str(self.output),
            "files": self.files,
            "notes": list(self.notes),
            "command": self.command,
            "proof": self.proof.to_json() if self.proof else None,
            "url": self.url,
        }

    def render(self, console: Console) -> None:
        """Where it is, what was changed, what was proven, and what to do with it."""
        if self.output is not None:
            size = sum(self.files.values()) / _MEBIBYTE
            say(console, f"{self.to}: {near(self.output)}, {size:,.1f} MiB")
            if self.output.is_dir():
                say(console, f"  {', '.join(self.files)}")
        if self.url is not None:
            say(console, f"pushed to {self.url}")
        for note in self.notes:
            say(console, f"- {note}")
        if self.proof is not None:
            say(console, self.proof.describe())
        if self.command is not None:
            say(console, f"start it with: {self.command}")
