"""The model card of a training run, written from what the run recorded."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

# What a reader wants to see of each kind: metric, heading, factor and format.
COLUMNS = {
    "semseg": (("miou", "mIoU", 1, ".3f"), ("pixel_accuracy", "pixel accuracy", 1, ".3f")),
    "depth": (("rmse", "RMSE, m", 1, ".3f"), ("abs_rel", "abs rel", 1, ".3f"), ("delta1", "δ < 1.25", 1, ".3f")),
    "normals": (("mean_angle", "mean angle, °", 1, ".2f"), ("median_angle", "median, °", 1, ".2f")),
    "edges": (("f", "F (1 px tolerance)", 1, ".3f"), ("l1", "L1", 1, ".3f")),
}


def metrics_table(columns: Mapping[str, Mapping[str, Mapping[str, float]]], kinds: Mapping[str, str]) -> str:
    """A Markdown table: a row per task and metric, a column per set of results {heading: {task: {metric: value}}}."""
    lines = [
        "| task | metric | " + " | ".join(columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for task, kind in kinds.items():
        for metric, heading, factor, form in COLUMNS[kind]:
            values = [format(factor * results[task][metric], form) for results in columns.values()]
            lines.append(f"| {task} | {heading} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def parameter_table(report: Mapping[str, Mapping[str, int]]) -> str:
    lines = ["| part | parameters | trained |", "|---|---|---|"]
    lines += [f"| {group} | {count['total']:,} | {count['trainable']:,} |" for group, count in report.items()]
    return "\n".join(lines)


def affinity_table(affinity: Sequence[Sequence[float]], task_names: Sequence[str]) -> str:
    """A Markdown table: rows are sources, columns targets."""
    lines = ["| source \\ target | " + " | ".join(task_names) + " |", "|---|" + "---|" * len(task_names)]
    for name, row in zip(task_names, affinity, strict=True):
        lines.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    return "\n".join(lines)


def model_card(record: Mapping[str, Any]) -> str:
    """The card of a run from its record (metrics.json); every figure in it is the record's."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="mt-adapters",
        base_model=record.get("base_model"),
        tags=["mt-adapters", "multitask", "dense-prediction", *record["tasks"]],
    )
    affinity, arguments = record["affinity"], record["arguments"]
    state = "trained" if arguments["train_backbone"] else "frozen"
    adapters = {"vta": "task-conditioned adapters", "lora": "LoRA adapters", "none": "no adapters"}
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# Multitask model: {', '.join(record['tasks'])}",
        f"A {state} vision transformer with {adapters[arguments['adapter']]}, made with mt_adapters.",
        "```python\nimport mt_adapters  # registers the model type\nfrom transformers import AutoModel\n\n"
        'model = AutoModel.from_pretrained("this folder or its Hub id").eval()\n```',
        f"## Results\n\n{record['evaluation']}; input-blind: predicts the training set's mean map or most frequent "
        "class for every image.\n\n"
        + metrics_table({"this model": record["results"], "input-blind": record["input_blind"]}, record["tasks"])
        + f"\n\nMean gain over input-blind: {record['mean_gain']:.1f} %.",
        "![image, and for each task the prediction over the truth](predictions.png)",
        f"## Parameters\n\n{parameter_table(record['parameters'])}",
    ]
    if affinity is not None:
        sections.append(
            "## Task affinities\n\nHow much the training of the source (row) helps the target (column).\n\n"
            f"{affinity_table(affinity, [*record['tasks']])}\n\n![row: source, column: target](affinity.png)"
        )
    sections.append(
        f"## Training\n\n{record['steps']} steps in {record['seconds'] / 60:.1f} minutes on {record['device']}; "
        f"the best evaluation was after step {record['best_step']}.\n\n```\n{record['command']}\n```\n\n"
        f"```json\n{json.dumps(arguments, indent=1)}\n```\n\n"
        + "Versions: "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + "."
    )
    return "\n\n".join(sections) + "\n"
