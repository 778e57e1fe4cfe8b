"""The whole way of one architecture: plan, two steps, evaluation, PEFT alone, merge, plain transformers, dry run.

    tiny base ─ train ─ evaluate ─┬─ PEFT alone over the base      same logits, no adapter zero or noise
                                  ├─ merge ─ transformers alone    same logits
                                  └─ estimate --exact              the bytes that training counted

All in this process, by the functions that the command line calls.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit import pipeline
from lorafit.contracts import Silent
from lorafit.errors import LorafitError, ModelError
from lorafit.model.classes import find_auto_class
from tests.support.tiny_model import make_tokenizer
from tests.support.zoo_models import make_base

TOLERANCE = 1e-4  # of logits, computed in fp32
EXACT_TOLERANCE = 0.03  # of live bytes
STEPS, ROWS = 2, 8


class BrokenError(AssertionError):
    """Something does not hold after a stage that went through."""


@dataclass
class Walk:
    """How far one architecture came in one precision.

    Attributes:
        stage: Where it is, or stopped.
        steps: Optimizer steps that were taken.
        trainable: Parameters of the adapter.
        quantised_share: Of the base's parameters, 0 to 1.
        learnt: Largest change of a logit by the adapter.
        peft_difference: Of a logit, PEFT's own model against lorafit's.
        merge_difference: Of a logit, plain transformers on the merged folder against lorafit's.
        exact_ratio: Live bytes of the dry run over those counted while training; 0: it runs on no fake tensors.
        left_out: What takes no adapter, by the plan.
        seconds: Spent so far, by stage.
    """

    stage: str = ""
    steps: int = 0
    trainable: int = 0
    quantised_share: float = 0.0
    learnt: float = 0.0
    peft_difference: float = 0.0
    merge_difference: float = 0.0
    exact_ratio: float = 0.0
    left_out: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def at(self, stage: str) -> Iterator[None]:
        """One stage, its time kept."""
        self.stage, began = stage, time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - began


def make_world(architecture: str, folder: Path) -> bool:
    """`base/` and `rows.jsonl` in a folder; all rows have one length, as the dry run's have.

    Returns:
        Whether transformers builds such a model here; if not, `base/` holds its config alone.
    """
    rows = [{"question": f"what does shop {number} sell", "answer": f"red mug {number}"} for number in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        make_base(architecture, folder / "base", make_tokenizer())
    except Exception:  # as many kinds as there are config classes that check themselves; the plan has to say why
        (folder / "base").mkdir(exist_ok=True)
        config = json.dumps({"model_type": architecture})  # the class's own defaults
        (folder / "base" / "config.json").write_text(config, encoding="utf-8")
        return False
    return True


def refuse_unbuilt(folder: Path) -> str:
    """What the plan of a world says whose model transformers cannot build.

    Raises:
        BrokenError: It does not refuse.
    """
    try:
        pipeline.estimate(recipe(folder, "none"))
    except LorafitError as error:
        return str(error)
    raise BrokenError("transformers cannot build it, and the plan does not refuse it")


def recipe(folder: Path, quantization: str) -> dict[str, Any]:
    """A recipe over a world, as the YAML would hold it."""
    return {
        "name": "zoo",
        "model": {"base": str(folder / "base"), "dtype": "fp32", "quantization": quantization},
        "adapter": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl"), "max_length": 128},
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "micro_batch_tokens": 1,
            "learning_rate": 1e-2,
            "optimizer": "adamw",
            "gradient_checkpointing": False,
        },
        "evaluation": {"final": ["perplexity"], "max_new_tokens": 2, "every_steps": STEPS},
        "checkpoints": {"every_steps": STEPS},
        "output": str(folder / f"run-{quantization}"),
    }


def go(folder: Path, quantization: str, walk: Walk, *, exact: bool = True) -> None:
    """Walks a world's whole way in one precision; what it finds stands in `walk`, also where it stops.

    Raises:
        BrokenError: Logits differ, an adapter is zero or has nothing to learn, or counts disagree.
        LorafitError: A command refused.
    """
    values, run, merged = (
        recipe(folder, quantization),
        folder / f"run-{quantization}",
        folder / f"merged-{quantization}",
    )
    with walk.at("train"):
        try:
            trained = pipeline.train(values, measure_memory=exact)
        finally:
            walk.steps = _steps_taken(run)
        walk.trainable = trained.plan.trainable_parameters
        walk.left_out = tuple(dict.fromkeys(part.name for part in trained.plan.without_adapter))
    with walk.at("evaluate"):
        pipeline.evaluate(run)
        ours, walk.quantised_share = _own_logits(run)
    with walk.at("PEFT"):
        _check_peft(folder, run, quantization, ours, walk)
    with walk.at("merge"):
        pipeline.merge(run, output=merged)
        walk.merge_difference = _distance(_plain_logits(merged), ours)
        _require(walk.merge_difference <= TOLERANCE, f"the merged model's logits are {walk.merge_difference:.1e} away")
    if exact:
        with walk.at("dry run"):
            _check_exact(values, trained, walk)


def _steps_taken(run: Path) -> int:
    """Steps that a run logged, however it ended."""
    log = run / "metrics.jsonl"
    return sum('"loss"' in line for line in log.read_text("utf-8").splitlines()) if log.is_file() else 0


def _check_exact(values: dict[str, Any], trained: Any, walk: Walk) -> None:
    """The step on fake tensors against the bytes that training counted, under the attention that was taken."""
    flags = [f"model.attention={trained.resolved.attention}"]
    try:
        dry = pipeline.estimate(values, overrides=flags, gpu="cpu", exact=True).exact
    except ModelError as error:
        _require("does not run on tensors without values" in str(error), str(error))
        return
    assert dry is not None
    walk.exact_ratio = dry.tensor_bytes / trained.fit.live_tensors.tensor_bytes
    _require(abs(walk.exact_ratio - 1) <= EXACT_TOLERANCE, f"--exact is {walk.exact_ratio:.3f} of what was counted")


def _check_peft(folder: Path, run: Path, quantization: str, ours: Any, walk: Walk) -> None:
    """The adapter folder in PEFT, over a base that transformers loaded: nothing of lorafit takes part."""
    from peft import PeftModel

    base = _load(folder / "base", **_quantised_as(run, quantization))
    before = _logits(base)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(base, run / "adapter")
    missing = [str(warning.message) for warning in said if "missing adapter keys" in str(warning.message).lower()]
    _require(not missing, f"PEFT finds no weights for: {''.join(missing)[:120]}")
    tuned = _logits(model)
    walk.peft_difference, walk.learnt = _distance(tuned, ours), _distance(tuned, before)
    _require(walk.peft_difference <= TOLERANCE, f"PEFT's logits are {walk.peft_difference:.1e} away")
    _require(walk.learnt > 10 * TOLERANCE, f"the adapter moves no logit by more than {walk.learnt:.1e}")
    chance = learns_from_rounding(model)
    _require(not chance, f"{len(chance)} adapters have no gradient but rounding in this base, e.g. {chance[:1]}")
    own = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    zero = [name for name, parameter in own.items() if ".lora_B." in name and not parameter.any()]
    _require(not zero, f"{len(zero)} adapters are zero, e.g. {zero[:1]}")
    found = sum(parameter.numel() for parameter in own.values())
    _require(found == walk.trainable, f"{walk.trainable} trainable parameters planned, PEFT has {found}")


def learns_from_rounding(model: Any) -> list[str]:
    """Adapters of a PEFT model whose gradient is zero or rounding, as that of queries is which see one key each.

    What they learn is chance, and nothing where another attention rounds otherwise. Thrice the loss has thrice the
    gradient, however small; rounding is drawn anew.
    """
    import torch

    trained = {name: p.requires_grad_() for name, p in model.named_parameters() if ".lora_B." in name}
    ids = _ids()
    logits = model.eval()(input_ids=ids, use_cache=False).logits.float()
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    once, thrice = (
        torch.autograd.grad(factor * loss, list(trained.values()), retain_graph=True, materialize_grads=True)
        for factor in (1, 3)
    )
    pairs = zip(trained, once, thrice, strict=True)
    return [name for name, one, three in pairs if not (three / 3 - one).norm() < one.norm() / 2]


def _own_logits(run: Path) -> tuple[Any, float]:
    """Of lorafit's own model of a run, and the share of its base that is quantised."""
    from lorafit.answering.opening import open_answerer
    from lorafit.model.inspect import coverage

    model = open_answerer(run, None, None, Silent()).load().model
    return _logits(model), coverage(model).quantised_share


