"""A repository of the Hugging Face Hub: its `config.json` and how many parameters its files hold, never its weights.

`huggingface_hub` itself honours HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE; what its cache holds is not
downloaded again.
"""

from __future__ import annotations

from pathlib import Path

from memplan.errors import InvalidSpecError, MemplanError
from memplan.hf_config import MAX_FILE_BYTES
from memplan.safetensors_header import Stored, stored_in

TIMEOUT_S = 5.0


class NoSuchRepositoryError(MemplanError):
    """The Hub answered that it has no repository of that name (or shows none to this user)."""


def config_file(repo: str, hints: list[str]) -> Path:
    """Path of the repository's `config.json`, from the local cache or else downloaded.

    Raises:
        NoSuchRepositoryError: the Hub has none of that name.
        InvalidSpecError: it holds no `config.json` of a sensible size.
        MemplanError: `huggingface_hub` is not installed, the Hub cannot be reached, or the repository is gated.
    """
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
            found = get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=TIMEOUT_S)
            if (found.size or 0) > MAX_FILE_BYTES:
                raise InvalidSpecError(f"`{repo}`: its `config.json` has {found.size} bytes, too many for one")
            path = hf_hub_download(repo, "config.json", etag_timeout=TIMEOUT_S)
    except hub.GatedRepoError:
        hints.insert(0, "ask for access on its page, then log in with `hf auth login`")
        raise MemplanError(f"`{repo}` is gated: its owner grants access one by one", hints=hints) from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise NoSuchRepositoryError(f"the Hugging Face Hub has no `{repo}`", hints=hints) from None
    except hub.RemoteEntryNotFoundError:
        raise InvalidSpecError(f"`{repo}` holds no `config.json`", hints=hints) from None
    except (hub.OfflineModeIsEnabled, hub.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise MemplanError(
            f"`{repo}` is not bundled, and the Hugging Face Hub cannot be reached: {reason}", hints=hints
        ) from None
    return Path(path)


def stored_parameters(repo: str, config: Path) -> Stored | None:
    """What the repository's safetensors headers count: of the files in the cache beside `config`, or else as the Hub
    read them. None where neither can say; that is no error, as the answer does not depend on it."""
    found = stored_in(config.parent)
    if found is not None:
        return found
    import httpx
    from huggingface_hub import errors as hub
    from huggingface_hub import model_info

    try:
        told = model_info(repo, expand=["safetensors"], timeout=TIMEOUT_S).safetensors
    except (hub.OfflineModeIsEnabled, hub.HfHubHTTPError, httpx.HTTPError, OSError):
        return None
    return Stored(told.total) if told is not None else None
