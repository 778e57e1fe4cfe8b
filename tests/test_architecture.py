"""The house keeps its floors: imports go down, no circles, no crowded rooms, no heavy import where none is needed."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lorafit"
FLOORS = (  # top to bottom; a room, or a module named apart from its room, imports only from floors below its own
    {"__main__"},
    {"cli", "__init__"},
    {"api"},
    {"studies", "chatting", "serving", "exporting", "console.python_calls"},
    {"pipeline"},
    {"training", "merging", "answering.classify"},
    {"answering.answer_rows", "answering.several"},
    {"answering.opening", "answering.evaluation_rows", "run.resumption", "run.assembly", "run.calibration"},
    {"run.curriculum"},
    {"answering.tuned", "answering.trained_prompts"},
    {"job"},
    {"answering.prompts", "estimation.local_rows", "run.output_folder"},
    {"run.results", "run.trained", "run.answered"},
    {"run.workspace", "run.named_files"},
    {"estimation.dry_run", "estimation.fake_operations", "estimation.layer_list", "estimation.measured"},
    {"trainer", "evaluation"},
    {"answering"},
    {"data", "model"},
    {"estimation"},
    {"plan"},
    {"memory"},
    {"recipe"},
    {"run.card"},
    {"kinds"},
    {"objective"},
    {"console.exits", "files.cache"},
    {"ops", "files", "machine.devices", "console.reporting", "hub"},
    {"machine.hardware"},
    {"machine.shipped", "console", "console.live_line", "run"},
    {
        "errors",
        "facts",
        "console.wording",
        "files.strict_json",
        "files.portable",
        "machine",
        "run.prelude",
    },
    {"contracts"},
    {"pictures"},
)
LIGHT = {"__main__", "cli", *(room for floor in FLOORS[FLOORS.index({"estimation"}) :] for room in floor)}
LIGHT -= {"ops", "objective", "console.live_line"}
HEAVY = {
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "rich",
    "numpy",
    "pyarrow",
    "sacrebleu",
    "rouge_score",
}
MOST_LINES = 400
MOST_LINES_IN_A_FUNCTION = 80
MOST_FILES_BESIDE_ROOMS = 12
MOST_ANY_IN_1000_LINES = 10
FAMILIES = {"Adapter", "Curriculum", "Initialisation", "Optimizer", "Quantization", "Schedule", "Task", "Metric"}
FAMILIES |= {"Format"}
HELP_SECONDS = 0.15


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def modules(package: Path) -> dict[str, ast.Module]:
    """Every module of the package by dotted name below it, parsed."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = parse(path.read_text(encoding="utf-8"))
    return found


def type_checking_nodes(tree: ast.Module) -> set[ast.AST]:
    blocks = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test))
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(tree: ast.Module, *, top_level_only: bool = False, with_types: bool = True) -> Iterator[tuple[str, int]]:
    """Dotted names that a module imports; `from a import b` gives `a.b`."""
    skipped = set() if with_types else type_checking_nodes(tree)
    nodes: Iterator[ast.AST] | list[ast.AST] = ast.walk(tree)
    if top_level_only:
        in_functions = {
            inner
            for n in ast.walk(tree)
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for inner in ast.walk(n)
        }
        nodes = [n for n in ast.walk(tree) if n not in in_functions]
    for node in nodes:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def named_on_a_floor(module: str) -> str:
    """The module itself where a floor names it apart from its room, else its room."""
    return module if any(module in floor for floor in FLOORS) else module.split(".")[0]


def floor_of(module: str) -> int:
    name = named_on_a_floor(module)
    for number, floor in enumerate(FLOORS):
        if name in floor:
            return number
    raise AssertionError(f"lorafit/{module} stands on no floor: add it to FLOORS")


def ours(name: str, known: dict[str, ast.Module]) -> str | None:
    """The module of the package that an imported dotted name means."""
    if not name.startswith("lorafit."):
        return "__init__" if name == "lorafit" else None
    parts = name.split(".")[1:]
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in known:
            return ".".join(parts[:end])
    return "__init__"


