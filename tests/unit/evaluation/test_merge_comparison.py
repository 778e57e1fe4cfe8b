"""Where a merge is compared: on the card that holds both models, else on the CPU; memory never costs the merge."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorafit import merging
from lorafit.answering.tuned import Tuned
from lorafit.contracts import Example, Silent
from lorafit.errors import NumericsError, ResourceError
from lorafit.evaluation.parity import Parity
from lorafit.kinds.tasks import tasks
from lorafit.run.card import RunCard
from tests.support.adapted import make_llama, open_base

GIB = 1 << 30
NEAR, FAR = (Parity(1, 900, 0.0, kl, kl, 1.0, 2.0, 2.0) for kl in (0.0, 0.5))


class Machine:
    """A pretended card and host. Where models were loaded is kept; a device in `lies` has less than it says."""

    def __init__(
        self, patch: pytest.MonkeyPatch, folder: Path, card: int | None, host: int, lies: dict[str, Exception]
    ):
        self.loaded: list[str] = []
        self.parity = NEAR
        self._lies = lies
        patch.setattr(torch.cuda, "is_available", lambda: card is not None)
        self.memory = {"auto": card, "cpu": host}
        patch.setattr(merging, "read_device", lambda kind: SimpleNamespace(memory_bytes=self.memory[kind]))
        patch.setattr(merging, "open_plain_model", lambda folder, reporter, device: SimpleNamespace(
            load=lambda: SimpleNamespace(model=torch.nn.Linear(1, 1))
        ))  # fmt: skip
        patch.setattr(merging, "compare_merge", lambda *_: self.parity)
        patch.setattr(type(tasks.make("causal-lm")), "build_objective", lambda *_: None)
        patch.setattr(Tuned, "tokenizer", lambda _: None)
        patch.setattr(Tuned, "load", lambda tuned, _, __, device: self._load(tuned, device))
        card_of_run = RunCard.model_construct(
            task=tasks.make_section("causal-lm"), pad_id=0, attention="flash_attention_2"
        )
        self._tuned = Tuned(card_of_run, open_base(make_llama(folder / "base")), folder)

    def _load(self, tuned: Tuned, device: str) -> Any:
        assert tuned.card.attention == "sdpa", "flash attention computes neither in fp32 nor on a CPU"
        self.loaded.append(device)
        if device in self._lies:
            raise self._lies[device]
        return SimpleNamespace(model=torch.nn.Linear(1, 1))

    def compare(self) -> merging._Comparison:
        made = merging._Comparison(self._tuned, [Example(0, {}, "rows.jsonl", 1)], must_agree=True, reporter=Silent())
        made(Path("merged"))
        return made


RAN_OUT = torch.OutOfMemoryError("CUDA out of memory")
NO_ROOM = RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("card", "host", "lies", "loaded", "says"),
    [
        (24 * GIB, GIB, {}, ["cuda"], ""),
        (GIB, 96 * GIB, {}, ["cpu"], ""),
        (24 * GIB, 96 * GIB, {"cuda": RAN_OUT}, ["cuda", "cpu"], ""),
        (
            24 * GIB,
            96 * GIB,
            {"cuda": RAN_OUT, "cpu": NO_ROOM},
            ["cuda", "cpu"],
            "had (cuda), not as much could be had (cpu)",
        ),
        (GIB, GIB, {}, [], "take 1.5 GiB of memory, 0.8 GiB are free (cuda), 0.8 GiB are free (cpu)"),
        (None, 96 * GIB, {"cpu": NO_ROOM}, ["cpu"], "take 1.5 GiB of memory, not as much could be had (cpu)"),
        (None, 96 * GIB, {}, ["cpu"], ""),
    ],
)
def test_both_models_go_where_they_fit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    card: int | None,
    host: int,
    lies: dict[str, Exception],
    loaded: list[str],
    says: str,
) -> None:
    machine = Machine(monkeypatch, tmp_path, card, host, lies)
    made = machine.compare()
    assert machine.loaded == loaded
    assert (made.parity is NEAR, made.skipped.endswith(says), bool(made.skipped)) == (not says, True, bool(says))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), ResourceError("no kernels for it")])
def test_a_card_that_is_too_full_or_too_old_to_be_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def ask(kind: str) -> Any:
        if kind == "auto":
            raise error
        return SimpleNamespace(memory_bytes=96 * GIB)

    machine = Machine(monkeypatch, tmp_path, GIB, 96 * GIB, {})
    monkeypatch.setattr(merging, "read_device", ask)
    assert machine.compare().parity is NEAR and machine.loaded == ["cpu"]


def test_a_far_merge_and_other_errors_still_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, tmp_path, 24 * GIB, 96 * GIB, {})
    machine.parity = FAR
    with pytest.raises(NumericsError):
        machine.compare()
    machine = Machine(monkeypatch, tmp_path, 24 * GIB, GIB, {"cuda": RuntimeError("no kernel image")})
    with pytest.raises(RuntimeError, match="no kernel image"):
        machine.compare()
