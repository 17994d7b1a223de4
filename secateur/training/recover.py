"""What brings a cut model back: closed-form repair of what is left, and training (LoRA or full, with distillation)."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.pruning.checks import check_tensors
from secateur.training.distill import distillation
from secateur.training.fit import fit
from secateur.training.sharded import gather, share_of
from secateur.training.sharded import shard as shard_model
from secateur.training.state import State
from secateur.utils.types import Objective

# Training


def recover(
    model: nn.Module,
    data: Any,
    *,
    how: str = "lora",
    steps: int = 100,
    lr: float | None = None,
    batch: int = 8,
    teacher: nn.Module | None = None,
    distill: float = 0.5,
    temperature: float = 2.0,
    hidden: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
    rank: int = 8,
    alpha: int = 16,
    targets: Sequence[str] | None = None,
    loss: Objective | None = None,
    shard: bool | str = False,
    **settings: Any,
) -> list[float]:
    """Train a pruned model for a while, in place; gives the loss of each step.

    >>> dense = copy.deepcopy(model)  # doctest: +SKIP
    >>> pruned = secateur.prune(model, method="wanda", target="50%", inplace=True)  # doctest: +SKIP
    >>> recover(model, token_ids, teacher=dense, masks=pruned.plan.masks, steps=200)  # doctest: +SKIP

    data: as for `secateur.training.fit`: token ids [samples, length], a pair (x, labels), a dict, or a list of batches.
    how: "lora" trains low-rank updates of the linear layers and merges them at the end: the model keeps its modules and
    names. "full" trains every parameter. lr: None is 3e-4 for LoRA and 3e-5 for full.
    teacher: the dense model; the loss is then (1 - distill) * the data's + distill * KL at `temperature` (+ `hidden` *
    distance of hidden states). None: the data's loss alone.
    masks: kept weights by parameter name, such as `plan.masks`; what is zero stays zero, and a LoRA update is masked
    as it is trained, so that merging loses nothing (at the time of full training, with the small optimizer of LoRA).
    rank, alpha, targets: LoRA's rank, its scale (alpha / rank), and the modules to adapt; None: every Linear but the
    output embedding. shard: each of the processes that `torchrun` started holds its share of the weights, moments and gradients, and of
    the teacher's weights (FSDP), on the device that it names, or where the model is; for "full". Checkpoints are those of one process. settings: passed to `fit` (seed, warmup, clip, checkpoint, ...).

    Raises `SecateurError`: a diverging loss, masks of another model, a teacher of another vocabulary, nothing to adapt. LoRA then leaves the model as it
    was; full training leaves it at the last good step, or with `shard` as it was.
    """
    if how not in ("lora", "full"):
        raise SecateurError(f"there is no recovery {how!r}", where="how", fix="lora or full")
    masks = _check_masks(model, masks or {})
    words = [getattr(getattr(each, "config", None), "vocab_size", None) for each in (model, teacher or model)]
    require(words[0] == words[1], f"the teacher reads {words[1]} tokens, the model {words[0]}", where="teacher", fix="take the dense model of this one")  # fmt: skip
    trained = model
    if shard:
        require(how == "full", "low-rank updates are small, and are not shared out", where="shard", fix="how='full', or leave it out")  # fmt: skip
        device = torch.device(shard) if isinstance(shard, str) else None
        trained = shard_model(model, device)
        teacher = None if teacher is None else shard_model(teacher, device)
    if teacher is not None:
        if loss is not None:
            raise SecateurError(
                "both a teacher and a loss are given", where="recover", fix="pass one of them"
            )
        loss = distillation(teacher, weight=distill, temperature=temperature, hidden=hidden)
    common = dict(steps=steps, batch=batch, loss=loss, description=f"recovering ({how})", **settings)
    if how == "full":
        losses = _full(trained, data, masks, lr=lr or 3e-5, **common)
        if shard:
            gather(trained, model)
        return losses
    return _lora(model, data, masks, rank, alpha, targets, lr=lr or 3e-4, **common)


def _check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameters = check_tensors(
        model, masks, "mask", where="masks", fix="use the masks of the plan that pruned this model"
    )
    for name, mask in masks.items():
        if parameters[name].detach()[~mask.to(parameters[name].device)].any():
            raise SecateurError(
                f"{name} isn't zero where its mask says so",
                where="masks",
                fix="apply the plan to the model first",
            )
    return {name: mask.to(parameters[name].device) for name, mask in masks.items()}


def _full(model: nn.Module, data: Any, masks: Mapping[str, Tensor], **settings: Any) -> list[float]:
    named = dict(model.named_parameters())
    masked = [(named[name], share_of(mask, named[name])) for name, mask in masks.items()]

    def mask_gradients(state: State) -> None:
        for parameter, mask in masked:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

    @torch.no_grad()
    def mask_weights(state: State) -> None:
        for parameter, mask in masked:
            parameter.mul_(mask)

    settings["after_backward"] = [*settings.get("after_backward", ()), mask_gradients]
    settings["after_step"] = [*settings.get("after_step", ()), mask_weights]
    return fit(model, data, **settings)


def _lora(
    model: nn.Module,
    data: Any,
    masks: Mapping[str, Tensor],
    rank: int,
    alpha: int,
    targets: Sequence[str] | None,
    **settings: Any,
) -> list[float]:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    names = lora_targets(model) if targets is None else list(targets)
    if not names:
        raise SecateurError("there is no linear layer to adapt", where="lora", fix="use how='full'")
    requires = {parameter: parameter.requires_grad for parameter in model.parameters()}
    seed = settings.get("seed", 0)
    adapted: Any = None
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
            try:
                adapted = cast(Any, LoraModel(model, config, "default"))
            except ValueError as error:
                raise SecateurError(
                    str(error).split(". ")[0], where="lora", fix="give names of linear modules"
                ) from error
        trained = [p for name, p in model.named_parameters() if "lora_" in name]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_()
        for name, mask in masks.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            if hasattr(layer, "lora_A"):
                _mask_update(layer, mask)
        losses = fit(model, data, parameters=trained, **settings)
        adapted.merge_and_unload(progressbar=False)
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
        adapted = None
        return losses
    finally:
        if adapted is not None:
            adapted.unload()
        for attribute in ("peft_config", "active_adapter", "peft_type"):
            if attribute in vars(model):
                delattr(model, attribute)
        for parameter, required in requires.items():
            parameter.requires_grad_(required)


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the linear layers (nn.Linear and transformers' Conv1D) but the output embedding."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kinds: tuple[type, ...] = (nn.Linear,)
    try:
        from transformers.pytorch_utils import Conv1D

        kinds = (nn.Linear, Conv1D)
    except ImportError:
        pass
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and module is not head and name
    ]


def _mask_update(layer: Any, mask: Tensor) -> None:
    """The adapted layer computes with W + mask * (B A) instead of W + B A: what is left after merging and masking."""
    base = layer.base_layer
    turned = (
        base.weight.shape != (base.out_features, base.in_features) if isinstance(base, nn.Linear) else True
    )

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        update = (self.lora_B["default"].weight @ self.lora_A["default"].weight) * self.scaling["default"]
        weight = base.weight + (mask * (update.T if turned else update)).to(base.weight.dtype)
        return F.linear(x, weight.T if turned else weight, base.bias)

    layer.forward = types.MethodType(forward, layer)
