"""The card of a model or adapter, written from its record: what it is, and what was measured.

`hub.record.describe` gives the record of any model; a training run adds its results, settings and command. A section
without anything in the record to fill it is left out.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mt_adapters.hub.shipped import is_shipped
from mt_adapters.tasks import get_tasks

# What a reader wants to see of each kind: metric, heading, factor and format.
COLUMNS = {
    "semseg": (("miou", "mIoU", 1, ".3f"), ("pixel_accuracy", "pixel accuracy", 1, ".3f")),
    "depth": (("rmse", "RMSE, m", 1, ".3f"), ("abs_rel", "abs rel", 1, ".3f"), ("delta1", "δ < 1.25", 1, ".3f")),
    "normals": (("mean_angle", "mean angle, °", 1, ".2f"), ("median_angle", "median, °", 1, ".2f")),
    "edges": (("f", "F (1 px tolerance)", 1, ".3f"), ("l1", "L1", 1, ".3f")),
}
# The Hub's names for what the kinds do, and for two of our metrics; it has none for the others.
HUB_TASKS = {"semseg": "image-segmentation", "depth": "depth-estimation"}
HUB_METRICS = {"miou": "mean_iou", "pixel_accuracy": "accuracy"}
# The pictures of a run, with their captions.
PICTURES = {
    "predictions.png": "Unseen images: the image, and for each task the prediction over the truth",
    "affinity.png": "Task affinities: row = source, column = target",
    "affinity_history.png": "Task affinities over the training",
}
PAPER = """```bibtex
@inproceedings{bhattacharjee2023vision,
  title     = {Vision Transformer Adapters for Generalizable Multitask Learning},
  author    = {Bhattacharjee, Deblina and S{\\"u}sstrunk, Sabine and Salzmann, Mathieu},
  booktitle = {ICCV},
  year      = {2023}
}
```"""


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


def head_table(heads: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of what each task predicts, from the tasks' settings."""
    lines = ["| task | kind | output | logits | loss weight |", "|---|---|---|---|---|"]
    for task in get_tasks(heads):
        lines.append(f"| {task.name} | {task.kind} | {task.output} | {task.num_channels} | {task.weight:g} |")
    return "\n".join(lines)


def model_card(
    record: Mapping[str, Any],
    repo_id: str | None = None,
    pictures: Sequence[str] = (),
    is_adapter: bool = False,
    license: str = "apache-2.0",
) -> str:
    """The card (README.md) of a model, or of its adapter alone; every figure in it is the record's.

    Args:
        record: as `hub.record.describe` and a training run give it.
        repo_id: where it will be on the Hub.
        pictures: those of `PICTURES` that stand beside the card.
        is_adapter: the repository holds an adapter with its heads, without the backbone.
        license: of the weights, in the Hub's spelling.
    """
    sections = [
        f"---\n{card_data(record, repo_id, is_adapter, license).to_yaml()}\n---",
        f"# {repo_id or 'Multitask model: ' + ', '.join(record['tasks'])}",
        summary(record, is_adapter),
        quick_start(record, repo_id or "org/name", is_adapter),
        f"## Tasks and heads\n\n{head_table(record['heads'])}",
    ]
    if record["classes"]:
        sections.append(f"Classes: {', '.join(f'{number} {name}' for number, name in enumerate(record['classes']))}.")
    sections.append(results(record))
    sections += [f"![{PICTURES[name]}]({name})" for name in pictures if name == "predictions.png"]
    sections.append(f"## Parameters\n\n{parameter_table(record['parameters'])}")
    if record["affinity"] is not None:
        sections.append(
            "## Task affinities\n\nHow much the training of the source (row) helps the target (column).\n\n"
            + affinity_table(record["affinity"], [*record["tasks"]])
        )
        sections += [f"![{PICTURES[name]}]({name})" for name in pictures if name != "predictions.png"]
    sections.append(training(record))
    sections.append(f"## Limits\n\n{limits(record)}")
    sections.append(f"## Citation\n\nThe method:\n\n{PAPER}")
    return "\n\n".join(sections) + "\n"


def card_data(record: Mapping[str, Any], repo_id: str | None, is_adapter: bool, license: str) -> ModelCardData:
    """The metadata that the Hub reads."""
    # A backbone that comes with the package is no repository that the Hub could link to.
    base_model = None if is_shipped(record["base_model"]) else record["base_model"]
    # No pipeline_tag: the Hub knows none for several tasks at once, and transformers would choose a pipeline by it.
    return ModelCardData(
        license=license,
        library_name="peft" if is_adapter else "mt-adapters",
        base_model=base_model,
        base_model_relation="adapter" if base_model and is_adapter else None,
        tags=["mt-adapters", "multitask", "dense-prediction", *record["tasks"]],
        model_name=repo_id or "multitask model",
        eval_results=eval_results(record) or None,
    )


def eval_results(record: Mapping[str, Any]) -> list[EvalResult]:
    """The record's results as entries of the model index; what is not a number (no label in the set) is left out."""
    return [
        EvalResult(
            task_type=HUB_TASKS.get(kind, "image-to-image"),
            task_name=task,
            dataset_type=" and ".join(record.get("evaluated_on", data_sets(record))),
            dataset_name=record["evaluation"],
            # Entries of one task type on one data set would be merged into one.
            dataset_config=task,
            dataset_split="validation",
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=heading,
            metric_value=record["results"][task][metric],
        )
        for task, kind in (record["tasks"] if "results" in record else {}).items()
        for metric, heading, *_ in COLUMNS[kind]
        if math.isfinite(record["results"][task][metric])
    ]


