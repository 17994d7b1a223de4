"""The generated pages: complete for any method, and as committed."""

import dataclasses
import re
from pathlib import Path

import pytest
from torch import Tensor

from secateur.method import list_methods
from secateur.pruning.method import WeightMethod
from secateur.report import pages
from secateur.taxonomy import MethodInfo

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass
class Sample(WeightMethod):
    """|W| to a power, times the input_norm. Doe 2020, arXiv 2001.00001.

    >>> 1 + 1
    2

    Reconstructed: the power is a guess.
    """

    needs = frozenset({"input_norm"})
    info = MethodInfo(
        title="Sample | pruning",
        spec="weight-baselines",
        objects="W",
        granularity="unstr/N:M",
        speedup="spec",
        when="PAT-PT",
        criteria="MAG",
        order="shot",
        data="calib",
        models="any",
        arxiv="2001.00001",
        refs="doe/sample",
    )
    power: float = dataclasses.field(default=0.5, metadata={"help": "exponent of a|b"})
    shape: tuple[int, ...] = dataclasses.field(default_factory=lambda: (1, 2))

    def score(self, weight: Tensor, stats: object) -> Tensor:
        return weight.abs() ** self.power


Sample.name = "sample"


def test_a_page_says_what_the_method_file_says() -> None:
    page = pages.method_page(Sample)
    assert page.startswith("# Sample | pruning\n") and page.endswith("|\n")
    assert "https://arxiv.org/abs/2001.00001" in page and "https://github.com/doe/sample" in page
    assert r"input\_norm. Doe 2020" in page and "```python\n>>> 1 + 1\n2\n```" in page
    assert "## Reconstruction\n\nReconstructed: the power is a guess." in page
    assert page.count("the power is a guess") == 1
    assert "| `power` | `0.5` | exponent of a\\|b |" in page and "| `shape` | `(1, 2)` |  |" in page
    assert "| granularity | `unstr/N:M` | unstructured |" in page and "| models | `any` |" in page
    assert "| kernel needed | `yes` |" in page
    assert "same size and speed without sparse kernels" in page
    assert "--method sample --target 50%" in page and 'method="sample"' in page and "The target `2:4`" in page
    assert page.count("```") % 2 == 0


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("a_b * c < d", r"a\_b \* c \< d"),
        ("keeps `a_b` and https://x.y/a_b as they are", "keeps `a_b` and https://x.y/a_b as they are"),
        ("see arXiv 2306.11695.", "see [arXiv 2306.11695](https://arxiv.org/abs/2306.11695)."),
        ("first\n\n    x = a_b\n\n    y\nlast", "first\n\n```\nx = a_b\n\ny\n```\n\nlast"),
        (">>> f()  # doctest: +SKIP\n3\n\nafter", "```python\n>>> f()\n3\n```\n\nafter"),
    ],
)
def test_docstrings_become_markdown(text: str, markdown: str) -> None:
    assert pages.prose(text) == markdown


def test_the_committed_pages_are_up_to_date() -> None:
    folder = ROOT / "docs" / "methods"
    wanted = pages.pages()
    assert {path.name for path in folder.glob("*.md")} == set(wanted), (
        "run `python -m secateur.report.pages docs/methods`"
    )
    for name, text in wanted.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"{name} is stale"


def test_every_method_has_a_page_and_every_link_leads_somewhere() -> None:
    written = pages.pages()
    assert {f"{name}.md" for name in list_methods()} | {"README.md", "taxonomy.md"} == set(written)
    for text in written.values():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target.startswith("https://") or target in written, target


def test_writing_touches_only_what_changed(tmp_path: Path) -> None:
    first = pages.write_pages(tmp_path)
    assert {path.name for path in first} == set(pages.pages())
    assert pages.write_pages(tmp_path) == []
    (tmp_path / "gone.md").write_text(f"# Gone\n\n{pages.GENERATED}\n")
    (tmp_path / "mine.md").write_text("# Written by hand\n")
    (tmp_path / "taxonomy.md").write_text("old")
    assert {path.name for path in pages.write_pages(tmp_path)} == {"gone.md", "taxonomy.md"}
    assert (tmp_path / "mine.md").exists() and not (tmp_path / "gone.md").exists()


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pages.main([str(tmp_path / "methods")]) == 0
    assert "methods/wanda.md" in capsys.readouterr().out
    pages.main([str(tmp_path / "methods")])
    assert "nothing to change" in capsys.readouterr().out
