"""A model or an adapter to the Hub: all its files in one commit, so that a repository never holds half of them."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from transformers.utils import logging

from mt_adapters.hub.card import PICTURES, model_card
from mt_adapters.hub.record import RECORD_FILE, describe, measured_record, read_record
from mt_adapters.version import __version__

logger = logging.get_logger(__name__)

CONFIG_FILE, ADAPTER_CONFIG_FILE = "config.json", "adapter_config.json"


def publish(
    model: Any,
    repo_id: str,
    save: Callable[[Path], Any],
    is_adapter: bool,
    run_folder: str | Path | None = None,
    loaded_from: Path | None = None,
    base_model: str | None = None,
    license: str = "apache-2.0",
    **options: Any,
) -> str:
    """Uploads what `save` writes into a folder, with the model's card, results and pictures.

    Args:
        model: the `VtaModel`.
        run_folder: what a training run left, whose results go on the card.
        loaded_from: takes the place of `run_folder`, if it holds results that still are those of the model.
        base_model: Hub id of the backbone, if it was loaded from a folder.
        license: of the weights, in the Hub's spelling.
        options: `commit_message`, `private`, `token`, `revision`, `create_pr`.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: if the results are not those of this model, an adapter's backbone has no name that others could
            load, or the repository holds the other kind.
    """
    described = describe(model, base_model)
    if is_adapter and described["is_pretrained"] and described["base_model"] is None:
        raise ValueError(
            f"the adapter's backbone is the folder {model.config.backbone_name_or_path!r} of this machine, which "
            "nobody else can load: give the backbone's Hub id, base_model=..."
        )
    if run_folder is None and loaded_from is not None and (loaded_from / RECORD_FILE).is_file():
        if read_record(loaded_from).get("weights") == described["weights"]:
            run_folder = loaded_from
        else:
            logger.warning(
                "The model has other weights than when its results in %s were measured: it is published without them.",
                loaded_from,
            )
    measured = {} if run_folder is None else measured_record(described, run_folder)
    # The run's own versions and counts stand; the backbone's public name may be known by now only.
    record = described | measured | {"base_model": described["base_model"]}
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        save(folder)
        rename_backbone(folder, described["base_model"])
        write_card(folder, record, run_folder, repo_id, is_adapter, license)
        if run_folder is not None:
            (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return upload(folder, repo_id, is_adapter, **options)


def write_card(
    folder: Path,
    record: dict[str, Any],
    run_folder: str | Path | None = None,
    repo_id: str | None = None,
    is_adapter: bool = False,
    license: str = "apache-2.0",
) -> None:
    """Writes README.md, and copies the pictures of a run beside it."""
    run = folder if run_folder is None else Path(run_folder)
    pictures = [name for name in PICTURES if (run / name).is_file()]
    if run != folder:
        for name in pictures:
            shutil.copyfile(run / name, folder / name)
    card = model_card(record, repo_id, pictures, is_adapter, license)
    (folder / "README.md").write_text(card, encoding="utf-8")


def rename_backbone(folder: Path, base_model: str | None) -> None:
    """Puts the backbone's public name in the place of a folder of this machine in the configs."""
    for file in folder.glob("*config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        for settings in (config, config.get("adapter") or {}, config.get("backbone_config") or {}):
            settings.pop("_name_or_path", None)
            for key in ("backbone_name_or_path", "base_model_name_or_path"):
                if key in settings:
                    settings[key] = base_model
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def upload(
    folder: Path,
    repo_id: str,
    is_adapter: bool,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """One commit that makes the repository's weights those of the folder; other people's files in it stay."""
    api = HfApi(token=token, library_name="mt-adapters", library_version=__version__)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    present = set(api.list_repo_files(repo_id, revision=revision))
    other = CONFIG_FILE if is_adapter else ADAPTER_CONFIG_FILE
    if other in present:
        kinds = ("a full model", "an adapter") if is_adapter else ("an adapter", "a full model")
        raise ValueError(
            f"{repo_id!r} holds {kinds[0]}, and loaders take a repository for one or the other: push {kinds[1]} to "
            "another repository"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stale = {name for name in present if is_ours(name)} - {path.name for path in files}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path.name, path) for path in files),
        *(CommitOperationDelete(name) for name in sorted(stale)),
    ]
    message = commit_message or f"Upload {'adapter' if is_adapter else 'model'} with mt_adapters {__version__}"
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    return commit.pr_url or commit.commit_url


def is_ours(name: str) -> bool:
    """Whether a file of a repository would be read with the model, or shown on its card, and must not be left over."""
    return "/" not in name and (name.endswith((".safetensors", ".index.json")) or name in (*PICTURES, RECORD_FILE))
