"""VisionDrop through `attach`: counts of all stages, and the tower's stage beside a plain reading of its rule."""

import pytest
import torch
from tiny_models import IMAGE, inputs_for, make

import secateur


@pytest.mark.parametrize("tokens", [6, 8, 9, 12])
def test_every_stage_keeps_its_own_share_of_the_target(tokens):
    """Spec: visiondrop: n_i = round(1.5 * T * 0.73362^i), whatever the stages before left."""
    model, inputs = make("llava-clip"), inputs_for("llava-clip", rows=(1,))
    with torch.no_grad(), secateur.attach(model, "visiondrop", target=f"tokens={tokens}") as attached:
        model(**inputs)
    sizes = [round(1.5 * tokens * 0.73362**i) for i in range(4)]
    total = int((inputs["input_ids"] == IMAGE).sum())
    found = [sorted({len(row) for row in rows if len(row)}) for rows in attached.kept.values()]
    assert found == [[min(size, total)] for size in sizes]


def test_the_tower_merges_states_and_projects_them():
    """[CLS and the best patches, then contextual sums], all projected afterwards, as the spec orders it."""
    model, inputs = make("llava-clip"), inputs_for("llava-clip", rows=(1,))
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad(), secateur.attach(model, "visiondrop", target="tokens=8"):
        model(**inputs)
    hook.remove()

    pixels = inputs["pixel_values"][:1]
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        keys = []
        blocks = (getattr(tower, "vision_model", tower)).encoder.layers
        hook = blocks[-2].self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out[0]))
        outputs = tower(pixels, output_hidden_states=True, output_attentions=True)
        hook.remove()
        states, attention = outputs.hidden_states[-2][0], outputs.attentions[-2][0]
        heads = attention.shape[0]
        metric = keys[0].unflatten(-1, (heads, -1)).mean(1)
        best = attention[:, 0, 1:].sum(0).topk(12 - 2 - 1).indices.sort().values + 1
        rest = [i for i in range(1, len(states)) if i not in best.tolist()]
        step = max(1, len(rest) // 2)
        targets = rest[::step][:2]
        sums = [[] for _ in targets]
        unit = metric / metric.norm(dim=-1, keepdim=True)
        for i in rest:
            if i not in targets:
                sums[int((unit[targets] @ unit[i]).argmax())].append(states[i])
        merged = [states[t] + (torch.stack(own).mean(0) if own else 0) for t, own in zip(targets, sums)]
        chosen = torch.stack([states[0], *states[best], *merged])
        expected = model.model.multi_modal_projector(chosen)
    embeds = seen["embeds"].reshape(-1, expected.shape[-1])
    starts = (torch.cdist(embeds, expected[:1]).squeeze(1) < 1e-6).nonzero()
    assert len(starts)
    start = int(starts[0])
    assert torch.allclose(embeds[start : start + 12], expected, atol=1e-6)
