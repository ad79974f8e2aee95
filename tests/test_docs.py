"""What the texts promise: examples in docstrings run, and commands name programs and options that exist."""

import argparse
import doctest
import importlib
import re
import runpy
import shlex
from pathlib import Path

import pytest
import typer

import mt_adapters_cli
from mt_adapters.training import arguments as training_arguments
from programs import EXAMPLES, REPOSITORY

PACKAGE = REPOSITORY / "src/mt_adapters"
# Modules whose docstrings hold examples. Those of the second table need pretrained weights, so nothing runs them here.
RUNNABLE = (
    "mt_adapters.data.table",
    "mt_adapters.data.rooms",
    "mt_adapters.data.sampling",
    "mt_adapters.data.thinning",
    "mt_adapters.data.transforms",
    "mt_adapters.decoders.fpn",
    "mt_adapters.distillation.matching",
    "mt_adapters.evaluate_metrics",
    "mt_adapters.evaluate_metrics.depth",
    "mt_adapters.evaluate_metrics.edges",
    "mt_adapters.evaluate_metrics.normals",
    "mt_adapters.evaluate_metrics.semseg",
    "mt_adapters.losses",
    "mt_adapters.metrics",
    "mt_adapters.tasks",
    "mt_adapters.training.balancing",
    "mt_adapters.troa",
    "mt_adapters.tuners.vta.config",
)
NEED_WEIGHTS = ("mt_adapters.models.vta.modeling_vta", "mt_adapters.pipelines", "mt_adapters.tuners.vta.model")

TEXTS = [
    REPOSITORY / "README.md",
    *sorted(EXAMPLES.glob("*.py")),
    *sorted(EXAMPLES.glob("recipes/*.yaml")),
    *sorted(EXAMPLES.glob("accelerate/*.yaml")),
]
COMMAND = re.compile(r"(?:python|torchrun|accelerate launch)[^\n`]*? (examples/\S+\.py)([^\n`#]*)")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def commands(text: str) -> list[tuple[str, str]]:
    """(program, its arguments) of every command; lines that end in a backslash go on."""
    return [(match[1], match[2]) for match in COMMAND.finditer(re.sub(r"\\\n\s*", " ", text))]


COMMANDS = [(path, *command) for path in TEXTS for command in commands(path.read_text(encoding="utf-8"))]


OWN_COMMAND = re.compile(r"(?:bin/|^|\s)mt(?:-adapters|_adapters_cli) ([a-z]+)((?: [^\n`#]*)?)", flags=re.MULTILINE)
OWN_COMMANDS = [
    (path, match[1], match[2])
    for path in TEXTS
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for match in OWN_COMMAND.finditer(block)
]


class Parsed(Exception):
    """Raised with a program's parser instead of the program's work."""


def parser_of(program: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    def stop(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        raise Parsed(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Parsed) as caught:
            runpy.run_path(str(program), run_name="__main__")
    return caught.value.args[0]


def test_the_tables_hold_every_module_with_examples() -> None:
    found = {module_name(path) for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text(encoding="utf-8")}
    assert found == {*RUNNABLE, *NEED_WEIGHTS}


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_examples_in_docstrings_give_what_they_show(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_the_texts_show_commands() -> None:
    files = {path.name for path, *_ in COMMANDS}
    assert {"README.md", "train_multitask.py", "predict.py", "rooms_dinov2_small.yaml"} <= files
    assert {command for _, command, _ in OWN_COMMANDS} >= {"info", "predict", "evaluate", "push"}


@pytest.mark.parametrize(
    ("path", "program", "options"), COMMANDS, ids=[f"{path.name}: {' '.join(rest)}" for path, *rest in COMMANDS]
)
def test_a_command_names_a_program_and_options_that_exist(
    path: Path, program: str, options: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (REPOSITORY / program).is_file()
    words = shlex.split(options.split(";")[0].split("   ")[0])
    known = parser_of(REPOSITORY / program, monkeypatch)._option_string_actions
    assert [word for word in words if word.startswith("--") and word.partition("=")[0] not in known] == []
    for word in words:
        assert not word.startswith("examples/") or (REPOSITORY / word).is_file(), word


@pytest.mark.parametrize(
    ("path", "command", "options"),
    OWN_COMMANDS,
    ids=[f"{path.name}: {' '.join(rest)}" for path, *rest in OWN_COMMANDS],
)
def test_a_command_of_mt_adapters_and_its_options_exist(path: Path, command: str, options: str) -> None:
    known = typer.main.get_command(mt_adapters_cli.app).commands
    assert command in known
    allowed = {name for parameter in known[command].params for name in parameter.opts}
    assert {word.partition("=")[0] for word in shlex.split(options) if word.startswith("--")} <= allowed


def test_options_named_outside_of_commands_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    known = parser_of(EXAMPLES / "train_multitask.py", monkeypatch)._option_string_actions
    texts = [path for path in TEXTS if path.suffix == ".yaml"] + [EXAMPLES / "train_multitask.py"]
    found = {
        option
        for path in texts
        for option in re.findall(r"(?<![\w-])--(?:adapter|decoder|resume)\S*\b", path.read_text(encoding="utf-8"))
    }
    assert found
    assert found <= set(known)


def test_a_text_about_two_processes_names_the_launcher_that_starts_two() -> None:
    # Without a GPU and without MPI `accelerate launch` starts a single process, whatever number it is told.
    for path in TEXTS:
        assert not re.search(r"accelerate launch [^\n]*--cpu[^\n]*--num_processes", path.read_text(encoding="utf-8"))


def test_every_setting_of_a_training_has_a_help_text() -> None:
    for section in training_arguments.SECTIONS:
        for name, item in section.__dataclass_fields__.items():
            assert item.metadata.get("help"), name
