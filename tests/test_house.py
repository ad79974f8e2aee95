"""House rules that a formatter does not know: file sizes, file names, no paths of one machine, no network in tests."""

import re
import socket
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "examples", "model_cards", "src", "tests")
BINARY = {".parquet", ".png", ".jpg", ".safetensors", ".pyc"}
LINE_LIMITS = {"modeling_vta.py": 500}
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py"}
# A path that starts at a home or work folder; the lookbehind lets URLs and relative paths pass.
MACHINE_PATH = re.compile(r"(?<![\w.:/-])/(?:home|Users|root|work|mnt)/[\w.-]+|\b[A-Z]:\\+Users\b")


def repository_files() -> list[Path]:
    files = [path for path in REPOSITORY.iterdir() if path.is_file() and path.name != ".git"]
    files += [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    return [path for path in files if path.suffix not in BINARY and ".egg-info" not in str(path)]


FILES = repository_files()
PYTHON_FILES = [path for path in FILES if path.suffix == ".py"]


def name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_the_walk_finds_this_file_and_the_package() -> None:
    assert {Path(__file__), REPOSITORY / "src/mt_adapters/__init__.py", REPOSITORY / "setup.cfg"} <= set(FILES)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_a_python_file_is_short(path: Path) -> None:
    limit = LINE_LIMITS.get(path.name, 400)
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= limit, f"{num_lines} lines, at most {limit}: split the file by ideas"


def test_no_file_has_a_vague_name() -> None:
    vague = [name(path) for path in PYTHON_FILES if path.name in VAGUE_NAMES]
    assert not vague, f"name these files for the one idea they hold: {vague}"


def test_no_text_names_a_path_of_one_machine() -> None:
    found = {name(path): MACHINE_PATH.findall(path.read_text(encoding="utf-8")) for path in FILES}
    found = {path: paths for path, paths in found.items() if paths}
    assert not found, f"use a relative path or a placeholder instead: {found}"


@pytest.mark.parametrize(
    ("text", "is_machine_path"),
    [
        ("/".join(["--data_dir ", "home", "someone", "data"]), True),
        ("/".join(["'", "work", "main'"]), True),
        ("\\".join(["C:", "Users", "someone"]), True),
        ("https://example.org/home/page", False),
        ("/path/to/data", False),
        ("outputs/work/demo", False),
    ],
)
def test_the_pattern_tells_machine_paths_from_others(text: str, is_machine_path: bool) -> None:
    assert bool(MACHINE_PATH.search(text)) == is_machine_path


def test_tests_cannot_reach_another_machine() -> None:
    with socket.socket() as sock, pytest.raises(RuntimeError, match="tests run offline"):
        sock.connect(("192.0.2.1", 80))
