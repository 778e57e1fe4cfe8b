"""Names from other tools, misspellings, and keys in the wrong section."""

from __future__ import annotations

from typing import Annotated

import pytest
from pydantic import TypeAdapter

from lorafit.console.nearest import nearest
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters.peft import fitting_methods
from lorafit.kinds.initialisations import initialisations
from lorafit.recipe.foreign import foreign, is_not_yet
from lorafit.recipe.schema import Recipe, TrainSourceSection, one_name_of
from lorafit.recipe.schema_tree import every_key, kinds_of, recipe_tree
from lorafit.recipe.schema_tree import words as words_of
from tests.support.recipe_texts import MINIMAL, Fails, Loads, parts

KEYS = {".".join(map(str, path)): node for path, node in every_key(recipe_tree())}
FOREIGN_NAMES, NAMES_IN_A_SOURCE = foreign()["anywhere"], foreign()["in_a_source"]
ANSWERED = {name: ours if isinstance(ours, str) else ours[True] for name, ours in FOREIGN_NAMES.items()}
AT_ONCE = 300
"""Less than the errors that are shown of a recipe."""
OURS = {name: ours.partition(": ")[0] for name, ours in ANSWERED.items()}


def test_every_answer_names_a_key_that_exists() -> None:
    """The table cannot rot: a key that is renamed must be renamed in it."""
    choices = {f"{key}.kind" for key, node in KEYS.items() if kinds_of(node)}
    assert {ours for ours in OURS.values() if ours} - set(KEYS) - choices == {"extends"}
    assert set(NAMES_IN_A_SOURCE.values()) <= set(TrainSourceSection.model_fields)


def test_answers_by_value_name_the_same_key() -> None:
    for name, ours in FOREIGN_NAMES.items():
        if not isinstance(ours, str):
            assert {True, False} <= set(ours), name
            assert {text.partition(": ")[0] for text in ours.values()} == {OURS[name]}, name


AXOLOTL = """\
base_model: some/model
adapter: qlora
strict: false
mask_history: false
load_in_8bit: false
sequence_len: 2048
micro_batch_size: 2
lora_r: 32
eval_table_size:
use_rslora: true
neftune_noise_alpha: 5
use_liger_kernel: true
dataset_num_proc: 4
eos_token: <|im_end|>
lora_task_type: CAUSAL_LM
dataset_train_split: train
dataset_test_split: test
"""


def test_a_recipe_of_another_tool_is_called_that(fails: Fails) -> None:
    """And each of its keys is answered, none with the nearest name of ours that means something else."""
    said = parts(fails(AXOLOTL))
    assert "looks like a recipe of axolotl" in said[0] and "docs/recipe.md" in said[0]
    text = "\n".join(said)
    for words in (
        "adapter: QLoRA is adapter: lora on a quantised base; add model: {quantization: nf4}",
        "strict: unknown key; a recipe is always read strictly",
        "mask_history: unknown key; in lorafit this is data.train_on (assistant, so every answer of a chat carries",
        "load_in_8bit: unknown key; in lorafit this is model.quantization (none)",
        "eval_table_size: unknown key; tables of answers are not tracked",
        "use_rslora: unknown key; in lorafit this is adapter.kind (rslora)",
        "neftune_noise_alpha: unknown key; in lorafit this is training.embedding_noise",
        "use_liger_kernel: unknown key; not needed",
        "dataset_num_proc: unknown key; decided by the machine",
        "eos_token: unknown key; the base model's own end tokens",
        "lora_task_type: unknown key; in lorafit this is task",
        "dataset_train_split: unknown key; in lorafit this is data.train (each source has a split)",
        "dataset_test_split: unknown key; in lorafit this is data.validation",
    ):
        assert words in text, words
    assert "a recipe has name, task" not in text


def test_a_recipe_of_ours_with_a_few_foreign_keys_is_none_of_theirs(fails: Fails) -> None:
    said = parts(fails(MINIMAL + "lora_r: 8\nmicro_batch_size: 2\nsequence_len: 9\nsample_packing: true\n"))
    assert not [line for line in said if "looks like" in line]


