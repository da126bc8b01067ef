"""The rules and budgets of docs/architecture.md, held by reading the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "octavo"

# A room may import rooms of a strictly lower level, and modules of its own.
LEVELS = {
    "cli": 7,
    "server": 6,
    "engine": 5,
    "scheduler": 4,
    "runner": 4,
    "tokenizer": 4,
    "kv_cache": 3,
    "models": 3,
    "weights": 3,
    "backends": 3,
    "graph": 2,
    "config": 1,
    "metrics": 1,
    "types": 0,
    "errors": 0,
}
ONLY_USER = {"kv_cache": "scheduler"}
HEAVY = {"torch": "backends/torch", "triton": "backends/torch", "jax": "backends/jax"}

# Rooms that know no tensors: neither they nor what they import may bring numpy.
WITHOUT_NUMPY = [
    "octavo",
    "octavo.types",
    "octavo.config",
    "octavo.cli.main",
    "octavo.cli.serve",
    "octavo.server.app",
    "octavo.engine.async_engine",
    "octavo.scheduler.scheduler",
    "octavo.tokenizer.load",
    "octavo.models.registry",
    "octavo.weights.source",
    "octavo.weights.gguf",
]

# Imports inside functions: heavy optional dependencies, lazy exports, the dispatch of cli.
INNER_IMPORTS = {
    "octavo/weights/source.py": {"huggingface_hub"},
    "octavo/weights/hub.py": {"huggingface_hub"},
    "octavo/engine/llm.py": {"tqdm"},
    "octavo/cli/chat.py": {"readline"},
}
LAZY_FILES = {"octavo/__init__.py"}

FILE_LINES, FUNCTION_LINES, PARAMETERS, RECORD_FIELDS = 600, 60, 8, 8
SERVE_OPTIONS, ENVIRONMENT_VARIABLES = 40, 6
LARGE_RECORDS = {"SamplingParams", "EngineConfig", "ServerOptions"}

FORBIDDEN = re.compile(
    r"\b(?:pickle|cloudpickle|dill|marshal|shelve|joblib)\b|\btorch\.load\b|(?<![\w.])(?:eval|exec)\("
    r"|\byaml\.load\(|\bjinja2\.Environment\("
)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sources():
        yield path, ast.parse(path.read_text(), filename=str(path))


def imports(node: ast.AST) -> Iterator[str]:
    """Full names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_room_has_a_level() -> None:
    rooms = {room_of(path) for path in sources()} - {"__init__"}
    assert rooms <= set(LEVELS)


def test_imports_point_down() -> None:
    faults = []
    for path, tree in trees():
        own = room_of(path)
        if own == "__init__":
            continue
        for node in ast.walk(tree):
            for module in imports(node):
                if not module.startswith("octavo."):
                    continue
                other = module.split(".")[1]
                if other in (own, "__version__") or other not in LEVELS:
                    continue
                if LEVELS[other] >= LEVELS[own]:
                    faults.append(f"{name_of(path)}:{node.lineno} {own} -> {other}")  # type: ignore[attr-defined]
                if other in ONLY_USER and own != ONLY_USER[other]:
                    faults.append(f"{name_of(path)}: {other} belongs to {ONLY_USER[other]} alone")
    assert not faults, "\n".join(faults)


def test_heavy_libraries_stay_in_their_backend() -> None:
    faults = []
    for path, tree in trees():
        for node in ast.walk(tree):
            for module in imports(node):
                home = HEAVY.get(module.split(".")[0])
                if home is not None and home not in name_of(path):
                    faults.append(f"{name_of(path)} imports {module}")
    assert not faults, "\n".join(faults)


def test_no_import_inside_a_function() -> None:
    faults = []
    for path, tree in trees():
        if name_of(path) in LAZY_FILES:
            continue
        allowed = INNER_IMPORTS.get(name_of(path), set())
        for function in functions(tree):
            for node in ast.walk(function):
                for module in imports(node):
                    if module.split(".")[0] not in allowed:
                        faults.append(f"{name_of(path)}:{node.lineno} {module}")  # type: ignore[attr-defined]
    assert not faults, "\n".join(faults)


