"""What `memplan calibrate` learnt of a GPU, kept for later estimates on it.

A profile replaces the constants of the runtime (what driver, context and kernels take); it never scales a formula.
Profiles are JSON files, one a GPU, in `$MEMPLAN_PROFILES`, else `$XDG_CONFIG_HOME/memplan/profiles`, else
`~/.config/memplan/profiles`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from memplan.errors import InvalidSpecError, MemplanError

MAX_FILE_BYTES = 2**20


class GpuProfile(BaseModel):
    """Measured constants of one GPU with one driver and one set of libraries; sizes in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    product: str
    """Name that the driver gives the card."""
    total_bytes: int = Field(gt=0)
    driver_bytes: int = Field(ge=0)
    """In use before any process starts."""
    context_bytes: int = Field(ge=0)
    """What creating the CUDA context adds."""
    kernels_bytes: int = Field(ge=0)
    """What a few training steps add beside reserved memory: the least over the runs."""
    fused_attention_bytes: int = Field(ge=0)
    """How much more that is where half-precision fused attention ran: the most over the runs."""
    num_runs: int = Field(ge=1)
    environment: dict[str, Any]
    """Driver and library versions, date: the header of the records."""


def folder() -> Path:
    told = os.environ.get("MEMPLAN_PROFILES")
    if told:
        return Path(told)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "memplan" / "profiles"


def save(profile: GpuProfile) -> Path:
    """Writes `profile` where later estimates look; returns the file.

    Raises:
        MemplanError: the folder cannot be written to.
    """
    path = folder() / f"{slug(profile.product)}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(profile.model_dump_json(indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise MemplanError(f"cannot write `{path}`: {error.strerror or error}",
                           hints=["`MEMPLAN_PROFILES` names another folder"]) from None  # fmt: skip
    return path


def find(products: tuple[str, ...]) -> GpuProfile | None:
    """The profile of a card that its driver calls one of `products`; None where there is none.

    Raises:
        InvalidSpecError: there is one, and it cannot be read.
    """
    for product in products:
        path = folder() / f"{slug(product)}.json"
        try:
            if not path.is_file():
                continue
            if path.stat().st_size > MAX_FILE_BYTES:
                raise InvalidSpecError(f"profile `{path}` is too large to be one", hints=["delete it and calibrate"])
            return GpuProfile.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise InvalidSpecError(
                f"profile `{path}` cannot be read: {reason}", hints=["delete it and run `memplan calibrate` again"]
            ) from None
    return None


def slug(product: str) -> str:
    """A file name that is the same with and without the maker's words."""
    words = re.sub(r"[^a-z0-9]+", "-", product.lower()).strip("-").split("-")
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla")) or "gpu"