def floor_breaks(package: Path) -> list[str]:
    """Imports that go up, or into another room of the same floor, or from one kind to another."""
    known, breaks = modules(package), []
    for module, tree in known.items():
        for name, line in imports(tree):
            target = ours(name, known)
            if target is None or target == module:
                continue
            here, there = floor_of(module), floor_of(target)
            same_room = module.split(".")[0] == target.split(".")[0]
            if there < here or (there == here and not same_room):
                breaks.append(f"{module}:{line} imports {target}")
            if same_room and module.startswith("kinds.") and is_kind(module) and is_kind(target):
                breaks.append(f"{module}:{line} imports the kind {target}")
    return breaks


def is_kind(module: str) -> bool:
    parts = module.split(".")
    return len(parts) == 3 and not parts[2].startswith("_")


def circles(package: Path) -> list[str]:
    """Modules that need each other, imports for types and inside of functions counted too."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for module, tree in known.items():
        targets = (ours(name, known) for name, _ in imports(tree))
        graph[module] = {t for t in targets if t and t not in (module, "__init__")}
    found, done = [], set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.append(" > ".join((*path[path.index(module) :], module)))
            return
        if module not in done:
            for target in graph[module]:
                visit(target, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    return found


def crowded(package: Path) -> list[str]:
    """Modules and functions that are too long."""
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > MOST_LINES:
            found.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_LINES_IN_A_FUNCTION:
                    found.append(f"{path.name}:{node.lineno} {node.name}: {length} lines")
    return found


def heavy_imports(package: Path) -> list[str]:
    """Heavy libraries imported at module level of light rooms."""
    return [
        f"{module}:{line} imports {name}"
        for module, tree in modules(package).items()
        if named_on_a_floor(module) in LIGHT
        for name, line in imports(tree, top_level_only=True, with_types=False)
        if name.split(".")[0] in HEAVY
    ]


def many_any(package: Path) -> list[str]:
    """The share of `Any` where it is above its ceiling; imports of the name do not count."""
    names = lines = 0
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        lines += text.count("\n")
        names += sum(
            (isinstance(node, ast.Name) and node.id == "Any")
            or (isinstance(node, ast.Attribute) and node.attr == "Any")
            for node in ast.walk(parse(text))
        )
    share = 1000 * names / max(1, lines)
    return [f"{share:.1f} Any in 1,000 lines"] if share > MOST_ANY_IN_1000_LINES else []


def files_beside_rooms(package: Path) -> list[str]:
    """Where more modules stand at the top than may: all of them."""
    found = sorted(path.name for path in package.glob("*.py"))
    return found if len(found) > MOST_FILES_BESIDE_ROOMS else []


def public_members(family: ast.ClassDef) -> set[str]:
    """Names of methods, properties and attributes that the base of a family promises for each of its kinds."""
    members = set()
    for node in family.body:
        if isinstance(node, ast.FunctionDef):
            members.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            members.add(node.target.id)
    return {name for name in members if not name.startswith("_")}


def unused_of_families(package: Path) -> list[str]:
    """Public members of a family's base that nobody asks for: no other room, and nothing that the kinds share."""
    known = modules(package)
    asked = {
        node.attr
        for module, tree in known.items()
        if not (module.startswith("kinds.") and is_kind(module))
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    return [
        f"{module}: {node.name}.{member}"
        for module, tree in known.items()
        if module.startswith("kinds.")
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in FAMILIES
        for member in sorted(public_members(node) - asked)
    ]


def test_imports_go_down() -> None:
    assert floor_breaks(PACKAGE) == []


def test_no_circles() -> None:
    assert circles(PACKAGE) == []


def test_no_room_is_crowded() -> None:
    assert crowded(PACKAGE) == []


def test_any_only_falls() -> None:
    assert many_any(PACKAGE) == []


def test_few_files_stand_beside_the_rooms() -> None:
    assert files_beside_rooms(PACKAGE) == []


def test_what_a_family_promises_is_used() -> None:
    assert unused_of_families(PACKAGE) == []


def test_light_rooms_import_nothing_heavy() -> None:
    assert heavy_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "text", "check"),
    [
        ("memory.py", "from lorafit.plan import plan\n", floor_breaks),
        ("trainer/loop.py", "def f():\n    from lorafit.evaluation.runner import score\n", floor_breaks),
        ("kinds/metrics/a.py", "from lorafit.kinds.metrics.b import B\n", floor_breaks),
        ("plan.py", "import torch\n", heavy_imports),
        ("data/sources/source.py", "\n" * 401, crowded),
        ("data/batch.py", "from lorafit.data.sources.source import x\n", circles),
        ("data/batch.py", "def f():\n    from lorafit.data.sources.source import x\n", circles),
        ("data/batch.py", "if TYPE_CHECKING:\n    from lorafit.data.sources.source import x\n", circles),
        ("data/batch.py", "def f(x: Any) -> None: ...\n", many_any),
        ("more.py", "", files_beside_rooms),
        ("kinds/metrics/__init__.py", "class Metric:\n    used: int\n    def unused(self): ...\n", unused_of_families),
    ],
)
def test_a_planted_break_is_seen(tmp_path: Path, file: str, text: str, check: object) -> None:
    """The checks above can fail: each sees the break planted for it, and a clean copy has none."""
    stubs = {"plan.py": "", "memory.py": "", "trainer/loop.py": "", "data/batch.py": ""}
    stubs |= {f"full{number}.py": "" for number in range(MOST_FILES_BESIDE_ROOMS - 2)}
    stubs["evaluation/runner.py"] = "def score(metric): return metric.used\n"
    stubs |= {
        "data/sources/source.py": "from lorafit.data.batch import y\n",
        "kinds/metrics/__init__.py": "class Metric:\n    used: int\n    _own: int\n",
        "kinds/metrics/a.py": "",
        "kinds/metrics/b.py": "",
    }
    for name, content in stubs.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert check(tmp_path) == []  # type: ignore[operator]
    (tmp_path / file).write_text(text)
    assert len(check(tmp_path)) >= 1  # type: ignore[operator]


