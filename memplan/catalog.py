"""Models by name: the bundled `model_specs/*.json`, a user's config, or a repository of the Hugging Face Hub.

A bundled spec is a Hugging Face config plus `name`, `aliases`, `source`, `num_parameters`, `hf_repo` and
`notes`. Its file is named after it, so one name costs one small file; the others are read only for an alias.
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
from memplan.hf_config import MAX_FILE_BYTES, read_config
from memplan.model_spec import ModelSpec

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9.-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_TIMEOUT_S = 5.0


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
    text = os.fspath(name_or_path)
    if isinstance(name_or_path, str):
        if _FILE_NAME.fullmatch(text.lower()) and _is_there(spec_dir() / f"{text.lower()}.json"):
            return _bundled(text.lower())
        name = _index().get(_key(text))
        if name is not None:
            return _bundled(name)
    path = Path(os.path.expanduser(text))
    if _is_there(path / "adapter_config.json") and not _is_there(path / "config.json"):
        return load(_base_model(path))
    is_path = not isinstance(name_or_path, str) or text.startswith((".", "/", "~")) or path.suffix == ".json"
    if is_path or _is_there(path):
        return ModelSpec.from_hf_config(path)
    if _HUB_ID.fullmatch(text):
        return _from_hub(text)
    raise UnknownNameError("model", text, names(), listed_by="memplan models")


_CATALOGUE_KEYS = ("name", "aliases", "source", "num_parameters", "hf_repo", "notes")


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
    """The spec of a repository on the Hub: its `config.json`, from the local cache or else downloaded.

    `huggingface_hub` itself honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE.
    """
    near = nearest(repo)
    hints = [f"`{near}` is bundled and needs no download"] if near else ["`memplan models` lists the bundled ones"]
    hints.append("or give the path of its `config.json`")
    try:
        import httpx  # what huggingface_hub asks with
        from huggingface_hub import errors as hub
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    except ImportError:
        raise MemplanError(
            f"`{repo}` is not bundled, and reading the Hugging Face Hub needs the package `huggingface-hub`",
            hints=["pip install 'memplan[hub]'", *hints],
        ) from None

    try:
        path = try_to_load_from_cache(repo, "config.json")
        if not isinstance(path, str):
            # Asked once, without the download's minute of retries, so that no network is said at once.
            found = get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=_HUB_TIMEOUT_S)
            if (found.size or 0) > MAX_FILE_BYTES:
                raise InvalidSpecError(f"`{repo}`: its `config.json` has {found.size} bytes, too many for one")
            path = hf_hub_download(repo, "config.json", etag_timeout=_HUB_TIMEOUT_S)
    except hub.GatedRepoError:
        hints.insert(0, "ask for access on its page, then log in with `hf auth login`")
        raise MemplanError(f"`{repo}` is gated: its owner grants access one by one", hints=hints) from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise UnknownNameError("model", repo, names(), listed_by="memplan models") from None
    except hub.RemoteEntryNotFoundError:
        raise InvalidSpecError(f"`{repo}` holds no `config.json`", hints=hints) from None
    except (hub.OfflineModeIsEnabled, hub.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MemplanError(
            f"`{repo}` is not bundled, and the Hugging Face Hub cannot be reached: {reason}", hints=hints
        ) from None
    spec = ModelSpec.from_hf_config(path)
    return spec.model_copy(update={"name": repo, "hf_repo": repo, "source": f"config.json of {repo}"})


def _base_model(folder: Path) -> str:
    base = _adapter(folder)[0].get("base_model_name_or_path")
    if not isinstance(base, str) or not base or (Path(base) / "adapter_config.json").is_file():
        raise InvalidSpecError(f"{folder}: an adapter that names no base model", hints=["name the base model itself"])
    return base


def adapter_settings(path: str | Path) -> dict[str, Any]:
    """TrainConfig's adapter fields from a PEFT `adapter_config.json`, or from a folder that holds one.

    That is `rank`, `target_modules`, `lora_dropout`, `use_dora` and `modules_to_save`, as far as it says.

    Raises:
        InvalidSpecError: no such file, not a JSON object, or not a LoRA adapter.
    """
    raw, where = _adapter(Path(path))
    kind = str(raw.get("peft_type", "LORA")).upper()
    if kind != "LORA":
        raise InvalidSpecError(f"{where}: a `{kind}` adapter; memplan knows LoRA")
    settings: dict[str, Any] = {"rank": raw.get("r"), "lora_dropout": raw.get("lora_dropout")}
    targets = raw.get("target_modules")
    # PEFT writes a set, in no order; a string is `all-linear` or one name.
    settings["target_modules"] = tuple(sorted(targets)) if isinstance(targets, list) else targets
    settings["use_dora"] = raw.get("use_dora") or None
    settings["modules_to_save"] = tuple(raw.get("modules_to_save") or ()) or None
    return {name: value for name, value in settings.items() if value is not None}


def _adapter(path: Path) -> tuple[dict[str, Any], str]:
    return read_config(path / "adapter_config.json" if path.is_dir() else path)
