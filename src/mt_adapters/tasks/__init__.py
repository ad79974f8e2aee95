"""What is predicted: one file per task kind, torch only."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mt_adapters.tasks.base import Task
from mt_adapters.tasks.depth import DepthTask
from mt_adapters.tasks.edges import EdgesTask
from mt_adapters.tasks.normals import NormalsTask
from mt_adapters.tasks.semseg import SemsegTask

TASKS: dict[str, type[Task]] = {
    "semseg": SemsegTask,
    "depth": DepthTask,
    "normals": NormalsTask,
    "edges": EdgesTask,
}


def get_task(spec: str | Mapping[str, Any], **defaults: Any) -> Task:
    """Builds a task from its name, or from a dict with `name`, `type` (default: the name) and the kind's settings.

    `defaults` fill settings that the spec leaves open and that the kind has.

    Raises:
        ValueError: if the type or a setting is unknown; names the known ones.

    Example:
        >>> get_task({"name": "parts", "type": "semseg", "num_labels": 7}).num_channels
        7
    """
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = settings.get("name", settings.get("type"))
    kind = settings.pop("type", name)
    if kind not in TASKS:
        raise ValueError(
            f"unknown task {kind!r}; known are {[*TASKS]}: for a task of your own name give its type, "
            f'e.g. {{"name": {str(name)!r}, "type": "depth"}}'
        )
    allowed = [field.name for field in fields(TASKS[kind])]
    unknown = sorted(set(settings) - set(allowed))
    if unknown:
        raise ValueError(f"task {name!r} has the unknown setting {unknown[0]!r}; a {kind} task has {allowed}")
    return TASKS[kind](**{k: v for k, v in defaults.items() if k in allowed} | settings | {"name": name})


def get_tasks(specs: Sequence[str | Mapping[str, Any]], **defaults: Any) -> list[Task]:
    """Builds a list of tasks, in the given order.

    Raises:
        ValueError: if the list is empty or a name stands in it twice.
    """
    tasks = [get_task(spec, **defaults) for spec in specs]
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"tasks must be a list of at least one task with different names, got {names}")
    return tasks


__all__ = ["TASKS", "DepthTask", "EdgesTask", "NormalsTask", "SemsegTask", "Task", "get_task", "get_tasks"]
