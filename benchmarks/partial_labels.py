"""What are partial labels worth? One random task labelled per frame, against all labels and against fewer frames.

    python benchmarks/partial_labels.py --backbone models/dinov2-small --data_dir rooms      # an hour on a CPU

Three training sets of the same rooms, prepared with `mt_adapters.data.preparation`: all labels; one label per frame,
each task on a quarter of the frames; a quarter of the frames with all labels, which is as many labels. Same recipe,
steps and validation frames; with one label per frame also with four times the frames in a step, so that a step sees as
many labels as with all of them. Runs that have ended are not repeated. Prints a table (mean over seeds +- half the
range) and writes --json: results and command of every run, and the table's figures. "gain" is the mean relative gain
(delta_m) over the run of the same seed with all labels.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mt_adapters.data import RoomsDataset
from mt_adapters.data.preparation import prepare_split
from mt_adapters.metrics import delta_m

PROGRAM = Path(__file__).parents[1] / "examples" / "train_multitask.py"
RECIPE = "examples/recipes/rooms_dinov2_small.yaml"
STUDY = {"image_size": 112, "eval_image_size": 112, "num_workers": 1, "trackers": "none"}
METRICS = {"semseg": "miou", "depth": "rmse", "normals": "mean_angle", "edges": "f"}
ALL, ONE, FEWER = "all labels", "one label per frame", "a quarter of the frames"
ONE_LARGE = "one label per frame, 4 x batch"


class OneLabelPerFrame(RoomsDataset):
    """Each frame keeps the label of one task, dealt at random, each task to as many frames as any other."""

    def __init__(self, split: str, data_dir: str | None) -> None:
        super().__init__(split, data_dir)
        dealt = np.arange(len(self)) % len(self.labels)
        self.owners = np.random.default_rng(0).permutation(dealt)

    def read(self, index: int, names: Collection[str]) -> dict[str, Any]:
        kept = list(self.labels)[self.owners[index]]
        return super().read(index, [name for name in names if name == kept])


class FewerFrames(RoomsDataset):
    """Every fourth frame, with all its labels."""

    def __len__(self) -> int:
        return super().__len__() // 4

    def _frame(self, index: int) -> tuple[int, dict[str, Any]]:
        return super()._frame(4 * index)

    def name(self, index: int) -> str:
        return super().name(4 * index)


SETS: dict[str, type[RoomsDataset]] = {ALL: RoomsDataset, ONE: OneLabelPerFrame, FEWER: FewerFrames}


# Row of the table -> its training set, and what it changes.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    ALL: (ALL, {}),
    ONE: (ONE, {}),
    ONE_LARGE: (ONE, {"batch_size": 32}),
    FEWER: (FEWER, {}),
}


def prepare(name: str, folder: Path, data_dir: str | None) -> dict[str, Any]:
    """The report of the training split."""
    folder.mkdir(parents=True, exist_ok=True)
    prepare_split(RoomsDataset("validation", data_dir), "validation", folder)
    return prepare_split(SETS[name]("train", data_dir), "train", folder)["report"]


def run(variant: str, data: Path, seed: int, folder: Path, arguments: argparse.Namespace) -> None:
    settings = STUDY | VARIANTS[variant][1] | {"dataset": "prepared", "data_dir": data, "seed": seed}
    settings |= {"backbone": arguments.backbone}
    settings |= {"max_steps": arguments.max_steps, "eval_steps": arguments.max_steps, "output_dir": folder}
    options = [text for key, value in settings.items() if value is not None for text in (f"--{key}", str(value))]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        command = [sys.executable, str(PROGRAM), "--recipe", RECIPE, *options, "--resume"]
        subprocess.run(command, check=True, stdout=log, stderr=log)


def summarize(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """{variant: {"mean", "half_range": per column}}."""
    kinds = dict(zip(METRICS, METRICS, strict=True))
    summary = {}
    for variant, by_seed in runs.items():
        columns = {
            task: [record["results"][task][metric] for record in by_seed.values()] for task, metric in METRICS.items()
        }
        columns["gain"] = [
            delta_m(record["results"], runs[ALL][seed]["results"], kinds) for seed, record in by_seed.items()
        ]
        summary[variant] = {
            "mean": {name: statistics.fmean(values) for name, values in columns.items()},
            "half_range": {name: (max(values) - min(values)) / 2 for name, values in columns.items()},
        }
    return summary


def table(summary: dict[str, Any], counts: dict[str, dict[str, Any]], num_seeds: int) -> str:
    rows = [
        "| training set | frames | labels | mIoU | depth RMSE, m | normals, ° | edges F | gain, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant, figures in summary.items():
        num_frames, labels = counts[VARIANTS[variant][0]].values()
        num_labels = sum(round(share * num_frames) for share in labels.values())
        digits = {"semseg": 3, "depth": 3, "normals": 2, "edges": 3, "gain": 1}
        spreads = {k: f" ± {figures['half_range'][k]:.{n}f}" if num_seeds > 1 else "" for k, n in digits.items()}
        cells = [f"{figures['mean'][k]:.{n}f}{spreads[k]}" for k, n in digits.items()]
        rows.append(f"| {variant} | {num_frames:,} | {num_labels:,} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--max_steps", type=int, default=300)
    parser.add_argument("--backbone", help="folder of the weights; default: the recipe's Hub id")
    parser.add_argument("--data_dir", help="folder of the rooms set; default: the shipped sample")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--output", type=Path, default=Path("outputs/partial_labels"))
    parser.add_argument("--json", type=Path, help="where the results go; default: study.json in --output")
    arguments = parser.parse_args()

    if ALL not in arguments.variants:
        arguments.variants.append(ALL)
    data = {name: arguments.output / "data" / name.replace(" ", "_") for name in SETS}
    reports = {name: prepare(name, folder, arguments.data_dir) for name, folder in data.items()}
    folders = {
        (variant, seed): arguments.output / f"{variant.replace(', ', '_').replace(' ', '_')}_seed{seed}"
        for seed in arguments.seeds
        for variant in arguments.variants
    }
    if arguments.jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    todo = {key: folder for key, folder in folders.items() if not (folder / "metrics.json").exists()}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda i: run(i[0][0], data[VARIANTS[i[0][0]][0]], i[0][1], i[1], arguments), todo.items()))
    runs: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in arguments.variants}
    for (variant, seed), folder in folders.items():
        record = json.loads((folder / "metrics.json").read_text())
        keys = ("results", "steps", "evaluation", "affinity", "affinity_updates", "seconds", "command", "versions")
        runs[variant][seed] = {key: record[key] for key in keys}
    summary = summarize(runs)
    counts = {
        name: {"num_frames": report["num_frames"], "labels": {k: v["frames"] for k, v in report["labels"].items()}}
        for name, report in reports.items()
    }
    target = arguments.json or arguments.output / "study.json"
    target.write_text(json.dumps({"summary": summary, "data": counts, "runs": runs}, indent=1) + "\n")
    print(table(summary, counts, len(arguments.seeds)))


if __name__ == "__main__":
    main()
