"""The documentation: a page of every method, what was shown of it, README's length, the tutorials' form."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

import diffrl
from docs.api_pages import plain_rst
from docs.method_pages import LEVELS, Finding, all_registries, evidence, method_page, write_pages
from tests.kit.configs import composed
from tests.kit.paths import ROOT
from tests.kit.runs import run
from tests.kit.shell import Shell

DOCS = ROOT / "docs"
EVIDENCE = yaml.safe_load((DOCS / "evidence.yaml").read_text(encoding="utf-8"))
METHODS = [(kind, name) for kind, registry in all_registries().items() for name in registry]
MADE = re.compile(r"(\.\./)?(methods|api|map|measured)/")
MUST_HAVE_EVIDENCE = ("objective", "sampler", "recipe", "credit", "placement")

MINE = '''
"""A credit of a user."""

from dataclasses import dataclass

from diffrl.finetuning.credit.base import Credit
from diffrl.finetuning.credit.registry import CREDITS


@CREDITS.register("mine", label="My credit")
@dataclass
class Mine(Credit):
    """Each step is praised by its rank.

        adv_i = rank(R)/N - 1/2

    where R is *not* scaled.

    Source: A Paper of Mine (2026), https://example.org/mine.

    Args:
        share: of the ranks that count, in (0, 1].
    """

    share: float = 0.25

    def __call__(self, rollout, reward):
        return reward
'''


# Pages of methods


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=lambda word: word)
def test_every_method_has_a_page(kind: str, name: str) -> None:
    page = method_page(kind, name)
    assert page.startswith("# ") and f"`{name}`" in page.splitlines()[0]
    for heading in ("## Options", "## Where it is from", "## What to expect"):
        assert heading in page
    (code,) = re.findall(r"^Code: `(.+)`$", page, flags=re.MULTILINE)
    assert (ROOT / code).is_file() and code.startswith("diffrl/")
    assert str(ROOT) not in page
    assert "None.__" not in page and "<function" not in page and "<object" not in page


def test_a_page_of_a_users_own_method(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "my_credit.py").write_text(MINE, encoding="utf-8")
    words = [str(DOCS / "method_pages.py"), "credit", "mine", "--import", "my_credit"]
    page = shell(*words, folder=tmp_path, path=(tmp_path,))
    assert page.startswith("# My credit (`mine`)\n\nEach step is praised by its rank.")
    assert "```text\nadv_i = rank(R)/N - 1/2\n```\n\nwhere R is \\*not\\* scaled." in page
    assert "python -m diffrl finetune --import my_credit credit=mine" in page
    assert "| `share` | `0.25` | of the ranks that count, in (0, 1\\]. |" in page
    assert "Source: A Paper of Mine (2026), <https://example.org/mine>." in page
    assert "Code: `my_credit.py`" in page
    assert LEVELS["not run"] in page and "nothing is recorded" in page.lower()


def test_a_method_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind is 'nope': give one of objective"):
        method_page("nope", "td")
    with pytest.raises(ValueError, match="objective is 'nope': give one of .*, ct, "):
        method_page("objective", "nope")


def test_the_site_has_all_pages_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "credit").mkdir()
    (tmp_path / "credit" / "gone.md").write_text("of a method that is no more", encoding="utf-8")
    write_pages(tmp_path)
    there = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.md")}
    now = [(kind, name) for kind, registry in all_registries().items() for name in registry]
    kinds = {kind for kind, _ in now}
    assert there == {f"{kind}/{name}.md" for kind, name in now} | {f"{kind}/index.md" for kind in kinds} | {
        "index.md"
    }
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.md")}
    write_pages(tmp_path)
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.md")}


# What was shown


@pytest.mark.parametrize(
    ("kind", "name"), [m for m in METHODS if m[0] in MUST_HAVE_EVIDENCE], ids=lambda word: word
)
def test_what_was_shown_of_every_method_is_recorded(kind: str, name: str) -> None:
    assert evidence(kind, name), (
        f"docs/evidence.yaml has no entry {kind}: {name}; write one, if only 'not run'"
    )


def test_evidence_is_of_methods_that_exist() -> None:
    recorded = {(kind, name) for kind, names in EVIDENCE.items() for name in names}
    assert recorded <= set(METHODS), recorded - set(METHODS)


@pytest.mark.parametrize("kind", EVIDENCE)
def test_evidence_is_complete(kind: str) -> None:
    for name, entries in EVIDENCE[kind].items():
        for finding in (Finding(**entry) for entry in entries):
            where = f"{kind} {name}: {finding}"
            assert finding.level in LEVELS and finding.figure, where
            assert finding.level == "not run" or (finding.command and finding.where), where
            assert not finding.where or (ROOT / finding.where).is_file(), where
            assert finding.level != "proxy" or finding.interval, where
            for path in re.findall(r"tests/[\w/]+\.py|examples/\w+\.py", finding.command):
                assert (ROOT / path).is_file(), where


# Docstrings as reStructuredText


def test_formulas_and_tables_stand_as_they_are_and_stars_are_no_markup() -> None:
    lines = [
        "Loss *L*.",
        "",
        "    L = |x|",
        "",
        "| a | b |",
        "|---|---|",
        "",
        "After.",
        "",
        "Args:",
        "    x: a*b.",
        "",
    ]
    plain_rst(lines)
    assert lines[0] == r"Loss \*L\*."
    assert lines[2:6] == ["::", "", "    L = |x|", ""]
    assert "    | a | b |" in lines and lines.index("    | a | b |") < lines.index("After.")
    assert lines[-2:] == [r"    x: a\*b.", ""]


# Words


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_links_of_the_documentation_lead_somewhere() -> None:
    for page in (*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md"), ROOT / "results" / "README.md"):
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text(encoding="utf-8")):
            made = "; pages that `make docs` makes are named by {doc}" * bool(MADE.match(link))
            assert not made and (link.startswith("http") or (page.parent / link).exists()), (
                f"{page.name}: {link}{made}"
            )


def test_pages_that_are_made_are_named_as_they_will_be_called() -> None:
    """A link to them would be dead for a reader of the sources."""
    pages = {
        "methods/index",
        *(f"methods/{kind}/{page}" for kind, name in METHODS for page in (name, "index")),
    }
    pages |= {
        f"map/{page}"
        for page in re.findall(r'"(\w+)\.md":', (DOCS / "map_page.py").read_text(encoding="utf-8"))
    }
    named = 0
    for page in (*DOCS.glob("*.md"), *DOCS.glob("tutorials/*.md")):
        for target in re.findall(r"\{doc\}`[^`<]+<([^`>]+)>`", page.read_text(encoding="utf-8")):
            made = (page.parent / target).resolve().relative_to(DOCS)
            assert made.as_posix() in pages, f"{page.name}: {target}"
            named += 1
    assert named > 5


@pytest.mark.parametrize("path", sorted(DOCS.glob("tutorials/[!i]*.md")), ids=lambda path: path.stem)
def test_tutorials_are_notebooks_whose_code_compiles(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---\n")[1])
    # the language is that of the code where no kernel runs to tell it; without, a quick build ends with warnings
    assert (head["file_format"], head["kernelspec"]["language"]) == ("mystnb", "python")
    cells = re.findall(r"```\{code-cell\} ipython3\n(.*?)```", text, flags=re.DOTALL)
    assert len(cells) >= 5
    compile("\n".join(cells), path.name, "exec")


# Commands


def written_commands() -> list[tuple[str, str]]:
    """(command, words) of what was shown; those of pages are in `test_written_commands`."""
    texts = [
        entry.get("command", "") for kind in EVIDENCE.values() for name in kind.values() for entry in name
    ]
    found = re.findall(
        r"^python -m diffrl (train|finetune|compare)\b(.*)$", "\n".join(texts), flags=re.MULTILINE
    )
    return sorted({(command, words.partition(" #")[0].strip()) for command, words in found})


@pytest.mark.parametrize(("command", "words"), written_commands())
def test_commands_of_what_was_shown_are_understood(command: str, words: str) -> None:
    given = shlex.split(words)
    if "--import" in given:
        return  # a module that the reader writes
    assert composed(*given, name=command) is not None


# For those who come from EDM

TRAIN = (
    "outdir data cond arch precond duration batch batch-gpu cbase cres lr ema dropout augment xflip fp16 ls bench "
    "cache workers desc nosubdir tick snap dump seed transfer resume dry-run"
)
GENERATE = (
    "network outdir seeds subdirs class batch steps sigma_min sigma_max rho S_churn S_min S_max S_noise solver disc "
    "schedule scaling"
)
"""Options of NVlabs/edm's scripts, at 008a4e5."""


