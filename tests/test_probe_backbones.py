"""The figures of the linear probes: what is trained, and the table."""

import argparse
import json
from pathlib import Path

import pytest
from benchmarks.probe_backbones import COLUMNS, ROWS, recipe, run, table

from mt_adapters.training.arguments import read_recipe

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


@pytest.fixture
def arguments(backbone_folder: Path) -> argparse.Namespace:
    return argparse.Namespace(
        student=str(backbone_folder), teacher="facebook/dinov2-small", recipe=None, max_steps=7, seed=None
    )


def test_the_rows_differ_in_the_backbone_only(tmp_path: Path, arguments: argparse.Namespace) -> None:
    recipes = {}
    for row in ROWS:
        (tmp_path / row).write_text(json.dumps(recipe(row, arguments)))
        recipes[row] = read_recipe(tmp_path / row)
    assert recipes["student"]["backbone"] == arguments.student
    assert recipes["teacher"]["backbone"] == "facebook/dinov2-small"
    config = recipes["random"]["backbone_config"]
    assert (config["model_type"], config["embed_dim"], config["depths"]) == ("swin", 8, [1, 1, 2, 1])
    own = ("backbone", "backbone_config")
    shared = [{key: value for key, value in settings.items() if key not in own} for settings in recipes.values()]
    assert shared == [shared[0]] * len(ROWS)
    assert (shared[0]["adapter"], shared[0]["decoder"], shared[0]["max_steps"]) == ("none", "linear", 7)


def test_a_recipe_is_run_on_the_backbone_of_each_row(arguments: argparse.Namespace) -> None:
    arguments.recipe = RECIPES / "rooms_demo.yaml"
    runs = {row: recipe(row, arguments) for row in ("student", "random")}
    assert runs["student"].pop("backbone") == arguments.student
    assert runs["random"].pop("backbone_config")["embed_dim"] == 8
    assert runs["student"] == runs["random"]
    told = read_recipe(arguments.recipe)
    assert runs["student"] == {key: told[key] for key in told.keys() - {"backbone", "output_dir"}} | {"max_steps": 7}


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path: Path, arguments: argparse.Namespace) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe("student", arguments), indent=1) + "\n")
    (tmp_path / "metrics.json").write_text("{}")
    run("student", tmp_path, arguments)
    arguments.recipe = RECIPES / "rooms_demo.yaml"
    with pytest.raises(ValueError, match="other settings"):
        run("student", tmp_path, arguments)


def test_a_table_has_a_row_per_run_and_the_input_blind_predictor() -> None:
    def results(value: float) -> dict[str, dict[str, float]]:
        return {task: {metric: value} for task, metric, *_ in COLUMNS}

    rows = {"student": {"results": results(0.25), "input_blind": results(0.125)}, "teacher": {"results": results(1)}}
    assert table(rows).splitlines()[2:] == [
        "| student | 0.250 | 0.250 | 0.25 | 0.250 |",
        "| teacher | 1.000 | 1.000 | 1.00 | 1.000 |",
        "| no backbone: input-blind | 0.125 | 0.125 | 0.12 | 0.125 |",
    ]
    # Higher is better, but for depth's and normals' errors.
    rows["random"] = {"results": results(0.2)}
    assert table(rows).splitlines()[-1] == "| student, better than random by | +25 % | -25 % | -25 % | +25 % |"
