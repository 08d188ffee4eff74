"""Routers side by side in a report: the checkpoint, and further ones by their names."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .part import Values


class Group(NamedTuple):
    """Routers of one name: the checkpoint, or further ones trained alike with several seeds."""

    name: str
    init: str
    routers: Sequence[Mapping[str, Any]]


def groups(values: Values) -> list[Group]:
    """The checkpoint first, then further routers by their names."""
    settings = values["settings"]
    by_name = {"this checkpoint": Group("this checkpoint", settings.get("init") or "", [values["gated"]])}
    for router in values.get("also", ()):
        before = by_name.get(router["name"])
        routers = [*(before.routers if before else ()), router]
        by_name[router["name"]] = Group(router["name"], router.get("init") or "", routers)
    return list(by_name.values())


def several(compared: Sequence[Group]) -> bool:
    """Whether some of them are several routers of one name."""
    return any(len(group.routers) > 1 for group in compared)
