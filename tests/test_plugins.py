"""Methods of anyone: in a file, in a notebook, in a package that announces them. Broken ones are named and hurt nobody else."""

import json
import subprocess
import sys
import types

import pytest

import secateur
from secateur import MethodInfo, SecateurError, SecateurWarning, TrainMethod, UnitMethod, WeightMethod, method
from secateur.cli.entry import _line as as_line
from secateur.cli.main import main
from secateur.cli.shared import entries
from secateur.saliency.method import SaliencyMethod
from secateur.tokens.method import TokenMethod
from secateur.utils.code import origin, read_spec

MINE = '''
"""Of my own."""
from dataclasses import dataclass, field
from secateur import WeightMethod

@dataclass
class OddFirst(WeightMethod):
    """Weights of odd columns stay."""

    power: float = field(default=1.0, metadata={"help": "exponent"})

    def score(self, weight, stats):
        return (weight.abs() ** self.power).index_fill(1, __import__("torch").arange(0, weight.shape[1], 2), 0)
'''


@pytest.fixture(autouse=True)
def _same_registry(monkeypatch):
    monkeypatch.setattr(method, "_REGISTRY", dict(method._load_all()))


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def odd_columns(model):
    weight = model.model.layers[0].mlp.up_proj.weight
    return bool((weight[:, ::2] == 0).all()) and bool((weight[:, 1::2] != 0).all())


def test_a_file_is_a_method(tiny_llama, mine):
    for name in (f"{mine}:OddFirst", str(mine)):
        pruned = secateur.prune(tiny_llama(), method=name, target="50%", power=2.0)
        assert odd_columns(pruned.model) and pruned.plan.hyperparameters == {"power": 2.0}
        assert pruned.plan.method == "odd-first" and pruned.plan.source.startswith("mine.py:OddFirst sha256:")
        assert pruned.report["source"] == pruned.plan.source
    assert "odd-first" not in secateur.list_methods()


def test_a_file_on_the_command_line(tiny_folder, mine, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--method", f"{mine}:OddFirst", "--target", "50%", "--power", "3", "--out", str(out), "--json"]
    assert main(["prune", str(tiny_folder), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "odd-first" and report["hyperparameters"] == {"power": 3.0} and report["met"]
    assert main(["methods", f"{mine}:OddFirst"]) == 0
    shown = capsys.readouterr().out
    assert "Weights of odd columns stay" in shown and "power" in shown
    assert main(["prune", "--method", str(mine), "--help"]) == 0
    assert "Hyperparameters of odd-first" in capsys.readouterr().out
    assert main(["plan", "show", str(out)]) == 0
    assert "odd-first (mine.py:OddFirst sha256:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (MINE, "mien.py", r"mien\.py: there is no such file; did you mean .*mine\.py\?"),
        (MINE, "mine.py:EvenFirst", r"mine\.py: there is no method 'EvenFirst'; did you mean OddFirst\?"),
        ("x = 1\n", "mine.py", r"mine\.py: it defines no method; define a subclass of WeightMethod"),
        ("x = 1\ny = x.z\n", "mine.py", r"can't be run \(AttributeError: .*'z'.*, line 2\); mend the file"),
        ("x = (1\n", "mine.py", r"can't be run \(SyntaxError: .*, line 1\)"),
        ("raise SystemExit\n", "mine.py", r"can't be run \(SystemExit: , line 1\)"),
        (f"{MINE}\nclass Second(OddFirst): ...\n", "mine.py", r"defines OddFirst and Second; name one: .*mine\.py:OddFirst"),
        (MINE.replace("    power", "    info = 3\n    power"), "mine.py", r"info is a int; set info = MethodInfo"),
    ],
)  # fmt: skip
def test_files_that_are_wrong(tmp_path, text, name, message, capsys):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SecateurError, match=message):
        method.method_class(str(tmp_path / name))
    assert main(["prune", "nothing", "--method", str(tmp_path / name), "--target", "50%"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("secateur: ")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("...", "method own: Own must define score"),
        (
            "score = lambda self, weight, stats: weight[0]",
            r"method own, .*q_proj\.weight: its scores are \[32\] for weights of \[32, 32\]",
        ),
        ("score = lambda self, weight, stats: None", "its scores are NoneType for weights"),
    ],
)
def test_methods_that_give_no_scores(tmp_path, tiny_llama, body, message):
    (tmp_path / "own.py").write_text(
        f"from secateur import WeightMethod\nclass Own(WeightMethod):\n    {body}\n"
    )
    with pytest.raises(SecateurError, match=message):
        secateur.prune(tiny_llama(), method=str(tmp_path / "own.py"), target="50%")


