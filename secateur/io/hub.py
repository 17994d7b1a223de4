"""Models that the hub gives, and what helps where it gives none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from secateur.errors import SecateurError
from secateur.utils.files import similar_path

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def hub_folder(name: str) -> Path:
    """The folder in the hub's cache of a model, fetched where it isn't there yet; only data, no code.

    Raises:
        SecateurError: there is no such model, it is gated, the hub can't be reached or is switched off.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
    except (OSError, ValueError) as error:  # what the hub's own errors derive from
        what, fix = explain(error, name)
        near = similar_path(name)
        raise SecateurError(
            what, where=name, fix=f"did you mean {near}? Else {fix}" if near else fix
        ) from error


def explain(error: BaseException, name: str) -> tuple[str, str]:
    """(what is wrong, what to do) for an error of the hub.

    >>> explain(ValueError("Repo id must use ..."), "a b")[0]
    'no folder has this name, and the hub has no names like it'
    """
    from huggingface_hub import constants, errors

    chain = list(_chain(error))

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(each, kinds) for each in chain)

    here = "no folder has this name"
    if among(errors.GatedRepoError):
        return (
            "the hub gives it only to those who accepted its terms",
            f"accept them at https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN",
        )
    if among(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return (
            f"{here}, the hub is switched off (HF_HUB_OFFLINE), and its cache doesn't hold it",
            "unset HF_HUB_OFFLINE, or give a folder",
        )
    if among(errors.RepositoryNotFoundError):
        return (
            f"{here}, and the hub has no such model, or it is private",
            "check the spelling; for a private one log in with `hf auth login` or set HF_TOKEN",
        )
    if among(errors.LocalEntryNotFoundError):
        return (
            f"{here}, the hub can't be reached ({_first(chain)}), and its cache doesn't hold it",
            "check the network, or fetch it elsewhere with `hf download` and give the folder",
        )
    if among(errors.HFValidationError, ValueError) and not isinstance(error, OSError):
        return f"{here}, and the hub has no names like it", "give a folder, or a name such as owner/model"
    return f"{here}, and the hub didn't give it ({_first(chain)})", "try again later, or give a folder"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first(chain: list[BaseException]) -> str:
    """The innermost error in a line: what the network or the server said."""
    told = next((each for each in reversed(chain) if str(each).strip()), chain[0])
    return f"{type(told).__name__}: {str(told).strip().splitlines()[0].rstrip('.')}"
