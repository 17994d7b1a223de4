"""Tasks that lm-evaluation-harness scores, beside our own scorer on the same items."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from secateur.data.choices import Item
from secateur.errors import SecateurError
from secateur.measure import accuracy, measure

TASK = """
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [
    {"question": f"What does {word} do with {other}?", "choices": [word, f"a {other} and more", "x"], "label": i % 3}
    for i, (word, other) in enumerate([("Tom", "cake"), ("the dog", "a ball"), ("Lily", "rain"), ("Ben", "sand")] * 3)
]  # fmt: skip


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tiny_llama: Any) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SecateurError, match=r"pip install 'secateur\[lm-eval\]'"):
        measure(tiny_llama(), tasks=["lm-eval:arc_easy"])


@pytest.mark.needs_data
def test_the_harness_and_our_scorer_agree_on_the_same_items(aidreams: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = aidreams
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(row) for row in QUESTIONS))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "items.jsonl"))
    name = f"lm-eval:{tmp_path / 'task.yaml'}"
    found = measure(model, tokenizer, tasks=[name])
    items = [
        Item((f"Question: {q['question']}\nAnswer:",) * 3, tuple(f" {c}" for c in q["choices"]), tuple(q["choices"]), q["label"])
        for q in QUESTIONS
    ]  # fmt: skip
    assert found["accuracy"][name] == pytest.approx(accuracy(model, tokenizer, items))
    assert found["questions"][name] == len(QUESTIONS)
    with pytest.raises(SecateurError, match="no such task"):
        measure(model, tokenizer, tasks=["lm-eval:arc_easyy"])
