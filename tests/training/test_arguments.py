from pathlib import Path

import pytest
import yaml

from mt_adapters.training.arguments import DEFAULT_TASKS, parse_arguments, read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "examples/recipes").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "batch_size: 3\nmax_steps: 7\ntasks: [depth]\nadapter: none\nresume: true\n")
    model, data, training, _ = parse_arguments(argv=["--recipe", str(file), "--max_steps", "9", "--tasks", "edges"])
    assert (training.batch_size, training.max_steps, training.resume) == (3, 9, True)
    assert (model.tasks, model.adapter, data.image_size) == (["edges"], "none", 128)


def test_a_recipe_that_is_named_replaces_the_default_recipe(tmp_path: Path) -> None:
    default = write(tmp_path, "batch_size: 3\nseed: 5\n")
    (tmp_path / "named").mkdir()
    named = write(tmp_path / "named", "batch_size: 4\n")
    assert parse_arguments(default, argv=[])[2].seed == 5
    training = parse_arguments(default, argv=["--recipe", str(named)])[2]
    assert (training.batch_size, training.seed) == (4, 0)


def test_without_recipe_and_arguments_the_defaults_hold() -> None:
    model, _, training, _ = parse_arguments(argv=[])
    assert (model.tasks, model.backbone, training.max_steps) == (DEFAULT_TASKS, None, 1000)


def test_a_resume_on_the_command_line_needs_no_value() -> None:
    assert parse_arguments(argv=["--resume", "--seed", "3"])[2].resume
    assert not parse_arguments(argv=["--resume", "false"])[2].resume


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "1E-3", "0.001", ".001", "+1.e-3"])
def test_every_way_to_write_a_number_is_a_number(tmp_path: Path, text: str) -> None:
    file = write(tmp_path, f"learning_rate: {text}\ncrop_scale: [{text}, 1]\ntasks: [{{name: depth, weight: {text}}}]")
    model, data, training, _ = parse_arguments(file, argv=[])
    assert training.learning_rate == 1e-3
    assert data.crop_scale == [1e-3, 1]
    assert model.tasks == [{"name": "depth", "weight": 1e-3}]


def test_a_number_on_the_command_line_may_lack_the_point() -> None:
    training = parse_arguments(argv=["--learning_rate", "1e-3", "--backbone_learning_rate", "2e-4"])[2]
    assert (training.learning_rate, training.backbone_learning_rate) == (1e-3, 2e-4)


def test_lists_and_dicts_of_a_recipe_arrive_as_they_are(tmp_path: Path) -> None:
    settings = {
        "backbone_config": {"model_type": "swin", "depths": [2, 2]},
        "adapter_settings": {"attention_grid": [4, 4]},
        "tasks": ["depth", {"name": "parts", "type": "semseg", "num_labels": 7}],
        "crop_scale": [0.25, 1],
        "trackers": ["none"],
        "backbone": None,
    }
    model, data, training, _ = parse_arguments(write(tmp_path, yaml.safe_dump(settings)), argv=[])
    found = vars(model) | vars(data) | vars(training)
    assert {name: found[name] for name in settings} == settings


def test_no_is_the_text_that_mixed_precision_expects(tmp_path: Path) -> None:
    assert parse_arguments(write(tmp_path, "mixed_precision: no"), argv=[])[2].mixed_precision == "no"


def test_an_unknown_key_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml.*unknown key 'learning_rat'.*'learning_rate'.*'weight_decay'"):
        read_recipe(write(tmp_path, "learning_rat: 0.1"))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe '.*nowhere\.yaml'.*examples/recipes"):
        parse_arguments(argv=["--recipe", str(tmp_path / "nowhere.yaml")])


@pytest.mark.parametrize("text", ["tasks: [depth", "a: b: c", "\t- x"])
def test_bad_yaml_is_refused_with_its_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"recipe\.yaml' is no valid YAML: (?s:.*)line 1"):
        read_recipe(write(tmp_path, text))


@pytest.mark.parametrize("text", ["", "- depth", "depth"])
def test_a_recipe_without_keys_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="'key: value' lines"):
        read_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("learning_rate: fast", "learning_rate: 'fast'; it must be float"),
        ("learning_rate: true", "learning_rate: True; it must be float"),
        ("backbone_learning_rate: fast", "backbone_learning_rate: 'fast'; it must be float . None"),
        ("max_steps: 2.5", "max_steps: 2.5; it must be int"),
        ("max_steps: null", "max_steps: None; it must be int"),
        ("resume: 1", "resume: 1; it must be bool"),
        ("tasks: depth", r"tasks: 'depth'; it must be list\[str . dict\]"),
        ("crop_scale: [half, 1]", r"crop_scale: \['half', 1\]; it must be list\[float\]"),
        ("adapter: prefix", "adapter: 'prefix'; it must be .*'vta', 'lora', 'none'"),
        ("output_dir: 12", "output_dir: 12; it must be str"),
        ("adapter_settings: [1]", r"adapter_settings: \[1\]; it must be dict"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_the_right_one(tmp_path: Path, line: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"recipe\.yaml' has {rule}"):
        read_recipe(write(tmp_path, line))


@pytest.mark.parametrize("name", ["max_steps", "batch_size", "gradient_accumulation_steps", "checkpoint_steps"])
def test_a_count_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
        parse_arguments(argv=[f"--{name}", "0"])


def test_a_list_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_scale is \[0\.5\]; it must be 2 numbers"):
        parse_arguments(argv=["--crop_scale", "0.5"])
    with pytest.raises(ValueError, match="color_jitter is .*; it must be 4 numbers"):
        parse_arguments(argv=["--color_jitter", "0.5", "0.5"])


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="--learning_rat_"):
        parse_arguments(argv=["--learning_rat_", "0.1"])


def test_the_recipes_are_found() -> None:
    assert {"rooms_demo.yaml", "rooms_dinov2_small.yaml"} <= {recipe.name for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_examples_is_read(recipe: Path) -> None:
    model, _, training, _ = parse_arguments(recipe, argv=[])
    assert (model.backbone is None) != (model.backbone_config is None)
    assert training.output_dir.startswith("outputs/")
    assert set(yaml.safe_load(recipe.read_text())) <= set(read_recipe(recipe))


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("affinity_interval", "-1", "it must be at least 0"),
        ("affinity_momentum", "1.0", "at least 0 and less than 1"),
        ("mirror_rate", "0", "the rate must be positive"),
        ("balancing", "gradnorm", r"known are \['fixed', 'uncertainty', 'dwa', 'random'\] by losses and .*'upgrad'"),
    ],
)
def test_a_wrong_setting_of_affinities_or_balancing_is_told_at_the_start(option: str, value: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        parse_arguments(argv=[f"--{option}", value])


def test_an_unknown_similarity_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(argv=["--affinity_similarity", "euclid"])
    assert "choose from 'cosine', 'split', 'lookahead', 'fisher', 'spatial'" in capsys.readouterr().err