def test_every_kind_comes_from_a_file(tmp_path):
    kinds = ("WeightMethod", "UnitMethod", "TrainMethod", "TokenMethod", "SaliencyMethod", "ObjectMethod")
    for kind in kinds:
        file = tmp_path / f"of_{kind}.py"
        file.write_text(
            f"from secateur.method import {kind}\nclass Own{kind}({kind}):\n    share: float = 0.5\n"
        )
        made = method.make_method(str(file), share="0.25")
        assert made.share == 0.25 and made.source.startswith(f"of_{kind}.py:Own{kind} sha256:")


def test_verbs_refuse_methods_of_others(mine, capsys):
    for verb in ("train-prune", "tokens", "saliency"):
        assert main([verb, "digits", "x.png", "--method", str(mine), "--target", "50%"]) == 2
        assert "secateur: --method: odd-first " in capsys.readouterr().err


def test_an_edited_file_is_read_again_and_is_another_run(tiny_llama, mine):
    first = method.method_class(str(mine))
    assert method.method_class(str(mine)) is first
    before = origin(first)
    mine.write_text(MINE.replace("** self.power", "** (2 * self.power)"))
    second = method.method_class(str(mine))
    assert second is not first and origin(second) != before


def test_a_plan_that_names_a_file_runs_nothing(tiny_llama, tiny_folder, mine, tmp_path, capsys):
    pruned = secateur.prune(tiny_llama(), method=str(mine), target="50%")
    pruned.save(tmp_path / "out")
    evil, canary = tmp_path / "evil.py", tmp_path / "canary"
    evil.write_text(f"open({str(canary)!r}, 'w').close()\n" + MINE)
    file = tmp_path / "out" / "plan.json"
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"method": f"{evil}:OddFirst", "source": str(evil)}))
    assert main(["plan", "show", str(tmp_path / "out")]) == 0
    assert (
        main(["plan", "apply", str(tmp_path / "out"), str(tiny_folder), "--out", str(tmp_path / "again")])
        == 0
    )
    assert main(["measure", str(tmp_path / "again")]) == 0
    secateur.load(tmp_path / "out")
    assert not canary.exists() and str(evil) in capsys.readouterr().out


def cell(text):
    """Runs text as a notebook runs a cell."""
    shown = types.ModuleType("__main__")
    exec(compile(text, "<cell>", "exec"), shown.__dict__)  # noqa: S102  this test's own text
    return shown


def test_a_cell_may_be_run_again(tiny_llama):
    text = MINE.replace("@dataclass", "@secateur.register\n@dataclass").replace(
        "from secateur", "import secateur\nfrom secateur"
    )
    cell(text)
    assert odd_columns(secateur.prune(tiny_llama(), method="odd-first", target="50%").model)
    again = cell(text.replace("arange(0", "arange(1"))
    assert method.method_class("odd_first") is again.OddFirst and "odd-first" in secateur.list_methods()
    assert not odd_columns(secateur.prune(tiny_llama(), method="odd-first", target="50%").model)
    plan = secateur.prune(tiny_llama(), method="odd-first", target="50%").plan
    assert plan.source.startswith("__main__:OddFirst")
    other = types.ModuleType("other")
    with pytest.raises(SecateurError, match="two methods are named 'odd-first'.*give it another: name = "):
        exec(compile(text.replace("__main__", "other"), "<cell>", "exec"), other.__dict__)  # noqa: S102
    with pytest.raises(SecateurError, match="two methods are named 'wanda'"):
        cell(text.replace("OddFirst", "Wanda"))
    assert "odd-first" not in method.own_methods()


