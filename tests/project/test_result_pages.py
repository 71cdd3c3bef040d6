"""The results on the site: a page for each folder, whose links lead somewhere, and links where a page names one."""

import re
from pathlib import Path

from docs.result_pages import link_included, link_results, link_sources, named_pages, write_results
from tests.kit.paths import ROOT

TARGETS = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[^)\s]*)?\)")


def test_each_folder_has_a_page_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    write_results(tmp_path)
    written = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    assert {f"{path.parent.name}.md" for path in ROOT.glob("results/*/README.md")} <= {*written}
    assert "few_step_digits.md" in written
    led = 0
    for name, text in written.items():
        source = next(ROOT / file for file, page in named_pages().items() if page == f"measured/{name}")
        assert text.splitlines()[0] == source.read_text(encoding="utf-8").splitlines()[0]
        for target in TARGETS.findall(text):
            there = target in written or (ROOT / "docs" / "measured" / target).resolve().exists()
            assert there, f"{name}: {target}"
            led += 1
        assert not re.findall(
            r"[^[]`results/\w+/README\.md`", text.replace(f"`{source.relative_to(ROOT)}`", "")
        )
    assert led > 30


def test_names_in_pages_become_links_of_the_site() -> None:
    rest = "`results/none/README.md` and `docs/conf.py`."
    text = f"See `results/maps/README.md`, `docs/limits.md`, {rest}"
    linked = "See [results/maps]({0}measured/maps.md), [docs/limits]({0}limits.md), " + rest
    for page, up in (("tour.md", ""), ("methods/objective/td.md", "../../")):
        assert link_results(text, page) == linked.format(up)
    assert link_results("`docs/limits.md`", "limits.md") == "`docs/limits.md`"  # a page names itself
    source, included = [text], [text]
    link_sources(None, "methods/objective/td", source)
    link_included(None, Path("../results/README.md"), "results", included)
    assert (source[0], included[0]) == (linked.format("../../"), linked.format(""))