@pytest.mark.parametrize("kind", ["galore", "GaLore", "longlora"])
def test_an_adapter_that_does_not_exist_yet_says_so(fails: Fails, kind: str) -> None:
    assert f"adapter '{kind}' does not exist yet; available: " in str(fails(MINIMAL + f"adapter: {kind}\n"))


def test_a_foreign_name_is_never_one_of_ours_in_its_place() -> None:
    """A name that is a key of ours at the top would never be looked up."""
    assert not set(FOREIGN_NAMES) & set(Recipe.model_fields)
    assert not set(NAMES_IN_A_SOURCE) & set(TrainSourceSection.model_fields)


def test_what_exists_is_not_said_to_be_missing() -> None:
    from lorafit.kinds.adapters import adapters
    from lorafit.kinds.formats import formats
    from lorafit.kinds.optimizers import optimizers
    from lorafit.kinds.quantizations import quantizations
    from lorafit.kinds.tasks import tasks

    families = {"adapter": adapters, "optimizer": optimizers, "quantization": quantizations}
    for family, kinds in {**families, "format": formats, "task": tasks}.items():
        assert not [name for name in kinds.names() if is_not_yet(family, name)]


def test_every_foreign_word_has_a_word_of_ours() -> None:
    assert set(foreign()["words"].values()) <= {word for node in KEYS.values() for word in words_of(node)}


ANSWERS = [  # where, what another tool calls it, ours
    ("", "base_model", "model.base"),
    ("", "model_name_or_path", "model.base"),
    ("", "load_in_4bit", "model.quantization"),
    ("", "bnb_4bit_quant_type", "model.quantization.kind"),
    ("", "bf16", "model.dtype"),
    ("", "fp16", "model.dtype"),
    ("", "flash_attention", "model.attention"),
    ("", "lora_r", "adapter.r"),
    ("", "lora_alpha", "adapter.alpha"),
    ("", "lora_dropout", "adapter.dropout"),
    ("", "lora_target_modules", "adapter.target_modules"),
    ("", "lora_target_linear", "adapter.target_modules"),
    ("", "finetuning_type", "adapter.kind"),
    ("adapter", "lora_alpha", "adapter.alpha"),
    ("adapter", "rank", "adapter.r"),
    ("", "datasets", "data.train"),
    ("", "dataset", "data.train"),
    ("", "val_set_size", "data.validation.fraction"),
    ("", "sequence_len", "data.max_length"),
    ("", "cutoff_len", "data.max_length"),
    ("training", "max_seq_length", "data.max_length"),
    ("training", "max_length", "data.max_length"),
    ("", "train_on_inputs", "data.train_on"),
    ("training", "assistant_only_loss", "data.train_on"),
    ("training", "completion_only_loss", "data.train_on"),
    ("", "template", "data.chat_template"),
    ("", "sample_packing", "data.packing"),
    ("training", "packing", "data.packing"),
    ("training", "per_device_train_batch_size", "training.batch_size"),
    ("", "micro_batch_size", "training.micro_batch_tokens"),
    ("", "gradient_accumulation_steps", "training.micro_batch_tokens"),
    ("training", "num_train_epochs", "training.epochs"),
    ("", "num_epochs", "training.epochs"),
    ("training", "lr", "training.learning_rate"),
    ("", "lr_scheduler_type", "training.schedule"),
    ("training", "optim", "training.optimizer"),
    ("training", "warmup_ratio", "training.schedule.warmup_ratio"),
    ("", "warmup_steps", "training.schedule.warmup_steps"),
    ("training", "weight_decay", "training.optimizer.weight_decay"),
    ("", "learning_rate", "training.learning_rate"),
    ("", "gradient_checkpointing", "training.gradient_checkpointing"),
    ("", "max_grad_norm", "training.max_grad_norm"),
    ("training", "random_state", "seed"),
    ("training", "save_steps", "checkpoints.every_steps"),
    ("training", "save_total_limit", "checkpoints.keep_last"),
    ("training", "eval_steps", "evaluation.every_steps"),
    ("", "early_stopping_patience", "evaluation.early_stopping.patience"),
    ("training", "logging_steps", "metrics.jsonl"),
    ("training", "output_dir", "output"),
    ("", "report_to", "tracking"),
    ("", "wandb_project", "WANDB_PROJECT"),
    ("", "trust_remote_code", "never run"),
    ("", "deepspeed", "accelerate"),
]


