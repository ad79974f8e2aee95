"""What the Hub of the tests keeps, and its rules for the metadata of model cards."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import HFValidationError, validate_repo_id

LFS_SIZE = 1024  # larger files are LFS files, and so are weights of any size


@dataclass(frozen=True)
class File:
    data: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        )

    @cached_property
    def blob_id(self) -> str:
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str
    message: str
    files: Mapping[str, File]


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS objects, also those that no commit has yet

    def commit(self, branch: str, files: Mapping[str, File], message: str) -> Commit:
        parent = self.branches.get(branch, "")
        content = json.dumps([parent, message, sorted((name, file.blob_id) for name, file in files.items())])
        commit = Commit(hashlib.sha1(content.encode()).hexdigest(), parent, message, dict(files))
        self.commits[commit.id] = commit
        self.branches[branch] = commit.id
        self.objects |= {file.sha256: file.data for file in files.values() if file.lfs}
        return commit

    def find(self, revision: str) -> Commit:
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        found = self.branches.get(name) or self.tags.get(name) or revision
        if found not in self.commits:
            raise Answer(404, {"error": f"Invalid rev id: {revision}"}, {"X-Error-Code": "RevisionNotFound"})
        return self.commits[found]


class Answer(Exception):
    """What a request gets; raised where it is an error."""

    def __init__(self, status: int, content: Any = None, headers: Mapping[str, object] | None = None) -> None:
        is_json = not isinstance(content, bytes)
        self.status = status
        self.body = json.dumps(content).encode() if is_json else content
        self.headers = {"Content-Type": "application/json" if is_json else "application/octet-stream"} | {
            name: str(value) for name, value in (headers or {}).items()
        }
        if is_json and status >= 400 and "error" in content:
            self.headers.setdefault("X-Error-Message", content["error"])


def is_lfs(name: str, size: int) -> bool:
    return size > LFS_SIZE or (size > 0 and name.endswith(".safetensors"))


def card_errors(content: str) -> list[str]:
    """What the Hub refuses in the metadata of a model card; its lists of known licenses and the like are left out."""
    block = REGEX_YAML_BLOCK.search(content)
    try:
        data = yaml.safe_load(block.group(2)) if block else {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    if not isinstance(data or {}, dict):
        return ["The metadata must be a mapping"]
    texts = ("license", "license_name", "license_link", "library_name", "pipeline_tag", "thumbnail")
    lists = ("tags", "datasets", "metrics", "language", "base_model")
    errors = []
    for name, value in (data or {}).items():
        if name in texts and not isinstance(value, str):
            errors.append(f'"{name}" must be a string')
        one_or_more = [value] if isinstance(value, str) and name != "tags" else value
        if name in lists and not (
            isinstance(one_or_more, list) and all(isinstance(item, str) for item in one_or_more)
        ):
            errors.append(f'"{name}" must be an array of strings')
        elif name == "base_model":
            errors += [f'"base_model" with value "{item}" is not valid' for item in one_or_more if not is_id(item)]
    if "model-index" in data if data else False:
        errors += model_index_errors(data["model-index"])
    return errors


def is_id(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def model_index_errors(index: Any) -> list[str]:
    try:
        _, results = model_index_to_eval_results(index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return [f'"model-index" is malformed: {error!r}']
    texts = [text for result in results for text in (result.task_type, result.dataset_type, result.dataset_name)]
    texts += [result.metric_type for result in results] + [entry["name"] for entry in index]
    errors = [f'"model-index" holds {text!r} where a string belongs' for text in texts if not isinstance(text, str)]
    return errors + ['"model-index" holds a metric without a value' for r in results if r.metric_value is None]
