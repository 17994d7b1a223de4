"""`secateur demo`: what the library does, on three models that need no account and no data, as one page."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from secateur.cli.flags import OUTPUT, SWITCH, flag
from secateur.cli.shared import JSON_HELP, check_new_folder, show
from secateur.errors import SecateurError

PROMPTS = ("The capital of France is", "Water boils at")
WORDS = 24
PRUNE = "--target 90% --round-to 8 --seqlen 128 --recover lora --steps 8 --tasks english --limit 64 --latency"
TOKENS = "--image 3 --method divprune --target 25%"
PAGE, SMALL, REPORT, PHOTO, KEPT, MAP, ASK, LOG = "index.html", "smaller", "report.html", "photo.jpg", "kept.png", "saliency.png", "ask.py", "log.txt"  # fmt: skip
QUIET = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}  # fmt: skip
ASKING = '''"""Answers of a model folder, by plain transformers: python ask.py FOLDER "The capital of France is" """

import json
import sys

sys.modules["secateur"] = None  # any import of it would fail

from transformers import AutoModelForCausalLM, AutoTokenizer

folder, words, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
answers = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=int(words), do_sample=False)
    answers.append(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(json.dumps(answers))
'''


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Where the page goes."""

    out: Annotated[str, OUTPUT] = flag("a new folder: index.html, and what it was made of", "demo")
    quick: Annotated[bool, SWITCH] = flag(
        "on small random models: half a minute, and senseless answers", False
    )
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def demo(*, flags: Demo) -> None:
    """Prune a language model, drop tokens of a vision-language model, draw a saliency map; all in one page.

    It runs the commands that it shows, in about four minutes on two processors; the language model (90 MB) and the classifier
    (17 MB) are fetched by pip once. What libraries say goes to log.txt beside the page.
    """
    from secateur.report.demo import print_demo, write_demo
    from secateur.utils.about import library_versions

    check_new_folder(flags.out)
    started, out = time.perf_counter(), Path(flags.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    dense, classifier = _tiny(out) if flags.quick else ("smollm2", "efficientnet-lite0")
    found: dict[str, Any] = {"out": flags.out, "quick": flags.quick, "versions": library_versions()}
    found["language"] = _language(out, dense, flags.quick)
    found["tokens"] = _verb(out, f"tokens scenes {TOKENS} --repeats {1 if flags.quick else 5} --out", KEPT)
    found["saliency"] = _saliency(out, classifier, flags.quick)
    found |= {"seconds": time.perf_counter() - started, "page": str(out / PAGE)}
    write_demo(out / PAGE, found, out)
    show(found, flags.json, lambda console: print_demo(found, console))


def _language(out: Path, dense: str, quick: bool) -> dict[str, Any]:
    """The report of the cut, and what both models say."""
    words = (
        "--target 90% --seqlen 32 --recover lora --steps 1 --tasks english --limit 2 --latency"
        if quick
        else PRUNE
    )
    report = _verb(out, f"prune {shlex.quote(dense)} {words} --out {_in(out, SMALL)} --report", REPORT)
    folder = dense
    if not quick:
        from secateur.tasks.models import smollm2_folder

        folder = str(smollm2_folder())
    (out / ASK).write_text(ASKING, encoding="utf-8")
    answers = {}
    for side, path in (("before", folder), ("after", str(out / SMALL))):
        words_ = [str(out / ASK), path, str(4 if quick else WORDS), *PROMPTS]
        answers[side] = json.loads(_run(out, [sys.executable, *words_], f"asking the model {side} the cut"))
    asked = f"python {_in(out, ASK)} {_in(out, SMALL)} {WORDS} {shlex.join(PROMPTS)}"
    return {
        **report,
        "report": str(out / REPORT),
        "prompts": list(PROMPTS),
        "answers": answers,
        "asked": asked,
    }


def _saliency(out: Path, classifier: str, quick: bool) -> dict[str, Any]:
    """The map, or {"missing": what to install}."""
    absent = [name for name, extra in (("timm", "timm"), ("sklearn", "digits")) if not _has(name)]
    if absent:
        return {"missing": f"it needs {' and '.join(absent)}: pip install 'secateur[timm,digits]'"}
    from importlib.resources import files

    photo = out / PHOTO
    photo.write_bytes(files("sklearn.datasets").joinpath("images/flower.jpg").read_bytes())
    size = " --size 64,64" if quick else ""
    try:
        return _verb(out, f"saliency {shlex.quote(classifier)} {shlex.quote(str(photo))}{size} --out", MAP)
    except SecateurError as error:  # without a network, say; the rest is worth a page
        return {"missing": str(error)}


def _has(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _in(out: Path, name: str) -> str:
    return shlex.quote(str(out / name))


def _verb(out: Path, words: str, name: str) -> dict[str, Any]:
    """What a verb says with --json; it runs in a process of its own, as a user's would."""
    line = f"{words} {_in(out, name)}"
    command = [sys.executable, "-m", "secateur", *shlex.split(line), "--json"]
    found = json.loads(_run(out, command, f"secateur {line}").splitlines()[-1])
    return {**found, "command": f"secateur {line}"}


def _run(out: Path, command: Iterable[str], shown: str) -> str:
    """The standard output of a command, which is shown; what it says beside that goes to the log."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print(f"$ {shown}", markup=False, soft_wrap=True)
    with open(out / LOG, "a+", encoding="utf-8") as log, console.status("running"):
        place = log.seek(0, os.SEEK_END)
        done = subprocess.run(
            list(command), stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, text=True,
            encoding="utf-8", env={**os.environ, **QUIET}, check=False,
        )  # fmt: skip
        log.seek(place)
        said = [line for line in log.read().splitlines() if line.strip()]
    if done.returncode:
        reason = said[-1].removeprefix("secateur: ") if said else f"exit code {done.returncode}"
        raise SecateurError(reason, where=shown, fix=f"{out / LOG} has all that it said")
    return done.stdout


def _tiny(out: Path) -> tuple[str, str]:
    """(a random language model with a tokenizer of bytes, a random classifier), as folders."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        ResNetConfig,
        ResNetForImageClassification,
    )

    from secateur.io.transformers import quiet

    torch.manual_seed(0)
    language, classifier = out / "tiny" / "language", out / "tiny" / "classifier"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: 1 + i for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with quiet():
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(language)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
            )
        ).save_pretrained(language)  # fmt: skip
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        config.num_labels = 4
        ResNetForImageClassification(config).save_pretrained(classifier)
    return str(language), str(classifier)
