"""Whether what would be published is right: built, checked, installed into bare environments, and started there.

python tools/release.py            # `make release-check`
python tools/release.py --keep DIR # leaves the wheel and the source archive there

Bare means: the wheel, and of its dependencies those that a start needs; `make test` in a fresh environment is what tries all.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 15e6
"""Bytes of the wheel."""
LIGHT = ("cyclopts", "rich", "safetensors", "pydantic", "pyyaml")
"""Dependencies that a start needs; the others are imported when a verb runs."""
NEEDED = ("py.typed", "report/templates/demo.html", "taxonomy/catalogue.json", "tasks/weights/scenes-llava-0/model.safetensors")  # fmt: skip
STARTS = (["-c", "import secateur; print(secateur.__version__)"], ["-m", "secateur", "--version"], ["-m", "secateur", "methods"])  # fmt: skip


def wrong_in_wheel(names: Sequence[str], size: int, files: Sequence[str]) -> list[str]:
    """What is missing from a wheel or too much in it. files: the package's own, as git lists them.

    >>> wrong_in_wheel(["secateur/x.py", "tests/test_x.py"], 10, ["secateur/x.py"])[0]
    'not of the package: tests/test_x.py'
    """
    wrong = [] if size < MOST else [f"{size / 1e6:.1f} MB, more than {MOST / 1e6:.0f}"]
    inside = [name for name in names if ".dist-info/" not in name]
    wrong += [f"not of the package: {name}" for name in inside if not name.startswith("secateur/")]
    wrong += [f"doesn't belong: {name}" for name in inside if name.endswith((".pyc", ".pkl", ".pt", ".pth"))]
    code = {name for name in files if name.startswith("secateur/") and name.endswith(".py")}
    wrong += [f"missing: {name}" for name in sorted(code - set(names))]
    wrong += [f"missing: secateur/{name}" for name in NEEDED if f"secateur/{name}" not in names]
    licences = [name for name in names if re.search(r"\.dist-info/(licenses/)?(LICENSE|NOTICE)$", name)]
    return wrong + ([] if len(licences) == 2 else ["missing: LICENSE and NOTICE"])


def wrong_in_archive(names: Sequence[str]) -> list[str]:
    """What is missing from a source archive or too much in it."""
    inside = [name.partition("/")[2] for name in names]
    wanted = ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "secateur/__init__.py", "PKG-INFO")
    wrong = [f"missing: {name}" for name in wanted if name not in inside]
    strange = ("shared/", ".venv/", "demo/", "site/", ".git/")
    return wrong + [f"doesn't belong: {name}" for name in inside if name.startswith(strange)]


def interpreters() -> list[str]:
    """The oldest and the newest Python on this machine of those that pyproject.toml declares."""
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    first = int(re.search(r"3\.(\d+)", least)[1])  # type: ignore[index]
    found = [path for minor in range(first, 20) if (path := shutil.which(f"python3.{minor}")) and works(path)]
    return list(dict.fromkeys([found[0], found[-1]])) if found else [sys.executable]


def works(python: str) -> bool:
    """Whether it starts: a version manager has commands for interpreters that aren't chosen."""
    return subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0


def run(*words: str | Path) -> str:
    """Standard output of a command; stops with what it said where it fails."""
    done = subprocess.run(
        [str(word) for word in words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def try_out(python: str, wheel: Path, folder: Path) -> None:
    """Install the wheel into a bare environment and start it."""
    run(python, "-m", "venv", folder)
    inner = folder / "bin" / "python"
    pip = (inner, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    run(*pip, "--no-deps", wheel)
    run(*pip, *(line for line in wanted if line.partition(">")[0] in LIGHT))
    for words in STARTS:
        last = subprocess.run(
            [str(inner), *words], cwd=folder, capture_output=True, text=True, check=False
        )  # in another folder: the checkout must not be what is imported
        if last.returncode or not last.stdout.strip():
            sys.exit(f"{python} {' '.join(words)}\n{last.stdout}{last.stderr}")
    print(f"starts: {run(inner, '--version').strip()}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="a folder for the wheel and the archive")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(sys.executable, "-m", "venv", folder / "tools")
        python = folder / "tools" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "build", "twine")
        dist = asked.keep or folder / "dist"
        # out of a clean copy: what lies beside the tracked files must not get in
        run("git", "worktree", "add", "--detach", folder / "clean", "HEAD")
        try:
            run(python, "-m", "build", "--outdir", dist, folder / "clean")
        finally:
            run("git", "worktree", "remove", "--force", folder / "clean")
        run(python, "-m", "twine", "check", "--strict", *dist.iterdir())
        wheel, archive = next(dist.glob("*.whl")), next(dist.glob("*.tar.gz"))
        names = zipfile.ZipFile(wheel).namelist()
        wrong = wrong_in_wheel(names, wheel.stat().st_size, run("git", "ls-files").splitlines())
        with tarfile.open(archive) as opened:
            wrong += wrong_in_archive(opened.getnames())
        if wrong:
            sys.exit("\n".join(wrong))
        sizes = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in (wheel, archive))
        print(f"{sizes}, {len(names)} files in the wheel")
        for number, interpreter in enumerate(interpreters()):
            try_out(interpreter, wheel, folder / f"bare{number}")


if __name__ == "__main__":
    main()
