"""Language models: perplexity of one text after a cut that is calibrated on another."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from secateur.comparison.rows import Run
from secateur.comparison.setup import Setup
from secateur.comparison.work import SEQLEN, Figures, Work, check_fit, cost, told
from secateur.data.text import load_calibration
from secateur.errors import SecateurError
from secateur.measure import measure
from secateur.method import method_class
from secateur.pruning.prune import Pruned, prune_with
from secateur.tasks import load_model


class LanguageWork(Work):
    """A language model: perplexity of WikiText-2 after a cut that is calibrated on the Brown corpus."""

    verbs = ("prune",)
    costs = ("params", "macs")
    metric, sign = "perplexity", -1
    judged, text = "wikitext2", "brown"
    usual = 16

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.model, self.tokenizer = load_model(setup.task)
        self.read: dict[int, Tensor] = {}
        self.inputs = {"input_ids": torch.zeros(1, SEQLEN, dtype=torch.int64)}

    def dense(self, seed: int) -> Figures:
        return self._figures(self.model)

    def run(self, run: Run) -> Figures:
        check_fit(self, method_class(run.method), run.method, self.setup)
        done = prune_with(
            copy.deepcopy(self.model),
            self.inputs,
            method=run.method,
            target=self.setup.budget(run.target),
            data=self._windows(run.seed),
            tokenizer=self.tokenizer,
            seed=run.seed,
            seqlen=SEQLEN,
            inplace=True,
            rollback=False,
        )
        return self._figures(done.model, done) | told(done)

    def _windows(self, seed: int) -> Tensor:
        """int64 [samples, 128]: the same for all methods of a seed, and read once."""
        if seed not in self.read:
            self.read[seed] = load_calibration(
                self.model, self.tokenizer, self.text, self.setup.samples, SEQLEN, seed
            )
        return self.read[seed]

    def _figures(self, model: nn.Module, done: Pruned | None = None) -> Figures:
        limit = self.setup.test or self.usual
        found = measure(model, self.tokenizer, [self.judged], limit=limit, seqlen=2 * SEQLEN)
        value = found["perplexity"][self.judged]
        if value is None:
            raise SecateurError("its perplexity isn't finite", where=self.judged, fix="a milder target")
        return {"quality": float(value)} | cost(model, self.model, self.inputs, self.setup, done)
