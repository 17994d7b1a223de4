"""Pipelines of diffusers: what is cut of them, their drawings through gates, and their files."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.cli.main import main
from secateur.families.pipelines import Parts, as_module, components_of, is_pipeline
from secateur.gates import HardConcrete, place
from secateur.graph import trace
from secateur.training.pipelines import pipeline_task
from secateur.training.sampling import draw, sample

diffusers = pytest.importorskip("diffusers", reason="pip install 'secateur[diffusers]'")
sys.path.insert(0, str(Path(__file__).parent))

import pipes

diffusers.logging.set_verbosity_error()
CALLS = {
    "stable_diffusion": {"num_inference_steps": 2},
    "dit": {"num_inference_steps": 2},
    "flux": {"num_inference_steps": 2, "height": 16, "width": 16, "max_sequence_length": 12},
}
PARTS = {
    "stable_diffusion": ["text_encoder", "unet"],
    "dit": ["transformer"],
    "flux": ["text_encoder", "text_encoder_2", "transformer"],
}
SEEDS, ASKED = torch.tensor([3, 4]), torch.arange(2)
every = pytest.mark.parametrize("name", sorted(CALLS))


def drawn(parts, through=None):
    with torch.no_grad():
        return parts.draw(SEEDS, ASKED, through)


@every
def test_a_drawing_is_what_the_pipeline_itself_draws(name):
    """Against the pipeline's own call, with its own argument for the noise, before anything is decoded."""
    pipe = getattr(pipes, name)()
    parts = Parts(pipe, **CALLS[name])
    assert is_pipeline(pipe) and not is_pipeline(nn.Linear(1, 1)) and list(components_of(pipe)) == PARTS[name]
    ours = drawn(parts)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in SEEDS]
    arguments = {parts.asks: parts.prompts[:2], "generator": generators, **CALLS[name]}
    if name == "dit":
        seen = []
        pipe.vae.decode = lambda latents: seen.append(latents) or (_ for _ in ()).throw(KeyError)
        with pytest.raises(KeyError):
            pipe(**arguments)
        theirs = seen[0] * pipe.vae.config.scaling_factor
    else:
        theirs = pipe(**arguments, output_type="latent").images
    torch.testing.assert_close(ours, theirs)
    assert "forward" not in vars(parts.get_submodule(PARTS[name][-1])) and "step" not in vars(pipe.scheduler)


@every
def test_inputs_are_what_each_part_is_called_with(name):
    parts = Parts(getattr(pipes, name)(), **CALLS[name])
    inputs = parts.example_inputs()
    assert sorted(inputs) == PARTS[name]
    assert all(
        isinstance(given, torch.Tensor) for kwargs in inputs.values() for given in [*kwargs.values()][:1]
    )
    assert len(parts.calibration_inputs(6)) == 4  # two batches of drawings, at both steps
    alone = parts(**{PARTS[name][0]: inputs[PARTS[name][0]]})
    assert [*alone] == PARTS[name][:1]


def test_a_copy_has_parts_and_a_scheduler_of_its_own():
    pipe = pipes.stable_diffusion()
    parts = Parts(pipe, **CALLS["stable_diffusion"])
    before, twin = drawn(parts), copy.deepcopy(parts)
    with torch.no_grad():
        for parameter in twin.unet.parameters():
            parameter.zero_()
    assert torch.equal(drawn(parts), before) and not torch.equal(drawn(twin), before)
    assert twin.pipeline.unet is twin.unet and twin.pipeline.vae is pipe.vae
    assert twin.pipeline.scheduler is not pipe.scheduler and not twin.unet.training


