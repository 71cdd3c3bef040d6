"""Registries: what the names in a configuration stand for, and how a file adds a name."""

import inspect
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar, get_type_hints

from diffrl.errors import InputError, InputTypeError, of_group

__all__ = [
    "ENTRY_POINTS",
    "IMPORT",
    "Config",
    "Entry",
    "Registry",
    "accepted",
    "as_tuples",
    "first_line",
    "import_named",
    "option_sources",
    "options_of",
    "registries",
    "user_modules",
]

Config = Mapping[str, Any]
Made = TypeVar("Made", bound=Callable[..., Any])

ENTRY_POINTS = "diffrl.methods"  # group of entry points: modules of other packages that register methods
IMPORT = "DIFFRL_IMPORT"  # environment variable: the user's modules, for processes that a launcher starts
_REGISTRIES: "dict[str, Registry]" = {}
_USERS: dict[str, None] = {}  # modules that the user named, in order


@dataclass(frozen=True)
class Entry:
    """A registered method.

    Args:
        name: in configurations.
        make: its constructor; the signature is the only home of its defaults.
        also: a second function that the same options go to, such as what draws an objective's states.
        label: name for people; a function makes it from the options.
        place: where it stands among the others of its kind, in coordinates of that kind; None if it does not say.
    """

    name: str
    make: Callable[..., Any]
    also: Callable[..., Any] | None = None
    label: str | Callable[[Config], str] = ""
    place: Any = None

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """All that the options go to."""
        return (self.make,) if self.also is None else (self.make, self.also)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return first_line(self.make)

    @property
    def module(self) -> str:
        """Where it is defined."""
        return str(getattr(self.make, "__module__", ""))

    def label_for(self, options: Config) -> str:
        """Name for people, such as "TD(λ=0.5)"."""
        return self.label(options) if callable(self.label) else self.label or self.name


