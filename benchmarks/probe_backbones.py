"""What does a frozen backbone know? Linear probes of several backbones side by side: same data, steps and seed.

    python benchmarks/probe_backbones.py --data_dir ROOMS_FOLDER    # minutes a row on a CPU; goes on where it stopped
    python benchmarks/probe_backbones.py --student outputs/distilled --rows student random
    python benchmarks/probe_backbones.py --recipe examples/recipes/rooms_demo.yaml --rows student random

Rows: the student (default: the backbone that the package ships), random weights of the same architecture, and the
teacher that it was distilled from. A probe is a run of `examples/train_multitask.py` with `adapter: none` and
`decoder: linear`: all feature maps, normalised, resized to the finest one and concatenated, and one 1x1 convolution
per task. With `--recipe` each run is what the recipe says, on the row's backbone. Runs that have ended are not
repeated. Prints a table and writes --json: results and settings of every run.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mt_adapters.backbones import load_backbone
from mt_adapters.training.arguments import read_recipe

PROGRAM = Path(__file__).parents[1] / "examples" / "train_multitask.py"
PROBE: dict[str, Any] = {
    "adapter": "none",
    "decoder": "linear",
    "tasks": ["semseg", "depth", {"name": "normals", "weight": 3.0}, {"name": "edges", "weight": 3.0}],
    "image_size": 128,
    "batch_size": 8,
    "max_steps": 400,
    "learning_rate": 5e-3,
    "checkpoint_steps": 100,
    "num_workers": 0,
    "trackers": ["none"],
}
# Row of the table -> its heading and what it changes; {student}, {teacher} and {config} are filled in.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "student": ("student", {"backbone": "{student}"}),
    "random": ("random weights, same architecture", {"backbone_config": "{config}"}),
    "teacher": ("teacher", {"backbone": "{teacher}"}),
}
# Task, its metric, heading, digits, and the sign of what is better.
COLUMNS = (
    ("semseg", "miou", "mIoU", 3, 1),
    ("depth", "rmse", "depth RMSE, m", 3, -1),
    ("normals", "mean_angle", "normals, °", 2, -1),
    ("edges", "f", "edges F", 3, 1),
)


def random_config(student: str) -> dict[str, Any]:
    """Settings of a backbone of the student's architecture."""
    settings = load_backbone(student).config.to_diff_dict()
    unused = ("architectures", "dtype", "transformers_version", "_name_or_path")
    return {name: value for name, value in settings.items() if name not in unused}


def recipe(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    filled = {"{student}": arguments.student, "{teacher}": arguments.teacher}
    settings = dict(PROBE)
    if arguments.recipe is not None:
        own = ("backbone", "backbone_config", "output_dir")
        settings = {name: value for name, value in read_recipe(arguments.recipe).items() if name not in own}
    told = {name: getattr(arguments, name) for name in ("max_steps", "seed")}
    settings |= {name: value for name, value in told.items() if value is not None} | ROWS[row][1]
    settings = {
        name: random_config(arguments.student) if value == "{config}" else filled.get(str(value), value)
        for name, value in settings.items()
    }
    return {name: value for name, value in settings.items() if value is not None}


def run(row: str, folder: Path, arguments: argparse.Namespace) -> None:
    """Trains a row to its end, from where it stopped.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # JSON is YAML.
    file, settings = folder / "recipe.yaml", json.dumps(recipe(row, arguments), indent=1) + "\n"
    if file.exists() and file.read_text() != settings:
        raise ValueError(f"{folder} holds a run with other settings: remove it, or choose another --output")
    if (folder / "metrics.json").exists():
        return
    file.write_text(settings)
    command = [sys.executable, str(PROGRAM), "--recipe", str(folder / "recipe.yaml"), "--resume"]
    command += ["--output_dir", str(folder)] + (["--data_dir", arguments.data_dir] if arguments.data_dir else [])
    command += ["--mixed_precision", arguments.mixed_precision]
    with open(folder / "log.txt", "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def gains(results: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[float]:
    """How much better than the baseline's each column is, in percent of the baseline's."""
    return [sign * 100 * (results[task][metric] / baseline[task][metric] - 1) for task, metric, _, _, sign in COLUMNS]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of the runs' results, with the predictor that never looks at the image."""
    lines = ["| backbone | " + " | ".join(column[2] for column in COLUMNS) + " |", "|---|---|---|---|---|"]
    results = {ROWS[row][0]: record["results"] for row, record in rows.items()}
    results["no backbone: input-blind"] = next(iter(rows.values()))["input_blind"]
    for name, of_tasks in results.items():
        values = [f"{of_tasks[task][metric]:.{digits}f}" for task, metric, _, digits, _ in COLUMNS]
        lines.append(f"| {name} | {' | '.join(values)} |")
    if {"student", "random"} <= rows.keys():
        values = [f"{value:+.0f} %" for value in gains(rows["student"]["results"], rows["random"]["results"])]
        lines.append(f"| student, better than random by | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW")
    parser.add_argument("--student", default="mt-adapters/swin-nano-rooms", help="name or folder of the backbone")
    parser.add_argument("--teacher", default="facebook/dinov2-small", help="Hub id or folder of its teacher")
    parser.add_argument("--data_dir", help="folder of the rooms set; default: the shipped sample")
    parser.add_argument("--recipe", type=Path, help="what is trained on each backbone; default: a linear probe")
    parser.add_argument("--max_steps", type=int, help="default: the recipe's")
    parser.add_argument("--seed", type=int, help="default: the recipe's")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--output", type=Path, default=Path("outputs/probe_backbones"))
    parser.add_argument("--json", type=Path, help="where the results go; default: probe.json in --output")
    arguments = parser.parse_args()

    rows = {}
    for row in arguments.rows:
        folder = arguments.output / row
        run(row, folder, arguments)
        record = json.loads((folder / "metrics.json").read_text())
        keys = ("results", "input_blind", "evaluation", "steps", "arguments", "seconds", "versions")
        rows[row] = {key: record[key] for key in keys}
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/probe_backbones.py", *words])
    target = arguments.json or arguments.output / "probe.json"
    target.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
