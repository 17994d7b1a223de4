"""DToP: the sheet's example, what must hold on any network, heads on ViTs of timm and transformers, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F

import secateur
from secateur import SecateurError
from secateur.families.segmenter import MaskHead, Segmenter, TokenHead, on_living
from secateur.families.vit import Vit
from secateur.measure import macs
from secateur.methods.dtop import DToP, check_labels, leaving
from secateur.report.summary import left, notes
from secateur.training.losses import mask_losses
from secateur.training.task import Task

P = torch.tensor(
    [
        [0.97, 0.95, 0.93, 0.91, 0.40, 0.05, 0.02, 0.10, 0.94, 0.30],
        [0.02, 0.03, 0.04, 0.05, 0.50, 0.96, 0.92, 0.88, 0.03, 0.30],
        [0.01, 0.02, 0.03, 0.04, 0.10, 0.02, 0.03, 0.02, 0.02, 0.40],
    ]
).T[None]
ALL = torch.ones(1, 10, dtype=torch.bool)


def out_of(mask):
    return set(mask[0].nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "p0, k, wanted",
    [(0.9, 2, {2, 3, 8}), (0.9, 0, {0, 1, 2, 3, 5, 6, 8}), (0.9, 5, set()), (1.0, 0, set())],
)
def test_the_example_of_the_sheet(p0, k, wanted) -> None:
    assert out_of(leaving(P, ALL, p0, k)) == wanted


def test_patches_that_left_neither_leave_again_nor_count_among_the_surest() -> None:
    """Without patches 0 and 1 the two surest of class 0 are 8 and 2, so 3 alone leaves."""
    alive = ALL.clone()
    alive[0, :2] = False
    assert out_of(leaving(P, alive, 0.9, 2)) == {3}


def test_ties_go_to_the_first_class_and_the_lower_patch() -> None:
    """All alike and sure of both classes: they are of the first, and the lower two stay."""
    assert out_of(leaving(torch.full((1, 4, 2), 0.95), torch.ones(1, 4, dtype=torch.bool), 0.9, 2)) == {2, 3}


def test_pictures_of_a_batch_are_counted_apart() -> None:
    assert torch.equal(
        leaving(P.expand(3, -1, -1), ALL.expand(3, -1), 0.9, 2), leaving(P, ALL, 0.9, 2).expand(3, -1)
    )


def segmenter(head=TokenHead, classes=3):
    torch.manual_seed(0)
    vit = Vit(size=16, patch=2, width=24, depth=4, heads=2)
    heads = [head(24, classes) for _ in range(3)]
    for each in heads:
        for p in each.parameters():
            p.data.mul_(3)
    return Segmenter(vit, heads, (0, 2, 3), "blocks", 1).eval()


def pictures(count=3, size=16):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def small_mask_head(width, classes):
    return MaskHead(width, classes, heads=2, layers=2)


HEADS = pytest.mark.parametrize("head, p0", [(TokenHead, 0.8), (small_mask_head, 0.25)])


@torch.no_grad()
@HEADS
def test_with_either_head_nothing_changes_at_1_and_masked_is_gathered(head, p0) -> None:
    model, x = segmenter(head), pictures()
    plain = model(x)
    with secateur.attach(model, "dtop", p0=1) as attached:
        assert torch.equal(model(x), plain) and attached.alive == []
    seen = []
    for masked in (False, True):
        with secateur.attach(model, "dtop", p0=p0, k=1, masked=masked) as attached:
            seen.append(model(x))
            counts = attached.alive[-1].sum(1)
    assert 0 < counts.min() and counts.min() < 64 and len(counts.unique()) > 1
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)
    with secateur.attach(model, "dtop", p0=p0, k=1):
        for number in range(3):
            torch.testing.assert_close(
                model(x[number : number + 1])[0], seen[0][number], rtol=1e-5, atol=1e-5
            )
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_who_left_stays_away_and_what_was_said_of_them_is_final() -> None:
    model, x = segmenter(), pictures()
    with secateur.attach(model, "dtop", p0=0.6, k=2) as attached:
        model(x)
    (first, second), canvases = attached.alive, [canvas for canvas, _ in attached.said]
    assert not (second & ~first).any() and (~first).any() and (first & ~second).any()
    assert torch.equal(canvases[1][~first], canvases[0][~first])
    assert torch.equal(canvases[2][~second], canvases[1][~second])
    assert (canvases[2][second] != canvases[1][second]).any(-1).all()
    assert torch.isfinite(canvases[2]).all() and (canvases[2] != 0).any(-1).all()


@torch.no_grad()
def test_every_class_keeps_its_surest_and_a_higher_p0_lets_fewer_go() -> None:
    model, x = segmenter(), pictures()
    gone = []
    for p0 in (0.5, 0.6, 0.7, 0.8, 0.9):
        with secateur.attach(model, "dtop", p0=p0, k=4) as attached:
            model(x)
        gone.append(int((~attached.alive[0]).sum()))
        sure, guess = attached.said[0][0].softmax(-1).max(-1)
        for row in range(3):
            for c in range(3):
                confident = (guess[row] == c) & (sure[row] > p0)
                stays = confident & attached.alive[0][row]
                assert int(stays.sum()) == min(4, int(confident.sum()))
                if stays.any() and (confident & ~stays).any():
                    assert sure[row][stays].min() >= sure[row][confident & ~stays].max()
    assert gone == sorted(gone, reverse=True) and gone[0] > gone[-1]


@torch.no_grad()
@HEADS
def test_work_is_the_forward_s_multiply_adds_but_for_the_patch_embedding(head, p0) -> None:
    model, x = segmenter(head), pictures(1)
    embedding = 24 * 3 * 4 * 64
    with secateur.attach(model, "dtop", p0=p0, k=1) as attached:
        assert macs(model, x) - embedding == int(attached.work.done[0])
        assert not attached.alive[-1].all()
        whole = int(attached.work.whole[0])
    assert macs(model, x) - embedding == whole


@torch.no_grad()
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_heads_stand_on_vits_of_other_libraries(library) -> None:
    """Against the network's own blocks run one after the other on indexed patches."""
    torch.manual_seed(0)
    if library == "timm":
        timm = pytest.importorskip("timm")
        vit = timm.create_model(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=24,
            depth=3,
            num_heads=2,
            num_classes=0,
        )
    else:
        from transformers import Dinov2Config, Dinov2Model

        vit = Dinov2Model(
            Dinov2Config(
                hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
            )
        )
    heads = [TokenHead(24, 2) for _ in range(3)]
    for head in heads:
        head.out.weight.data.mul_(3)
    model, x = Segmenter(vit, heads, (0, 1, 2)).eval(), pictures(2, 32)
    plain = model(x)
    seen: list[torch.Tensor] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    vit(x)
    hook.remove()
    with secateur.attach(model, "dtop", p0=0.7, k=1) as attached:
        made = model(x)
    counts = attached.alive[0].sum(1).tolist()
    assert counts[0] != counts[1] and min(counts) < 16
    for row in range(2):
        states, alive, canvas = seen[0][row], torch.ones(17, dtype=torch.bool), torch.zeros(16, 2)
        for number, block in enumerate(model.blocks):
            states = states.clone()
            out = block(states[alive][None])
            states[alive] = out[0]
            canvas[alive[1:]] = heads[number](states[None, 1:][:, alive[1:]])[0][0]
            if number < 2:
                alive = torch.cat([torch.ones(1, dtype=torch.bool), attached.alive[number][row]])
        torch.testing.assert_close(attached.said[-1][0][row], canvas, rtol=1e-4, atol=1e-5)
        want = F.interpolate(canvas.T.view(1, 2, 4, 4), (32, 32), mode="bilinear")
        torch.testing.assert_close(made[row], want[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), plain)