@pytest.mark.parametrize(("section", "name", "ours"), ANSWERS, ids=[f"{s}.{n}".strip(".") for s, n, _ in ANSWERS])
def test_another_tools_name_is_answered_with_ours(fails: Fails, section: str, name: str, ours: str) -> None:
    text = f"{section}: {{{name}: 1}}\n" if section else f"{name}: 1\n"
    error = fails(MINIMAL + text)
    assert error.exit_code == 3
    assert f"{section}.{name}".strip(".") + ": unknown key" in str(error)
    assert ours in str(error)


@pytest.mark.parametrize("first", range(0, len(FOREIGN_NAMES), AT_ONCE))
def test_every_foreign_name_is_answered_wherever_it_stands(fails: Fails, first: int) -> None:
    """As many at once as errors are shown, one line each, each naming its key."""
    names = list(FOREIGN_NAMES)[first : first + AT_ONCE]
    error = fails(MINIMAL + "".join(f"{name}: 1\n" for name in names))
    lines = {line.split(": ")[1]: line for line in parts(error)}
    assert set(lines) == set(names)
    for name in names:
        assert not OURS[name] or f"in lorafit this is {OURS[name]}" in lines[name]
        assert len(lines[name]) < 292


@pytest.mark.parametrize(
    ("name", "ours"),
    [("type", "format"), ("file", "path"), ("name", "subset"), ("weight", "repeats"), ("max_samples", "limit")],
)
def test_another_tools_names_in_a_source(fails: Fails, name: str, ours: str) -> None:
    error = fails(MINIMAL.replace("a.jsonl}", f"[{{path: a, {name}: 1}}]}}"))
    assert f"data.train[0].{name}: unknown key; a source's key for this is {ours}" in str(error)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.epoch", "epochs"),
        ("training.learnig_rate", "learning_rate"),
        ("training.schedule.warmup_step", "warmup_steps"),
        ("data.trian", "train"),
        ("data.validaton", "validation"),
        ("evaluation.early_stoping.patience", "early_stopping"),
        ("checkpoints.keep", "keep_last"),
        ("modle.base", "model"),
        ("extend", "extends"),
        ("adapter.target_module", "target_modules"),
    ],
)
def test_a_misspelling_is_answered_with_the_nearest_name(fails: Fails, key: str, meant: str) -> None:
    error = fails(MINIMAL, [f"{key}=3"])
    assert f"did you mean {meant}" in str(error)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("epochs", "training.epochs"),
        ("r", "adapter.r"),
        ("data.learning_rate", "training.learning_rate"),
        ("training.attention", "model.attention"),
        ("training.path", "data.train.path"),
        ("max_lenght", "data.max_length"),
        ("training.keep_last", "checkpoints.keep_last"),
    ],
)
def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(fails: Fails, key: str, meant: str) -> None:
    assert f"did you mean {meant}" in str(fails(MINIMAL, [f"{key}=3"]))


def test_an_option_of_another_task_is_said_to_be_that(fails: Fails) -> None:
    """`beta` is another tool's name for `task.beta` elsewhere; here it is where it belongs, on the wrong task."""
    said = str(fails(MINIMAL + "task: sequence-classification\n", ["task.beta=1"]))
    assert said.endswith("task.beta: unknown key; sequence-classification has no beta; it belongs to dpo and kto")
    assert "in lorafit this is task.beta" in str(fails(MINIMAL, ["training.beta=1"]))


