"""Models and adapters go to a Hub in one commit, with a card that says what was measured."""

import json

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModel
from transformers.utils import logging

from mt_adapters import VtaModel
from mt_adapters.hub.card import COLUMNS, PICTURES, metrics_table
from tiny_models import FAMILIES, assert_same, logits_of, make_images, make_model

SIZE = FAMILIES["swin"].size
KINDS = {"semseg": "semseg", "depth": "depth", "normals": "normals", "edges": "edges"}
MODEL, ADAPTER, BASE = "org/vta-swin", "org/vta-swin-adapter", "org/swin"


def test_a_second_push_changes_only_what_changed(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder)
    model.push_to_hub(MODEL)
    before, num_uploads = hub.files(MODEL), hub.count("PUT")
    model.push_to_hub(MODEL)
    assert hub.files(MODEL) == before
    assert hub.count("PUT") == num_uploads
    assert hub.count("POST", f"{MODEL}/commit/") == 1, "nothing changed, so there is nothing to commit"

    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    model.push_to_hub(MODEL)
    after = hub.files(MODEL)
    # The results were those of other weights: they are gone, and so are the pictures.
    assert {name for name in before if before[name] != after.get(name)} == {
        "model.safetensors",
        "README.md",
        "metrics.json",
        *PICTURES,
    }
    assert after.keys() == before.keys() - {"metrics.json", *PICTURES}
    assert "Not evaluated" in after["README.md"].decode()


@pytest.mark.parametrize("what", ["PUT", r"/commit/"])
def test_an_interrupted_upload_leaves_the_repository_as_it_was(hub, run_folder, what):
    model = VtaModel.from_pretrained(run_folder)
    model.push_to_hub(MODEL)
    before = hub.files(MODEL)
    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    hub.fail = lambda method, path: 500 if what == method or what in path else False
    with pytest.raises((HfHubHTTPError, RuntimeError), match="500|while uploading"):
        model.push_to_hub(MODEL)
    assert hub.files(MODEL) == before
    hub.fail = lambda method, path: False
    assert_same(
        logits_of(AutoModel.from_pretrained(MODEL).eval(), make_images(SIZE)),
        logits_of(VtaModel.from_pretrained(run_folder).eval(), make_images(SIZE)),
    )
    model.push_to_hub(MODEL)
    assert_same(
        logits_of(AutoModel.from_pretrained(MODEL).eval(), make_images(SIZE)), logits_of(model, make_images(SIZE))
    )


@pytest.mark.parametrize("is_adapter", [False, True])
def test_the_card_is_valid_and_every_figure_is_the_records(hub, run_folder, is_adapter):
    model = VtaModel.from_pretrained(run_folder)
    repo_id = ADAPTER if is_adapter else MODEL
    model.push_adapter_to_hub(repo_id) if is_adapter else model.push_to_hub(repo_id)
    card = ModelCard.load(repo_id)
    card.validate()
    record = json.loads(hub.files(repo_id)["metrics.json"])
    assert card.data.library_name == ("peft" if is_adapter else "mt-adapters")
    assert card.data.base_model == BASE
    assert card.data.license == "apache-2.0"
    assert {"mt-adapters", *KINDS} <= set(card.data.tags)
    found = {(one.dataset_config, one.metric_name): one.metric_value for one in card.data.eval_results}
    expected = {
        (task, heading): record["results"][task][metric]
        for task, kind in KINDS.items()
        for metric, heading, *_ in COLUMNS[kind]
        if metric != "abs_rel"  # not a number
    }
    assert found == expected
    assert (
        metrics_table({"this model": record["results"], "input-blind": record["input_blind"]}, KINDS) in card.content
    )
    for text in ("import mt_adapters", record["command"], repo_id, "## Citation", "CC-BY 4.0", "seed (3)"):
        assert text in card.content or is_adapter and text == "import mt_adapters"
    for name in PICTURES:
        assert f"]({name})" in card.content
        assert hub.files(repo_id)[name] == (run_folder / name).read_bytes()


def test_results_of_other_weights_are_not_published(hub, run_folder, caplog):
    model = VtaModel.from_pretrained(run_folder)
    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    with pytest.raises(ValueError, match="measured with other weights"):
        model.push_to_hub(MODEL, run_folder=run_folder)
    assert MODEL not in hub.repositories
    logging.enable_propagation()
    try:
        model.push_to_hub(MODEL)
    finally:
        logging.disable_propagation()
    assert "published without them" in caplog.text
    assert "Not evaluated" in hub.files(MODEL)["README.md"].decode()
    assert "metrics.json" not in hub.files(MODEL)
    with pytest.raises(ValueError, match=r"no readable metrics.json.*train_multitask.py"):
        model.push_to_hub(MODEL, run_folder=run_folder / "nowhere")


def test_a_model_and_an_adapter_do_not_share_a_repository(hub, run_folder):
    model = VtaModel.from_pretrained(run_folder)
    model.push_to_hub(MODEL)
    before = hub.files(MODEL)
    with pytest.raises(ValueError, match="holds a full model.*push an adapter to another repository"):
        model.push_adapter_to_hub(MODEL)
    model.push_adapter_to_hub(ADAPTER)
    with pytest.raises(ValueError, match="holds an adapter.*push a full model to another repository"):
        model.push_to_hub(ADAPTER)
    assert hub.files(MODEL) == before


def test_files_of_other_people_stay(hub, run_folder):
    HfApi().create_repo(MODEL)
    HfApi().upload_file(path_or_fileobj=b"notes", path_in_repo="notes.txt", repo_id=MODEL)
    VtaModel.from_pretrained(run_folder).push_to_hub(MODEL)
    assert hub.files(MODEL)["notes.txt"] == b"notes"


def test_a_backbone_from_a_folder_is_published_under_its_public_name_only(hub, base, tmp_path):
    model = VtaModel.from_backbone(tmp_path / "base", tasks=["depth"], decoder_dim=16)
    with pytest.raises(ValueError, match="folder .* of this machine.*base_model="):
        model.push_adapter_to_hub(ADAPTER)
    model.push_adapter_to_hub(ADAPTER, base_model=BASE)
    model.push_to_hub(MODEL)
    assert_same(
        logits_of(VtaModel.from_adapter(ADAPTER), make_images(SIZE)), logits_of(model.eval(), make_images(SIZE))
    )
    assert ModelCard.load(ADAPTER).data.base_model == BASE
    for repo_id in (ADAPTER, MODEL):
        for name, content in hub.files(repo_id).items():
            assert str(tmp_path).encode() not in content, name


def test_a_model_without_a_record_gets_a_card_of_what_is_known(hub):
    make_model("dinov2").push_to_hub(MODEL, license="cc-by-nc-4.0", private=True)
    card = ModelCard.load(MODEL)
    card.validate()
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.eval_results is None
    assert "Not evaluated" in card.content
    assert "The backbone started from random weights" in card.content
    files = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", ".gitattributes"}
    assert hub.files(MODEL).keys() == files