@torch.no_grad()
def test_a_mask_head_reads_only_what_is_alive() -> None:
    """Its attention over the patches of one picture against the head on these patches alone; a picture without any is finite."""
    torch.manual_seed(0)
    head, x = MaskHead(16, 3, heads=2).eval(), torch.randn(2, 6, 16)
    alive = torch.tensor([[1, 0, 1, 1, 0, 0], [0] * 6]).bool()
    for masked in (False, True):
        logits, presence = on_living(head, x, alive, masked)
        want, there = head(x[:1, alive[0]])
        torch.testing.assert_close(logits[0][alive[0]], want[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(presence[0], there[0], rtol=1e-5, atol=1e-6)
        assert torch.isfinite(presence).all()


def test_mask_losses_by_hand() -> None:
    """One picture of two pixels, class 0 in the first, the other not labelled, class 1 absent; all logits 0.

    Presence: (1 ln 2 + .1 ln 2) / 1.1 = ln 2. Focal: .25 * .25 * ln 2, times 20. Dice: 1 - (2 * .5 + 1) / (.5 + 1 + 1) = .2.
    """
    got = mask_losses(torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 2), torch.tensor([[[0, -100]]]))
    ln2 = 0.6931472
    assert got.item() == pytest.approx(ln2 + 20 * 0.0625 * ln2 + 0.2, abs=1e-5)


@pytest.mark.parametrize("head", [TokenHead, small_mask_head])
def test_training_lowers_the_loss_of_every_stage_and_leaves_the_rest_alone(head) -> None:
    """A frozen backbone stays; both kinds of head learn to tell the halves apart."""
    task = DToP.example()
    net = segmenter(head, 2)
    net.heads = torch.nn.ModuleList(head(24, 2) for _ in range(3))
    net.backbone.requires_grad_(False)
    x, y = (
        F.interpolate(task.train[0], scale_factor=2),
        task.train[1].repeat_interleave(2, 1).repeat_interleave(2, 2),
    )
    before = copy.deepcopy(net.backbone.state_dict())
    task = Task("halves", lambda: net, (x, y), inputs=x[:1], recipe=task.recipe)
    rate = 1e-2 if head is TokenHead else 2e-3
    pruned = secateur.train_prune(task, method="dtop", p0=0.9, k=1, steps=60, lr=rate)
    assert all(torch.equal(before[name], value) for name, value in pruned.model.backbone.state_dict().items())
    pruned.model.eval()
    assert (pruned.model(x).argmax(1) == y).float().mean() > 0.85
    phase = pruned.report["phases"][0]
    assert pruned.report["met"] and phase["phase"] == "pruning on"


@pytest.mark.parametrize("settings, match", [({"p0": 0}, "p0"), ({"p0": 1.5}, "p0"), ({"k": -1}, "k")])
def test_settings_out_of_range_are_refused(settings, match) -> None:
    with pytest.raises(SecateurError, match=match):
        DToP(**settings)


def test_networks_and_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SecateurError, match="no early head behind block 1.*some of 0, 2"):
        secateur.attach(segmenter(), "dtop", stages=(1,))
    with pytest.raises(SecateurError, match="no heads between its blocks"):
        secateur.attach(Vit(8, 2, 8, 2, 2), "dtop")
    with pytest.raises(SecateurError, match="no use for it"):
        secateur.attach(segmenter(), "dtop", target="50%")
    vit, head = Vit(8, 2, 8, 2, 2), TokenHead(8, 2)
    with pytest.raises(SecateurError, match="only head is at its end"):
        secateur.attach(Segmenter(vit, [head], (1,), "blocks", 1), "dtop")
    with pytest.raises(SecateurError, match="a head for each stage"):
        Segmenter(vit, [head], (0,), "blocks", 1)
    with pytest.raises(SecateurError, match="no list of blocks named 'layers'.*blocks=, prefix="):
        Segmenter(vit, [head], (1,), "layers", 1)
    namesake = type(
        "VisionTransformer", (torch.nn.Module,), {}
    )()  # torchvision's too has its blocks elsewhere
    with pytest.raises(SecateurError, match="aren't where they are in others.*blocks=, prefix="):
        Segmenter(namesake, [head], (1,))


