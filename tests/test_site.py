"""The docs site is built without a broken link, and holds what readers look for."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import secateur
from secateur.method import list_methods

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("mkdocs", reason="the docs site is made with the extra `docs`")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))  # a broken link raises
    yield folder


@pytest.mark.slow
def test_every_method_and_public_name_has_its_place(site: Path) -> None:
    assert {path.parent.name for path in (site / "methods").glob("*/index.html")} >= set(list_methods())
    reference = (site / "api/index.html").read_text(encoding="utf-8")
    headings = set(re.findall(r'<h2 id="secateur\.[\w.]*?(\w+)"', reference))
    assert headings == set(secateur.__all__)
    assert "&gt;&gt;&gt;" in reference and "SECTION" not in reference


@pytest.mark.slow
def test_texts_of_the_root_are_pages_with_links_of_the_site(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="guide/"' in start and not re.findall(r'(?:href|src)="[^":]*\.md[#"]', start)
    for page in ("contributing", "changelog", "security"):
        assert (site / page / "index.html").is_file()


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in ("index.html", "api/index.html", "truth/index.html"):
        text = (site / page).read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://(?!github\.com)', text), page


def test_a_docstring_becomes_markdown() -> None:
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "tools/docstrings.py")
    assert spec and spec.loader
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    text = "Adds.\n\n>>> add(1, 2)  # doctest: +SKIP\n3\n\nArgs:\n    a: first\n        of two.\n    b, c: others.\n\nRaises `E`."
    assert docstrings.as_markdown(text) == (
        "Adds.\n\n```python\n>>> add(1, 2)\n3\n```\n\n**Args**\n\n- `a`: first\n    of two.\n- `b, c`: others.\n\nRaises `E`."
    )
