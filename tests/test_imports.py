"""The direction of imports: which room of the package may import which, and which other packages it may use.

A room is a folder or a module directly under `src/mt_adapters`; imports inside functions count like those at the top.
"""

import ast
import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src/mt_adapters"
PACKAGE = SOURCE.name

# `import mt_adapters` stays quick and works without the extras.
NOT_AT_IMPORT = {"datasets", "evaluate", "torchmetrics", "matplotlib", "typer"}

# losses < tasks < hub < backbones, decoders < models < training < pipelines, visualize < registration
MODEL_ROOMS = {"losses", "tasks", "hub", "backbones", "decoders", "tuners", "troa", "models"}
TRAINING_ROOMS = MODEL_ROOMS | {"data", "metrics", "training"}
LIBRARY_ROOMS = TRAINING_ROOMS | {"pipelines", "visualize"}

MAY_IMPORT: dict[str, set[str]] = {
    "version": set(),
    "losses": set(),
    "troa": set(),
    "tasks": {"losses"},
    # Models publish themselves and read what others published, so what the Hub needs stands below them.
    "hub": {"tasks", "version"},
    "backbones": {"losses", "tasks", "hub"},
    "decoders": {"losses", "tasks"},
    "tuners": {"backbones"},
    "models": MODEL_ROOMS,
    "data": {"losses", "tasks"},
    "metrics": {"losses", "tasks"},
    "evaluate_metrics": {"tasks", "metrics"},
    "distillation": {"backbones", "data"},
    "training": TRAINING_ROOMS,
    "pipelines": TRAINING_ROOMS,
    "visualize": TRAINING_ROOMS,
    "registration": LIBRARY_ROOMS,
    "__init__": LIBRARY_ROOMS | {"registration", "version"},
}

# Rooms that may use only some of the packages that setup.cfg names.
ONLY_PACKAGES = {
    "losses": {"torch"},
    "tasks": {"torch"},
    "troa": {"torch"},
    "tuners": {"torch", "transformers", "peft", "safetensors"},
}

# Where a distribution's import name is not its own name with underscores.
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve"}


