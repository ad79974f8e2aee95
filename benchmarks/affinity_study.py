"""Does it help? Ways to learn and to use task affinities side by side: same recipe, steps, data and seeds.

    python benchmarks/affinity_study.py --data_dir ROOMS_FOLDER --jobs 2    # hours on a CPU; goes on where it stopped
    python benchmarks/affinity_study.py --variants fisher common --seeds 0 1 2

"gain" is the mean relative gain (delta_m) over the run of the same seed whose tasks share one common embedding.
Every run is one of `examples/train_multitask.py` with the settings of STUDY and VARIANTS, in its own folder under
--output; runs that have ended are not repeated. Prints a table (mean over seeds +- half the range) and writes
--json: results, affinities and command of every run, the table's figures, and Spearman's rank correlation of the
off-diagonal affinities between seeds.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mt_adapters.metrics import delta_m

PROGRAM = Path(__file__).parents[1] / "examples" / "train_multitask.py"
RECIPE = "examples/recipes/rooms_dinov2_small.yaml"
STUDY = {"image_size": 112, "eval_image_size": 112, "max_steps": 300, "eval_steps": 300, "num_workers": 1}

# Row of the table -> what it changes. All others keep the recipe's weighting "average".
VARIANTS: dict[str, dict[str, str]] = {
    "cosine": {"affinity_similarity": "cosine"},
    "split": {"affinity_similarity": "split"},
    "fisher": {"affinity_similarity": "fisher"},
    "spatial": {"affinity_similarity": "spatial"},
    "fisher, mirror": {"affinity_similarity": "fisher", "affinity_weighting": "mirror"},
    "identity": {"affinity_weighting": "identity"},
    "uniform": {"affinity_weighting": "uniform"},
    "one common embedding": {"affinity_weighting": "common"},
}
REFERENCE = "one common embedding"
METRICS = {"semseg": "miou", "depth": "rmse", "normals": "mean_angle", "edges": "f"}


def run(variant: str, seed: int, folder: Path, arguments: argparse.Namespace) -> None:
    settings: dict[str, Any] = STUDY | VARIANTS[variant] | {"seed": seed, "data_dir": arguments.data_dir}
    settings |= {"backbone": arguments.backbone, "max_steps": arguments.max_steps, "eval_steps": arguments.max_steps}
    options = [text for key, value in settings.items() if value is not None for text in (f"--{key}", str(value))]
    command = [sys.executable, str(PROGRAM), "--recipe", RECIPE, *options, "--output_dir", str(folder), "--resume"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def spearman(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Rank correlation; None if one side has but one value."""
    if len(set(left)) == 1 or len(set(right)) == 1:
        return None
    return statistics.correlation(ranks(left), ranks(right))


def off_diagonal(matrix: Sequence[Sequence[float]]) -> list[float]:
    return [value for s, row in enumerate(matrix) for t, value in enumerate(row) if s != t]


def summarize(runs: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """{variant: {"mean", "half_range": per column, "spearman": between pairs of seeds}}."""
    summary = {}
    for variant, by_seed in runs.items():
        columns = {
            task: [record["results"][task][metric] for record in by_seed.values()] for task, metric in METRICS.items()
        }
        columns["gain"] = [
            delta_m(record["results"], runs[REFERENCE][seed]["results"], dict(zip(METRICS, METRICS, strict=True)))
            for seed, record in by_seed.items()
        ]
        matrices = [off_diagonal(record["affinity"]) for record in by_seed.values()]
        summary[variant] = {
            "mean": {name: statistics.fmean(values) for name, values in columns.items()},
            "half_range": {name: (max(values) - min(values)) / 2 for name, values in columns.items()},
            "spearman": [spearman(left, right) for left, right in itertools.combinations(matrices, 2)],
        }
    return summary


def table(summary: dict[str, Any], num_seeds: int) -> str:
    rows = [
        "| variant | mIoU | depth RMSE, m | normals, ° | edges F | gain, % | Spearman |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, columns in summary.items():
        mean, spread = columns["mean"], columns["half_range"]
        digits = {"semseg": 3, "depth": 3, "normals": 2, "edges": 3, "gain": 1}
        cells = [f"{mean[name]:.{places}f} ± {spread[name]:.{places}f}" for name, places in digits.items()]
        correlations = ["-" if value is None else f"{value:.2f}" for value in columns["spearman"]]
        rows.append(f"| {variant} | {' | '.join(cells)} | {', '.join(correlations)} |")
    return "\n".join([*rows, f"\n(mean over {num_seeds} seeds ± half the range)"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--max_steps", type=int, default=STUDY["max_steps"])
    parser.add_argument("--backbone", help="folder of the weights; default: the recipe's Hub id")
    parser.add_argument("--data_dir", help="folder of the rooms set; default: the shipped sample")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--output", type=Path, default=Path("outputs/affinity_study"))
    parser.add_argument("--json", type=Path, help="where the results go; default: study.json in --output")
    arguments = parser.parse_args()
    if REFERENCE not in arguments.variants:
        arguments.variants.append(REFERENCE)

    folders = {
        (variant, seed): arguments.output / f"{variant.replace(', ', '_').replace(' ', '_')}_seed{seed}"
        for seed in arguments.seeds
        for variant in arguments.variants
    }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        if arguments.jobs > 1:
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
        todo = {key: folder for key, folder in folders.items() if not (folder / "metrics.json").exists()}
        list(pool.map(lambda item: run(*item[0], item[1], arguments), todo.items()))
    runs: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in arguments.variants}
    for (variant, seed), folder in folders.items():
        record = json.loads((folder / "metrics.json").read_text())
        keys = ("results", "affinity", "steps", "evaluation", "seconds", "command", "versions")
        runs[variant][seed] = {key: record[key] for key in keys}
    summary = summarize(runs)
    target = arguments.json or arguments.output / "study.json"
    target.write_text(json.dumps({"summary": summary, "runs": runs}, indent=1) + "\n")
    print(table(summary, len(arguments.seeds)))


if __name__ == "__main__":
    main()