@every
def test_cut_and_saved_pipelines_draw_the_same(name, tmp_path):
    pipe = getattr(pipes, name)()
    decoder = {key: value.clone() for key, value in pipe.vae.state_dict().items()}
    pruned = secateur.prune(pipe, method="group-magnitude", target="75%", drawing=CALLS[name])
    assert pruned.report["met"]
    kept = {g["name"].split(".")[0].split(":")[0] for g in pruned.report["groups"] if g["kept"] < g["size"]}
    assert kept == set(PARTS[name])
    assert all(
        torch.equal(value, decoder[key]) for key, value in pruned.model.pipeline.vae.state_dict().items()
    )
    pruned.save(tmp_path / "cut")
    assert json.loads((tmp_path / "cut" / "report.json").read_text())["artefact"]["form"] == "pipeline"
    loaded, _ = secateur.load(tmp_path / "cut")
    loaded.prompts, loaded.call = pruned.model.prompts, pruned.model.call
    torch.testing.assert_close(drawn(loaded), drawn(pruned.model))
    with pytest.raises(OSError):  # never quietly another model
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize(
    ("name", "method", "target", "settings"),
    [
        ("stable_diffusion", "wanda", "50%", {"samples": 4}),
        ("dit", "group-magnitude", "67%", {"kinds": ("layers",)}),
        ("stable_diffusion", "group-magnitude", "text_encoder=50%", {"kinds": ("neurons",)}),
    ],
)
def test_plain_diffusers_loads_what_configs_can_say(name, method, target, settings, tmp_path):
    """Zeros, fewer blocks, and as many neurons in every layer."""
    pruned = secateur.prune(
        getattr(pipes, name)(), method=method, target=target, drawing=CALLS[name], **settings
    )
    pruned.save(tmp_path / "cut")
    about = json.loads((tmp_path / "cut" / "report.json").read_text())["artefact"]
    assert about["form"] == "plain", about
    plain = Parts(
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "cut"), pruned.model.prompts, **CALLS[name]
    )
    torch.testing.assert_close(drawn(plain), drawn(pruned.model))


@every
def test_gradients_through_the_loop_are_those_of_plain_autograd(name, monkeypatch):
    """With each part's call run again on the way back, and without."""
    task = pipeline_task(Parts(getattr(pipes, name)(), **CALLS[name]))
    model = task.pretrained()
    graph = trace(model, task.inputs)
    gated = place(
        model, graph, lambda group: HardConcrete(group.size, 1.0), kinds=("heads",), train_model=False
    )
    noise, asked = task.sampler.start(2, 0)
    found = []
    for again in (True, False):
        if not again:
            monkeypatch.setattr(
                "secateur.families.pipelines.checkpoint", lambda run, given, use_reentrant: run(given)
            )
        torch.manual_seed(0)
        gated.train().zero_grad()
        (sample(gated, task.sampler, noise, asked) ** 2).mean().backward()
        found.append([law.logits.grad.clone() for law in gated.laws])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert sum(bool(grad.abs().sum() > 0) for grad in found[0]) >= len(found[0]) // 2
    encoders = [g for g, name in zip(found[0], gated.groups) if name.startswith("text_encoder")]
    assert name == "dit" or any(grad.abs().sum() > 0 for grad in encoders)


@every
def test_ecodiff_on_a_pipeline(name, tmp_path):
    pipe = getattr(pipes, name)()
    before = drawn(Parts(pipe, **CALLS[name]))
    pruned = secateur.train_prune(
        pipe, method="ecodiff", target="75%", steps=2, samples=3, batch=2, drawing=CALLS[name]
    )
    assert pruned.report["met"] and pruned.model.pipeline is not pipe
    assert torch.equal(drawn(Parts(pipe, **CALLS[name])), before)  # the user's is as it was
    pruned.save(tmp_path / "cut")
    loaded, _ = secateur.load(tmp_path / "cut")
    loaded.prompts, loaded.call = pruned.model.prompts, pruned.model.call
    torch.testing.assert_close(drawn(loaded), drawn(pruned.model))


