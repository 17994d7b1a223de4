"""Where the hub gives no model, the error says what helps."""

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from secateur import SecateurError
from secateur.cli.main import main
from secateur.tasks.models import load_model


def raised(kind: type[BaseException], text: str = "") -> BaseException:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


def fails(monkeypatch: pytest.MonkeyPatch, error: BaseException, cause: BaseException | None = None) -> None:
    def snapshot_download(*_: object, **__: object) -> None:
        raise error from cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


UNREACHED = raised(
    errors.LocalEntryNotFoundError, "An error happened while trying to locate files on the Hub."
)


@pytest.mark.parametrize(
    ("error", "cause", "message"),
    [
        (raised(errors.GatedRepoError, "401"), None, r"accepted its terms; accept them at https://huggingface\.co/owner/model, then log in"),
        (raised(errors.RepositoryNotFoundError, "404"), None, r"the hub has no such model, or it is private; check the spelling"),
        (UNREACHED, raised(errors.OfflineModeIsEnabled), r"the hub is switched off \(HF_HUB_OFFLINE\), and its cache .*; unset"),
        (UNREACHED, ConnectionError("\x1b[1mName or service not known\x1b[0m"), r"can't be reached \(ConnectionError: Name or service not known\).*check the network"),
        (raised(errors.HFValidationError, "Repo id must"), None, r"has no names like it; give a folder"),
        (OSError("503 Server Error\nbusy"), None, r"the hub didn't give it \(OSError: 503 Server Error\); try again later"),
    ],
)  # fmt: skip
def test_each_cause_has_its_advice(monkeypatch, tmp_path, capsys, error, cause, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fails(monkeypatch, error, cause)
    with pytest.raises(SecateurError, match=rf"^owner/model: .*{message}") as caught:
        load_model("owner/model")
    assert caught.value.__cause__ is error
    for verb in (["measure", "owner/model"], ["tokens", "owner/model", __file__, "--prompt", "what ?"]):
        assert main(verb) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "\x1b" not in said


def test_what_was_meant_is_offered(monkeypatch, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    fails(monkeypatch, UNREACHED)
    for wrong, right in (
        ("./out/mdoel", "out/model"),
        ("./uot/model", "out"),
        (str(tmp_path / "otu" / "x"), f"{tmp_path}/out"),
    ):
        with pytest.raises(SecateurError, match=f"no such folder; did you mean {right}[?]"):
            load_model(wrong)
    with pytest.raises(
        SecateurError, match="no folder has this name, .*; did you mean out/model[?] Else check the network"
    ):
        load_model("out/modell")
    with pytest.raises(SecateurError, match="no such folder; check the path"):
        load_model("./nothing-like-it")
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(SecateurError, match="no such text; did you mean texts?.txt"):
        from secateur.data.text import load_text

        load_text("texst.txt")


def test_colours_of_libraries_stay_out_of_errors():
    error = SecateurError(
        "\x1b[31mbad\x1b[0m \x1b]8;;https://x\x1b\\link\x1b]8;;\x1b\\",
        where="\x1b[1mhere",
        fix="\x1b[32mfix\x1b[m",
    )
    assert str(error) == "here: bad link; fix" and (error.what, error.where, error.fix) == (
        "bad link",
        "here",
        "fix",
    )
