"""The state of a run in plain values, as a checkpoint holds it in JSON; and the optimizer's beside it, dtypes exact.

No pickle is read or written:

    optimizer.safetensors   NAME/KEY            each tensor of each parameter's state, stored once where it is shared
    optimizer.json          {"optimizer": CLASS, "states": {NAME: {KEY: {"tensor": "NAME/KEY"} | {"value": 3}}}}
    hooks.safetensors       NUMBER/KEY          tensors of the states of step hooks, where they have any

`Optimizer.load_state_dict` is not used: it casts fp32 moments to the dtype of the parameter.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors.torch import load, save

from lorafit.contracts import JsonMapping, JsonObject, JsonValue
from lorafit.errors import CheckpointError, LorafitError, NumericsError
from lorafit.files.atomic import read_object
from lorafit.ops.live_tensors import LivePeak
from lorafit.ops.process_memory import is_out_of_memory
from lorafit.ops.rng import RngState
from lorafit.ops.step_hook import StepHook

MOST_OVERFLOWS_IN_ROW = 20
Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Amount = Annotated[Real, Field(ge=0)]
Event = dict[str, int | str]
"""What happened on the way: its `kind` (an out-of-memory, an inexact resume), and what is to be known of it."""
T = TypeVar("T")
TENSORS_FILE = "optimizer.safetensors"
SKELETON_FILE = "optimizer.json"
HOOKS_FILE = "hooks.safetensors"


def read_dataclass(kind: type[T], values: JsonMapping | JsonValue, name: str) -> T:
    """The dataclass of which `asdict` gave these JSON values.

    Raises:
        ValueError: A value is none of its declared type; the text names the key.
    """
    try:
        return TypeAdapter(kind).validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        found = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, (name, *found['loc'])))}: {found['msg'].lower()}") from error


@dataclass(frozen=True, slots=True)
class Best:
    """The best evaluation so far."""

    step: Count
    metric: str
    value: Real


@dataclass(frozen=True, slots=True)
class Plateau:
    """What a run without improvement has led to so far.

    Attributes:
        factor: Multiplier of the learning rate.
        value: The value that the next evaluation must beat by the plateau's `min_delta`.
        evaluations: Since that value, or since the rate last fell.
        times: How often it fell.
    """

    factor: Annotated[Real, Field(gt=0, le=1)] = 1.0
    value: Real | None = None
    evaluations: Count = 0
    times: Count = 0


@dataclass(slots=True)
class TrainState:
    """A run right after optimizer step `step`: all that a resume needs beside weights and optimizer.

    Attributes:
        step: Optimizer steps taken.
        epoch: Passes over the rows so far, e.g. 1.5.
        tokens: Real tokens seen, padding apart.
        padded_tokens: Those and padding.
        trained_tokens: Those that carried loss.
        seconds: Time spent in steps.
        micro_batch_limit_tokens: What an out-of-memory left of the plan's token budget; None: all of it.
        evaluated_step: The last step whose evaluation is in the log.
        best: The best evaluation by the metric that selects; None where none does, or none was made.
        patience_value: The value that the next evaluation must beat by `min_delta`.
        evaluations_without_improvement: Since that value.
        stopped_early: Patience ran out at `step`.
        plateau: The learning rate's factor, and what it follows.
        overflows: fp16 steps that were skipped.
        overflows_in_row: The last of them without a good step between.
        scaler: fp16's loss scale.
        hooks: State of each StepHook, tensors apart.
        events: What happened on the way (an out-of-memory, a stop), with its step.
        rng: Each rank's random number generators at this edge.
    """

    step: Count = 0
    epoch: Amount = 0.0
    tokens: Count = 0
    padded_tokens: Count = 0
    trained_tokens: Count = 0
    seconds: Amount = 0.0
    micro_batch_limit_tokens: Annotated[Count, Field(gt=0)] | None = None
    evaluated_step: Count = 0
    best: Best | None = None
    patience_value: Real | None = None
    evaluations_without_improvement: Count = 0
    stopped_early: bool = False
    plateau: Plateau = field(default_factory=Plateau)
    overflows: Count = 0
    overflows_in_row: Count = 0
    scaler: dict[str, int | Real] = field(default_factory=dict)
    hooks: list[JsonMapping] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    rng: list[RngState] = field(default_factory=list)

    def to_json(self) -> JsonObject:
        """As JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonMapping) -> TrainState:
        """What `to_json` gave.

        Raises:
            ValueError: Anything else; the text names the key.
        """
        if not isinstance(values, Mapping):
            raise ValueError("train is no object")
        values = {"plateau": {}, **values}  # which states of earlier versions lack
        if wrong := sorted({field.name for field in fields(cls)}.symmetric_difference(values)):
            raise ValueError(f"train.{wrong[0]} is missing or unknown")
        return read_dataclass(cls, values, "train")

    def is_complete(self, total_steps: int) -> bool:
        """Whether nothing is left to do."""
        return self.step >= total_steps or self.stopped_early

    def token_budget(self, planned_tokens: int) -> int:
        """Padded tokens of a forward pass."""
        return min(planned_tokens, self.micro_batch_limit_tokens or planned_tokens)

    def lower_token_budget(self, tokens: int) -> None:
        """After an out-of-memory in the step behind this edge."""
        self.micro_batch_limit_tokens = tokens
        self.events.append({"kind": "out_of_memory", "step": self.step + 1, "micro_batch_tokens": tokens})

    def count_overflow(self, is_overflow: bool, step: int, loss_scale: float) -> None:
        """Takes note of whether fp16 gradients of `step` overflowed.

        Raises:
            NumericsError: For the 20th time in a row.
        """
        in_row = self.overflows_in_row + 1 if is_overflow else 0
        if in_row >= MOST_OVERFLOWS_IN_ROW:
            raise NumericsError(
                f"step {step}: fp16 gradients overflowed {in_row} times in a row, {self.overflows + 1} skipped steps "
                f"in all, loss scale {loss_scale:g}",
                todo="use model.dtype bf16 or fp32, or lower training.learning_rate",
            )
        self.overflows_in_row = in_row
        self.overflows += is_overflow

    def judge(self, value: float, metric: str, *, lower_is_better: bool, min_delta: float = 0.0) -> bool:
        """Takes one evaluation into account, for the best checkpoint and for early stopping.

        The best checkpoint is the best at all; patience counts evaluations not better by more than `min_delta`.

        Returns:
            Whether this is the best so far.
        """
        sign = -1.0 if lower_is_better else 1.0
        if self.patience_value is None or sign * (value - self.patience_value) > min_delta:
            self.patience_value, self.evaluations_without_improvement = value, 0
        else:
            self.evaluations_without_improvement += 1
        if self.best is None or sign * (value - self.best.value) > 0:
            self.best = Best(self.step, metric, value)
            return True
        return False


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a run ended.

    Attributes:
        steps: Optimizer steps of the whole run.
        adapter_step: The step whose adapter is the run's.
        was_complete: Nothing was left to do.
        seconds: Time spent in steps, over all processes of the run; tokens likewise.
        peak_memory_bytes: Of the steps: allocated on a GPU, resident on a CPU.
        peak_before_steps_bytes: The same until the first step: loading, proofs, the rehearsal's tries. None where the
            system cannot tell the two apart; `peak_memory_bytes` is then of both.
        peak_reserved_bytes: What a GPU's allocator took; None on a CPU.
        live_tensors: The worst moment of live tensors over the steps, where they were counted.
        resumed_step: The step that this process went on from; 0 where it made all of them.
    """

    steps: int
    adapter_step: int
    best: Best | None
    stopped_early: bool
    was_complete: bool
    tokens: int
    padded_tokens: int
    trained_tokens: int
    seconds: float
    peak_memory_bytes: int
    peak_before_steps_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    live_tensors: LivePeak | None = None
    resumed_step: int = 0

    @classmethod
    def of_complete(cls, state: TrainState) -> FitResult:
        """Of a run that had ended before: nothing was done, nothing was measured."""
        return cls(
            steps=state.step,
            adapter_step=state.best.step if state.best else state.step,
            best=state.best,
            stopped_early=state.stopped_early,
            was_complete=True,
            tokens=state.tokens,
            padded_tokens=state.padded_tokens,
            trained_tokens=state.trained_tokens,
            seconds=state.seconds,
            peak_memory_bytes=0,
        )


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file. By Python: safetensors hides the errno of a full disk in a text of its own."""
    path.write_bytes(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Writes the state of every parameter, by the parameter's name."""
    tensors: dict[str, torch.Tensor] = {}
    stored: dict[tuple[int, int, torch.dtype], str] = {}  # bitsandbytes shares its quantisation maps between parameters
    states: dict[str, JsonObject] = {}
    for name, parameter in parameters.items():
        entries: JsonObject = {}
        states[name] = entries
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                identity = (value.data_ptr(), value.numel(), value.dtype)
                place = stored.setdefault(identity, f"{name}/{key}")
                tensors.setdefault(place, value)
                entries[key] = {"tensor": place}
            else:
                entries[key] = {"value": value}
    write_tensors(folder / TENSORS_FILE, tensors)
    skeleton = {"optimizer": type(optimizer).__name__, "states": states}
    (folder / SKELETON_FILE).write_text(json.dumps(skeleton, indent=1, allow_nan=False) + "\n", encoding="utf-8")


@torch.no_grad()
def load_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> None:
    """Takes back what `save_optimizer` wrote.

    Raises:
        CheckpointError: Parameters or shapes are not those that were saved.
    """
    skeleton = read_object(folder / SKELETON_FILE)
    # into memory: nothing stays mapped, so that a file cut short later does no harm
    tensors: dict[str, torch.Tensor] = load((folder / TENSORS_FILE).read_bytes())
    if skeleton["optimizer"] != type(optimizer).__name__:
        raise CheckpointError(
            f"holds the state of {skeleton['optimizer']}, the recipe's optimizer is {type(optimizer).__name__}",
            file=str(folder),
            todo="name the optimizer that was used",
        )
    states = skeleton["states"]
    if different := sorted(set(states) ^ set(parameters)):
        raise CheckpointError(
            f"its optimizer knows other parameters, {len(different)} differ, first {different[0]}",
            file=str(folder),
            todo="the recipe's adapter must be the one that was trained",
        )
    optimizer.state.clear()
    places = [(g, i, p) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])]
    names = {parameter: name for name, parameter in parameters.items()}
    for group_index, index, parameter in places:
        entries = states[names[parameter]]
        values = {key: tensors[e["tensor"]] if "tensor" in e else e["value"] for key, e in entries.items()}
        if values and hasattr(optimizer, "init_state"):
            # bitsandbytes: its own buffers (paged ones, shared maps), filled.
            optimizer.init_state(optimizer.param_groups[group_index], parameter, group_index, index)
            _fill(optimizer.state[parameter], values, f"{folder}: {names[parameter]}")
        elif values:
            # torch keeps its step counter on the CPU unless it is fused; every other tensor lies with its parameter.
            stays = () if optimizer.param_groups[group_index].get("fused") else ("step",)
            optimizer.state[parameter] = {
                key: value.to(parameter.device) if isinstance(value, torch.Tensor) and key not in stays else value
                for key, value in values.items()
            }