def test_no_global_mutable_state() -> None:
    faults = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Global | ast.Nonlocal):
                kind = type(node).__name__.lower()
                if kind == "global":
                    faults.append(f"{name_of(path)}:{node.lineno} global {', '.join(node.names)}")
    assert not faults, "\n".join(faults)


def test_inheritance_is_for_exceptions_and_libraries() -> None:
    """No class derives from another of Octavo's, exceptions apart."""
    own = {
        node.name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    faults = []
    for path, tree in trees():
        if room_of(path) == "errors":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                parents = {base.id for base in node.bases if isinstance(base, ast.Name)}
                shared = {p for p in parents & own if not p.endswith("Error")}
                faults += [f"{name_of(path)}: {node.name}({parent})" for parent in shared]
    assert not faults, "\n".join(faults)


def test_no_cycles() -> None:
    names = {name_of(p)[:-3].replace("/", ".").removesuffix(".__init__"): p for p in sources()}
    graph: dict[str, set[str]] = {}
    for module, path in names.items():
        found: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            # A module's own package is no edge: `from package import sibling` names both.
            found |= {m for m in imports(node) if m in names and not module.startswith(m)}
        graph[module] = found
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("suffix", ["py", "cpp", "h"])
def test_files_are_short(suffix: str) -> None:
    folders = [PACKAGE, ROOT / "csrc", ROOT / "tests", ROOT / "benchmarks"]
    files = [p for folder in folders for p in folder.rglob(f"*.{suffix}")]
    long = {name_of(p): n for p in files if (n := len(p.read_text().splitlines())) > FILE_LINES}
    assert not long


def test_functions_are_short_and_take_few_parameters() -> None:
    faults = []
    for path, tree in trees():
        for function in functions(tree):
            assert function.end_lineno is not None
            lines = function.end_lineno - function.lineno + 1
            arguments = function.args
            count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
            if any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
                continue  # A kernel's arguments are its launch; it has nothing to split.
            is_method = bool(arguments.args) and arguments.args[0].arg in ("self", "cls")
            if lines > FUNCTION_LINES:
                faults.append(f"{name_of(path)}: {function.name} has {lines} lines")
            if count - is_method > PARAMETERS:
                faults.append(f"{name_of(path)}: {function.name} has {count} parameters")
    assert not faults, "\n".join(faults)


def test_boundary_records_are_small() -> None:
    faults = []
    for path in (PACKAGE / "types.py", PACKAGE / "graph" / "batch.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name not in LARGE_RECORDS:
                count = sum(isinstance(item, ast.AnnAssign) for item in node.body)
                if count > RECORD_FIELDS:
                    faults.append(f"{node.name} has {count} fields")
    assert not faults, "\n".join(faults)


def test_nothing_dangerous() -> None:
    """SEC-01: no unpickling, no evaluation of text, no bare templates, in dead code neither."""
    faults = [
        f"{name_of(path)}:{number} {line.strip()}"
        for path in sources()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN.search(line) and not line.lstrip().startswith("#")
    ]
    assert not faults, "\n".join(faults)


def test_rooms_without_tensors_import_no_numpy() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    assert 'numpy' not in sys.modules, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *WITHOUT_NUMPY], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_serve_has_few_options() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "octavo.cli.main", "serve", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 5 < len(set(re.findall(r"--[a-z][a-z-]+", done.stdout))) <= SERVE_OPTIONS


def test_few_environment_variables() -> None:
    found = {v for p in sources() for v in re.findall(r"\bOCTAVO_[A-Z_]+\b", p.read_text())}
    native = {
        v
        for p in (ROOT / "csrc").glob("*.cpp")
        for v in re.findall(r"getenv\(\"(OCTAVO_[A-Z_]+)\"", p.read_text())
    }
    assert len(found | native) <= ENVIRONMENT_VARIABLES, sorted(found | native)
