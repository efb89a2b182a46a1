"""Whether `target_modules` and `modules_to_save` name what the model has, as PEFT 0.21.2 takes them.

tuners/tuners_utils.py `inject_adapter`: adapters on nothing are an error, and so is a name of a module that takes none
(a norm, a whole MLP); a name of no module at all is passed over. utils/other.py `_set_trainable` copies whatever
module's name ends so, and passes over the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from memplan.architectures.builder import Weight
from memplan.architectures.peft_targets import adapts_module, converted_names, is_named
from memplan.errors import MemplanError, UnknownNameError
from memplan.train_config import TrainConfig

_ADAPTER = re.compile(r"\.(?:lora_|modules_to_save\.).*")
_INDEX = re.compile(r"(?:^|\.)\d+(?=\.)")


def name_warnings(model_type: str, config: TrainConfig, weights: Iterable[Weight]) -> list[str]:
    """One sentence for each name that PEFT passes over.

    Raises:
        MemplanError: names that PEFT refuses, or that memplan cannot follow: of one layer among its like, or of
            a part of the model that would be trained whole.
    """
    if not config.trains_adapters or (config.target_modules == "all-linear" and not config.modules_to_save):
        return []
    parts = _Parts(weights)
    return [*_targets(model_type, config, parts), *_saved(model_type, config, parts)]


class _Parts:
    """Modules of the model by name, layers of one kind as one: `model.layers.self_attn.q_proj`."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.adapted: set[str] = set()
        """Modules and bare parameters with an adapter."""
        self.saved: set[str] = set()
        """Modules of which a copy is trained."""
        self.plain: set[str] = set()
        self.linear: set[str] = set()
        """Last names of linear layers."""
        for name, kind, of, rank in {(_without_index(w.name), w.kind, w.of, len(w.shape)) for w in weights}:
            if kind == "weights":
                module, _, leaf = name.rpartition(".")
                self.plain.add(module)
                if leaf == "weight" and rank == 2 and not of:
                    self.linear.add(module.rpartition(".")[2])
            elif ".modules_to_save." in name:
                self.saved.add(_ADAPTER.sub("", name))
            else:
                self.adapted.add(_ADAPTER.sub("", name))
        self.plain |= self.adapted | self.saved
        self.groups = {group for name in self.plain for group in _above(name)} - self.plain
        """Modules that hold other modules."""


def _without_index(name: str) -> str:
    return _INDEX.sub("", name).lstrip(".")


def _above(name: str) -> Iterator[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _targets(model_type: str, config: TrainConfig, parts: _Parts) -> Iterator[str]:
    targets = () if config.target_modules == "all-linear" else config.target_modules
    idle = []
    for target in targets:
        if target.rpartition(".")[2] in converted_names(model_type) or any(
            adapts_module(model_type, (target,), a) for a in parts.adapted
        ):
            continue
        if _INDEX.search(target) and any(is_named(name, _without_index(target)) for name in parts.plain):
            raise MemplanError(
                f"`{target}` in `target_modules` is of one layer, and memplan adapts the layers of a kind alike",
                hints=[f"name it in all of them: `{target.rpartition('.')[2]}`"],
            )
        if any(is_named(name, target) for name in parts.saved):
            continue  # what is trained whole gets no adapter
        if any(is_named(name, target) for name in parts.plain | parts.groups):
            raise MemplanError(
                f"PEFT puts no adapter on `{target}`: it is no linear layer and no embedding",
                hints=["name the linear layers in it, or take `all-linear`"],
            )
        idle.append(target)
    if not parts.adapted:
        names = parts.linear | set(converted_names(model_type))
        raise MemplanError(
            f"no layer of `{model_type}` gets an adapter: `target_modules` is {','.join(targets) or 'all-linear'}",
            hints=[*UnknownNameError("target", idle[0], names).hints, "`all-linear` needs no names"]
            if idle
            else ["leave some of them out of `modules_to_save`"],
        )
    for target in idle:
        yield f"PEFT passes over `{target}` in `target_modules`: `{model_type}` has no module of that name"


def _saved(model_type: str, config: TrainConfig, parts: _Parts) -> Iterator[str]:
    for wanted in config.modules_to_save:
        if any(name.endswith(wanted) for name in (parts.plain | parts.groups) - parts.saved):
            raise MemplanError(
                f"`{wanted}` in `modules_to_save` is more than a layer of its own, which memplan does not count",
                hints=["name layers, such as `lm_head` or `embed_tokens`"],
            )
        copied = [name for name in parts.saved if name.endswith(wanted)]
        refused = [
            name
            for name in copied
            if not is_named(name, wanted) and adapts_module(model_type, config.target_modules, name)
        ]
        if refused:
            raise MemplanError(
                f"PEFT cannot copy `{refused[0]}`, which `{wanted}` in `modules_to_save` names: it has an adapter",
                hints=["write the names in `modules_to_save` in full"],
            )
        if not copied:
            yield f"PEFT passes over `{wanted}` in `modules_to_save`: `{model_type}` has no module of that name"
