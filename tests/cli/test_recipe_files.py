"""`--recipe`: a file that repeats a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from secateur.cli import main as cli
from secateur.cli import recipe
from secateur.errors import SecateurError

QUICK = ["--samples", "4", "--seqlen", "16"]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must end with 2 and one line; gives the line."""

    def go(*words: object) -> str:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    return go


def test_a_results_folder_holds_the_recipe_that_gives_the_same_bits(
    tiny_folder: Path, tmp_path: Path
) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    asked = ["--method", "wanda", "--target", "50%", "--data", "self", "--seed", "3", *QUICK]
    assert cli.main(["prune", str(tiny_folder), *asked, "--no-resume", "--out", str(first)]) == 0
    found = yaml.safe_load((first / "recipe.yaml").read_text())
    assert (found["verb"], found["arguments"]) == ("prune", [str(tiny_folder)])
    expected = {"method": "wanda", "target": "50%", "data": "self", "seed": 3, "samples": 4, "prove": True}
    assert {name: found["flags"][name] for name in expected} == expected
    assert found["flags"].keys() & {"out", "json", "resume", "report", "recover"} == set()
    assert cli.main(["prune", "--recipe", str(first / "recipe.yaml"), "--out", str(second)]) == 0
    assert (
        cli.main(["--recipe", str(first), "--seed", "4", "--out", str(third)]) == 0
    )  # the folder, another seed
    bits = [(folder / "model.safetensors").read_bytes() for folder in (first, second, third)]
    assert bits[0] == bits[1] != bits[2]
    assert yaml.safe_load((second / "recipe.yaml").read_text()) == found
    assert yaml.safe_load((third / "recipe.yaml").read_text())["flags"]["seed"] == 4


def test_what_stands_on_the_line_wins_and_every_value_is_read_as_it_is_written(tmp_path: Path) -> None:
    file = write(
        tmp_path / "r.yaml",
        "verb: prune\narguments: a_model\n"
        "flags: {target: 2:4, seed: 010, prove: false, also: ['1,2', '3,4'], round_to: 4, kinds: , floor: 1e-3}\n",
    )
    line = recipe.expand(["prune", "--recipe", file, "--no-prove", "--seed=1"], ["prune"])
    assert line == [
        "prune", "a_model", "--target=2:4", "--also=1,2", "--also=3,4", "--round-to=4", "--floor=1e-3",
        "--no-prove", "--seed=1",
    ]  # fmt: skip
    assert recipe.expand(["prune", "other", f"--recipe={file}"], ["prune"])[:2] == ["prune", "other"]
    assert recipe.expand(["prune", "m", "--seed", "1"], ["prune"]) == ["prune", "m", "--seed", "1"]


def test_save_recipe_writes_it_where_there_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "new" / "advice.yaml"
    assert cli.main(["recommend", "--goal", "storage", "--json", "--save-recipe", str(file)]) == 0
    found = yaml.safe_load(file.read_text())
    assert (found["verb"], found["flags"]["goal"]) == ("recommend", "storage")
    assert cli.main(["--recipe", str(file), "--json"]) == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("verb: prun\n", "there is no verb 'prun'; did you mean prune?"),
        ("verb: prune\nflag: {}\n", "there is no key 'flag'; did you mean flags"),
        ("- prune\n", "it isn't a recipe"),
        ("verb: [prune\n", "it can't be read (while parsing"),
        ("verb: prune\nflags: {target: {a: 1}}\n", "target is neither text nor a list of texts"),
        ("verb: prune\nflags: {method: 'mine.py:Mine'}\n", "it names code, mine.py:Mine, which only a command line may"),
        ("verb: measure\n", "it is for `measure`; secateur measure --recipe"),
    ],
)  # fmt: skip
def test_bad_recipes_are_refused(text: str, said: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert said in refused("prune", "--recipe", write(tmp_path / "r.yaml", text))


def test_a_missing_recipe_and_an_unknown_flag_are_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    write(
        tmp_path / "recipe.yaml", "verb: prune\narguments: [aidreams]\nflags: {method: wanda, traget: 50%}\n"
    )
    assert "did you mean" in refused("prune", "--recipe", tmp_path / "recipes.yaml")
    assert "--traget" in refused("prune", "--recipe", tmp_path)
    assert "it needs a file" in refused("prune", "--recipe")
    assert "is a folder" in refused("methods", "--save-recipe", tmp_path)


def test_code_that_the_line_names_itself_is_run(tmp_path: Path) -> None:
    file = write(tmp_path / "r.yaml", "verb: prune\nflags: {method: 'mine.py:Mine'}\n")
    line = recipe.expand(["--recipe", file, "--method", "mine.py:Mine"], ["prune"])
    assert line == ["prune", "--method", "mine.py:Mine"]
    with pytest.raises(SecateurError, match="names code"):
        recipe.expand(["--recipe", file], ["prune"])
