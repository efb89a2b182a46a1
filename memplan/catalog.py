"""Models by name: the bundled `model_specs/*.json`, a user's config, or a repository of the Hugging Face Hub.

A bundled spec is a Hugging Face config plus `name`, `aliases`, `source`, `num_parameters`, `hf_repo`, `notes` and
`left_out`. Its file is named after it, so one name costs one small file; the others are read only for an alias.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from memplan.errors import InvalidSpecError, MemplanError, UnknownNameError
from memplan.hf_config import read_config
from memplan.model_spec import ModelSpec
from memplan.prequantized import storage_fields
from memplan.safetensors_header import Stored, stored_in

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@cache
def spec_dir() -> Path:
    """The folder of the bundled specs: inside the installed package, or at the root of a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "model_specs"
    return installed if installed.is_dir() else here.parent / "model_specs"


@cache
def names() -> tuple[str, ...]:
    """Names of the bundled models, sorted; no file is opened."""
    return tuple(sorted(path.stem for path in spec_dir().glob("*.json")))


def load(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """The spec behind a bundled name or alias, the path of a `config.json` or its folder, or a Hub id.

    Names are matched whatever their case and separators. A folder with only an adapter means its base model.

    Raises:
        UnknownNameError: nothing of that name; the nearest bundled names are in the hints.
        InvalidSpecError: a config was found and cannot be used.
        MemplanError: the Hub was needed and could not answer.
    """
    name = _bundled_name(name_or_path)
    if name is not None:
        return _bundled(name)
    text, folder = os.fspath(name_or_path), _adapter_folder(name_or_path)
    if folder is not None and not _is_there(folder / "config.json"):
        return load(_base_model(folder))
    path = folder or Path(os.path.expanduser(text))
    is_path = not isinstance(name_or_path, str) or text.startswith((".", "/", "~")) or path.suffix == ".json"
    if is_path or _is_there(path):
        spec = ModelSpec.from_hf_config(path)
        return _counted(spec, stored_in(path if path.is_dir() else path.parent))
    if _HUB_ID.fullmatch(text):
        return _from_hub(text)
    raise UnknownNameError("model", text, names(), listed_by="memplan models")


def load_with_settings(model: ModelSpec | str | os.PathLike[str]) -> tuple[ModelSpec, dict[str, Any]]:
    """The spec, and the fields of TrainConfig that its files decide where the user says nothing: the settings of a
    folder's adapter, the storage of a checkpoint that comes quantised.

    Raises:
        MemplanError: as `load`; an adapter or a storage that is not modelled.
    """
    if isinstance(model, ModelSpec):
        return model, storage_fields(model)
    spec, folder = load(model), None if _bundled_name(model) else _adapter_folder(model)
    return spec, (adapter_settings(folder) if folder else {}) | storage_fields(spec)


def _bundled_name(name_or_path: str | os.PathLike[str]) -> str | None:
    """The bundled model of that name; a Path is never a name."""
    if not isinstance(name_or_path, str):
        return None
    lowered = name_or_path.lower()
    if _FILE_NAME.fullmatch(lowered) and _is_there(spec_dir() / f"{lowered}.json"):
        return lowered
    return _index().get(_key(name_or_path))


def _adapter_folder(name_or_path: str | os.PathLike[str]) -> Path | None:
    """The folder with an `adapter_config.json` that is meant, if one is."""
    path = Path(os.path.expanduser(os.fspath(name_or_path)))
    if path.name == "adapter_config.json":
        path = path.parent
    return path if _is_there(path / "adapter_config.json") else None


_CATALOGUE_KEYS = ("name", "aliases", "source", "num_parameters", "hf_repo", "notes", "left_out")


def source_config(name_or_path: str | Path) -> dict[str, Any]:
    """The Hugging Face config behind a bundled name or a path, as transformers' AutoConfig takes it.

    Raises:
        UnknownNameError, InvalidSpecError: as `load`; a Hub id is not looked up.
    """
    spec = load(name_or_path)
    if spec.name in names():
        raw = json.loads((spec_dir() / f"{spec.name}.json").read_bytes())
        return {key: value for key, value in raw.items() if key not in _CATALOGUE_KEYS}
    if not Path(name_or_path).exists():
        raise MemplanError(f"`{name_or_path}`: give the path of its config.json", hints=["or a bundled name"])
    return read_config(Path(name_or_path))[0]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long for the file system
        return False


def all_specs() -> tuple[ModelSpec, ...]:
    """Every bundled spec, by name."""
    return tuple(_bundled(name) for name in names())


@cache
def _bundled(name: str) -> ModelSpec:
    return ModelSpec.from_hf_config(spec_dir() / f"{name}.json")


def _key(text: str) -> str:
    """`text` without case and separators; dots stay, or `opt-1.3b` would be `opt-13b`."""
    return re.sub(r"[^a-z0-9./]", "", text.lower())


@cache
def _index() -> dict[str, str]:
    """Every spelling of a bundled model: its name, its aliases, its Hub id with and without the owner."""
    index: dict[str, str] = {}
    for name in names():
        raw = json.loads((spec_dir() / f"{name}.json").read_bytes())
        for spelling in (name, raw.get("hf_repo") or "", *raw.get("aliases", ())):
            index.setdefault(_key(spelling), name)
            index.setdefault(_key(spelling.rpartition("/")[2]), name)
    index.pop("", None)
    return index


def nearest(text: str) -> str | None:
    """The bundled name that looks most like `text`, or None."""
    tail = _key(text.rpartition("/")[2])
    near = difflib.get_close_matches(tail, [key for key in _index() if "/" not in key], n=1, cutoff=0.6)
    return _index()[near[0]] if near else None


def _from_hub(repo: str) -> ModelSpec:
    """The spec of a repository on the Hub: see `memplan.hub`."""
    from memplan import hub

    near = nearest(repo)
    hints = [f"`{near}` is bundled and needs no download"] if near else ["`memplan models` lists the bundled ones"]
    hints.append("or give the path of its `config.json`")
    try:
        path = hub.config_file(repo, hints)
    except hub.NoSuchRepositoryError:
        raise UnknownNameError("model", repo, names(), listed_by="memplan models") from None
    spec = ModelSpec.from_hf_config(path)
    named = {"name": repo, "hf_repo": repo, "source": f"config.json of {repo}"}
    return _counted(spec, hub.stored_parameters(repo, path)).model_copy(update=named)


def _counted(spec: ModelSpec, stored: Stored | None) -> ModelSpec:
    """`spec` with the parameters that its checkpoint holds, where its config does not say and they are plain ones."""
    if stored is None or spec.num_parameters is not None or spec.quantization_config:
        return spec
    if spec.part_of and not stored.num_other:  # a total over towers that are not told apart
        return spec
    return spec.model_copy(update={"num_parameters": stored.num_elements - (stored.num_other if spec.part_of else 0)})


def _base_model(folder: Path) -> str:
    base = _adapter(folder)[0].get("base_model_name_or_path")
    if not isinstance(base, str) or not base or (Path(base) / "adapter_config.json").is_file():
        raise InvalidSpecError(f"{folder}: an adapter that names no base model", hints=["name the base model itself"])
    return base


# Keys of LoraConfig (PEFT 0.21) that give some layers another adapter than the rest, or train more than adapters.
_ONE_FOR_ALL = (
    "rank_pattern", "layers_to_transform", "exclude_modules", "layer_replication", "target_parameters", "bias",
    "trainable_token_indices", "lora_bias",
)  # fmt: skip


def adapter_settings(path: str | Path) -> dict[str, Any]:
    """TrainConfig's adapter fields from a PEFT `adapter_config.json`, or from a folder that holds one.

    That is `rank`, `target_modules`, `lora_dropout`, `use_dora` and `modules_to_save`, as far as it says.

    Raises:
        InvalidSpecError: no such file, not a JSON object, not a LoRA adapter, or one with settings that memplan has
            no part for.
    """
    raw, where = _adapter(Path(path))
    kind = str(raw.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise InvalidSpecError(f"{where}: a `{kind}` adapter; memplan knows LoRA")
    for key in _ONE_FOR_ALL:
        if raw.get(key) not in (None, "none", False, [], {}):
            raise InvalidSpecError(
                f"{where}: `{key}` is not modelled",
                hints=["name the base model, and give `--rank` and `--target-modules` for all its layers"],
            )
    settings: dict[str, Any] = {"rank": raw.get("r"), "lora_dropout": raw.get("lora_dropout")}
    targets = raw.get("target_modules")
    # PEFT writes a set, in no order; a string is `all-linear` or one name.
    settings["target_modules"] = tuple(sorted(targets)) if isinstance(targets, list) else targets
    settings["use_dora"] = raw.get("use_dora") or None
    settings["modules_to_save"] = tuple(raw.get("modules_to_save") or ()) or None
    return {name: value for name, value in settings.items() if value is not None}


def _adapter(path: Path) -> tuple[dict[str, Any], str]:
    return read_config(path / "adapter_config.json" if path.is_dir() else path)