@pytest.mark.parametrize("flag", ["task.threshold=f1", "task.thresholds=[0.5]"])
def test_an_option_that_its_section_refuses_is_blamed_where_it_was_set(fails: Fails, flag: str) -> None:
    said = str(fails(MINIMAL + "task: sequence-classification\n", [flag]))
    assert said.startswith(f"--set {flag}: {flag.partition('=')[0]}: ") and "is for rows of several labels" in said


def test_an_option_of_many_kinds_names_the_usual_one_first(fails: Fails) -> None:
    said = str(fails(MINIMAL + "adapter: {kind: vera, alpha: 8}\n"))
    assert "vera has no alpha; it belongs to lora, adalora, dora and " in said and said.endswith(" more")


def test_a_kind_set_over_options_of_another_is_told_how_to_replace_the_section(fails: Fails) -> None:
    text = MINIMAL + "adapter: {kind: lora, r: 8, alpha: 8}\ntraining: {optimizer: {kind: sgd, momentum: 0.9}}\n"
    said = parts(fails(text, ["adapter.kind=vera"]))
    assert len(said) == 1 and said[0].endswith("; --set adapter=vera replaces the whole section")
    said = parts(fails(text, ["training.optimizer.kind=adamw"]))
    assert said[0].endswith("; --set training.optimizer=adamw replaces the whole section")
    assert "replaces" not in str(fails(MINIMAL + "adapter: {kind: vera, alpha: 8}\n"))


def test_a_key_like_no_other_gets_the_list(fails: Fails) -> None:
    assert "this section has every_steps, keep_last" in str(fails(MINIMAL + "checkpoints: {zzzzqq: 1}\n"))


VALUES = [
    ("training.optimizer=adamw_torch", "adamw"),
    ("training.optimizer=adamw_bnb_8bit", "adamw_8bit"),
    ("training.schedule=constant_with_warmup", "constant"),
    ("model.quantization=4bit", "nf4"),
    ("model.dtype=float16", "fp16"),
    ("model.attention=flash_attn", "flash_attention_2"),
    ("task=sft", "causal-lm"),
    ("adapter=bitfit", "bias"),
    ("adapter=ln_tuning", "layer_norm"),
    ("adapter=bone", "miss"),
    ("adapter=ptuning", "p_tuning"),
    ("adapter=prefix", "prefix_tuning"),
    ("adapter=prompt", "prompt_tuning"),
    ("adapter=full_finetune", "full"),
    ("evaluation.final=[mean_token_accuracy]", "token_accuracy"),
]


@pytest.mark.parametrize(("flag", "ours"), VALUES)
def test_another_tools_word_is_answered_with_ours(fails: Fails, flag: str, ours: str) -> None:
    assert f"did you mean {ours}" in str(fails(MINIMAL, [flag]))


@pytest.mark.parametrize("flag", ["adapter", "adapter.kind"])
def test_a_method_that_is_an_option_here_is_answered_with_what_to_write(fails: Fails, loads: Loads, flag: str) -> None:
    names = foreign()["kinds"]["adapter"]
    assert {"qlora", *initialisations.names()} - {"kaiming", "gaussian", "orthogonal"} <= names.keys()
    assert {name for name, answer in names.items() if "kind: peft" in answer} == {
        name for name in fitting_methods() if name not in adapters.names()
    }
    for name in names:
        what, _, todo = str(fails(MINIMAL, [f"{flag}={name.upper()}"])).rpartition("; ")
        assert "unknown" not in what and "does not exist yet" not in what
        base = "nf4" if name == "loftq" else "none"
        if todo.startswith("write adapter: "):
            loads(MINIMAL, [f"adapter={todo.removeprefix('write adapter: ')}", f"model.quantization={base}"])


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("adapter.layers=last", "write {first: 4}, {last: 4} or {list: [0, 5, 7]}"),
        ("adapter.layers=[1, 2]", "write layers: {list: [1, 2]}"),
        ("training.unfreezing=5", "write {top: 4, steps: [50, 100]}"),
        ("training.unfreezing=[50, 100]", "write {top: 4, steps: [50, 100]}"),
        ("checkpoints=often", "its keys are every_steps, keep_last"),
        ("checkpoints=[5]", "its keys are every_steps, keep_last"),
    ],
)
def test_what_is_no_mapping_is_answered_with_one(fails: Fails, flag: str, advice: str) -> None:
    assert str(fails(MINIMAL, [flag])).endswith(advice)


