"""The training of the layers that look, by the losses of the authors' code: by hand, inside a model, saved and attached."""

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.errors import SecateurError
from secateur.families.vlm import facts_of, family_of
from secateur.methods.lrs_dip import LRSDIP, distillation
from secateur.tokens.attach import attach
from secateur.tokens.pyramid import Level
from secateur.tokens.train import train_tokens
from secateur.training.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "tokens"))
from test_pyramid import pyramid_inputs
from tiny_models import IMAGE, inputs_for, make

QUICK = {"target": "25%", "recipe": Recipe(lr=1e-2, batch=2, warmup=0.0)}


def batches(count=2, grids=None):
    out = []
    for seed in range(count):
        inputs = inputs_for("llava-clip", torch.float32, rows=(2, 1), seed=seed)
        if grids is not None:
            inputs = pyramid_inputs("llava-clip", torch.float32, grids)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        out.append({**inputs, "labels": labels})
    return out


def test_the_loss_by_hand():
    """One set and head: a visual token of the thumbnail, two that count, one of padding, a word."""
    look, guide = torch.tensor([[[1.0, 0.0, 2.0, 9.0, 0.5]]]), torch.tensor([[[0.0, 1.0, 1.0, 7.0, 1.5]]])
    mine = torch.tensor([[False, True, True, False]])
    there = torch.tensor([[True, True, True, False, True]])

    def kl(wanted, said):
        p, q = ([math.exp(x) / sum(map(math.exp, row)) for x in row] for row in (wanted, said))
        return sum(a * math.log(a / b) for a, b in zip(p, q))

    every = kl([0, 1, 1, 1.5], [1, 0, 2, 0.5])
    local = kl([0.5, 0.5], [0, 1])
    apart = ((0 - 0.5) ** 2 + (1 - 0.5) ** 2) / 2
    found = distillation(look, guide, mine, there)
    assert found.item() == pytest.approx((every + local + apart) / 3, abs=1e-6)
    # a mean over sets and heads, in either of which nothing differs
    both = distillation(torch.cat([look, guide], 1), torch.cat([guide, guide], 1), mine, there)
    assert both.item() == pytest.approx(found.item() / 2, abs=1e-6)


def test_gradients_reach_the_look_alone_and_are_finite():
    look, guide = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    mine, there = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    mine[0, 2:] = there[0, 3] = False
    distillation(look, guide, mine, there).backward()
    assert look.grad.isfinite().all() and look.grad.abs().sum() > 0 and guide.grad is None


@pytest.mark.parametrize("grids", [None, [[Level(1, 1), Level(2, 2)]] * 2])
def test_copies_of_all_layers_have_no_loss_and_others_have(grids):
    """Spec: lrs-dip (b). The loss of copies that were turned, against the attention that the model itself gives."""
    model, data = make("llava-clip", torch.float32), batches(1, grids)
    given = {"pyramid": grids} if grids else None
    model.set_attn_implementation("eager")
    seen = []

    class Watched(LRSDIP):
        """No paper."""

        def lessons(self, facts):
            (lesson,) = super().lessons(facts)
            keep = lesson.loss
            return [
                type(lesson)(
                    lesson.name, lesson.stages, lambda noted, own: seen.append(noted) or keep(noted, own)
                )
            ]

    train_tokens(model, Watched(layers=(0, 1, 2)), data=data, steps=1, given=given, **QUICK)
    first = seen[0]
    assert [name for name in first if name.startswith("distilled")] == ["distilled 0", "distilled 1"]
    assert all(abs(first[f"distilled {n}"].item()) < 1e-9 for n in (0, 1))
    # the last of two layers alone sees other states than in the model
    seen.clear()
    train_tokens(model, Watched(layers=(1, 2)), data=data, steps=1, given=given, **QUICK)
    look, loss = seen[0]["look 1"], seen[0]["distilled 1"]
    assert loss.item() > 1e-6
    with torch.no_grad():
        maps = model(
            **{k: v for k, v in data[0].items() if k != "labels"}, output_attentions=True
        ).attentions[2]
    ids = data[0]["input_ids"]
    at = ids.shape[1] - 3  # the last word before the answer
    visual = (ids[-1] == IMAGE).nonzero()[:, 0]
    behind = torch.arange(int(visual[-1]) + 1, at + 1)
    keys = torch.cat([visual, behind])
    probs = maps[-1, :, at][:, keys]
    wanted = probs / probs.sum(1, keepdim=True)
    mine = look[-1][:, : len(visual)], look[-1][:, look.shape[2] - len(behind) :]
    said = torch.cat(mine, 1).log_softmax(1)
    kl = (wanted * (wanted.log() - said)).sum(1)
    assert kl.mean().item() > 1e-7 and kl.shape == (4,)
    if grids is None:
        return
    # both rows have one picture of 80 tokens: local ones are the last 64
    rows = []
    for row in (0, 1):
        p = maps[row, :, at][:, keys].log()
        s, t = look[row], p
        a = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
        u, v = s[:, 16:80] / 2, t[:, 16:80] / 2
        b = (v.softmax(1) * (v.log_softmax(1) - u.log_softmax(1))).sum(1)
        rows.append(a + b)
    # without the squared differences, which attention alone doesn't tell
    assert loss.item() >= torch.stack(rows).mean().item() / 3 - 1e-6


