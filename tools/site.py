"""What the docs site has beside docs/: the README as its first page, texts of the root, the reference of the public names.

Links are written for readers of the repository; here they are turned to where the site has the page, or to the file's address.
"""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"].rstrip("/")
TEXTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
"""Files of the root, and the pages they are."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every method's page follows the list of methods."""
    methods = next(entry["Methods"] for entry in config.nav or [] if "Methods" in entry)
    found = sorted((ROOT / "docs/methods").glob("*.md"))
    methods += [f"methods/{path.name}" for path in found if path.name != "README.md"]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in TEXTS.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "api.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links in terms of the site; `page.file.src_uri` says where in docs/ the text would be."""
    named = {page: source for source, page in TEXTS.items()}
    here = (
        ROOT / named[page.file.src_uri] if page.file.src_uri in named else ROOT / "docs" / page.file.src_uri
    )

    def turned(match: re.Match[str]) -> str:
        link, anchor = match[2], match[3] or ""
        if link.startswith((f"{SOURCE}/blob/main/", f"{SOURCE}/raw/main/")):
            target = ROOT / link.split("/main/", 1)[1]
        elif "://" in link or link.startswith(("mailto:", "#")) or not link:
            return match[0]
        else:
            target = (here.parent / link).resolve()
        inside = target.relative_to(ROOT).as_posix()
        if inside in TEXTS:
            goal = TEXTS[inside]
        elif inside.startswith("docs/") and (target.is_file() or (target / "README.md").is_file()):
            goal = inside.removeprefix("docs/") + ("" if target.is_file() else "/README.md")
        elif target.exists():
            return f"{match[1]}{SOURCE}/blob/main/{inside}{anchor})"
        else:
            return match[0]  # mkdocs says that it leads nowhere
        up = "../" * page.file.src_uri.count("/")
        return f"{match[1]}{up}{goal}{anchor})"

    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    link = r"(\]\()([^)\s#]*)(#[^)\s]*)?\)"
    return "".join(part if i % 2 else re.sub(link, turned, part) for i, part in enumerate(parts))


def reference() -> str:
    """A page of the public names, functions first; each from the module that it is written in."""
    tree = ast.parse((ROOT / "secateur/__init__.py").read_text(encoding="utf-8"))
    home = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_HOME"
    )
    where = []
    for module, names in home.items():
        for name in names.split():
            inner = (ROOT / "secateur" / module.replace(".", "/") / f"{name}.py").is_file()
            where.append((name, f"secateur.{module}.{name}" + (f".{name}" if inner else "")))
    where.sort(key=lambda found: (found[0][0].isupper(), found[0]))
    return "\n\n".join(["# Reference", *(f"::: {path}" for _, path in where)]) + "\n"
