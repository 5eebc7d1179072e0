"""A change to code of others: what it replaces, why, and for which source it was made."""

import inspect
import logging
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from hashlib import blake2b
from importlib import import_module
from typing import Any

LOG = logging.getLogger("vllm.qwen_vllm")
_applied: set[str] = set()


@dataclass(frozen=True)
class Patch:
    """One change.

    Attributes:
        name: what the log calls it.
        why: what is wrong or slow without it.
        upstream: where the change was proposed, or what it waits for.
        replaces: for each dotted name, a function from the original object to the one that takes its place.
        made_for: for each function whose source the change relies on, its dotted name and `source_hash`.
        shows_fault: the probe of a repair; None: applied only where the source is the one in `made_for`.
        modules: for each module that cannot be imported, the name of the one that takes its place.
    """

    name: str
    why: str
    upstream: str
    replaces: Mapping[str, Callable[[Any], Any]]
    made_for: Mapping[str, str]
    shows_fault: Callable[[], bool] | None = None
    modules: Mapping[str, str] = field(default_factory=dict)

    def changed(self) -> list[str]:
        """Name the functions whose source is not the one that this change was made for."""
        return [name for name, known in self.made_for.items() if source_hash(name) != known]

    def is_wanted(self) -> bool:
        """Tell whether to apply the change here; log one line where it is left out for its source."""
        if self.shows_fault:
            return self.shows_fault()
        if changed := self.changed():
            LOG.warning("%s: left out, because this version differs in %s", self.name, ", ".join(changed))
        return not changed

    def apply(self) -> bool:
        """Make the change for the life of this process, unless it is made already or not wanted; tell if it is made."""
        if self.name not in _applied and self.is_wanted():
            _applied.add(self.name)
            self._replace()
        return self.name in _applied

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Make the change, if it is wanted, while the block runs."""
        undo = self._replace() if self.is_wanted() else []
        try:
            yield
        finally:
            for step in undo:
                step()

    def _replace(self) -> list[Callable[[], Any]]:
        """Make the change, and return the steps that take it back."""
        undo: list[Callable[[], Any]] = []
        for target, replacement in self.replaces.items():
            where, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(where)
            original = getattr(owner, name)
            undo.append(partial(setattr, owner, name, original))
            setattr(owner, name, replacement(original))
        for name, stand_in in self.modules.items():
            sys.modules[name] = import_module(stand_in)
            undo.append(partial(sys.modules.pop, name))
        return undo


@cache
def source_hash(name: str) -> str:
    """Hash the source text of a dotted name; "missing" where there is no such object."""
    try:
        found: Any = pkgutil.resolve_name(name)
        source = inspect.getsource(getattr(found, "fget", found))
    except (ImportError, AttributeError):
        return "missing"
    return blake2b(source.encode(), digest_size=6).hexdigest()


def ours(name: str) -> Callable[[Any], Any]:
    """Replace by the object with this dotted name, which is imported when the patch is applied."""
    return lambda _: pkgutil.resolve_name(name)


def wrapped_by(name: str) -> Callable[[Any], Any]:
    """Replace by what the function with this dotted name makes of the original."""
    return lambda original: pkgutil.resolve_name(name)(original)