def run_lorafit(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sysconfig.get_path("scripts")) / "lorafit"
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C.UTF-8"}, check=False
    )


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    """The time is reported, never judged strictly: another load on the machine must not fail the tests."""
    heavy = "('torch', 'pydantic', 'rich', 'yaml', 'numpy')"
    code = f"import sys; import lorafit.cli; print([m for m in {heavy} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        assert run_lorafit("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    print(f"lorafit --help: median {statistics.median(seconds):.3f} s, wanted {HELP_SECONDS} s")
    assert min(seconds) < 10 * HELP_SECONDS


def stale_names(text: str, package: Path) -> list[str]:
    """Dotted names below the package that are no module, nor anything that a module's text holds."""
    found = []
    for dotted in re.findall(r"(?<![\w./-])lorafit((?:\.[a-z_]+)+)", text):
        if dotted == ".json":  # a file that lies beside an adapter
            continue
        place, parts = package, dotted[1:].split(".")
        while parts and (place / parts[0]).is_dir():
            place = place / parts.pop(0)
        module = (place / parts[0]).with_suffix(".py") if parts else place
        holder = place / "__init__.py"
        held = holder.is_file() and parts and re.search(rf"\b{parts[0]}\b", holder.read_text(encoding="utf-8"))
        if not module.exists() and not held:
            found.append(f"lorafit{dotted}")
    return found


def test_modules_that_prose_names_are_there() -> None:
    """A docstring or a page that sends its reader to a module, sends to one that exists."""
    pages = [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "docs").rglob("*.md"), PACKAGE.parent / "README.md"]
    assert {name for page in pages for name in stale_names(page.read_text(encoding="utf-8"), PACKAGE)} == set()
    assert stale_names("see `lorafit.memory.no_such_module`", PACKAGE) == ["lorafit.memory.no_such_module"]