def test_labels_that_do_not_fit_are_refused() -> None:
    def task(labels):
        return Task("x", segmenter, (pictures(), labels))

    with pytest.raises(SecateurError, match=r"labels \[3, 8, 8\] for pictures \[3, 3, 16, 16\]"):
        check_labels(task(torch.zeros(3, 8, 8, dtype=torch.int64)))
    empty = torch.zeros(3, 16, 16, dtype=torch.int64)
    empty[1] = -100
    with pytest.raises(SecateurError, match="no pixel of picture 1 has a class"):
        check_labels(task(empty))


def test_the_report_says_what_the_network_reaches_while_it_skips() -> None:
    """Not that all multiply-adds are left, which is true of the network that skips nothing. Rows of training alone say nothing of it."""
    rows = [{"phase": "pruning on", "last_step": 3}, {"phase": "pruned", "quality": 25.3, "work": 0.525}]
    same = {"params": 40, "macs": 200}
    report = {"before": same, "after": same, "task": {"metric": "psnr"}, "phases": rows}
    assert (
        left(report) == "left: 100.0 % of the parameters, 52.5 % of the multiply-adds of the parts that skip"
    )
    said = "where work is skipped: psnr 25.30 dB, 52.5 % of the multiply-adds of the parts that skip"
    assert [note.startswith(said) for note in notes(report)].count(True) == 1
    assert "where work" not in str(notes(report | {"phases": rows[:1]}))
    assert left(report | {"phases": rows[:1]}).endswith("100.0 % of the multiply-adds")


def test_a_seed_that_nothing_would_be_drawn_by_is_refused() -> None:
    with pytest.raises(SecateurError, match="seed: a network that skips"):
        secateur.attach(DToP.example().build(), "dtop", seed=3)
