"""The adapter's first values, where its recipe asks for others than it was made with: before step 1, never again."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Mapping
from functools import partial

import torch

from lorafit.contracts import Examples, Reporter
from lorafit.files.safetensors import read_index, read_rows
from lorafit.kinds.adapters import AdapterSection, adapters
from lorafit.kinds.initialisations import Start
from lorafit.model.base import Base
from lorafit.model.homes import find_homes
from lorafit.model.names import names_of
from lorafit.objective import Objective
from lorafit.ops.isolation import adapter_off, evaluating
from lorafit.ops.rng import seed_rng


def give_first_values(
    objective: Objective,
    section: AdapterSection,
    base: Base,
    splits: Mapping[str, Examples],
    seed: int,
    pad_id: int,
    reporter: Reporter,
) -> None:
    """Lets the recipe's initialisation fill a fresh adapter; the run's random numbers are as before.

    Every rank draws and reads the same.

    Args:
        objective: Around the model with its fresh adapter.
        section: The recipe's adapter.
        base: Whose files hold the weights before they were quantised.
        splits: Rows, for initialisations that look at what layers get to see.
        seed: Of what is drawn, rows among it.
        pad_id: Fills up shorter rows.
        reporter: Told what was found.

    Raises:
        ModelError: A weight lies in no place of the base's files.
        DataError: The rows have fewer tokens than the initialisation must see.
    """
    initialisation = adapters.bind(section).initialisation()
    if initialisation is None or section.init_from is not None:
        return
    start = Start(
        partial(_run_rows, objective, splits, seed, pad_id, reporter), partial(_read_original, objective, base)
    )
    with evaluating(objective):
        seed_rng(seed)
        found = initialisation.start(objective.model, start)
    if found is not None:
        reporter.info(found)


def _run_rows(
    objective: Objective,
    splits: Mapping[str, Examples],
    seed: int,
    pad_id: int,
    reporter: Reporter,
    split: str,
    most: int,
    seers: Mapping[str, Callable[[torch.Tensor], None]],
) -> None:
    """See `Start.forward`. A row is a batch, and yet padded where a task pads its sides to one length."""
    examples, real, shown = splits[split], list[torch.Tensor](), list[tuple[torch.Tensor, torch.Tensor]]()
    rows = random.Random(seed).sample(range(len(examples)), min(most, len(examples)))

    def show(see: Callable[[torch.Tensor], None], _: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        inputs = arguments[0]
        if not shown or shown[-1][0] is not inputs:  # queries, keys and values get one tensor
            of_tokens = inputs.shape[:-1] == real[-1].shape
            seen = inputs[real[-1]] if of_tokens else inputs.flatten(0, -2)
            shown[:] = [(inputs, seen.detach().float())]
        see(shown[-1][1])

    with contextlib.ExitStack() as stack, reporter.track(len(rows), "what layers see") as bar:
        stack.enter_context(adapter_off(objective.model))
        for path, see in seers.items():
            layer = objective.base.get_submodule(path)
            stack.enter_context(layer.register_forward_pre_hook(partial(show, see)))
        for row in rows:
            batch = objective.batch_of(examples[row], pad_id)
            behind = batch["input_ids"].ne(pad_id).flip(-1).cumsum(-1).flip(-1)  # of each token, others than padding
            real.append(behind > 0)
            objective.logits(batch)
            bar.advance(1)


def _read_original(objective: Objective, base: Base, path: str) -> torch.Tensor:
    """A linear's weight `[out, in]` on the model's device, as the base's files hold it."""
    names = names_of(objective.model)
    assert names is not None, "the model was loaded by load_model"
    home, entries = find_homes(objective.model, names)[path], read_index(base.path)
    parts = [read_rows(entries[part.name].as_matrix(), part.start, part.stop) for part in home.parts]
    weight = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (weight.t() if home.transposed else weight).to(objective.device, torch.float32)
