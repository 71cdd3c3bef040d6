"""Pages about methods, made from the registries: formula, options, file, source, and what was shown of each.

python docs/method_pages.py objective td                        # print a page
python docs/method_pages.py credit mine --import my_module      # of a method of your own
"""

import argparse
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))  # run as a script, this file knows its own folder only

import diffrl  # noqa: E402
from diffrl.registry import Entry, Registry, import_named, option_sources, registries  # noqa: E402
from docs.docstrings import Docstring, markdown, write_folder  # noqa: E402

__all__ = [
    "KINDS",
    "LEVELS",
    "Finding",
    "all_registries",
    "evidence",
    "method_page",
    "write_pages",
]

LEVELS = {
    "gated": "**Gated by a test.** A test in the suite fails when this stops being true.",
    "proxy": "**At proxy size.** Measured over several seeds, on problems far smaller than the published ones.",
    "once": "**Once.** Measured in one run or two; how much it varies from seed to seed is not known.",
    "not run": "**Not run.** No result of using it has been measured.",
}
"""How firmly something was shown, from the firmest to the least."""

NOTHING = "nothing is recorded about this method in `docs/evidence.yaml`"


@dataclass(frozen=True)
class Kind:
    """What is said about all methods of a kind: a title, a sentence, a command and its option."""

    title: str
    sentence: str
    command: str = "train"
    option: str = ""  # the kind's name, if empty
    more: str = ""  # on the page of each


KINDS = {
    "objective": Kind(
        "Objectives",
        "An objective is a way to train a denoiser: a loss, and the noisy states it is for.",
        more="Its place on [the map](../../map/index.md); [what it learns of N(0, 1)](../../map/fixed_points.md).",
    ),
    "process": Kind(
        "Noise processes", "A process says how clean data turn into noise, and at which noise levels."
    ),
    "starts": Kind("Starts", "Starts decide from which noise levels the chains of a batch begin."),
    "sampler": Kind("Samplers", "A sampler walks from noise to data with a trained denoiser."),
    "network": Kind("Networks", "The neural network inside a denoiser."),
    "data": Kind("Data sets", "Clean data to train on; for synthetic sets the exact denoiser is known."),
    "recipe": Kind(
        "Fine-tuning recipes",
        "A recipe is a fine-tuning method: a list of pieces that fit together.",
        "finetune",
    ),
    "rollouts": Kind(
        "Rollout plans",
        "A rollout plan decides which trajectories are collected before an update.",
        "finetune",
    ),
    "placement": Kind(
        "Placements", "A placement says at which denoising steps rewards are paid.", "finetune"
    ),
    "credit": Kind("Credit", "Credit turns rewards into one advantage for each denoising step.", "finetune"),
    "updates": Kind(
        "Update plans", "An update plan decides how a rollout is cut into minibatches.", "finetune"
    ),
    "surrogate": Kind("Surrogates", "A surrogate is the loss that an update lowers.", "finetune"),
    "reward": Kind("Rewards", "A reward scores samples: the larger, the better.", "finetune"),
    "reader": Kind(
        "Readers of text",
        "A reader finds the text in an image, for the reward `ocr`.",
        "finetune",
        "reward=ocr reward.reader",
    ),
    "model": Kind("Models", "Where the model to be tuned comes from.", "finetune"),
}
"""The kinds that have words of their own, in the order in which the site shows them; others follow."""


# What the library has


@cache
def _import_rooms() -> None:
    for module in pkgutil.walk_packages(diffrl.__path__, "diffrl."):
        if not module.name.rpartition(".")[2].startswith("__"):
            import_module(module.name)


def all_registries() -> dict[str, Registry]:
    """Every registry that holds a method, of the library or of the user, by kind, in the order of `KINDS`."""
    _import_rooms()
    found = {kind: registry for kind, registry in registries().items() if len(registry) > 0}
    order = [*(kind for kind in KINDS if kind in found), *sorted(found.keys() - KINDS.keys())]
    return {kind: found[kind] for kind in order}


@dataclass(frozen=True)
class Finding:
    """One thing that was shown of a method.

    Args:
        level: one of `LEVELS`.
        figure: what to expect, in words.
        interval: its 95 % interval, where there is one.
        command: what shows it.
        where: file of the repository with the figure or the test.
        ends: where it stops being true.
    """

    level: str
    figure: str
    interval: str = ""
    command: str = ""
    where: str = ""
    ends: str = ""


