"""The command `list`: the registered names of each kind, read from the source, as importing it all takes seconds.

What the user's own modules or other packages register can only be known by importing them: with those, everything is.
"""

import ast
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import diffrl
from diffrl.configs.words import Words
from diffrl.errors import InputError
from diffrl.registry import ENTRY_POINTS, IMPORT, first_line, import_named, registries, user_modules

__all__ = ["known_names", "list_names", "names_in_source"]

Names = dict[str, dict[str, str]]
"""By kind and name the first line of what it says of itself."""


def list_names() -> None:
    """The registered names of a kind with a line each; without a kind, the kinds."""
    parser = Words("list", list_names.__doc__)
    parser.add_argument("kind", nargs="?", help="data, process, network, objective, sampler, ...")
    parser.add_argument(
        "--import", dest="modules", action="append", default=[], metavar="MODULE", help="of your own"
    )
    given = parser.parse_args()
    found = known_names(given.modules)
    if given.kind is None:
        kinds = {kind: f"{len(found[kind])} names" for kind in sorted(found)}
        print(_lines(kinds) + "\n\ndiffrl list KIND tells the names of one")
    elif given.kind not in found:
        raise InputError(f"there is no kind {given.kind!r}: give one of {', '.join(sorted(found))}")
    else:
        print(_lines(found[given.kind]))


def known_names(modules: list[str]) -> Names:
    """All that is registered.

    Args:
        modules: of the user's, to import first.

    Raises:
        ValueError: a module cannot be found.
    """
    if (
        not modules
        and not os.environ.get(IMPORT)
        and not entry_points(group=ENTRY_POINTS)
        and not user_modules()
    ):
        return names_in_source()
    from diffrl.configs import groups  # costs seconds

    import_named(*modules)
    for registry in groups.GROUPS:
        list(registry)  # imports what registers
    return {
        kind: _told([(entry.name, *map(first_line, entry.functions)) for entry in registry.entries()])
        for kind, registry in registries().items()
    }


def names_in_source() -> Names:
    """What the library itself registers, without importing it: every ``KINDS.register("name")`` in its files."""
    kinds: dict[str, str] = {}
    calls: list[tuple[str, ast.Call, str, str]] = []
    for module, text in _sources():
        if "Registry(" not in text and ".register(" not in text:
            continue
        tree = _parsed(module)
        kinds |= _made(tree)
        calls += [(module, *found) for found in _registered(tree)]
    names: dict[str, list[tuple[str, ...]]] = {kind: [] for kind in kinds.values()}
    for module, call, variable, function in calls:
        if variable in kinds:
            also = [ast.unparse(word.value) for word in call.keywords if word.arg == "also"]
            said = (_summary(module, name) for name in (function, *also))
            names[kinds[variable]].append((ast.literal_eval(call.args[0]), *said))
    return {kind: _told(sorted(found)) for kind, found in names.items()}


def _told(found: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """What is said of each name: of what several share, what each has besides, such as the states of a loss."""
    shared = Counter(said for _, said, *_ in found)
    return {name: also[0] if also and shared[said] > 1 else said for name, said, *also in found}


def _sources() -> Iterator[tuple[str, str]]:
    """Dotted name and text of each module."""
    (root,) = map(Path, diffrl.__path__)
    for file in sorted(root.rglob("*.py")):
        yield ".".join(file.relative_to(root.parent).with_suffix("").parts), file.read_text(encoding="utf-8")


@cache
def _parsed(module: str) -> ast.Module:
    (root,) = map(Path, diffrl.__path__)
    return ast.parse(root.parent.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))


def _made(tree: ast.Module) -> dict[str, str]:
    """Kind by variable, of each ``VARIABLE = Registry("kind", ...)``."""
    return {
        target.id: ast.literal_eval(node.value.args[0])
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        for target in node.targets
        if isinstance(target, ast.Name) and ast.unparse(node.value.func) == "Registry"
    }


def _registered(tree: ast.Module) -> Iterator[tuple[ast.Call, str, str]]:
    """The call, the registry's variable and the registered function: of decorators, and of ``X.register("n")(f)``."""
    for node in tree.body:
        found: list[tuple[ast.expr, str]] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found = [(decorator, node.name) for decorator in node.decorator_list]
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found = [(node.value.func, ast.unparse(given)) for given in node.value.args]
        for call, function in found:
            if (
                isinstance(call, ast.Call)
                and isinstance(call.func, ast.Attribute)
                and call.func.attr == "register"
            ):
                yield call, ast.unparse(call.func.value), function


def _summary(module: str, function: str) -> str:
    """First line of the docstring of a function or class that stands in a module, or is imported there by name."""
    for node in _parsed(module).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == function:
            return (ast.get_docstring(node) or "").partition("\n")[0]
        if isinstance(node, ast.ImportFrom) and function in [alias.name for alias in node.names]:
            return _summary(str(node.module), function)
    raise LookupError(f"{function} is not defined in {module}")


def _lines(found: Mapping[str, str]) -> str:
    width = max(map(len, found), default=0)
    return "\n".join(f"{name:{width}}  {said}" for name, said in found.items())