def test_a_short_record_is_filled_by_the_kind():
    class Loud(WeightMethod):
        needs = frozenset({"input_norm"})

    class Deep(UnitMethod):
        info = MethodInfo(title="Depth", criteria="NORM", when="PAT")

    class Slow(TrainMethod):
        removes = "units"

    class Seen(TokenMethod):
        info = MethodInfo(order="iter", stages=2)

    class Shown(SaliencyMethod):
        pass

    class Deeper(Deep):
        info = MethodInfo(scope="glob")

    assert (Loud.name, Loud.info.title, Loud.info.data, Loud.info.objects) == ("loud", "Loud", "calib", {"W"})
    assert (Deep.info.title, Deep.info.criteria, Deep.info.when, Deep.info.granularity) == (
        "Depth",
        {"NORM"},
        "PAT",
        "struct",
    )
    assert (Deeper.info.title, Deeper.info.criteria, Deeper.info.scope) == ("Deeper", {"NORM"}, "glob")
    assert Slow.info.changes_shapes and not Slow.info.training_free
    assert (Seen.info.decision, Seen.info.stages, Seen.info.objects) == ("dyn", 2, {"T"})
    assert Shown.info.objects == {"S"} and Shown.info.budget_exact is None
    with pytest.raises(
        SecateurError, match="record .*, criteria: 'NROM' is not a member of the axis; did you mean NORM"
    ):
        MethodInfo(criteria="NROM")
    with pytest.raises(
        SecateurError, match="unstructured and N:M sparsity is no faster without sparse kernels"
    ):
        type("Fast", (WeightMethod,), {"info": MethodInfo(speedup="univ")})
    assert read_spec("wanda") is None


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two installed packages, one of which can't be imported."""
    for name, text in (("theirs", MINE), ("broken", "import nothing_like_it\n")):
        (tmp_path / f"{name}_pack.py").write_text(text)
        info = tmp_path / f"{name}_pack-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-pack\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[secateur.methods]\n{name}-one = {name}_pack:OddFirst\n")
    monkeypatch.syspath_prepend(tmp_path)
    for cached in (method.plugins, entries):
        cached.cache_clear()
    yield
    for cached in (method.plugins, entries):
        cached.cache_clear()
    sys.modules.pop("theirs_pack", None)


def test_a_package_announces_methods_and_a_broken_one_is_a_line(packages, tiny_folder, tmp_path, capsys):
    with pytest.warns(SecateurWarning) as warned:
        assert main(["methods", "--json"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["methods"]]
    assert {"theirs-one", "wanda"} <= set(names) and "broken-one" not in names and names == sorted(names)
    line = "secateur: broken-pack 1.2: its method 'broken-one' is left out (ModuleNotFoundError: No module named 'nothing_like_it')\n"
    assert [as_line(w.message, w.category, w.filename, w.lineno) for w in warned] == [line]
    words = ["--method", "theirs-one", "--target", "50%", "--out", str(tmp_path / "out"), "--power", "2"]
    assert main(["prune", str(tiny_folder), *words]) == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["method"] == "theirs-one" and plan["source"].startswith("theirs_pack:OddFirst sha256:")
    assert main(["methods", "theirs_one"]) == 0 and "columns stay" in capsys.readouterr().out
    assert "theirs-one" in secateur.list_methods() and "theirs-one" not in method.own_methods()


def test_without_packages_nothing_is_imported_to_list_methods():
    code = "import sys; from secateur.cli.main import main; main(['methods', '--json']); print('torch' in sys.modules, file=sys.stderr)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert found.stderr == "False\n"
