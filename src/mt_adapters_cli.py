"""The command line: `mt-adapters info | predict | evaluate | card | push | backbones | tasks`.

A module of its own beside the package, whose import takes seconds: help and the shell's completion, which runs the
program at every TAB, need none of it, so each command imports what it uses.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

# An adapter and its backbone, which come with the package.
SHIPPED_MODEL = "mt-adapters/vta-swin-nano-rooms"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

app = typer.Typer(
    name="mt-adapters",
    help="One frozen vision transformer, many dense tasks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[str, typer.Argument(help="Folder or Hub id of a full model or an adapter.", show_default=False)]
Backbone = Annotated[
    str | None, typer.Option(help="Folder or Hub id of an adapter's backbone, if it is not the one of its config.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def show(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


@app.command()
def info(source: Source, backbone: Backbone = None, as_json: AsJson = False) -> None:
    """What a model is: its config, tasks, task affinities and parameters."""
    from mt_adapters.hub.card import affinity_table, head_table, parameter_table, summary
    from mt_adapters.hub.record import describe
    from mt_adapters.models.loading import load_model

    model = load_model(source, backbone)
    record = describe(model)
    if as_json:
        show(record | {"config": json.loads(model.config.to_json_string(use_diff=True))})
        return
    sections = [summary(record), head_table(record["heads"]), parameter_table(record["parameters"])]
    if record["affinity"] is not None:
        sections.append(affinity_table(record["affinity"], model.task_names))
    if record["adapter"] is not None:
        settings = {key: value for key, value in model.config.adapter.items() if value not in (None, {}, [])}
        sections.append("Adapter: " + json.dumps(settings, indent=1))
    typer.echo("\n\n".join(sections))


@app.command()
def predict(
    pictures: Annotated[
        list[Path], typer.Argument(help="Picture files, or folders of pictures.", show_default=False, exists=True)
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub id of a full model or an adapter.")] = SHIPPED_MODEL,
    output_dir: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("outputs/predictions"),
    task: Annotated[list[str] | None, typer.Option(help="A task to predict (may be repeated); default: all.")] = None,
    arrays: Annotated[bool, typer.Option(help="Also write NAME.npz with the values of all tasks.")] = True,
    backbone: Backbone = None,
    as_json: AsJson = False,
) -> None:
    """Predict all tasks for pictures, at their own size: one PNG per picture and task, and one file of raw values.

    A picture that cannot be read is named at the end; the others are done, and the exit status is 1.
    """
    import numpy as np

    from mt_adapters.pipelines import MultitaskDensePredictionPipeline

    paths = list(find_pictures(pictures))
    pipe = MultitaskDensePredictionPipeline.from_pretrained(model, backbone, task or None)
    output_dir.mkdir(parents=True, exist_ok=True)
    results, problems = [], []
    for path, name in zip(paths, distinct_names(paths), strict=True):
        try:
            maps = pipe(path)
        except ValueError as error:
            problems.append({"picture": str(path), "problem": str(error)})
            continue
        files = {kind: output_dir / f"{name}_{kind}.png" for kind in maps}
        for kind, file in files.items():
            maps[kind]["picture"].save(file)
        if arrays:
            files["arrays"] = output_dir / f"{name}.npz"
            np.savez_compressed(files["arrays"], **{kind: result["map"] for kind, result in maps.items()})
        results.append({"picture": str(path), "files": {kind: str(file) for kind, file in files.items()}})
        if not as_json:
            typer.echo("\n".join(map(str, files.values())))
    if as_json:
        show({"results": results, "problems": problems})
    for problem in problems:
        typer.echo(f"{problem['picture']}: {problem['problem']}", err=True)
    typer.echo(f"{len(results)} of {len(paths)} pictures predicted", err=True)
    if problems or not paths:
        raise typer.Exit(1)


def find_pictures(sources: Iterable[Path]) -> Iterable[Path]:
    """The files that are named, and the pictures in the folders that are named and below."""
    for source in sources:
        if source.is_dir():
            yield from sorted(path for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
        else:
            yield source


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """A name for each picture's results, as short as it can be without two having the same."""
    for name in (lambda path: path.stem, lambda path: path.name.replace(".", "_")):
        names = [name(path) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number:06d}_{path.stem}" for number, path in enumerate(paths)]