def test_the_command_line_learns_from_the_prompts_of_a_file(tmp_path, capsys):
    """A pipeline that takes class numbers; what it gets while it draws is counted by steps and numbers."""
    pipes.dit().save_pretrained(tmp_path / "dit")
    (tmp_path / "classes.txt").write_text("1\n\n2\n")
    words = ["train-prune", tmp_path / "dit", "--method", "ecodiff", "--target", "75%", "--steps", "2"]
    words += [
        "--samples",
        "3",
        "--batch",
        "2",
        "--drawing",
        "num_inference_steps=2",
        "--out",
        tmp_path / "out",
    ]
    assert main([str(word) for word in [*words, "--prompts", tmp_path / "classes.txt", "--json"]]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["met"] and report["model"] == str(tmp_path / "dit")
    loaded, _ = secateur.load(tmp_path / "out")
    assert drawn(loaded).isfinite().all()
    assert as_module(loaded, [3], {"num_inference_steps": 1}).prompts == [3] and as_module(loaded) is loaded
    for more, told in (
        (["--train", "3"], "a pipeline brings no data"),
        (["--drawing", "stepps=2"], "takes no 'stepps'"),
    ):
        assert main([*map(str, words[:-2]), *more]) == 2 and told in capsys.readouterr().err


def noisy():
    """A scheduler whose steps have noise that nobody seeds."""

    class NoisyScheduler(diffusers.DDIMScheduler):
        def step(self, *args, **kwargs):
            given = super().step(*args, **kwargs)
            first = given[0] if isinstance(given, tuple) else given.prev_sample
            first += 0.1 * torch.randn_like(first)
            return given

    return NoisyScheduler(clip_sample=False, steps_offset=1)


def test_a_sampler_that_is_not_a_function_of_its_seed_is_refused():
    pipe = pipes.stable_diffusion(noisy())
    with pytest.raises(SecateurError, match="NoisyScheduler.*isn't a function of its seed"):
        secateur.train_prune(
            pipe, method="ecodiff", target="75%", steps=1, drawing={"num_inference_steps": 1}
        )


def test_noise_that_comes_from_the_seed_is_no_obstacle():
    pipe = pipes.stable_diffusion(diffusers.EulerAncestralDiscreteScheduler())
    task = pipeline_task(Parts(pipe, **CALLS["stable_diffusion"]))
    one, _ = draw(task.pretrained(), task.sampler, 2, 0)
    two, _ = draw(task.pretrained(), task.sampler, 2, 0)
    assert torch.equal(one, two)


def test_bad_input_is_named(tmp_path):
    pipe = pipes.dit()
    with pytest.raises(SecateurError, match="takes no 'stepps'"):
        Parts(pipe, stepps=3)
    with pytest.raises(SecateurError, match="list of prompts"):
        Parts(pipe, "a dog")
    with pytest.raises(SecateurError, match="only a pipeline"):
        secateur.prune(nn.Linear(2, 2), torch.zeros(1, 2), method="magnitude", target="50%", prompts=["a"])
    with pytest.raises(SecateurError, match="step by step"):
        secateur.train_prune(
            pipe, method="ecodiff", target="75%", match="step", steps=1, drawing=CALLS["dit"]
        )
    with pytest.raises(SecateurError, match="no data and no loss"):
        secateur.train_prune(pipe, method="lottery-ticket", target="50%", steps=1, drawing=CALLS["dit"])


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model_index.json", {"_class_name": "os.system"}),
        ("model_index.json", {"_class_name": "UNet2DModel"}),
        ("model_index.json", {"transformer": ["os", "system"]}),
        ("pruned.json", {"format": "other"}),
        ("pruned.json", {"parts": {"vae_2": {"blocks": {}, "identity": [], "shapes": {}, "attributes": {}}}}),
        ("pruned.json", {"parts": {"transformer": {"blocks": "all"}}}),
        ("pruned.json", {"parts": {}}),
    ],
)
def test_folders_that_name_anything_else_are_refused(file, change, tmp_path):
    pruned = secateur.prune(pipes.dit(), method="group-magnitude", target="75%", drawing=CALLS["dit"])
    pruned.save(tmp_path / "cut")
    path = tmp_path / "cut" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SecateurError):
        secateur.load(tmp_path / "cut")


def test_the_command_line_takes_a_folder(tmp_path, capsys):
    from secateur.cli.main import main

    pipes.dit().save_pretrained(tmp_path / "pipe")
    out = tmp_path / "cut"
    code = main(
        ["prune", str(tmp_path / "pipe"), "--method", "group-magnitude", "--target", "75%", "--out", str(out)]
    )
    assert code == 0 and (out / "model_index.json").is_file()
    assert json.loads((out / "report.json").read_text())["artefact"]["load"] == "secateur.load(folder)"