def save_hooks(folder: Path, hooks: Sequence[StepHook]) -> list[JsonMapping]:
    """Writes the tensors of all hooks' states, where there are any.

    Returns:
        What else there is of each.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: list[JsonMapping] = []
    for number, hook in enumerate(hooks):
        state = hook.state_dict()
        own = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"{number}/{name}": value for name, value in own.items()}
        plain.append({name: value for name, value in state.items() if name not in own})
    if tensors:
        write_tensors(folder / HOOKS_FILE, tensors)
    return plain


def load_hooks(folder: Path, hooks: Sequence[StepHook], plain: Sequence[JsonMapping]) -> None:
    """Gives each hook what `save_hooks` wrote of it."""
    file = folder / HOOKS_FILE
    tensors: dict[str, torch.Tensor] = load(file.read_bytes()) if file.exists() else {}
    for number, (hook, values) in enumerate(zip(hooks, plain, strict=True)):
        own = {name.removeprefix(f"{number}/"): t for name, t in tensors.items() if name.startswith(f"{number}/")}
        hook.load_state_dict({**values, **own})


@contextlib.contextmanager
def as_checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turns whatever a library raises while a checkpoint is read into an error that names the checkpoint.

    Raises:
        CheckpointError: A file holds something else than a run saves.
    """
    try:
        yield
    except (LorafitError, OSError):
        raise
    except Exception as error:  # safetensors, torch and numpy share no base class
        if is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"cannot be taken back ({type(error).__name__}: {first})",
            file=str(folder),
            todo="resume from another one with --resume-from STEP",
        ) from error


def _fill(state: JsonObject, values: JsonMapping, where: str) -> None:
    todo = "the recipe's optimizer must be the one that was used"
    if set(state) != set(values):
        what = f"optimizer state has {sorted(values)}, this optimizer wants {sorted(state)}"
        raise CheckpointError(what, file=where, todo=todo)
    for key, value in values.items():
        if not isinstance(value, torch.Tensor):
            state[key] = value
        elif state[key].shape != value.shape or state[key].dtype != value.dtype:
            wanted = f"this optimizer wants {state[key].dtype} {list(state[key].shape)}"
            what = f"optimizer state {key} is {value.dtype} {list(value.shape)}, {wanted}"
            raise CheckpointError(what, file=where, todo=todo)
        else:
            state[key].copy_(value)