def evidence(kind: str, name: str) -> list[Finding]:
    """What `docs/evidence.yaml` records about a method, the firmest first; nothing for most of the user's own."""
    found = [Finding(**entry) for entry in _evidence().get(kind, {}).get(name, [])]
    return sorted(found, key=lambda finding: list(LEVELS).index(finding.level))


@cache
def _evidence() -> Mapping[str, Mapping[str, list[dict[str, str]]]]:
    return yaml.safe_load((FOLDER / "evidence.yaml").read_text(encoding="utf-8"))


# A page


def method_page(kind: str, name: str) -> str:
    """The page of a registered method, in Markdown.

    Args:
        kind: of the registry, such as "objective".
        name: under which the method is registered there.

    Raises:
        ValueError: there is no such kind or no such method, with those that there are.
    """
    known = all_registries()
    if kind not in known:
        raise ValueError(f"kind is {kind!r}: give one of {', '.join(known)}")
    registry = known[kind]
    entry = registry.entry(name)
    sections = (
        _head(kind, entry),
        _formula(entry),
        _options(kind, registry, entry),
        _origin(entry),
        _shown(kind, entry),
    )
    return "\n\n".join(part for part in sections if part) + "\n"


def _head(kind: str, entry: Entry) -> str:
    label = entry.label if isinstance(entry.label, str) else ""
    title = f"# {label} (`{entry.name}`)" if label and label != entry.name else f"# `{entry.name}`"
    doc = Docstring.of(entry.make)
    parts = [title, markdown(doc.summary), *doc.intro]
    if entry.also is not None:
        drawn = Docstring.of(entry.also)
        parts += [
            f"What it trains on is drawn by `{entry.also.__name__}`. {markdown(drawn.summary)}",
            *drawn.intro,
        ]
    return "\n\n".join([*parts, *([KINDS[kind].more] if kind in KINDS and KINDS[kind].more else [])])


def _formula(entry: Entry) -> str:
    found: list[str] = []
    for function in entry.functions:
        near = [*_mentioned(function), *_pieces(entry)]
        things = (function, *(x for thing in near for x in (thing, *_mentioned(thing))))
        of = next((thing for thing in things if Docstring.of(thing).formula), None)
        if of is None:
            continue
        if of is not function or len(entry.functions) > 1:
            found.append(f"From `{of.__name__}`:")
        found += Docstring.of(of).formula
    return "\n\n".join(["## Formula", *dict.fromkeys(found)]) if found else ""


def _pieces(entry: Entry) -> list[type]:
    """Classes of a recipe's pieces, the loss first; nothing for other methods."""
    if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(entry.make).parameters.values()):
        return []
    pieces = dict(vars(entry.make()))
    return [type(pieces[name]) for name in sorted(pieces, key=lambda name: name != "surrogate")]


def _mentioned(function: Callable[..., Any]) -> Iterator[Any]:
    """Classes and functions that a docstring names in backticks, as its module knows them."""
    names = vars(sys.modules.get(function.__module__, object()))
    for name in re.findall(r"`([\w.]+)`", inspect.getdoc(function) or ""):
        thing = names.get(name.rpartition(".")[2])
        if thing is not function and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield thing


def _options(kind: str, registry: Registry, entry: Entry) -> str:
    words = KINDS.get(kind, Kind(kind, ""))
    own = "" if entry.module.startswith("diffrl.") else f"--import {entry.module} "
    command = f"    python -m diffrl {words.command} {own}{words.option or kind}={entry.name}"
    described = _described(entry)
    rows, pieces = [], False
    for parameter in _parameters(entry):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            pieces = True
        elif parameter.name not in registry.omit:
            default = "needed" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
            meaning = markdown(described.get(parameter.name, "")).replace("|", "\\|")
            rows.append(f"| `{parameter.name}` | {default} | {meaning} |")
    parts = ["## Options", command]
    if rows:
        parts += [
            f"Each option is set as `{kind}.OPTION=VALUE`.",
            "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]),
        ]
    elif not pieces:
        parts.append("It has no options.")
    if pieces:
        parts += [
            "It is made of these pieces, each of which can be replaced:",
            f"```text\n{entry.make()}\n```",
        ]
    return "\n\n".join(parts)