@pytest.mark.parametrize(
    "flag", ["adapter.ranks={early: 0}", "adapter.ranks=[0]", "adapter.ranks={early: 0, late: 0}", "tracking=[x]"]
)
def test_what_is_left_of_a_mapping_of_names_is_not_blamed(fails: Fails, flag: str) -> None:
    assert not any("names no" in said or "empty" in said for said in parts(fails(MINIMAL, [flag])))


@pytest.mark.parametrize("key", ["adapter.lora_plus_lr_ratio", "adapter.loraplus_lr_ratio"])
def test_the_ratio_of_lora_plus_is_known_however_it_is_written(fails: Fails, key: str) -> None:
    assert "in lorafit this is adapter.rate_ratio" in str(fails(MINIMAL, [f"{key}=16"]))


def test_no_answer_says_of_what_exists_that_it_does_not() -> None:
    assert not [name for name, answer in ANSWERED.items() if "not built" in answer or "not trained" in answer]


@pytest.mark.parametrize(
    "value", ["all", "'all linear'", "all_linear", "All", "[all]", "[all-linear]", "[q_proj, all]"]
)
def test_a_word_for_every_linear_is_answered_with_all_linear(fails: Fails, value: str) -> None:
    """At the recipe's line, before a row is read; never with a list that the same check would refuse next."""
    said = str(fails(MINIMAL + f"adapter: {{target_modules: {value}}}\n"))
    assert said.startswith("r.yaml:") and "did you mean all-linear?" in said and "write [" not in said


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("tracking=none", "leave it out, or write []"),
        ("tracking=[none]", "leave it out, or write []"),
        ("tracking=false", "leave it out, or write []"),
        ("evaluation.early_stopping=false", "leave it out, or write null"),
        ("evaluation.every_steps=none", "leave it out, or write null"),
        ("training.max_grad_norm=none", "write null"),
    ],
)
def test_a_word_for_none_is_answered_with_what_the_key_takes(fails: Fails, flag: str, advice: str) -> None:
    assert str(fails(MINIMAL, [flag])).endswith(f"; {advice}")


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("tracking=wandb", "; write [wandb]"),
        ("tracking='wandb, mlflow'", "; write [wandb, mlflow]"),
        ("tracking=tensorbord", "; did you mean [tensorboard]?"),
        ("tracking=everything", "found 'everything'"),
        ("adapter.target_modules='q_proj,v_proj'", "; write [q_proj, v_proj]"),
        ("adapter.target_modules=layers.0.q_proj", "found 'layers.0.q_proj'"),
        ("adapter.target_modules=none", "found 'none'"),
    ],
)
def test_a_word_in_the_place_of_a_list_is_advised_only_what_is_taken(
    fails: Fails, loads: Loads, flag: str, advice: str
) -> None:
    assert str(fails(MINIMAL, [flag])).endswith(advice)
    if advice.startswith("; write "):
        loads(MINIMAL, [f"{flag.split('=')[0]}={advice.removeprefix('; write ')}"])


def test_few_shared_letters_are_no_likeness() -> None:
    """`bias` has three of the four letters of `base`, and means another thing; a slip of the hand is still known."""
    assert nearest("bias", ["base", "seed"]) == []
    assert nearest("loss_fn", ["lora", "task"]) == []
    assert nearest("trian", ["train", "test"]) == ["train"]
    assert nearest("keep", ["every_steps", "keep_last"]) == ["keep_last"]
    assert nearest("learnig_rate", ["learning_rate"]) == ["learning_rate"]


