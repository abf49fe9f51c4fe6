"""Find target plug-ins: classes that packages announce in the entry-point group `llamac.targets`.

A plug-in is loaded when it is asked for, never before: one that is broken stops nobody who does not
need it.
"""

from __future__ import annotations

import difflib
from importlib.metadata import EntryPoint, entry_points

from llamac.runtime.errors import TargetUnknown, ToolchainMissing
from llamac.targets.base import API_VERSION, Target
from llamac.targets.soc import SoC

GROUP = "llamac.targets"


def target_names() -> tuple[str, ...]:
    """Return the names of all installed plug-ins, sorted; nothing is imported."""
    return tuple(sorted(_plugins()))


def distribution_of(name: str) -> str:
    """Return which distribution brings an installed plug-in, "llamac 0.1.0"."""
    return ", ".join(_origin(entry) for entry in _plugins()[name])


def load_target(name: str) -> type[Target]:
    """Import one plug-in.

    Args:
        name: as in the SoC file, "x86-cpu".

    Raises:
        TargetUnknown: no package or more than one announces it, it cannot be imported, or it does
            not keep to the interface of `targets/base.py`.
    """
    entries = _plugins().get(name, [])
    if not entries:
        raise _not_installed(name)
    if len(entries) > 1:
        raise TargetUnknown(
            f"two plug-ins are called {name!r}",
            cause=" and ".join(f"{_origin(entry)} ({entry.value})" for entry in entries),
            fix="uninstall one of them, or rename its entry point and the SoC files that use it",
        )
    [entry] = entries
    try:
        found = entry.load()
    except Exception as error:  # a plug-in may fail in any way; the user must see which and how
        raise TargetUnknown(
            f"the plug-in {name!r} of {_origin(entry)} cannot be imported",
            cause=f"{entry.value}: {type(error).__name__}: {error}",
            fix="install what it needs, or uninstall it",
        ) from error
    return _checked(found, entry)


def make_target(name: str, soc: SoC) -> Target:
    """Load a plug-in and make it for a SoC that this machine can compile for.

    Raises:
        TargetUnknown: the plug-in cannot be used, or does not serve the SoC.
        SocInvalid: the SoC file asks for what the plug-in does not have.
        ToolchainMissing: this machine lacks something, the first thing is named.
    """
    target = load_target(name)(soc)
    for missing in target.check():
        raise ToolchainMissing(f"{name} lacks {missing.what}", cause=missing.why, fix=missing.fix)
    return target


def _plugins() -> dict[str, list[EntryPoint]]:
    """Group entry points by name; the same class announced twice counts once."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, {}).setdefault(entry.value, entry)
    return {name: list(entries.values()) for name, entries in found.items()}


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _checked(found: object, entry: EntryPoint) -> type[Target]:
    """Return a plug-in's class if it keeps to the interface."""
    if not isinstance(found, type) or not issubclass(found, Target):
        raise _refused(entry, f"{entry.value} is no subclass of llamac.targets.base.Target")
    if found.api_version != API_VERSION:
        versions = f"version {found.api_version} of the interface; this llamac has {API_VERSION}"
        raise _refused(entry, f"it was written for {versions}")
    missing = [word for word in ("name", "processor") if not hasattr(found, word)]
    if missing or found.name != entry.name:
        wrong = f"no {' and no '.join(missing)}" if missing else f"the name {found.name!r}"
        raise _refused(entry, f"its class has {wrong}, its entry point is {entry.name!r}")
    return found


def _refused(entry: EntryPoint, cause: str) -> TargetUnknown:
    return TargetUnknown(
        f"the plug-in {entry.name!r} of {_origin(entry)} cannot be used",
        cause=cause,
        fix="update the plug-in or llamac; docs/adding-a-target.md shows what a plug-in must have",
    )


def _not_installed(name: str) -> TargetUnknown:
    installed = target_names()
    near = difflib.get_close_matches(name, installed, n=1)
    cause = f"no installed package has an entry point {name!r} in the group {GROUP}"
    fix = f"did you mean {near[0]}?" if near else "install the package that brings it"
    listed = ", ".join(installed) or "none"
    return TargetUnknown(
        f"no plug-in {name!r} is installed (there are: {listed})", cause=cause, fix=fix
    )
