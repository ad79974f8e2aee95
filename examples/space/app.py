"""A page on which a trained model predicts the maps of your own pictures: a Gradio app, and a Hugging Face Space.

    pip install -r examples/space/requirements.txt
    python examples/space/app.py
    python examples/space/app.py outputs/demo

The model is a folder or Hub id, of a whole model or of an adapter; by default the adapter that comes with the package.
A Space reads it from its variable MODEL_ID.
"""

import argparse
import io
import os
from html import escape
from typing import Any

import gradio as gr
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image

from mt_adapters import MultitaskDensePredictionPipeline, VtaModel
from mt_adapters.data.rooms import SAMPLE_DIR
from mt_adapters.tasks.base import Task

EXAMPLE_FRAMES = (3, 19, 38, 52)
# Maps are as large as the picture, and in between there is a number per pixel and class: a phone's photo takes GBs.
LONGEST_SIDE = 1024
CSS = """
#photo img, .map img {width: 100%; height: 100%; object-fit: contain}
.caption {display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: center; min-height: 1.5rem; font-size: 0.85rem}
.chip {display: inline-block; width: 0.9em; height: 0.9em; margin-right: 4px; border-radius: 2px; vertical-align: -1px}
.bar {flex: 1; height: 0.9em; border-radius: 2px}
.html-container {padding: 0 !important}
.affinity {overflow-x: auto}
.affinity table {border-spacing: 3px; border-collapse: separate; font-size: 0.9rem}
.affinity table, .affinity th, .affinity td {border: none !important}
.affinity th, .affinity td {padding: 5px 8px; text-align: center; font-weight: normal}
.affinity th[scope=row] {text-align: right}
.affinity td {border-radius: 4px; min-width: 3.5em; color: black; font-variant-numeric: tabular-nums}
"""
# Fonts that gradio ships, so that the page asks no other machine for any; its semibold one lacks most letters.
FONTS = [gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"]


def css_color(rgb: torch.Tensor) -> str:
    return f"rgb({', '.join(map(str, rgb.tolist()))})"


def color_bar(task: Task, low: float, high: float, unit: str = "") -> str:
    colors = map(css_color, task.colorize(torch.linspace(low, high, 9).unsqueeze(0))[0])
    bar = f"<span class='bar' style='background: linear-gradient(to right, {', '.join(colors)})'></span>"
    return f"<span>{low:.1f}{unit}</span>{bar}<span>{high:.1f}{unit}</span>"


def class_legend(task: Task, names: dict[int, str], map_HW: np.ndarray) -> str:
    """The classes in the map, the largest first, without those of less than half a percent."""
    shares = np.bincount(map_HW.ravel()) / map_HW.size
    chips = []
    for class_id in np.argsort(-shares)[: (shares >= 0.005).sum()].tolist():
        color = css_color(task.colorize(torch.tensor([[class_id]]))[0, 0])
        # Names come from the model's repository, which may be anyone's.
        name = escape(names.get(class_id, f"class {class_id}"))
        chips.append(
            f"<span><span class='chip' style='background: {color}'></span>{name} {shares[class_id]:.0%}</span>"
        )
    return "".join(chips)


def caption(model: VtaModel, name: str, map_: np.ndarray) -> str:
    """HTML that says what the colours of a task's picture mean."""
    task = next(task for task in model.tasks if task.name == name)
    if task.kind == "semseg":
        text = class_legend(task, model.config.id2label, map_)
    elif task.kind == "depth":
        text = color_bar(task, map_.min().item(), map_.max().item(), " m")
    elif task.kind == "edges":
        text = color_bar(task, 0, 1)
    elif task.kind == "normals":
        text = "red: faces right, green: up, blue: the camera"
    else:
        text = escape(task.output)
    return f"<div class='caption'><b>{escape(name)}</b>{text}</div>"


def affinity_matrix(model: VtaModel) -> str:
    """An HTML table of the task affinities, the higher the bluer."""
    if not model.has_affinity:
        return "This model has no VTA adapter and hence no task affinities."
    names = [escape(name) for name in model.task_names]
    head = "".join(f"<th scope='col'>{name}</th>" for name in names)
    rows = ""
    for name, values in zip(names, model.affinity.tolist(), strict=True):
        cells = "".join(
            f"<td style='background: color-mix(in srgb, #60a5fa {value:.0%}, white)'>{value:.2f}</td>"
            for value in values
        )
        rows += f"<tr><th scope='row'>{name}</th>{cells}</tr>"
    return (
        f"<div class='affinity'><table aria-label='task affinities'><tr><td></td>{head}</tr>{rows}</table></div>"
        "<div class='caption'>How much a row's task helps a column's task, from 0 to 1.</div>"
    )


def example_pictures() -> list[Image.Image]:
    column = pyarrow.parquet.read_table(SAMPLE_DIR / "validation.parquet", columns=["image"])["image"]
    return [Image.open(io.BytesIO(column[row].as_py()["bytes"])) for row in EXAMPLE_FRAMES]


def build_page(pipe: Any, source: str) -> gr.Blocks:
    model: VtaModel = pipe.model
    tasks = model.task_names
    counts = ", ".join(f"{part} {count['total']:,}" for part, count in model.parameter_report().items())
    with gr.Blocks(title="mt_adapters", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>One picture in, a map per task out</h1>"
            f"Model <b>{escape(source)}</b>: one backbone for all tasks. Parameters: {counts}."
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                photo = gr.Image(type="pil", label="Picture", height=300, elem_id="photo")
                chosen = gr.CheckboxGroup(tasks, value=tasks, label="Tasks")
                button = gr.Button("Predict", variant="primary")
                gr.Examples(example_pictures(), photo, label="Rendered rooms (CC-BY 4.0) to try")
            with gr.Column(scale=2, min_width=280):
                with gr.Row():
                    columns, pictures, captions = {}, {}, {}
                    for name in tasks:
                        with gr.Column(min_width=270, visible=False) as columns[name]:
                            # The default format is lossy. The caption names the task: a label would cover the map.
                            pictures[name] = gr.Image(
                                format="png",
                                height=230,
                                show_label=False,
                                interactive=False,
                                buttons=["download", "fullscreen"],
                                elem_classes="map",
                            )
                            captions[name] = gr.HTML()
                gr.HTML("<h3>Task affinities</h3>" + affinity_matrix(model))

        def predict(picture: Image.Image | None, names: list[str]) -> dict[gr.components.Component, Any]:
            if picture is None:
                raise gr.Error("No picture: upload one or click on an example.", print_exception=False)
            if not names:
                raise gr.Error("No task: choose at least one.", print_exception=False)
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            results = pipe(picture, tasks=names)
            updates: dict[Any, Any] = {columns[name]: gr.Column(visible=name in results) for name in tasks}
            for name, result in results.items():
                updates[pictures[name]] = result["picture"]
                updates[captions[name]] = caption(model, name, result["map"])
            return updates

        outputs = [*columns.values(), *pictures.values(), *captions.values()]
        button.click(predict, [photo, chosen], outputs, api_name="predict")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("MODEL_ID", "mt-adapters/vta-swin-nano-rooms")
    parser.add_argument("model", nargs="?", default=default, help="default: $MODEL_ID, or what comes with the package")
    source = parser.parse_args().model
    build_page(MultitaskDensePredictionPipeline.from_pretrained(source), source).launch(
        css=CSS, theme=gr.themes.Default(font=FONTS), footer_links=["api", "gradio"]
    )


if __name__ == "__main__":
    main()