def test_one_name_of_says_what_there_is() -> None:
    check = TypeAdapter(Annotated[str, *one_name_of("colour", ["red", "green"])]).validate_python
    assert check("red") == "red"
    with pytest.raises(ValueError, match=r"unknown colour 'gren'; did you mean green\? available: red, green"):
        check("gren")


def test_a_whole_axolotl_config_is_answered_line_by_line(fails: Fails) -> None:
    text = """\
base_model: NousResearch/Llama-2-7b-hf
load_in_4bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
val_set_size: 0.05
output_dir: ./outputs/out
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
"""
    whole, *lines = parts(fails(text))
    assert "looks like a recipe of axolotl" in whole
    answered = {line.split(": ")[1] for line in lines}
    written = {line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")}
    inside = {"datasets[0].path", "datasets[0].type"}
    assert answered == written | inside | {"name"}, "each of its keys, and the one that is missing"
    assert not any("missing" in line for line in lines if ": name: " not in line)


@pytest.mark.parametrize(("ours", "is_axolotls"), [(5, False), (2, True)])
def test_a_recipe_of_ours_with_strange_keys_stays_ours(fails: Fails, ours: int, is_axolotls: bool) -> None:
    own = ["name: x", "seed: 0", "model: {base: b}", "training: {epochs: 1}", "output: out"][:ours]
    strange = ["datasets: []", "sequence_len: 2048", "micro_batch_size: 2", "num_epochs: 4"]
    said = str(fails("\n".join([*own, *strange])))
    assert ("looks like a recipe of axolotl" in said) == is_axolotls
    assert "sequence_len: unknown key; in lorafit this is data.max_length" in said, "each is answered still"


def test_only_training_repeats_rows(fails: Fails) -> None:
    """Held-out rows are scored once each: `repeats` would do nothing there."""
    error = fails(MINIMAL.replace("a.jsonl}", "a.jsonl, test: [{path: b.jsonl, repeats: 2}]}"))
    assert "data.test[0].repeats: unknown key here; did you mean data.train.repeats?" in str(error)


UNSLOTH = """\
model_name: some/model
max_seq_length: 2048
load_in_4bit: true
r: 16
target_modules: [q_proj, v_proj]
lora_alpha: 16
lora_dropout: 0
bias: none
use_gradient_checkpointing: unsloth
random_state: 3407
use_rslora: false
loftq_config:
dataset_text_field: text
"""


def test_a_recipe_of_unsloth_is_called_that_and_each_key_is_answered(fails: Fails) -> None:
    whole, *lines = parts(fails(UNSLOTH))
    assert "looks like a recipe of Unsloth" in whole
    said = {line.split(": ")[1]: line for line in lines}
    assert set(said) == {line.split(":")[0] for line in UNSLOTH.splitlines()} | {"name"}
    assert said["bias"].endswith("as under bias: none; adapter.kind: bias trains them alone")
    assert said["loftq_config"].endswith("in lorafit this is adapter.init (loftq)")
    assert "training.gradient_checkpointing (auto" in said["use_gradient_checkpointing"]
    assert "did you mean adapter.r?" in said["r"]


@pytest.mark.parametrize(
    ("text", "key", "answer"),
    [
        ("lora_target: all", "lora_target", "adapter.target_modules (all-linear)"),
        ("lora_target: q_proj,v_proj", "lora_target", "adapter.target_modules ([q_proj, v_proj])"),
        ("optim: adamw_torch_fused", "optim", "training.optimizer (adamw)"),
        ("optim: adamw_bnb_8bit", "optim", "training.optimizer (adamw_8bit)"),
        ("optim: adafactor", "optim", "training.optimizer (adafactor)"),
        ("optim: galore_adamw", "optim", "training.optimizer ('galore_adamw' does not exist yet)"),
        ("lr_scheduler_type: constant_with_warmup", "lr_scheduler_type", "training.schedule (constant)"),
        ("flash_attention: true", "flash_attention", "model.attention (flash_attention_2, on a GPU"),
        ("flash_attention: false", "flash_attention", "model.attention (auto)"),
        ("torch_dtype: bfloat16", "torch_dtype", "model.dtype (bf16)"),
        ("precision: 16-mixed", "precision", "model.dtype (fp16)"),
        ("fp16: true", "fp16", "model.dtype (fp16)"),
        ("report_to: none", "report_to", "tracking (leave it out, or write [])"),
        ("report_to: wandb", "report_to", "tracking ([wandb])"),
        ("stage: sft", "stage", "task (causal-lm)"),
        ("finetuning_type: lora", "finetuning_type", "adapter.kind (lora)"),
        ("load_in_4bit: true\nload_in_8bit: false", "load_in_8bit", "model.quantization (nf4, by load_in_4bit)"),
        ("load_in_4bit: false\nload_in_8bit: true", "load_in_4bit", "model.quantization (int8, by load_in_8bit)"),
        ("load_in_8bit: true", "load_in_8bit", "model.quantization (int8)"),
        ("load_in_4bit: false\nload_in_8bit: false", "load_in_4bit", "model.quantization (none)"),
        (
            "micro_batch_size: 3\ngradient_accumulation_steps: 5",
            "micro_batch_size",
            "training.batch_size (15: micro_batch_size 3 x gradient_accumulation_steps 5, times the devices",
        ),
        (
            "per_device_train_batch_size: 2\ngradient_accumulation_steps: 8",
            "gradient_accumulation_steps",
            "training.batch_size (16: per_device_train_batch_size 2 x gradient_accumulation_steps 8, times the devices",
        ),
        ("micro_batch_size: 3", "micro_batch_size", "training.batch_size (micro_batch_size x gradient_accumulation"),
    ],
)
def test_the_answer_to_a_key_says_the_value_that_its_value_means(
    fails: Fails, text: str, key: str, answer: str
) -> None:
    said = {line.split(": ")[1]: line for line in parts(fails(MINIMAL + text + "\n"))}
    assert f"in lorafit this is {answer}" in said[key]


@pytest.mark.parametrize(
    ("line", "answers"),
    [
        (
            "datasets: [{path: a.jsonl, type: completion, split: train}, {path: b, type: chat_template}]",
            {
                "datasets[0].path": "did you mean data.train[0].path?",
                "datasets[0].type": "a source's key for this is format: text",
                "datasets[0].split": "did you mean data.train[0].split?",
                "datasets[1].path": "did you mean data.train[1].path?",
                "datasets[1].type": "a source's key for this is format: messages",
            },
        ),
        ("test_datasets: [{path: a}]", {"test_datasets[0].path": "did you mean data.test[0].path?"}),
        (
            "datasets: [{message_property_mappings: {role: from, content: value}}]",
            {"datasets[0].message_property_mappings": "data.train.columns ({ours: theirs})"},
        ),
        (
            "lora: {r: 8, lora_alpha: 16, bias: none}",
            {"lora.r": "adapter.r?", "lora.lora_alpha": "adapter.alpha", "lora.bias": "biases stay frozen"},
        ),
        (
            "quantization_config: {load_in_4bit: true, bnb_4bit_use_double_quant: true}",
            {
                "quantization_config.load_in_4bit": "model.quantization (nf4)",
                "quantization_config.bnb_4bit_use_double_quant": "model.quantization.double_quant",
            },
        ),
    ],
)
def test_the_keys_inside_of_another_tools_section_are_answered_too(
    fails: Fails, line: str, answers: dict[str, str]
) -> None:
    _, *lines = parts(fails(MINIMAL + line + "\n"))
    said = {one.split(": ")[1]: one for one in lines}
    assert set(said) == set(answers)
    for key, answer in answers.items():
        assert said[key].startswith("r.yaml:4:") and answer in said[key]


@pytest.mark.parametrize(
    "line", ["datasets: [1, {path: a, 2: b}]", "datasets: {path: {path: {}}}", "lora: [[r]]", "lora:"]
)
def test_another_tools_section_of_odd_contents_is_answered(fails: Fails, line: str) -> None:
    assert any("in lorafit this is" in said for said in parts(fails(MINIMAL + line + "\n")))