def declared_packages() -> set[str]:
    """Import names of what setup.cfg requires, with the extras that users install."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    extras = dict(config["options.extras_require"])
    requirements = [config["options"]["install_requires"], *(extras[name] for name in extras.keys() - {"test", "dev"})]
    names = {re.match(r"[\w.-]+", line).group().lower() for text in requirements for line in text.split("\n") if line}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def imported_modules(path: Path, source: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of every import in a file; `from a import b` gives `a.b`."""
    folders = [source.name, *path.relative_to(source).parent.parts]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) - node.level + 1] if node.level else []
            base += [node.module] if node.module else []
            found += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found += [(node.lineno, arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
    return found


def room_of(path: Path, source: Path) -> str:
    return path.relative_to(source).parts[0].removesuffix(".py")


def forbidden_imports(source: Path, packages: set[str]) -> list[str]:
    problems = []
    for path in sorted(source.rglob("*.py")):
        room = room_of(path, source)
        if room not in MAY_IMPORT:
            problems.append(f"{path.relative_to(source)}: room {room} has no line in MAY_IMPORT")
            continue
        for line, module in imported_modules(path, source):
            where = f"{path.relative_to(source)}:{line}"
            top, *rest = module.split(".")
            if top == source.name:
                # A name that is no room, as in `from mt_adapters import VtaModel`, comes from the package itself.
                target = rest[0] if rest and rest[0] in MAY_IMPORT else "__init__"
                if target not in MAY_IMPORT[room] | {room}:
                    problems.append(f"{where}: {room} may not import {target}")
            elif top not in ONLY_PACKAGES.get(room, packages) and top not in sys.stdlib_module_names:
                problems.append(f"{where}: {room} may not import {top}")
    return problems


def unsafe_loading(source: Path) -> list[str]:
    """Uses of torch.load, of a module that unpickles, and of trust_remote_code other than False."""
    problems = []
    for path in sorted(source.rglob("*.py")):
        where = path.relative_to(source)
        for line, module in imported_modules(path, source):
            if module.split(".")[0] in UNPICKLERS or module in {"torch.load", "torch.serialization.load"}:
                problems.append(f"{where}:{line}: {module}")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.serialization.load"}:
                problems.append(f"{where}:{node.lineno}: torch.load")
            elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    problems.append(f"{where}:{node.value.lineno}: trust_remote_code")
    return problems


def write_package(folder: Path, files: dict[str, str]) -> Path:
    source = folder / PACKAGE
    lawful = {
        "losses.py": "import torch\n",
        "tasks/depth.py": "from ..losses import l1\n",
        "hub/new.py": "import json\n",
    }
    for name, text in (lawful | files).items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    return source


def test_importing_the_package_leaves_heavy_packages_alone(tmp_path: Path) -> None:
    program = "import json, sys, mt_adapters; print(json.dumps([mt_adapters.__file__, *sys.modules]))"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    file, *modules = json.loads(result.stdout.splitlines()[-1])
    assert PACKAGE in modules
    assert Path(file).resolve() == (SOURCE / "__init__.py").resolve(), "another mt_adapters than this checkout's"
    leaked = NOT_AT_IMPORT & {module.split(".")[0] for module in modules}
    assert not leaked, f"`import {PACKAGE}` also imported {sorted(leaked)}"


def test_imports_follow_the_direction() -> None:
    problems = forbidden_imports(SOURCE, declared_packages())
    assert not problems, "\n".join(problems)


def test_nothing_is_unpickled_and_no_remote_code_runs() -> None:
    problems = unsafe_loading(SOURCE)
    assert not problems, "\n".join(problems)


def test_declared_packages_are_those_of_setup_cfg() -> None:
    packages = declared_packages()
    assert {"torch", "huggingface_hub", "PIL", "yaml", "torchmetrics"} <= packages
    assert not {"pytest", "ruff", "mypy", "mt_adapters"} & packages


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("losses.py", "from .tasks.depth import Depth", "losses.py:1: losses may not import tasks"),
        ("losses.py", "from . import tasks", "losses.py:1: losses may not import tasks"),
        ("losses.py", "import mt_adapters.tasks.depth", "losses.py:1: losses may not import tasks"),
        ("losses.py", "from mt_adapters import tasks", "losses.py:1: losses may not import tasks"),
        ("losses.py", "def f():\n    from .tasks import depth", "losses.py:2: losses may not import tasks"),
        ("losses.py", "from mt_adapters import VtaModel", "losses.py:1: losses may not import __init__"),
        ("tasks/new.py", "from .. import hub", "tasks/new.py:1: tasks may not import hub"),
        ("tuners/vta/layer.py", "from ...models import vta", "tuners/vta/layer.py:1: tuners may not import models"),
        ("tuners/vta/layer.py", "from ... import tasks", "tuners/vta/layer.py:1: tuners may not import tasks"),
        ("tuners/vta/layer.py", "import PIL.Image", "tuners/vta/layer.py:1: tuners may not import PIL"),
        (
            "data/new.py",
            "import importlib\nimportlib.import_module('timm')",
            "data/new.py:2: data may not import timm",
        ),
        ("misc.py", "", "misc.py: room misc has no line in MAY_IMPORT"),
    ],
)
def test_the_checker_finds_a_forbidden_import(tmp_path: Path, name: str, text: str, problem: str) -> None:
    assert forbidden_imports(write_package(tmp_path, {}), {"torch", "PIL"}) == []
    assert forbidden_imports(write_package(tmp_path, {name: text}), {"torch", "PIL"}) == [problem]


def test_training_may_not_import_what_stands_above_it(tmp_path: Path) -> None:
    above = ("pipelines", "visualize", "registration")
    files = {f"{room}.py": "" for room in above} | {"training/loop.py": f"from .. import {', '.join(above)}"}
    problems = forbidden_imports(write_package(tmp_path, files), {"torch"})
    assert problems == [f"training/loop.py:1: training may not import {room}" for room in above]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import torch\ntorch.load('weights')", "losses.py:2: torch.load"),
        ("from torch import load", "losses.py:1: torch.load"),
        ("import pickle", "losses.py:1: pickle"),
        ("from pickle import loads", "losses.py:1: pickle.loads"),
        ("f(trust_remote_code=True)", "losses.py:1: trust_remote_code"),
        ("f(trust_remote_code=flag)", "losses.py:1: trust_remote_code"),
    ],
)
def test_the_checker_finds_unsafe_loading(tmp_path: Path, text: str, problem: str) -> None:
    assert unsafe_loading(write_package(tmp_path, {"losses.py": "f(trust_remote_code=False)"})) == []
    assert unsafe_loading(write_package(tmp_path, {"losses.py": text})) == [problem]
