"""The process: it starts without torch, `python -m secateur` is the command, and Ctrl-C is one line at any moment."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import secateur

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(secateur.__file__).parents[1])}
LIGHT = [
    (["--help"], 0),
    (["--version"], 0),
    (["prun"], 2),
    (["methods"], 0),
    (["methods", "nirvana"], 0),
    (["methods", "--published"], 0),
    (["methods", "merges", "tokens"], 0),
    (["recommend", "--model", "llm", "--goal", "storage"], 0),
    (["prune", "--help", "--method", "wanda"], 0),
    (["train-prune", "--help", "--method", "lottery-ticket"], 0),
    (["tokens", "--help", "--method", "fastv"], 0),
    (["plan", "show", "nowhere"], 2),
    (["prune", "x", "--method", "wannda", "--target", "50%"], 2),
]


@pytest.mark.parametrize(("words", "code"), LIGHT, ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")  # fmt: skip
def test_it_starts_without_torch(words: list[str], code: int) -> None:
    script = "import sys; from secateur.cli.main import main; code = main()\n"
    script += "assert not {'torch', 'transformers', 'scipy'} & set(sys.modules); sys.exit(code)"
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr


def test_verbs_and_flags_are_completed_by_the_shell(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "secateur", "--install-completion", "--shell", "bash"]
    home = {**ENVIRONMENT, "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    subprocess.run(words, env=home, capture_output=True, check=True)
    (script,) = (file for file in tmp_path.rglob("secateur*") if file.is_file())
    assert {"train-prune", "--target", "demo"} <= set(
        script.read_text().replace("'", " ").replace('"', " ").split()
    )
    if bash := shutil.which("bash"):
        subprocess.run([bash, "-n", str(script)], check=True)


def test_the_package_is_imported_without_torch_and_keeps_its_names() -> None:
    script = (
        "import sys, secateur, secateur.taxonomy; assert 'torch' not in sys.modules\n"
        "from secateur.measure import cost; from secateur.saliency import record\n"
        "assert secateur.measure.__name__ == 'measure' and secateur.saliency.__name__ == 'saliency'\n"
        "from secateur import *\n"
        "assert all(getattr(secateur, name) is globals()[name] for name in secateur.__all__)\n"
        "assert {type(secateur.measure), type(measure)} == {type(secateur.prune)}"
    )
    subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, check=True)


def test_python_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "secateur", "--version"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == secateur.__version__


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.2, 0.5, 1.0, 2.0, 4.0])
def test_ctrl_c_at_any_moment(delay: float, tiny_folder: Path) -> None:
    words = ["prune", str(tiny_folder), "--method", "wanda", "--target", "50%", "--samples", "100000"]
    # a first line says that the command's own code has begun: what comes before is the interpreter's
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "from secateur.cli import entry; print('begun', flush=True); import sys; sys.exit(entry.main())"
    with subprocess.Popen(
        [sys.executable, "-c", script, *words],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == "begun\n"
        time.sleep(0.02 + delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    said = [line for line in err.splitlines() if line.startswith("secateur:")]
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    assert said == ["secateur: interrupted; nothing is half written; run the same command again to continue"]


@pytest.mark.parametrize("times", [1, 5])
def test_an_interrupt_that_a_library_swallows_is_raised_again(times: int) -> None:
    """A destructor loses exceptions; so may whatever runs when the signal comes. `times`: how often it is lost."""
    script = (
        "import signal, sys, types, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from secateur.cli import entry\n"
        "entry.AGAIN = 0.1\n"
        "def run():\n"
        f"    for _ in range({times}):\n"
        "        try:\n"
        "            print('begun', flush=True) if not _ else None\n"
        "            time.sleep(60)\n"
        "        except KeyboardInterrupt:\n"
        "            pass\n"
        "    time.sleep(60)\n"
        "    return 0\n"
        "sys.modules['secateur.cli.main'] = types.SimpleNamespace(main=run)\n"
        "sys.exit(entry.main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "secateur: interrupted; nothing is half written; run it again to start from the beginning\n"
