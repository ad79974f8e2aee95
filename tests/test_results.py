"""The numbers in README.md are those of the results files under model_cards/."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from benchmarks import partial_labels, probe_backbones
from benchmarks.affinity_study import VARIANTS, off_diagonal, summarize, table
from examples.attach_to_backbone import steps_table

from mt_adapters.hub.card import PICTURES, metrics_table, model_card
from mt_adapters.metrics import delta_m
from mt_adapters.training.arguments import MultitaskArguments

REPOSITORY = Path(__file__).parents[1]
CARDS = REPOSITORY / "model_cards"
ROOMS = CARDS / "rooms_dinov2_small"


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def test_readme_shows_the_results_files_table_and_commands():
    model, probe = read(ROOMS / "metrics.json"), read(ROOMS / "metrics_linear_probe.json")
    columns = {
        "adapters + fpn": model["results"],
        "linear probe": probe["results"],
        "input-blind": model["input_blind"],
    }
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert metrics_table(columns, model["tasks"]) in readme
    assert f"{delta_m(model['results'], probe['results'], model['tasks']):.1f} %" in readme
    assert model["command"] in readme
    assert probe["command"] in readme


@pytest.mark.parametrize("name", ["attached_to_9_blocks", "attached_from_swin"])
def test_readme_shows_how_an_attached_adapter_trains(name):
    record, readme = read(ROOMS / f"{name}.json"), (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert steps_table(record["losses"]) in readme
    assert shlex.join(["python", "examples/attach_to_backbone.py", *record["argv"]]) in readme
    attached, scratch = record["results"]["attached"], record["results"]["from scratch"]
    for task, metric, digits in (
        ("semseg", "miou", 3),
        ("depth", "rmse", 3),
        ("normals", "mean_angle", 2),
        ("edges", "f", 3),
    ):
        assert re.search(rf"{attached[task][metric]:.{digits}f}\D+{scratch[task][metric]:.{digits}f}", readme), task


def test_readme_shows_the_figures_of_the_cost_file():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for row in read(CARDS / "cost_swin_tiny.json")["rows"]:
        assert (
            f"| {row['model']} | {row['total']:.2f} | {row['forward_cpu']:.3f} | {row['forward_ratio']:.2f} "
            f"| {row['step_cpu']:.3f} | {row['step_ratio']:.2f} | {row['step_memory']} |"
        ) in readme


def test_readme_shows_the_cost_of_learning_affinities():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for row in read(CARDS / "cost_swin_tiny.json")["affinities"]["rows"]:
        assert (
            f"| {row['step']} | {row['cpu']:.3f} | {row['ratio']:.2f} | {row['memory']} | {row['memory_ratio']:.2f} |"
        ) in readme


def test_readme_shows_the_table_of_the_affinity_study():
    study = read(ROOMS / "affinity_study.json")
    assert set(study["runs"]) == set(VARIANTS)
    runs = {
        variant: {int(seed): record for seed, record in by_seed.items()} for variant, by_seed in study["runs"].items()
    }
    assert all(len(by_seed) >= 2 for by_seed in runs.values())
    assert study["summary"] == summarize(runs)
    assert table(study["summary"], len(runs["fisher"])) in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_the_affinity_study_says_what_readme_says_of_it():
    study = read(ROOMS / "affinity_study.json")
    for seed in ("0", "1"):

        def column(task: str, metric: str, of_seed: str = seed) -> dict[str, float]:
            return {name: by_seed[of_seed]["results"][task][metric] for name, by_seed in study["runs"].items()}

        normals, edges, depth = column("normals", "mean_angle"), column("edges", "f"), column("depth", "rmse")
        assert max(normals, key=normals.get) == "one common embedding"
        assert min(normals, key=normals.get) == max(edges, key=edges.get) == "identity"
        assert min(depth, key=depth.get) == "fisher"
        assert max(off_diagonal(study["runs"]["cosine"][seed]["affinity"])) < 0.1
    correlation = {name: columns["spearman"][0] for name, columns in study["summary"].items()}
    assert (
        min(correlation["fisher"], correlation["spatial"]) > 0.8 > 0.6 > correlation["cosine"] > correlation["split"]
    )


def test_model_and_linear_probe_were_trained_alike():
    model, probe = (read(ROOMS / name)["arguments"] for name in ("metrics.json", "metrics_linear_probe.json"))
    different = {key for key in probe if model[key] != probe[key]}
    # The probe has no adapter: its record may lack the settings of affinities, and those alone.
    assert model.keys() - probe.keys() <= {item.name for item in fields(MultitaskArguments)}
    assert different == {"adapter", "decoder"}


def test_the_model_beats_the_linear_probe_in_all_that_readme_says_and_the_input_blind_predictor_everywhere():
    record, probe = read(ROOMS / "metrics.json"), read(ROOMS / "metrics_linear_probe.json")["results"]
    results, blind = record["results"], record["input_blind"]
    for other in (probe, blind):
        assert results["semseg"]["miou"] > other["semseg"]["miou"]
        assert results["semseg"]["pixel_accuracy"] > other["semseg"]["pixel_accuracy"]
        assert results["depth"]["rmse"] < other["depth"]["rmse"]
        assert results["normals"]["mean_angle"] < other["normals"]["mean_angle"]
        assert results["edges"]["f"] > other["edges"]["f"]


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in CARDS.glob("*/metrics.json")), ids=lambda path: path.name
)
def test_a_card_is_what_its_results_file_gives(folder: Path):
    pictures = [name for name in PICTURES if (folder / name).is_file()]
    card = model_card(read(folder / "metrics.json"), pictures=pictures)
    assert (folder / "README.md").read_text(encoding="utf-8") == card


def test_readme_shows_the_demo_beside_random_weights():
    record, readme = read(CARDS / "rooms_demo" / "against_random.json"), (REPOSITORY / "README.md").read_text("utf-8")
    assert probe_backbones.table(record["rows"]) in readme
    assert record["command"].partition(" --json")[0] in readme
    # The demo's card is of the same run as the script's first row, up to the last digits of other threads.
    demo = read(CARDS / "rooms_demo" / "metrics.json")
    student = record["rows"]["student"]
    own = {"backbone", "output_dir", "mixed_precision"}
    for key in demo["arguments"].keys() - own:
        assert demo["arguments"][key] == student["arguments"][key], key
    for task, metric, *_ in probe_backbones.COLUMNS:
        assert student["results"][task][metric] == pytest.approx(demo["results"][task][metric], rel=0.05)
    probe = read(REPOSITORY / "src/mt_adapters/backbones/shipped/swin_nano_rooms/probe.json")["rows"]
    gains = probe_backbones.gains(probe["student"]["results"], probe["random"]["results"])
    assert "better by {:.0f} %, {:.0f} %, {:.0f} % and {:.0f} %".format(*gains) in readme


def test_readme_shows_the_table_of_partial_labels():
    study = read(ROOMS / "partial_labels.json")
    assert set(study["runs"]) == set(partial_labels.VARIANTS)
    runs = {name: {int(seed): record for seed, record in by_seed.items()} for name, by_seed in study["runs"].items()}
    assert study["summary"] == partial_labels.summarize(runs)
    num_seeds = len(runs[partial_labels.ALL])
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert partial_labels.table(study["summary"], study["data"], num_seeds) in readme


def test_readme_shows_the_figures_of_the_loader():
    figures = read(CARDS / "loader_512.json")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert (
        f"| 512 x 512 | {figures['alone']:.0f} | {figures['loader']:.0f} | {figures['ratio']:.2f} "
        f"| {figures['cpu_alone']:.2f} | {figures['cpu_loader']:.2f} |"
    ) in readme
    assert f"At {figures['cpu_loader']:.1f} CPU ms a frame" in readme