@pytest.mark.parametrize(("heading", "flags"), [("Training", TRAIN), ("Sampling", GENERATE)])
def test_each_option_of_edm_has_its_line_and_what_it_names_is_there(heading: str, flags: str) -> None:
    page = (DOCS / "coming_from_edm.md").read_text(encoding="utf-8")
    section = page.partition(f"## {heading} options")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    named = {flag for row in rows for flag in re.findall(r"`--([\w-]+)", row[0])}
    assert not set(flags.split()) - named
    settings = composed(
        "data=folder", "data.path=a", "network=unet", "objective=edm", "sampler=edm_stochastic"
    )
    code = " ".join(re.findall(r"`([^`]+)`", " ".join(row[1] for row in rows)))
    keys = [key for key in re.findall(r"\b([a-z]+\.\w+)", code) if key.partition(".")[0] in settings]
    assert keys and not [key for key in keys if OmegaConf.select(settings, key, default="none") == "none"]


@pytest.mark.usefixtures("unrendered")
def test_edm_s_samples_of_a_class_are_written_as_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("data=digits", "data.conditional=true", "network.hidden=16", "network.depth=1", "compare=false")
    own = run(tmp_path / "runs" / "edm", *words, "trainer.grad_steps=2").path
    assert own.is_dir()
    page = (DOCS / "coming_from_edm.md").read_text(encoding="utf-8")
    [snippet] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Image" in code]
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    files = sorted((tmp_path / "out").iterdir())
    assert [file.name for file in files] == [f"{seed:06d}.png" for seed in range(64)]
    labels = torch.tensor([3])
    x0 = diffrl.sample(
        diffrl.load(own).denoiser,
        (1, 1, 8, 8),
        sampler=diffrl.load(own).sampler,
        num_steps=18,
        seed=5,
        cond=labels,
    )
    with Image.open(files[5]) as image:
        assert np.abs(np.asarray(image) - (x0[0, 0].numpy() * 127.5 + 127.5).clip(0, 255)).max() < 1