def _parameters(entry: Entry) -> list[inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for function in entry.functions:
        for parameter in inspect.signature(function).parameters.values():
            found.setdefault(parameter.name, parameter)
    return list(found.values())


def _described(entry: Entry) -> dict[str, str]:
    """What docstrings say about parameters: those of the functions themselves, then of what they refer to."""
    found: dict[str, str] = {}
    for function in entry.functions:
        for thing in (function, *_mentioned(function), *option_sources(function)):
            found = {**Docstring.of(thing).args, **found}
    return found


def _origin(entry: Entry) -> str:
    sources = [source for function in entry.functions for source in Docstring.of(function).sources]
    for function in entry.functions:
        if not sources:
            sources = [source for thing in _mentioned(function) for source in Docstring.of(thing).sources]
    lines = ["## Where it is from", *(markdown(source) for source in dict.fromkeys(sources))]
    if not sources:
        lines.append("Its docstring names no publication.")
    return "\n\n".join([*lines, f"Code: `{_file(entry)}`"])


def _file(entry: Entry) -> str:
    """Path inside the repository, or the bare name of the user's file."""
    path = Path(getattr(sys.modules.get(entry.module), "__file__", None) or entry.module)
    for root in (ROOT, Path(diffrl.__file__).resolve().parent.parent):
        if path.resolve().is_relative_to(root):
            return path.resolve().relative_to(root).as_posix()
    return path.name


def _shown(kind: str, entry: Entry) -> str:
    parts = ["## What to expect"]
    for finding in evidence(kind, entry.name) or [Finding("not run", "")]:
        figure = finding.figure.strip() or NOTHING
        text = f"{LEVELS[finding.level]} {figure[0].upper()}{figure[1:].rstrip('.')}"
        text += f" (95 % interval {finding.interval})." if finding.interval else "."
        if finding.ends:
            text += f"\n\n*Where it ends:* {finding.ends.strip()}"
        if finding.where:
            text += f"\n\nSee `{finding.where}`."
        if finding.command:
            text += f"\n\n    {finding.command}"
        parts.append(text)
    return "\n\n".join(parts)


# The site


def write_pages(folder: Path) -> None:
    """Write the page of every method below `folder`, with an index of each kind; untouched where nothing changed."""
    known = all_registries()
    wanted = {"index.md": _index(known)}
    for kind, registry in known.items():
        wanted[f"{kind}/index.md"] = _kind_index(kind, registry)
        wanted |= {f"{kind}/{name}.md": method_page(kind, name) for name in registry}
    write_folder(folder, wanted)


def _level(kind: str, name: str) -> str:
    found = evidence(kind, name)
    return found[0].level if found else "not run"


def _kind_index(kind: str, registry: Registry) -> str:
    words = KINDS.get(kind, Kind(kind.capitalize(), ""))
    rows = [
        f"| [`{entry.name}`]({entry.name}.md) | {markdown(entry.summary)} | {_level(kind, entry.name)} |".replace(
            "\n", " "
        )
        for entry in registry.entries()
    ]
    names = "\n".join(registry)
    return "\n\n".join(
        [
            f"# {words.title}",
            words.sentence,
            f"On the command line: `python -m diffrl {words.command} {words.option or kind}=NAME`.",
            "\n".join(["| name | what it is | shown |", "|---|---|---|", *rows]),
            f"```{{toctree}}\n:hidden:\n\n{names}\n```",
        ]
    )


def _index(known: Mapping[str, Registry]) -> str:
    kinds = {kind: KINDS.get(kind, Kind(kind.capitalize(), "")) for kind in known}
    rows = [
        f"| [{words.title}]({kind}/index.md) | {len(known[kind])} | {words.sentence} |"
        for kind, words in kinds.items()
    ]
    levels = "\n".join(f"* {text}" for text in LEVELS.values())
    toc = "\n".join(f"{kind}/index" for kind in known)
    return f"""# Methods

Every method has a page: its formula, its options with their defaults, its file, where it is from, and what to
expect of it. The pages are made from the code when this site is built, so a method of your own gets one too:

    python docs/method_pages.py credit mine --import my_module

Each page says how firmly something was shown, at one of four levels:

{levels}

| kind | methods | |
|---|---|---|
{chr(10).join(rows)}

```{{toctree}}
:hidden:

{toc}
```
"""


def main() -> None:
    """Print one page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", help="such as objective, sampler, credit")
    parser.add_argument("name", help="of the method")
    parser.add_argument("--import", dest="modules", action="append", default=[], help="module of your own")
    given = parser.parse_args()
    try:
        import_named(*given.modules)
        print(method_page(given.kind, given.name), end="")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