def test_trained_layers_are_saved_and_attached(tmp_path):
    model = make("llava-clip", torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    same = list(model.parameters())
    recipe = Recipe(lr=1e-3, batch=2, warmup=0.0)
    trained = train_tokens(
        model, "lrs-dip", data=batches(1), target="25%", steps=10, layers=(1, 2), recipe=recipe
    )
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), same))
    assert all(p.grad is None and p.requires_grad for p in same)
    (about,) = trained.about["lessons"]
    assert about["name"] == "distillation" and about["last"] < about["first"]
    trained.save(tmp_path / "look")
    inputs = inputs_for("llava-clip", torch.float32)
    file = str(tmp_path / "look" / "modules.safetensors")
    own = {f"{n}.{k}": p for n in (1, 2) for k, p in model.get_decoder().layers[n].named_parameters()}
    assert load_file(file).keys() == own.keys()
    # the second layer's MLP comes after the attention that is taught
    moved = {name for name, tensor in trained.state.items() if not torch.equal(tensor, own[name])}
    assert {name for name in own if ".q_proj" in name or ".k_proj" in name} <= moved
    scores = []
    for settings in ({"weights": tmp_path / "look"}, {"rfm": file, "layers": (1, 2)}, {"layers": (1, 2)}):
        with torch.no_grad(), attach(model, "lrs-dip", target="25%", **settings) as attached:
            model(**inputs)
        scores.append([row.tolist() for row in attached.kept["input"]])
        assert attached.report["after"]["glimpse_tokens_x_layers"] == 2 * 48
    assert scores[0] == scores[1]
    assert all(a is b for a, b in zip(model.parameters(), same))


def test_what_training_refuses(tmp_path):
    model = make("llava-clip", torch.float32)
    for settings, says in (
        ({"token": "next"}, "prompt's last token"),
        ({"layers": (0, 7)}, "no layer 7"),
        ({"layers": (1, 0)}, "aren't layers of this model, in order"),
    ):
        with pytest.raises(SecateurError, match=says):
            train_tokens(model, "lrs-dip", data=batches(1), steps=1, **settings, **QUICK)
    trained = train_tokens(model, "lrs-dip", data=batches(1), steps=1, layers=(1,), **QUICK)
    trained.save(tmp_path / "one")
    with pytest.raises(SecateurError, match="came twice"):
        attach(
            model,
            "lrs-dip",
            target="25%",
            weights=trained,
            layers=(1,),
            rfm=str(tmp_path / "one" / "modules.safetensors"),
        )
    with pytest.raises(SecateurError, match=r"missing|not there"):
        attach(model, "lrs-dip", target="25%", weights=trained, layers=(2,))
    attach(model, "lrs-dip", target="25%").detach()


def test_the_models_layers_are_copied_not_shared():
    model = make("llava-clip", torch.float32)
    facts = facts_of(model, family_of(model))
    assert LRSDIP().copies(facts) == (0, 1) and LRSDIP(layers=(2,)).copies(facts) == (2,)
    trained = train_tokens(copy.deepcopy(model), "lrs-dip", data=batches(1), steps=1, **QUICK)
    assert {name.split(".")[0] for name in trained.state} == {"0", "1"}
    assert secateur.method.make_method("covipal").copies(facts) == ()


def test_layers_as_text_of_a_command_line():
    """Also where there are none by default, so that their type is in the annotation alone."""
    assert secateur.method.make_method("lrs-dip", layers="1, 2").layers == (1, 2)
    assert secateur.method.make_method("adatoken-3d", later="5").later == (5,)
    with pytest.raises(SecateurError, match="'one' is not a tuple"):
        secateur.method.make_method("lrs-dip", layers="one")