def _plain_logits(folder: Path) -> Any:
    return _logits(_load(folder))


def _load(folder: Path, **options: Any) -> Any:
    """transformers alone."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto = getattr(transformers, find_auto_class(config, "AutoModelForCausalLM"))
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    filled = sorted(info["missing_keys"])
    _require(not filled, f"transformers fills {len(filled)} tensors with random numbers, e.g. {filled[:1]}")
    for module in model.modules():  # else bitsandbytes rounds constants to bf16 in the first forward on some CPUs
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _quantised_as(run: Path, quantization: str) -> dict[str, Any]:
    """transformers' settings for the same linears in the same codes: what the run's own record says."""
    if quantization == "none":
        return {}
    import torch
    from transformers import BitsAndBytesConfig

    from lorafit.answering.opening import open_answerer

    packed = set(json.loads((run / "quantization.json").read_text(encoding="utf-8"))["tensors"])
    base = open_answerer(run, None, None, Silent()).load().model.get_base_model()
    linears = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    plain = sorted({name.replace(".base_layer", "") for name in linears if ".lora_" not in name} - packed)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=plain,
    )
    return {"quantization_config": settings}


def _logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=_ids(), use_cache=False).logits.float()


def _ids() -> Any:
    import torch

    return torch.arange(5, 305, 13)[None]


def _distance(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenError(what)
