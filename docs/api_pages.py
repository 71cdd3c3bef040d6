"""Pages about the public names, one for each room, and docstrings as reStructuredText for autodoc."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import diffrl
from docs.docstrings import write_folder

__all__ = ["FACES", "plain_rst", "write_api"]

FACES = {
    "diffrl": "What a script needs first: processes, denoisers, chains, samplers, and the calls that tune and load.",
    "diffrl.data": "Clean data, with the law that they follow where it is known.",
    "diffrl.diffusion": "Chains of noisy states and the denoisers that read them. It knows no reinforcement learning.",
    "diffrl.diffusion.schedules": "Noise processes: how data turn into noise.",
    "diffrl.diffusion.networks": "Networks for denoisers.",
    "diffrl.diffusion.samplers": "Steps from noise to data.",
    "diffrl.diffusion.pipelines": "Denoisers made of a diffusers pipeline, and adapters to tune them.",
    "diffrl.rl.returns": "Returns along a chain, as functions of tensors.",
    "diffrl.rl.estimators": "The same returns as TorchRL value estimators.",
    "diffrl.rl.advantages": "Advantages for policy gradients.",
    "diffrl.objectives": "Losses: one for each way to train a denoiser or a policy.",
    "diffrl.rewards": "Rewards of samples.",
    "diffrl.metrics": "How good a denoiser and its samples are, and how sure a mean over seeds is.",
    "diffrl.metrics.diagnostics": "Bias and variance of targets against the exact denoiser.",
    "diffrl.training": "The training loop, its checkpoints and its run folders.",
    "diffrl.finetuning": "Tuning a policy for a reward.",
    "diffrl.finetuning.recipes": "What a recipe is made of; [each recipe has a page](../methods/recipe/index.md).",
    "diffrl.experiments": "From a configuration to runs and comparisons.",
    "diffrl.envs": "The denoising chain as an environment, for TorchRL and for Gymnasium.",
    "diffrl.registry": "How a method gets a name.",
}
"""The modules whose names are public, each with a sentence."""


def write_api(folder: Path) -> None:
    """Write a page for each of `FACES`, and an index; a name that `diffrl` has itself stands there only."""
    wanted = {"index.md": _index()}
    top = {name: getattr(diffrl, name) for name in vars(diffrl)["__all__"]}
    for face in FACES:
        wanted[f"{face}.md"] = _page(face, top)
    write_folder(folder, wanted)


def _page(face: str, top: dict[str, object]) -> str:
    module = import_module(face)
    things = {name: getattr(module, name) for name in module.__all__}
    public = {n: t for n, t in things.items() if inspect.isclass(t) or inspect.isfunction(t)}
    here = {n: t for n, t in public.items() if face == "diffrl" or top.get(n) is not t}
    there = [f"`diffrl.{name}`" for name in sorted(public.keys() - here.keys())]
    parts = [f"# `{face}`", FACES[face]]
    if there:
        parts.append(f"On the page of [`diffrl`](diffrl.md): {', '.join(there)}.")
    parts += [_directive(face, name, thing) for name, thing in sorted(here.items())]
    return "\n\n".join(parts) + "\n"


def _directive(face: str, name: str, thing: object) -> str:
    kind = "autoclass" if inspect.isclass(thing) else "autofunction"
    members = "\n   :members:" if kind == "autoclass" else ""
    return f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: {face}.{name}{members}\n```"


def _index() -> str:
    rows = [
        f"| [`{face}`]({face}.md) | {sentence.replace('../methods', 'methods')} |"
        for face, sentence in FACES.items()
    ]
    rows = [row.replace("(methods", "(../methods") for row in rows]
    pages = "\n".join(FACES)
    return "\n".join(
        [
            "# Public names",
            "",
            "Everything a script may import. Names that are not listed here may change at any time. Methods that are",
            "chosen by name, such as objectives and samplers, have [pages of their own](../methods/index.md).",
            "",
            "| module | what it holds |",
            "|---|---|",
            *rows,
            "",
            "```{toctree}",
            ":hidden:",
            "",
            pages,
            "```",
            "",
        ]
    )


SECTION = re.compile(r"\s*(Args|Attributes|Returns|Raises|Yields):$")


def plain_rst(lines: list[str]) -> None:
    """Rewrite the lines of a docstring in place: formulas and tables as they stand, nothing else taken for markup."""
    out: list[str] = []
    in_section = in_block = False
    for j, line in enumerate(lines):
        before = lines[j - 1] if j else ""
        indented = line.startswith("    ")
        if SECTION.match(line):
            in_section, in_block = True, False
        elif line and not indented:
            in_section = False
        verbatim = (indented and not in_section) or line.startswith("|")
        if verbatim and not in_block:
            out += [*([""] if before else []), "::", ""]
        if line:
            in_block = verbatim
        if verbatim:
            out.append(line if indented else f"    {line}")
        elif line.lstrip().startswith((">>>", "...")) or _continues_doctest(lines, j):
            out.append(line)
        else:
            if line and out and out[-1].startswith("    ") and not in_section and before.startswith("|"):
                out.append("")
            out.append(_escaped(line))
    lines[:] = out


def _continues_doctest(lines: list[str], j: int) -> bool:
    """Whether a line is what a doctest prints: nothing but text between it and the prompt above."""
    for line in reversed(lines[:j]):
        if not line.strip():
            return False
        if line.lstrip().startswith(">>>"):
            return bool(lines[j].strip())
    return False


def _escaped(line: str) -> str:
    pieces = re.split(r"(``.+?``|`[^`]+`|https?://\S+)", line)
    return "".join(_piece(piece) for piece in pieces)


def _piece(piece: str) -> str:
    if piece.startswith("``") or re.match("https?://", piece):
        return piece
    if piece.startswith("`") and piece.endswith("`") and len(piece) > 2:
        return f"`{piece}`"
    return re.sub(r"(\*+(?=\w+:)\w+)|([\\*|`]|_(?!\w))", lambda m: m[1] or f"\\{m[2]}", piece)