def first_line(function: Callable[..., Any]) -> str:
    """Of its docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


class Registry(Mapping[str, Callable[..., Any]]):
    """Methods of one kind by name: name → constructor.

    The modules of `package` are imported when the registry is first read, so that a new file is enough. Modules
    of other packages come by the entry point group `diffrl.methods`, the user's own by `import_named`.

    Args:
        kind: what they are, which is also the config group.
        package: dotted name of the package whose modules register them, or of one module.
        omit: parameters that the library supplies itself; they are no options.

    Raises:
        ValueError: there is a registry of that kind.
    """

    def __init__(self, kind: str, package: str, *, omit: tuple[str, ...] = ()) -> None:
        if kind in _REGISTRIES:
            raise InputError(f"there is a registry of kind {kind!r} already")
        self.kind, self.package, self.omit = kind, package, omit
        self._entries: dict[str, Entry] = {}
        self._read = False
        _REGISTRIES[kind] = self

    def register(
        self,
        name: str,
        *,
        also: Callable[..., Any] | None = None,
        label: str | Callable[[Config], str] = "",
        place: Any = None,  # noqa: ANN401
    ) -> Callable[[Made], Made]:
        """Decorator: make a class or function known by `name`; see `Entry`.

        Raises:
            ValueError: another method has that name.
        """

        def decorate(make: Made) -> Made:
            entry = Entry(name, make, also, label, place)
            there = self._entries.get(name)
            if there is not None and _identity(there) != _identity(entry):
                raise InputError(
                    f"{self.kind} {name!r} of {entry.module} is taken by {there.module}: choose another name"
                )
            self._entries[name] = entry
            if not entry.module.startswith("diffrl.") and entry.module not in ("__main__", "__mp_main__"):
                _USERS.setdefault(entry.module)
            return make

        return decorate

    def entry(self, name: str) -> Entry:
        """All that was registered under a name.

        Raises:
            ValueError: nothing was, with the names that are known.
        """
        self._load()
        if name not in self._entries:
            known = ", ".join(self) or "(none is registered yet)"
            raise InputError(
                f"{self.kind} is {name!r}: give one of {known}; a method of your own is made "
                "known by --import MODULE on the command line, or by importing its module in Python"
            )
        return self._entries[name]

    def entries(self) -> list[Entry]:
        """All that was registered, by name."""
        return [self.entry(name) for name in self]

    def build(self, config: Config, *, group: str | None = None, **more: Any) -> Any:
        """What a configuration describes: the constructor of its ``name``, called with the other entries and `more`.

        Args:
            config: ``name`` and options.
            group: the config group, by which errors name an option; the kind if None.
            more: what is not configured.
        """
        if "name" not in config:
            raise InputError(f"{group or self.kind} is {config!r}: give the name of one of its options")
        options = dict(config)
        make = self[options.pop("name")]
        with of_group(group or self.kind, options):
            return make(**more, **options)

    def name_of(self, piece: Any) -> str:
        """The name under which the class of an object is registered.

        Raises:
            ValueError: it is not.
        """
        for entry in self.entries():
            if entry.make is type(piece):
                return entry.name
        raise InputError(f"{type(piece).__name__} is no registered {self.kind}")

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return self.entry(name).make

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        """Import everything that may register a method; once."""
        if self._read:
            return
        self._read = True  # now, since the modules may look at the registry themselves
        try:
            package = import_module(self.package)
            for module in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{self.package}."):
                if not module.ispkg:
                    import_module(module.name)
            _import_plugins()
        except BaseException:
            self._read = False
            raise


def registries() -> Mapping[str, Registry]:
    """All registries by kind, of the rooms that are imported."""
    return dict(_REGISTRIES)


def import_named(*modules: str) -> None:
    """Import the user's modules, which register methods, and remember them for worker processes.

    The current folder is looked in first, as by ``python -m``, however the process was started.

    Raises:
        ValueError: one of them cannot be found.
    """
    if modules and os.getcwd() not in sys.path:  # an installed script has its own folder there instead
        sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # it was found, but needs something that is missing
            remedy = "run where it lies, or set PYTHONPATH"
            if module.endswith(".py"):
                remedy = f"give its name without .py: --import {module.removesuffix('.py')}"
            raise InputError(f"--import {module}: there is no such module here; {remedy}") from error
        _USERS.setdefault(module)


def user_modules() -> list[str]:
    """Modules outside the library that registered a method or were named by the user."""
    _import_plugins()
    return list(_USERS)


def accepted(function: Callable[..., Any], options: Config) -> dict[str, Any]:
    """The options that `function` has parameters for."""
    names = inspect.signature(function).parameters
    return {k: v for k, v in options.items() if k in names}


def as_tuples(options: Config) -> dict[str, Any]:
    """Turn the lists of a configuration into the tuples that constructors take."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def options_of(
    source: Callable[..., Any], *, drop: tuple[str, ...] = (), **defaults: Any
) -> Callable[[Made], Made]:
    """Decorator: give a function ``f(first, **options)`` the options of `source`, so that their defaults have one home.

    >>> def source(x, *, a=1, b=2, c=3): ...
    >>> @options_of(source, drop=("c",), b=5)
    ... def f(x, **options):
    ...     return options
    >>> str(inspect.signature(f)), f(0), f(0, a=7)
    ('(x, *, a=1, b=5)', {'b': 5}, {'b': 5, 'a': 7})

    Args:
        source: a function or class with keyword-only options; it refuses names that it does not know.
        drop: options that the function sets itself.
        defaults: options with another default here.
    """

    def decorate(function: Made) -> Made:
        own = [
            p
            for p in inspect.signature(function).parameters.values()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        taken = [
            p.replace(default=defaults.get(p.name, p.default))
            for p in inspect.signature(source).parameters.values()
            if p.kind is inspect.Parameter.KEYWORD_ONLY and p.name not in (*drop, *(o.name for o in own))
        ]
        known = {p.name for p in (*own, *taken)}
        given = {name: default for name, default in defaults.items() if name in known}

        def wrapper(*args: Any, **options: Any) -> Any:
            if unknown := options.keys() - known:
                raise InputTypeError(f"{function.__name__} has no option {', '.join(sorted(unknown))}")
            return function(*args, **{**given, **options})

        target = source.__init__ if inspect.isclass(source) else source
        hints = {**get_type_hints(target), **get_type_hints(function)}
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(wrapper, name, getattr(function, name))
        wrapper.options_from = source  # type: ignore[attr-defined]  # for documentation
        wrapper.__signature__ = inspect.Signature([*own, *taken])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {name: hints[name] for name in (*known, "return") if name in hints}
        return wrapper  # type: ignore[return-value]

    return decorate


def option_sources(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """What a function or class takes options of by `options_of`, and what that takes options of, nearest first."""
    found: list[Callable[..., Any]] = []
    source: Any = function
    while source is not None:
        source = getattr(
            source, "options_from", getattr(getattr(source, "__init__", None), "options_from", None)
        )
        found += [] if source is None else [source]
    return found


def _identity(entry: Entry) -> tuple[str, str]:
    """Module and name: a module that is imported a second time, as spawned processes do, registers the same."""
    module = "__main__" if entry.module == "__mp_main__" else entry.module
    return module, getattr(entry.make, "__qualname__", repr(entry.make))


@cache
def _import_plugins() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        point.load()
    import_named(*filter(None, os.environ.get(IMPORT, "").split(",")))
