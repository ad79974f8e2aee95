"""Files of a Hub repository or folder: only those asked for by name, and only weights in safetensors."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.utils.hub import cached_file, cached_files, extract_commit_hash

from mt_adapters.hub.shipped import local_source

# Options of from_pretrained that say where files come from.
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
WEIGHT_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Missing tensors are reported by name when a model is loaded; beyond this they are not worth the memory.
SPARE_ELEMENTS = 10_000_000


def fetch(source: str | Path, files: Iterable[str], **options: Any) -> Path:
    """A folder with those of the files that the repository has, all of one commit; nothing else is downloaded."""
    source = local_source(source)
    if Path(source).is_dir():
        return Path(source)
    return Path(snapshot_download(str(source), allow_patterns=list(files), **options))


def holds_adapter(source: str | Path, **options: Any) -> bool:
    """Whether a folder or repository holds an adapter in peft's format, and not a full model."""
    name = "adapter_config.json"
    return (
        cached_file(str(local_source(source)), name, _raise_exceptions_for_missing_entries=False, **options)
        is not None
    )


def weight_files(source: str | Path, **options: Any) -> list[Path]:
    """The safetensors files of a full model, one or the shards of its index.

    Args:
        options: `HUB_OPTIONS`, `subfolder` and `variant`, as `from_pretrained` takes them.

    Raises:
        OSError: if there is none; pickled weights do not count.
        ValueError: if the index names a file that is no safetensors file of the repository, or this holds an adapter.
    """
    variant = options.pop("variant", None)
    for name in (WEIGHT_FILE, INDEX_FILE):
        stem, _, ending = name.rpartition(".")
        name = f"{stem}.{variant}.{ending}" if variant else name
        file = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **options)
        if file is not None:
            break
    else:
        if holds_adapter(source, **options):
            raise ValueError(
                f"{str(source)!r} holds an adapter and not a full model: load it with VtaModel.from_adapter"
            )
        raise OSError(f"there is no {WEIGHT_FILE} (or {INDEX_FILE})")
    if not file.endswith(".json"):
        return [Path(file)]
    shards = cached_files(str(source), shard_names(Path(file)), **options)
    return [Path(shard) for shard in shards or ()]


def pinned(options: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The options of a load with the commit of a fetched file, so that what is loaded is what was checked."""
    commit = extract_commit_hash(str(file), None)
    return dict(options) if commit is None else {**options, "revision": commit}


def shard_names(index: Path) -> list[str]:
    """The files that an index of shards names.

    Raises:
        ValueError: if it cannot be read, or one is not the plain name of a safetensors file.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is no index of shards ({error!r}): get it again") from error
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(name)):
            raise ValueError(
                f"{index.name} names the file {name!r}; weights are read from safetensors files beside it only"
            )
    return names


def num_elements(files: Iterable[Path]) -> int:
    """Elements of all tensors in safetensors files, from their headers, which cannot claim more than the file has."""
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            total += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())
    return total


def build_on_meta(source: str | Path, build: Callable[[], nn.Module]) -> Any:
    """A model without memory, to see what a config asks for before any memory is given to it.

    Raises:
        ValueError: if the config describes nothing that can be built.
    """
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"the config of {str(source)!r} describes no model that can be built: {error}") from error


def check_size(source: str | Path, build: Callable[[], nn.Module], files: Iterable[Path]) -> Any:
    """The model of a config without memory, as `build_on_meta` gives it.

    Raises:
        ValueError: also if the config asks for far more memory than the weights that came with it fill.
    """
    described = build_on_meta(source, build)
    declared = sum(tensor.numel() for tensor in described.state_dict().values())
    found = num_elements(files)
    if declared > 2 * found + SPARE_ELEMENTS:
        raise ValueError(
            f"the config of {str(source)!r} describes a model of {declared:,} numbers, but its weight files hold "
            f"{found:,}: they do not belong together, get both again"
        )
    return described


def hub_options(options: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Those of a call's options that say where files come from."""
    return {name: options[name] for name in (*HUB_OPTIONS, *more) if options.get(name) is not None}


@contextmanager
def readable_weight_errors(source: str | Path) -> Iterator[None]:
    """Turns what transformers and safetensors raise for a missing, damaged or pickled file into a clear ValueError."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"the weight file of {str(source)!r} is truncated or no safetensors file ({error}): get it again, or "
            "convert it with safetensors; pickled weights are never loaded"
        ) from error
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"cannot load {str(source)!r}: {error}. Give a Hub id or a folder that holds config.json and "
            "model.safetensors; pickled weights (.bin, .pt) are never loaded"
        ) from error
