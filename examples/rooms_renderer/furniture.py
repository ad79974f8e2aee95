"""The furniture libraries: their catalogues, the models as seen and unseen ones, and the credits of the authors."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .classes import classify

DEBIAN_FOLDER = Path("/usr/share/sweethome3d/furniture")
LIBRARY_SUFFIXES = (".sh3f", ".jar", ".zip")
CATALOGUE = re.compile(r"(?:^|/)\w*FurnitureCatalog\.properties$")
ENTRY = re.compile(r"(\w+)#(\d+)\s*=\s*(.*)")
CENTIMETRES_PER_METRE = 100
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
FURNITURE_SPLITS = ("all", "seen", "unseen")
UNSEEN_SHARE = 0.2
MIN_TO_SPLIT = 3
INSTALL_HINT = (
    "Install the Debian package with\n"
    "    apt-get install -y --no-install-recommends sweethome3d-furniture\n"
    "or name libraries (.sh3f files, or folders that hold some) with --furniture PATH."
)


@dataclass(frozen=True)
class FurnitureModel:
    """One model of a library; sizes in metres; `rotation` (row by row) comes before the scaling to that size."""

    library: str  # path of the .sh3f file
    key: str  # id in the catalogue, unique over all libraries
    name: str
    kind: str
    semantic_class: str
    model_path: str  # the OBJ file inside the library
    width: float
    height: float
    depth: float
    elevation: float
    # Height of the surface that things stand on, such as a table's top or a bed's mattress; 0 = none.
    top: float
    rotation: tuple[float, ...]
    creator: str
    licence: str


def find_libraries(paths: Sequence[str | Path] = ()) -> list[Path]:
    """The library files that `paths` name or hold; without paths, those of Debian's package.

    Raises:
        FileNotFoundError: a path does not exist or there is no library; says how to install them.
    """
    libraries: list[Path] = []
    for path in map(Path, paths or [DEBIAN_FOLDER]):
        if not path.exists():
            raise FileNotFoundError(f"There is no furniture at {str(path)!r}. {INSTALL_HINT}")
        found = sorted(p for p in path.iterdir() if p.suffix in LIBRARY_SUFFIXES) if path.is_dir() else [path]
        libraries += found
    if not libraries:
        raise FileNotFoundError(f"No {'/'.join(LIBRARY_SUFFIXES)} file in {[str(p) for p in paths]}. {INSTALL_HINT}")
    return libraries


def read_catalogue(libraries: Iterable[Path], furniture_split: str = "all") -> list[FurnitureModel]:
    """The models that furnish rooms, ordered by key; `furniture_split` is "all", "seen" or "unseen".

    Raises:
        ValueError: a file is no furniture library, an unknown split, or no model is left.
    """
    if furniture_split not in FURNITURE_SPLITS:
        raise ValueError(f"Unknown furniture split {furniture_split!r}; there is: {', '.join(FURNITURE_SPLITS)}.")
    models = {model.key: model for library in libraries for model in _read_library(library)}
    chosen = [models[key] for key in sorted(models)]
    if furniture_split != "all":
        unseen = unseen_keys(chosen)
        chosen = [model for model in chosen if (model.key in unseen) == (furniture_split == "unseen")]
    if not chosen:
        raise ValueError(f"The libraries hold no model for rooms (furniture split {furniture_split!r}).")
    return chosen


def unseen_keys(models: Iterable[FurnitureModel]) -> set[str]:
    """The keys of the models that belong to the unseen part: about one in five of every kind.

    Models are ordered by a hash of their key, so the choice is random but the same on every machine. A kind with fewer
    than `MIN_TO_SPLIT` models is all seen.
    """
    by_kind: dict[str, list[str]] = defaultdict(list)
    for model in models:
        by_kind[model.kind].append(model.key)
    unseen: set[str] = set()
    for keys in by_kind.values():
        if len(keys) >= MIN_TO_SPLIT:
            count = max(1, round(len(keys) * UNSEEN_SHARE))
            unseen.update(sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:count])
    return unseen


def credits_text(models: Iterable[FurnitureModel]) -> str:
    """Who made the models, library by library, as CREDITS.txt tells it."""
    by_library: dict[tuple[str, str], list[FurnitureModel]] = defaultdict(list)
    for model in models:
        by_library[Path(model.library).stem, model.licence].append(model)
    lines = [
        "Furniture models in the rendered rooms, from furniture libraries for Sweet Home 3D.",
        "Modified: scaled, recoloured per part, re-posed, converted; frames are path-traced pictures of them.",
    ]
    for (library, licence), used in sorted(by_library.items()):
        creators = sorted({model.creator for model in used})
        lines.append(f"\n{library} ({licence}), {len(used)} models used. Creators: {', '.join(creators)}")
    lines += ["", f"total {sum(map(len, by_library.values()))}", ""]
    return "\n".join(lines)


def _read_library(path: Path) -> list[FurnitureModel]:
    try:
        with zipfile.ZipFile(path) as archive:
            catalogue = next((name for name in archive.namelist() if CATALOGUE.search(name)), None)
            # Java's property files are Latin-1 with \\uXXXX for the rest.
            text = archive.read(catalogue).decode("latin-1") if catalogue else ""
            members = set(archive.namelist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(path)!r} is no furniture library (a zip file with a catalogue): {error}.") from error
    if not catalogue:
        raise ValueError(f"{str(path)!r} holds no ...FurnitureCatalog.properties, so it is no furniture library.")
    library_licence = re.search(r"^license\s*=\s*(.*)$", text, re.MULTILINE)
    licence = short_licence(_unescape(library_licence[1]) if library_licence else "")

    entries: dict[str, dict[str, str]] = defaultdict(dict)
    for line in text.splitlines():
        if match := ENTRY.match(line):
            entries[match[2]][match[1]] = _unescape(match[3].strip())
    models = (_model(path, entry, licence) for entry in entries.values())
    return [model for model in models if model is not None and model.model_path in members]


def _model(library: Path, entry: dict[str, str], licence: str) -> FurnitureModel | None:
    try:
        width, depth, height = (float(entry[side]) / CENTIMETRES_PER_METRE for side in ("width", "depth", "height"))
        name, category, model_path = entry["name"], entry["category"], entry["model"].lstrip("/")
    except KeyError:  # Not a piece of furniture, or one whose model is kept elsewhere.
        return None
    rule = classify(name, category, (width, height, depth))
    if rule is None or not model_path.endswith(".obj"):
        return None
    return FurnitureModel(
        library=str(library),
        key=entry.get("id", f"{library.stem}#{model_path}"),
        name=name,
        kind=rule.kind,
        semantic_class=rule.semantic_class,
        model_path=model_path,
        width=width,
        height=height,
        depth=depth,
        elevation=float(entry.get("elevation", 0)) / CENTIMETRES_PER_METRE,
        top=float(entry.get("dropOnTopElevation", 0)) / CENTIMETRES_PER_METRE,
        rotation=tuple(map(float, entry["modelRotation"].split())) if "modelRotation" in entry else IDENTITY,
        creator=entry.get("creator", "unknown"),
        licence=short_licence(entry["license"]) if "license" in entry else licence,
    )


def short_licence(text: str) -> str:
    """The licence's usual short name, where the text is one of those that the libraries use."""
    if re.search(r"public domain|cc-?0|zero", text, re.IGNORECASE):
        return "CC0 1.0"
    if re.search(r"attribution 3\.0", text, re.IGNORECASE):
        return "CC-BY 3.0 US" if "United States" in text else "CC-BY 3.0"
    return text or "licence not stated"


def _unescape(text: str) -> str:
    return re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
