"""VidCom2 through `attach`: videos of two families beside a plain reading of its rule."""

import pytest
import torch
from tiny_models import VIDEO, make

import secateur


def plainly(features, frames, share):
    """Kept places of a video [frames * n, D], counts rounded frame by frame."""
    order = features.var(0, correction=0).argsort()[: features.shape[1] // 2]
    rows = torch.nn.functional.normalize(features[:, order], dim=1).view(frames, -1, len(order))

    def near(centre):
        square = (rows - centre).square().sum(-1)
        return sum(torch.exp(-square / (2 * a)) for a in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    video, own = near(rows.mean((0, 1))), near(rows.mean(1, keepdim=True))
    p = (-video.mean(1) / 0.01).softmax(0)
    kept = []
    for i in range(frames):
        n = rows.shape[1]
        count = max(1, round(n * min(1.0, share * (1 + float(p[i]) - 1 / frames))))
        kept += sorted((video + own)[i].topk(count, largest=False).indices.add(i * n).tolist())
    return kept


@pytest.mark.parametrize("family", ["qwen2.5-vl", "llava-onevision"])
def test_two_videos_of_a_batch(family):
    model, generator = make(family), torch.Generator().manual_seed(1)
    if family == "qwen2.5-vl":
        shapes, line = [(3, 8), (2, 6)], 0
        extra = {
            "pixel_values_videos": torch.randn(144, 48, generator=generator, dtype=torch.float64),
            "video_grid_thw": torch.tensor([[3, 4, 8], [2, 6, 4]]),
        }
    else:
        shapes, line = [(3, 4), (3, 4)], 1
        noise = torch.randn(2, 3, 3, 16, 16, generator=generator, dtype=torch.float64)
        extra = {"pixel_values_videos": noise}
    rows = [[1, 7, *[VIDEO] * (t * n + line), 8, *[50] * (i + 1)] for i, (t, n) in enumerate(shapes)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long(), **extra}
    if family == "qwen2.5-vl":
        inputs["mm_token_type_ids"] = 2 * (ids == VIDEO).long()
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        hook.remove()
        with secateur.attach(model, "vidcom2", target="50%", compat="code") as attached:
            model(**inputs)
    for row, (frames, n) in enumerate(shapes):
        features = seen["embeds"][row][ids[row] == VIDEO][: frames * n].float()
        expected = plainly(features, frames, 0.5) + [frames * n] * line  # its newline stays
        assert attached.kept["input"][row].tolist() == expected