@app.command()
def evaluate(
    source: Source,
    dataset: Annotated[str, typer.Option(help="Name of the data set.")] = "rooms",
    data_dir: Annotated[Path | None, typer.Option(help="Its folder; default: the sample that is shipped.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side in pixels; default: the image processor's.")] = None,
    batch_size: int = 8,
    num_workers: int = 2,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    backbone: Backbone = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on a validation set. Several processes give the same digits as one:

    torchrun --nproc_per_node 2 -m mt_adapters_cli evaluate outputs/demo
    """
    import torch
    from accelerate import Accelerator, DataLoaderConfiguration

    from mt_adapters import VtaImageProcessorPil
    from mt_adapters.data import get_dataset
    from mt_adapters.hub.card import metrics_table
    from mt_adapters.hub.shipped import local_source
    from mt_adapters.models.loading import load_model
    from mt_adapters.training.evaluation import eval_loader
    from mt_adapters.training.evaluation import evaluate as measure

    accelerator = Accelerator(
        # Said aloud, so that several processes on CPUs find each other.
        cpu=not torch.accelerator.is_available(),
        dataloader_config=DataLoaderConfiguration(even_batches=False),
    )
    model = load_model(source, backbone)
    side = image_size or VtaImageProcessorPil.from_pretrained(local_source(source)).size["height"]
    validation_set: Any = get_dataset(dataset)("validation", data_dir)
    loader = eval_loader(validation_set, model.tasks, side, batch_size, num_workers)
    results = measure(model.to(accelerator.device), accelerator.prepare(loader), accelerator)
    if accelerator.is_main_process:
        if as_json:
            show(results)
        else:
            kinds = {task.name: task.kind for task in model.tasks}
            typer.echo(f"{len(validation_set)} validation images of {dataset} at {side} x {side} pixels\n")
            typer.echo(metrics_table({source: results}, kinds))
        if output is not None:
            output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    accelerator.end_training()


RunFolder = Annotated[
    Path, typer.Argument(help="Folder that a training wrote.", exists=True, file_okay=False, show_default=False)
]


@app.command()
def card(
    folder: RunFolder,
    repo_id: Annotated[str | None, typer.Option(help="Where the model will be on the Hub.")] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="The card of an adapter.")] = False,
    license: Annotated[str, typer.Option(help="Licence of the weights, in the Hub's spelling.")] = "apache-2.0",
) -> None:
    """Write the model card (README.md) of a training run from its metrics.json and pictures."""
    from mt_adapters.hub.push import write_card
    from mt_adapters.hub.record import read_record

    write_card(folder, read_record(folder), repo_id=repo_id, is_adapter=adapter, license=license)
    typer.echo(folder / "README.md")


@app.command()
def push(
    folder: RunFolder,
    repo_id: Annotated[str, typer.Argument(help='Repository on the Hub, "organization/name".', show_default=False)],
    adapter: Annotated[bool, typer.Option("--adapter", help="Only the adapter and heads of a full model.")] = False,
    backbone: Backbone = None,
    base_model: Annotated[str | None, typer.Option(help="Hub id of a backbone that was loaded from a folder.")] = None,
    license: Annotated[str, typer.Option(help="Licence of the weights, in the Hub's spelling.")] = "apache-2.0",
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; it is created if it does not exist.")] = None,
    commit_message: Annotated[str | None, typer.Option(help="First line of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
) -> None:
    """Publish a model or adapter with its image processor, card, results and pictures, in one commit."""
    from mt_adapters.hub.download import holds_adapter
    from mt_adapters.models.loading import load_model

    model = load_model(str(folder), backbone)
    publish = model.push_adapter_to_hub if adapter or holds_adapter(folder) else model.push_to_hub
    url = publish(
        repo_id,
        base_model=base_model,
        license=license,
        private=private or None,
        revision=revision,
        commit_message=commit_message,
        create_pr=create_pr,
    )
    typer.echo(url)


@app.command()
def backbones(as_json: AsJson = False) -> None:
    """The kinds of backbones that can be adapted."""
    from mt_adapters.backbones.table import FAMILIES

    rows = {name: "windows" if family.windowed else "global" for name, family in sorted(FAMILIES.items())}
    if as_json:
        show([{"model_type": name, "attention": attention} for name, attention in rows.items()])
        return
    typer.echo("| model_type | attention |\n|---|---|")
    for name, attention in rows.items():
        typer.echo(f"| {name} | {attention} |")


@app.command()
def tasks(as_json: AsJson = False) -> None:
    """The kinds of tasks, what they predict and how they are measured."""
    from dataclasses import fields

    from mt_adapters.hub.card import COLUMNS
    from mt_adapters.tasks import TASKS

    rows = [
        {
            "kind": kind,
            "output": task.output,
            "metrics": [heading for _, heading, *_ in COLUMNS[kind]],
            "settings": [field.name for field in fields(task)],
        }
        for kind, task in TASKS.items()
    ]
    if as_json:
        show(rows)
        return
    typer.echo("| kind | output | metrics | settings |\n|---|---|---|---|")
    for row in rows:
        cells = [cell if isinstance(cell, str) else ", ".join(cell) for cell in row.values()]
        typer.echo(f"| {' | '.join(cells)} |")


def print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"mt-adapters {version('mt-adapters')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The program `mt-adapters`: a user's mistake is one line and exit status 1, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"mt-adapters: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
