"""What the command line says about a target that could mean two things."""

import pytest

from secateur.cli.prune import check_target


def test_a_share_without_a_percent_sign_is_said_before_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    check_target("0.25")
    assert capsys.readouterr().err == "the target 0.25 was read as the share kept: 25 % stays\n"
    for clear in ("25%", "2:4", "params<=0.5", "1"):
        check_target(clear)
    assert capsys.readouterr().err == ""
