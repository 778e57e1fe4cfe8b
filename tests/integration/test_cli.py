"""The command line itself: help, the flags that every command has, what goes to which stream, and the main job."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from lorafit.answering.evaluation_rows import changed_evaluation
from lorafit.cli import app
from lorafit.model import load as load_module
from lorafit.run.workspace import open_run
from tests.support.processes import PROGRAM
from tests.support.world import Outcome, World, say_all

COMMANDS = sorted(get_command(app).commands)  # type: ignore[attr-defined]
COMMON_FLAGS = ("--json", "--quiet", "--verbose", "--debug", "--help")
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "pandas", "pyarrow")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(world: World, command: str) -> None:
    outcome = world.run(command, "--help")
    assert outcome.code == 0
    assert outcome.stderr == ""
    for part in ("Usage:", command, *COMMON_FLAGS):
        assert part in outcome.stdout
    assert "function" not in outcome.stdout
    assert "<" not in re.sub(r"<(path|str|list\[str\])>", "", outcome.stdout).split("Options")[0]
    assert world.run(command, "-h").stdout == outcome.stdout


def test_help_lists_every_command_with_what_it_does(world: World) -> None:
    outcome = world.run("--help")
    for command in COMMANDS:
        line = next(line for line in outcome.stdout.splitlines() if line.split()[:1] == [command])
        assert len(line.split()) > 3
    assert outcome.code == 0
    assert world.run() == outcome


@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        (["--help"], ("pydantic", "yaml", "numpy", *HEAVY)),
        (["train", "--help"], ("yaml", "numpy", *HEAVY)),
        (["validate", "r.yaml"], HEAVY),
        (["validate", "r.yaml", "--set", "adapter.dropuot=1"], HEAVY),
        (["estimate-memory", "r.yaml", "--set", "model.base=meta-llama/Llama-3.1-70B", "--gpu", "a100-80gb"], HEAVY),
        (["train", "nope.yaml"], HEAVY),
    ],
    ids=" ".join,
)
def test_imports_nothing_heavy(world: World, arguments: list[str], unwanted: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom lorafit import cli\n"
        f"try: cli.main({arguments!r})\nexcept SystemExit: pass\n"
        f"print('IMPORTED', [name for name in {unwanted!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=world.environment, cwd=world.root, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "IMPORTED []", done.stdout + done.stderr


def only_json(outcome: Outcome) -> dict[str, object]:
    """Exactly one object, on one line, and nothing that is no JSON (NaN)."""
    assert outcome.code == 0, outcome.stderr
    assert len(outcome.stdout.splitlines()) == 1
    value = json.loads(outcome.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(value, dict)
    return value


@pytest.fixture
def trained(world: World) -> World:
    """A world with test rows and a finished run."""
    world.rows(4, "v.jsonl", first=100)
    world.rows(5, "t.jsonl", first=200)
    world.recipe(
        ("  max_length: 128", "  max_length: 128\n  validation: v.jsonl\n  test: t.jsonl"),
        ("  final: [perplexity]", "  every_steps: 1\n  final: [perplexity, exact_match]"),
        ("  max_steps: 2", "  max_steps: 4"),
    )
    say_all(world.run("train", "r.yaml"), 0)
    return world


def test_the_main_job(trained: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """train, eval, merge, generate: each result as a person and as a program reads it."""
    world = trained
    with monkeypatch.context() as slow:
        load, clock, waited = load_module.load_model, time.perf_counter, [0.0]
        slow.setattr(
            load_module, "load_model", lambda *args, **options: (waited.append(1e4), load(*args, **options))[1]
        )
        slow.setattr(time, "perf_counter", lambda: clock() + sum(waited))
        scored = world.run("eval", "run")
    say_all(scored, 0, "perplexity", "base", "tuned", "run/report.md")
    [seconds] = re.findall(r"([\d.]+) s in all", scored.stdout)
    assert float(seconds) >= 1e4  # loading is not left out
    report = only_json(world.run("eval", "run", "--json"))
    assert report == json.loads((world.root / "run" / "report.json").read_text()) | {
        key: report[key] for key in ("seconds", "peak_memory_bytes", "base_speed", "tuned_speed") if key in report
    }
    whole = world.digests("run")
    for which, name in {"best": "step-4", "3": "step-3"}.items():
        arguments = ["--checkpoint", which, "--limit", "2", "--split", "validation"]
        part = only_json(world.run("eval", "run", *arguments, "--json"))
        named = world.root / "run" / f"report.validation.first-2.{name}"
        assert json.loads(named.with_name(f"{named.name}.json").read_text())["rows"] == part["rows"] == 2
        say_all(world.run("eval", "run", *arguments), 0, f"run/{named.name}.md", "v.jsonl:1", "too few rows to tell")
    assert {name: digest for name, digest in world.digests("run").items() if name in whole} == whole

    merged = only_json(world.run("merge", "run", "--output", "merged", "--json"))
    assert merged["parity"] is not None
    say_all(world.run("merge", "r.yaml", "--output", "merged-2"), 0, "merged-2")
    assert world.digests("merged")["model.safetensors"] == world.digests("merged-2")["model.safetensors"]

    tuned = only_json(world.run("generate", "run", "--prompt", "what opens", "--max-new-tokens", "8", "--json"))
    plain = only_json(world.run("generate", "merged", "--prompt", "what opens", "--max-new-tokens", "8", "--json"))
    assert tuned == plain
    (world.root / "prompts.txt").write_text("what opens\n\nthe mug\n")
    both = only_json(
        world.run("generate", "run", "--input", "prompts.txt", "--compare-base", "--max-new-tokens", "8", "--json")
    )
    answers = both["answers"]
    assert isinstance(answers, list) and [row["messages"][0]["content"] for row in answers] == ["what opens", "the mug"]
    assert all("base_answer" in row for row in answers)
    shown = world.run("generate", "run", "--input", "prompts.txt", "--compare-base", "--max-new-tokens", "8")
    say_all(shown, 0, "> what opens", "base:", "tuned:")
    sampled = ["generate", "run", "--prompt", "a", "--temperature", "1.5", "--max-new-tokens", "16", "--json"]
    assert world.run(*sampled, "--seed", "1").json == world.run(*sampled, "--seed", "1").json
    assert world.run(*sampled, "--seed", "1").json != world.run(*sampled, "--seed", "2").json


def test_an_evaluation_by_other_values_leaves_the_runs_report(trained: World) -> None:
    """Whatever decides which rows are scored or how they are answered makes another report, the same one each time."""
    world = trained
    say_all(world.run("eval", "run", "--set", "name=other", "--set", "data.validation=t.jsonl"), 0, "run/report.md")
    kept = {name: digest for name, digest in world.digests("run").items() if name.startswith("report.")}
    assert len(kept) == 3
    world.rows(3, "other.jsonl", first=300)
    for flag in ("data.test=other.jsonl", "data.test=null", "evaluation={final: [bleu], max_new_tokens: 2}"):
        before = set(world.digests("run"))
        say_all(world.run("eval", "r.yaml", "--set", flag), 0)
        (new,) = {name.rpartition(".")[0] for name in set(world.digests("run")) - before}
    whole = set(world.digests("run"))
    say_all(world.run("eval", "run", "--set", flag), 0, f"run/{new}.md")  # the same from the run's own recipe
    assert set(world.digests("run")) == whole
    assert kept.items() <= world.digests("run").items()


def test_what_makes_another_evaluation_of_a_run(trained: World) -> None:
    run = trained.root / "run"

    def changed(flag: str, split: str = "test") -> dict[str, Any]:
        return changed_evaluation(open_run(run, [flag]), split)

    for flag, key in {
        "data.test=other.jsonl": "data.test",
        "data.test[0].limit=2": "data.test",
        "data.max_length=120": "data.max_length",
        "data={overlength: drop}": "data.overlength",
        "data.bad_rows={policy: skip}": "data.bad_rows.policy",
        "evaluation.final=[exact_match]": "evaluation.final",
        "evaluation.max_new_tokens=3": "evaluation.max_new_tokens",
        "evaluation.retention=v.jsonl": "evaluation.retention",
        "seed=5": "seed",
    }.items():
        assert list(changed(flag)) == [key], flag
    for flag in ("data.test=t.jsonl", "name=x", "training.max_steps=9", "data.train=v.jsonl"):
        assert changed(flag) == {}, flag
    assert changed("data.validation=t.jsonl") == changed("data.test=v.jsonl", "validation") == {}
    assert list(changed("data.validation=t.jsonl", "validation")) == ["data.validation"]
    assert set(changed("data.validation={fraction: 0.5}", "validation")) >= {"data.validation.fraction"}


@pytest.mark.parametrize("base", ["./nowhere", "d.jsonl", "gone.gguf", "/no/such/model"])
def test_a_base_that_is_not_there_is_told_at_the_recipes_line(world: World, base: str) -> None:
    line = world.recipe((f"  base: {world.base}", f"  base: {base}"))
    for command in ("train", "preview", "estimate-memory"):
        say_all(world.run(command, "r.yaml"), 5, f"error: r.yaml:{line}:9: model.base: ", Path(base).name)
    flag = f"model.base={base}"
    say_all(world.run("train", "r.yaml", "--set", flag), 5, f"error: --set {flag}: model.base: ")


def test_a_merge_of_a_system_prompt_says_nothing_of_a_template_that_nobody_changed(world: World) -> None:
    world.recipe(("  max_length: 128", "  max_length: 128\n  system_prompt: Be brief."))
    say_all(world.run("train", "r.yaml"), 0)
    merged = world.run("merge", "run", "--output", "merged")
    say_all(merged, 0, "merged")
    assert "chat template" not in merged.stderr
    assert "Be brief." in (world.root / "merged" / "chat_template.jinja").read_text()


def test_a_run_goes_on_by_its_own_recipe(trained: World) -> None:
    """Where it was cut off, bit for bit as by the first recipe; complete, it says so. A moved run and a copy too."""
    world, whole = trained, trained.weights("run")
    run = world.root / "run"
    for gone in (run / "adapter", run / "checkpoints" / "step-000004"):
        shutil.rmtree(gone)
    (run / "result.json").unlink()
    run.rename(world.root / "sd")
    shutil.copytree(world.root / "sd", world.root / "copy")
    for name, flags in {"sd": ["--output", "sd"], "copy": []}.items():
        command = ["train", f"{name}/recipe.yaml", *flags]
        say_all(world.run(*command), 2, f"{name}: output", "go on with lorafit train", "--resume")
        resumed = world.run(*command, "--resume")
        say_all(resumed, 0, "step 4")
        assert "starts at step 0" not in resumed.stderr
        assert world.weights(name) == whole
        say_all(world.run(*command, "--resume"), 0, "already complete")
        say_all(world.run(*command), 2, f"{name}: output", "holds this run, finished")
    before = world.digests()
    (world.root / "plain").mkdir()
    shutil.copyfile(world.root / "r.yaml", world.root / "plain" / "recipe.yaml")  # in no run of lorafit's
    say_all(world.run("train", "plain/recipe.yaml", "--output", "plain", "--resume"), 2, "also an input")
    shutil.rmtree(world.root / "plain")
    assert world.digests() == before


@pytest.mark.parametrize(
    ("inside", "same_as"),
    [
        ("run/adapter", ["run"]),
        ("run/adapter/", ["run"]),
        ("run/checkpoints/step-000003", ["run", "--checkpoint", "3"]),
        ("run/checkpoints/step-000003/adapter", ["run", "--checkpoint", "3"]),
    ],
)
def test_a_folder_inside_a_run_is_that_run(trained: World, inside: str, same_as: list[str]) -> None:
    flags = ["--prompt", "what opens", "--max-new-tokens", "6", "--json"]
    assert only_json(trained.run("generate", inside, *flags)) == only_json(trained.run("generate", *same_as, *flags))
    scored = [only_json(trained.run("eval", *words, "--json")) for words in ([inside], same_as)]
    assert scored[0]["checkpoint_step"] == scored[1]["checkpoint_step"]
    assert scored[0]["metrics"] == scored[1]["metrics"]
    say_all(trained.run("generate", "run/checkpoints", *flags), 6, "run/checkpoints", "no run folder")


QUICK = [
    ["validate", "r.yaml"],
    ["estimate-memory", "r.yaml"],
    ["estimate-memory", "r.yaml", "--gpu", "24GiB"],
    ["preview", "r.yaml"],
    ["train", "r.yaml", "--dry-run"],
    ["train", "r.yaml", "--output", "other"],
]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_streams(world: World, arguments: list[str]) -> None:
    """Results on stdout, everything else on stderr; `--quiet` leaves only the result."""
    quiet = world.run(*arguments, "--quiet", "--set", "name=quiet")
    assert quiet.code == 0, quiet.stderr
    assert quiet.stderr == ""
    assert quiet.stdout.strip() != ""
    assert "preparing" not in quiet.stdout and "loading" not in quiet.stdout and "training 1/" not in quiet.stdout
    changed = [argument.replace("other", "another") for argument in arguments]
    only_json(world.run(*changed, "--json"))
    silent = world.run(*[argument.replace("other", "third") for argument in arguments], "--json", "--quiet")
    only_json(silent)
    assert silent.stderr == ""


def test_progress_goes_to_stderr(world: World) -> None:
    outcome = world.run("train", "r.yaml", "--verbose")
    assert "training 1/2" in outcome.stderr and "training 2/2" in outcome.stderr
    assert "training 1/2" not in outcome.stdout and "warning" not in outcome.stdout
    assert "trained 2 steps" in outcome.stdout and "trained 2 steps" not in outcome.stderr


def test_debug_shows_the_traceback_and_ends_the_same(world: World) -> None:
    plain, debugged = world.run("train", "nope.yaml"), world.run("train", "nope.yaml", "--debug")
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debugged.stderr and "load_recipe" in debugged.stderr
    assert (debugged.code, debugged.last) == (plain.code, plain.last) and plain.code == 2
    assert "Traceback" not in world.run("train", "--ouput", "x").stderr  # a flag of the command before is forgotten


def test_errors_print_nothing_on_stdout(world: World) -> None:
    world.recipe(("  r: 4", "  r: 0"))
    for arguments in (["validate", "r.yaml"], ["train", "r.yaml"], ["eval", "run"], ["trian"]):
        outcome = world.run(*arguments)
        assert outcome.code != 0
        assert outcome.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["train", "r.yaml"], {"file": "r.yaml", "line": 9, "key": "adapter.r"}),
        (["preview", "r.yaml"], {"file": "r.yaml", "line": 9, "key": "adapter.r"}),
        (["estimate-memory", "r.yaml"], {"file": "r.yaml", "line": 9, "key": "adapter.r"}),
        (["validate", "r.yaml"], {"file": "r.yaml", "line": 9, "key": "adapter.r"}),
        (["eval", "nope"], {"file": "nope", "line": None, "key": None}),
        (["merge", "nope", "--output", "m"], {"file": "nope"}),
        (["generate", "r.yaml", "--prompt", "a", "--input", "b"], {"key": "--prompt"}),
        (["eval", "run", "--limit", "0"], {"todo": "see lorafit eval --help"}),
        (["train"], {"todo": "see lorafit train --help"}),
        (["trian", "r.yaml"], {"key": None}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_as_json(world: World, arguments: list[str], place: dict[str, object]) -> None:
    """One object on stdout for a failure of every command; the lines on stderr are the same as without `--json`."""
    world.recipe(("  r: 4", "  r: 0"))
    plain, outcome = world.run(*arguments), world.run(*arguments, "--json")
    assert (outcome.code, outcome.stderr) == (plain.code, plain.stderr)
    assert len(outcome.stdout.splitlines()) == 1
    failure = outcome.json
    assert failure["error"].items() >= {**place, "exit_code": plain.code}.items()
    assert f"error: {failure['error']['message']}" == outcome.last
    assert failure["errors"] == [failure["error"]]
    assert failure.get("valid") == (False if arguments[0] == "validate" else None)


def test_every_error_of_a_recipe_as_json(world: World) -> None:
    world.recipe(("  r: 4", "  r: 0"), ("  dropout: 0.0", "  dropuot: 0.1"))
    outcome = world.run("validate", "r.yaml", "--json")
    assert outcome.code == 3 and outcome.json["valid"] is False
    assert [(error["key"], error["line"]) for error in outcome.json["errors"]] == [
        ("adapter.r", 9),
        ("adapter.dropuot", 11),
    ]
    assert "2 errors" in outcome.json["error"]["message"]


def test_a_valid_recipe_promises_no_more_than_was_looked_at(world: World) -> None:
    world.recipe(("train: d.jsonl", "train: nope.jsonl"))
    say_all(world.run("validate", "r.yaml"), 0, "r.yaml is valid", "not opened", "preview", "--dry-run")


def test_one_is_no_plural(world: World) -> None:
    said = world.run("train", "r.yaml", "--set", "training.max_steps=1", "--set", "training.batch_size=12")
    say_all(said, 0, "trained 1 step in", "1 of 12 rows: 1 epoch of 1 step", "every step")
    assert "1 steps" not in said.stdout + said.stderr and "1 epochs" not in said.stderr


def test_a_bug_as_json(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit import pipeline

    monkeypatch.setattr(pipeline, "preview", lambda *a, **o: {}["missing"])
    outcome = world.run("preview", "r.yaml", "--json")
    assert outcome.code == outcome.json["error"]["exit_code"] == 1
    named = Path(outcome.json["error"]["message"].split()[-1])
    assert "KeyError" in named.read_text()
    named.unlink()


def test_a_result_is_the_only_object(world: World) -> None:
    """What does not fit is a result with an exit code, not a failure."""
    outcome = world.run("estimate-memory", "r.yaml", "--gpu", "0.25GiB", "--json")
    assert outcome.code == 10
    assert outcome.json["fits"] is False and "error" not in outcome.json


def test_version(world: World) -> None:
    outcome = world.run("--version")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, f"lorafit {version('lorafit')}\n", "")
    done = subprocess.run([sys.executable, "-m", "lorafit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == outcome.stdout


@pytest.mark.parametrize("command", [[str(PROGRAM)], [sys.executable, "-m", "lorafit"]], ids=["script", "module"])
def test_modules_of_the_current_folder_are_not_ours(world: World, command: list[str]) -> None:
    for name in ("typer", "yaml", "pydantic", "json"):
        (world.root / f"{name}.py").write_text("open('PWNED', 'w')\n")
    line = [*command, "validate", "r.yaml"]
    done = subprocess.run(line, cwd=world.root, env=world.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "is valid" in done.stdout, done.stderr
    assert not (world.root / "PWNED").exists()


@pytest.mark.parametrize("columns", ["80", "120"])
def test_descriptions_are_whole(world: World, columns: str) -> None:
    shown = world.spawn("--help", fresh=True, env={"COLUMNS": columns}).stdout
    assert "..." not in shown.replace("[ARGS]...", "") and "…" not in shown
    assert max(map(len, shown.splitlines())) <= int(columns)


def test_ctrl_c_during_the_first_imports(world: World) -> None:
    """Whatever the command line itself imports is interrupted here: no traceback, one line."""
    (world.root / "early").mkdir()
    (world.root / "early" / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    outcome = world.spawn("--help", env={"PYTHONPATH": str(world.root / "early")})
    assert (outcome.code, outcome.stdout) == (130, "")
    assert outcome.stderr == "error: stopped by SIGINT; nothing was left half-written\n"


def test_estimate_that_does_not_fit_ends_with_10(world: World) -> None:
    outcome = world.run("estimate-memory", "r.yaml", "--gpu", "0.25GiB")
    say_all(outcome, 10, "fit")
    assert outcome.stdout.strip() != ""
    assert world.run("estimate-memory", "r.yaml", "--gpu", "24GiB").code == 0


LONG = "x" * 240


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", "/".join([LONG] * 4)],
        ["validate", f"{LONG}.yaml"],
        ["train", "r.yaml", "--set", f"adapter.{LONG * 3}=1"],
        ["train", "r.yaml", "--set", f"model.base={LONG}/{LONG}"],
        ["train", "r.yaml", "--set", f"model.base=./{LONG}/{LONG}"],
        ["train", "r.yaml", "--set", f"data.train={LONG}/{LONG}.jsonl"],
        ["train", "r.yaml", "--set", f"adapter.target_modules=[{','.join(LONG + str(n) for n in range(9))}]"],
        ["train", "r.yaml", f"--{LONG * 3}"],
        [LONG * 3],
        ["generate", LONG, "--prompt", LONG * 9],
        ["eval", f"{LONG}/{LONG}"],
        ["merge", "/".join([LONG] * 5), "--output", "m"],
        ["estimate-memory", "r.yaml", "--gpu", LONG * 3],
    ],
    ids=lambda arguments: " ".join(a[:24] for a in arguments),
)
def test_last_lines_stay_short(world: World, arguments: list[str]) -> None:
    before = world.digests()
    outcome = world.run(*arguments)
    assert outcome.code in (2, 3, 4, 5, 6), outcome.stderr
    say_all(outcome, outcome.code)
    assert world.digests() == before


# --- what each command refuses --------------------------------------------------------------------------------------


def test_refusals_of_a_finished_run(trained: World) -> None:
    world = trained
    (world.root / "full").mkdir()
    (world.root / "full" / "mine.txt").write_text("mine")
    (world.root / "empty.txt").write_text("\n \n")
    (world.root / "rows.jsonl").write_text('{"prompt": "a"}\n{oops}\n')
    (world.root / "bare").mkdir()
    (world.root / "file").write_text("mine")
    before = world.digests()
    cases = [
        (["eval", "run", "--checkpoint", "first"], 2, ["--checkpoint", "first", "best"]),
        (["eval", "run", "--checkpoint", "77"], 6, ["77", "steps"]),
        (["eval", "run", "--split", "other"], 2, ["--split", "other", "validation"]),
        (["eval", "bare"], 6, ["bare", "no run"]),
        (["eval", "full"], 6, ["full", "no run"]),
        (["eval", "r.yaml", "--set", "output=elsewhere"], 6, ["elsewhere", "train first"]),
        (["merge", "run", "--output", "full"], 2, ["full", "not empty"]),
        (["merge", "run", "--output", "file"], 2, ["file"]),
        (["merge", "run", "--output", "run"], 2, ["output", "also an input"]),
        (["merge", "run", "--output", "."], 2, ["output", "also an input"]),
        (["merge", "run", "--output", str(world.base)], 2, ["output", "also an input"]),
        (["merge", "run", "--output", str(world.base / "inside")], 2, ["output", "also an input"]),
        (["merge", "run/adapter", "--output", "run/adapter"], 2, ["output", "also an input"]),
        (["merge", "run", "--output", "m", "--base", "nf4"], 2, ["--base", "nf4", "original"]),
        (["merge", "run", "--output", "m", "--base", "dequantized"], 5, ["--base", "quantised", "original"]),
        (["merge", "run", "--output", "m", "--checkpoint", "77"], 6, ["77"]),
        (["merge", "bare", "--output", "m"], 6, ["bare"]),
        (["generate", "run", "--input", "empty.txt"], 4, ["empty.txt", "no prompts"]),
        (["generate", "run", "--input", "rows.jsonl"], 4, ["rows.jsonl:2", "invalid JSON"]),
        (["generate", "run", "--input", "nope.txt"], 4, ["nope.txt", "no such file"]),
        (["generate", "run", "--prompt", ""], 2, ["--prompt"]),
        (["generate", "bare", "--prompt", "a"], 6, ["bare"]),
        (["generate", str(world.base), "--prompt", "a", "--compare-base"], 2, ["--compare-base"]),
        (["train", "run", "--resume"], 2, ["run"]),
        (["train", "r.yaml", "--resume", "--plan", "nope.json", "--output", "other"], 6, ["nope.json", "missing"]),
        (["train", "r.yaml", "--plan", "d.jsonl", "--output", "other"], 6, ["d.jsonl"]),
    ]
    failed = []
    for arguments, code, said in cases:
        try:
            say_all(world.run(*arguments), code, *said)
            assert world.digests() == before, sorted(world.digests().keys() ^ before.keys())
        except AssertionError as error:
            failed.append(f"{' '.join(arguments)}: {str(error).splitlines()[0:4]}")
    assert not failed, "\n".join(failed)


def test_a_profile_says_where_the_time_goes(world: World) -> None:
    outcome = world.run("train", "r.yaml", "--profile", "--output", "runs/profiled")
    assert outcome.code == 0, outcome.stderr
    assert all(part in outcome.stdout for part in ("forward", "backward", "optimizer", "tokens/s", "padding"))
    run = world.root / "runs/profiled"
    assert (run / "profile.txt").read_text(encoding="utf-8").splitlines()[0].startswith("phase")
    assert (run / "trace.json.gz").stat().st_size > 0
    speed = json.loads((run / "result.json").read_text(encoding="utf-8"))["speed"]
    assert speed["tokens_per_second"] > speed["trained_tokens_per_second"] > 0
    assert 0 <= speed["padding_share"] < 1


def test_preview_of_many_rows_counts_only_what_it_says(world: World) -> None:
    world.recipe()
    world.rows(600)
    quick = world.run("preview", "r.yaml", "--rows", "1")
    say_all(
        quick,
        0,
        "only the first 256 rows of about 600",
        "train, the first rows of about 600: 256 rows",
        "that were counted",
    )
    assert quick.stdout.count("d.jsonl:") == 1
    told = world.run("preview", "r.yaml", "--rows", "1", "--json").json
    assert told["digest"] is None and told["report"]["splits"]["train"]["of_rows"] == 600
    for whole in (["preview", "r.yaml"], ["preview", "r.yaml", "--rows", "0"]):
        outcome = world.run(*whole)
        say_all(outcome, 0, "train: 600 rows", "of the training tokens")
        assert "only the first" not in outcome.stderr
    told = world.run("preview", "r.yaml", "--rows", "1", "--json").json  # prepared by now
    assert told["digest"] and told["report"]["splits"]["train"]["rows"] == 600 and len(told["rows"]) == 1


@pytest.mark.parametrize("command", [["train", "r.yaml"], ["train", "r.yaml", "--dry-run"]])
def test_what_only_the_plan_can_refuse_is_said_at_its_line(world: World, command: list[str]) -> None:
    line = world.recipe(("  attention: eager", "  attention: flash_attention_2"))
    world.rows()
    say_all(world.run(*command), 3, f"r.yaml:{line}:14: model.attention", "runs on no CPU")
    world.recipe()
    say_all(world.run(*command, "--set", "model.attention=flash_attention_2"), 3, "--set", "runs on no CPU")
    assert not world.loaded