def summary(record: Mapping[str, Any], is_adapter: bool = False) -> str:
    origin = ", which comes with the package" if is_shipped(record["base_model"]) else ""
    backbone = f"{record['backbone']} backbone"
    backbone += f" ({record['base_model']}{origin})" if record["base_model"] else ""
    adapters = {None: "no adapters", "VTA": "task-conditioned adapters", "LORA": "LoRA adapters"}
    adapter = adapters.get(record["adapter"], f"{record['adapter']} adapters")
    if record["train_adapted_blocks"]:
        adapter += ", trained copies of the adapted blocks"
    state = "trained" if record["train_backbone"] else "frozen"
    what = f"A {state} {backbone} with {adapter} and {record['decoder']} decoders"
    if is_adapter:
        what = f"{adapter[0].upper()}{adapter[1:]}, {record['decoder']} decoders and heads for a {state} {backbone}"
    return f"{what}: {', '.join(record['tasks'])} from one image. Made with mt_adapters."


def quick_start(record: Mapping[str, Any], repo_id: str, is_adapter: bool) -> str:
    first = next(iter(record["tasks"]))
    if not is_adapter:
        return f"""```python
import mt_adapters  # registers the model type and the pipeline
from transformers import AutoModel, pipeline

predict = pipeline("multitask-dense-prediction", model="{repo_id}")
predict("photo.jpg")["{first}"]["picture"].show()  # ["map"] holds the values

model = AutoModel.from_pretrained("{repo_id}").eval()  # model(pixel_values).logits["{first}"]
```"""
    backbone = "" if record["base_model"] else ", backbone=..."
    whole = f"""```python
from mt_adapters import MultitaskDensePredictionPipeline, VtaModel

predict = MultitaskDensePredictionPipeline.from_pretrained("{repo_id}"{backbone})
predict("photo.jpg")["{first}"]["picture"].show()  # ["map"] holds the values

model = VtaModel.from_adapter("{repo_id}"{backbone})  # model(pixel_values).logits["{first}"]
model = VtaModel.from_adapter("{repo_id}"{backbone}, tasks=["{first}"])  # one task, and only its files
```"""
    # Names of the package's own are known to the package only.
    if is_shipped(repo_id):
        return whole
    base = record["base_model"] or "..."
    load, loader = ("AutoModel.from_pretrained", "from transformers import AutoModel")
    if is_shipped(base):
        load, loader = "load_backbone", "from mt_adapters.backbones import load_backbone"
    return f"""{whole}

The adapter alone, without heads, on the plain backbone:

```python
import mt_adapters  # registers the adapter type
from peft import PeftModel
{loader}

backbone = PeftModel.from_pretrained({load}("{base}"), "{repo_id}")
```"""


def results(record: Mapping[str, Any]) -> str:
    if "results" not in record:
        return "## Results\n\nNot evaluated."
    columns = {"this model": record["results"], "input-blind": record["input_blind"]}
    return (
        f"## Results\n\n{record['evaluation']}; input-blind: predicts the training set's mean map or most frequent "
        "class for every image.\n\n"
        + metrics_table(columns, record["tasks"])
        + f"\n\nMean gain over input-blind: {record['mean_gain']:.1f} %. All figures: [metrics.json](metrics.json)."
    )


def data_sets(record: Mapping[str, Any]) -> Mapping[str, str]:
    """Of the training sets {name: what it is and its licence}; a record of an earlier version has the name alone."""
    name = record["arguments"]["dataset"]
    return record.get("datasets", {name: name})


def training(record: Mapping[str, Any]) -> str:
    versions = f"Versions: {', '.join(f'{name} {number}' for name, number in record['versions'].items())}."
    if "command" not in record:
        return f"## Training\n\nNo record of the training was kept with these weights. {versions}"
    arguments, sets = record["arguments"], data_sets(record)
    evaluated = record.get("evaluated_on", [*sets])
    use = "Trained and evaluated" if set(evaluated) == set(sets) else f"Evaluated on {', '.join(evaluated)}; trained"
    data = f"{use} on {'; and '.join(sets.values())}"
    return (
        f"## Training\n\n{record['steps']} steps in {record['seconds'] / 60:.1f} minutes on {record['device']}; "
        f"the best evaluation was after step {record['best_step']}.\n\n```\n{record['command']}\n```\n\n"
        f"```json\n{json.dumps(arguments, indent=1)}\n```\n\n{versions}\n\n## Data and licences\n\n"
        f"{data}. The weights' licence is in the card's metadata; the backbone keeps its own."
    )


def limits(record: Mapping[str, Any]) -> str:
    lines = []
    if "results" in record:
        lines.append(
            f"Measured on {record['evaluation']} with one seed ({record['arguments']['seed']}), and on nothing else."
        )
    if not record["is_pretrained"]:
        lines.append("The backbone started from random weights, not from pretrained ones.")
    kinds = set(record["tasks"].values())
    if "depth" in kinds:
        lines.append("Depth in metres holds for cameras and scenes like those of the training data.")
    if "edges" in kinds:
        lines.append("F of edges allows a tolerance of one pixel and is not the odsF of the literature.")
    if "semseg" in kinds:
        lines.append("mIoU counts the classes that occur.")
    return "\n".join(f"- {line}" for line in lines) or "None were looked for."
