"""What users bring: cut each model to half of its multiply-adds and go the whole way with what is left of it.

    python benchmarks/users_models.py --out users_models.csv         # the whole list; rows that the table has are kept
    python benchmarks/users_models.py diffusers:UNet2DModel --again  # one of them
    python benchmarks/users_models.py --list

Each model is built from a config with random weights (seed 0), nothing is downloaded. `group-magnitude` cuts it to
`macs<=50%` with the proof on, then the result trains a step, is saved and loaded (by secateur, and without it), and is
exported as .pt2 and ONNX, each checked to give what the cut model gives. Models of ultralytics (AGPL) and diffusers
need these packages, which nothing else in the project uses:

    pip install --no-deps ultralytics ultralytics-thop opencv-python-headless diffusers
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from architectures import fill, flat, limited, told
from torch import Tensor, nn

from secateur.utils.files import atomic_write_text
from secateur.utils.inputs import as_call
from secateur.utils.running import without_cache

FIELDS = ["model", "status", "params", "macs_left", "met", "whole", "refused_by_proof", "trained", "loaded"]
FIELDS += ["plain", "pt2", "onnx", "seconds", "why"]
OUT = Path(__file__).parent / "users_models.csv"
Built = tuple[nn.Module, Any]


# --- the models: name after the colon -> (model, inputs)


def picture(*sizes: int) -> Tensor:
    return torch.randn(sizes or (2, 3, 64, 64))


def ids(*sizes: int) -> Tensor:
    return torch.randint(3, 100, sizes or (2, 12))


def ultralytics(name: str) -> Built:
    """A network of a yaml of the package: detection, and segmentation, poses, boxes with angles, classes by name."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.gettempdir())
    os.environ.setdefault("YOLO_OFFLINE", "true")
    from ultralytics import YOLO

    return YOLO(name, verbose=False).model.float(), picture()


def torchvision(name: str) -> Built:
    """Detectors take a list of pictures; segmenters and classifiers a batch."""
    import torchvision.models as zoo

    found = getattr(zoo.detection, name, None)
    if found is None:
        build = getattr(zoo.segmentation, name, None) or getattr(zoo, name)
        return build(
            weights=None, **({"weights_backbone": None} if hasattr(zoo.segmentation, name) else {})
        ), picture()
    few: dict[str, Any] = {"score_thresh": 0.0, "topk_candidates": 20, "detections_per_img": 20}
    if "rcnn" in name:
        few = {
            "box_score_thresh": 0.0,
            "box_detections_per_img": 20,
            "rpn_pre_nms_top_n_test": 50,
            "rpn_post_nms_top_n_test": 20,
        }
    small = {} if "ssd" in name else {"min_size": 96, "max_size": 96}
    pictures = [torch.rand(3, 96, 96), torch.rand(3, 96, 96)]
    return found(weights=None, weights_backbone=None, **few, **small), (pictures,)


def diffusers(name: str) -> Built:
    import diffusers as zoo

    four = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    config: dict[str, Any] = {
        "UNet2DModel": {**four, "sample_size": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        "UNet2DConditionModel": {**four, "sample_size": 16, "cross_attention_dim": 32, "attention_head_dim": 8,
                                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
                                 "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
        "AutoencoderKL": {**four, "latent_channels": 4, "sample_size": 32, "down_block_types": ("DownEncoderBlock2D",) * 2,
                          "up_block_types": ("UpDecoderBlock2D",) * 2},
        "VQModel": {**four, "latent_channels": 4, "sample_size": 32, "num_vq_embeddings": 16,
                    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
        "DiTTransformer2DModel": {"sample_size": 8, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
                                  "num_embeds_ada_norm": 10},
        "PixArtTransformer2DModel": {"sample_size": 8, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
                                     "cross_attention_dim": 64, "caption_channels": 32},
        "SD3Transformer2DModel": {"sample_size": 8, "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2,
                                  "in_channels": 4, "out_channels": 4, "joint_attention_dim": 32, "caption_projection_dim": 64,
                                  "pooled_projection_dim": 32, "pos_embed_max_size": 8},
        "FluxTransformer2DModel": {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 1, "num_single_layers": 1,
                                   "in_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32,
                                   "axes_dims_rope": (4, 6, 6)},
        "AutoencoderTiny": {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16),
                            "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    }[name]  # fmt: skip
    model = getattr(zoo, name)(**config)
    time_, text = torch.tensor([3, 5]), torch.randn(2, 7, 32)
    latent = {"hidden_states": picture(2, 4, 8, 8), "timestep": time_}
    inputs: dict[str, Any] = {
        "UNet2DModel": {"sample": picture(2, 3, 16, 16), "timestep": time_},
        "UNet2DConditionModel": {"sample": picture(2, 4, 16, 16), "timestep": time_, "encoder_hidden_states": text},
        "DiTTransformer2DModel": {**latent, "class_labels": torch.tensor([1, 2])},
        "PixArtTransformer2DModel": {**latent, "encoder_hidden_states": text,
                                     "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        "SD3Transformer2DModel": {**latent, "encoder_hidden_states": text, "pooled_projections": torch.randn(2, 32)},
        "FluxTransformer2DModel": {"hidden_states": torch.randn(2, 16, 4), "timestep": torch.rand(2), "encoder_hidden_states": text,
                                   "pooled_projections": torch.randn(2, 32), "txt_ids": torch.zeros(7, 3),
                                   "img_ids": torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0),
                                                                         indexing="ij"), -1).reshape(16, 3)},
    }  # fmt: skip
    return model, inputs.get(name, picture(2, 3, 32, 32))


def timm(name: str) -> Built:
    import timm as zoo

    return zoo.create_model(name, pretrained=False), picture()


def tiny_backbone() -> Any:
    """A small ResNet as the backbone of a detector."""
    import transformers

    sizes = {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
    }
    return transformers.ResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"])


def hgnet() -> Any:
    import transformers

    stages = {"stage_in_channels": [16, 32, 48, 64], "stage_mid_channels": [8, 16, 16, 16], "stage_out_channels": [32, 48, 64, 64],
              "stage_num_blocks": [1, 1, 1, 1], "stage_downsample": [False, True, True, True], "stage_light_block": [False] * 4,
              "stage_kernel_size": [3, 3, 3, 3], "stage_numb_of_layers": [2, 2, 2, 2], "stem_channels": [3, 8, 16]}  # fmt: skip
    return transformers.HGNetV2Config(
        embedding_size=16,
        hidden_sizes=[32, 48, 64, 64],
        **stages,
        out_features=["stage2", "stage3", "stage4"],
    )


def hf(name: str) -> Built:
    """A transformers model by its class, from a small config."""
    import transformers as zoo

    torch.manual_seed(0)
    text = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    seen = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
            "patch_size": 16}  # fmt: skip
    seq = {"vocab_size": 100, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 64,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}  # fmt: skip
    detr = {
        **{k: v for k, v in seq.items() if k.split("_")[0] in ("encoder", "decoder") or k == "d_model"},
        "num_queries": 10,
    }
    detr.pop("decoder_start_token_id")
    levels = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_queries": 10, "decoder_layers": 2,
              "encoder_hidden_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_denoising": 0,
              "initializer_range": 0.1,  # wide, so that no two boxes score the same: rounding would choose among them
              "encoder_in_channels": [32, 48, 64], "decoder_in_channels": [64, 64, 64], "anchor_image_size": None}  # fmt: skip
    view = {"pixel_values": picture(2, 3, 64, 64)}
    pair = {"input_ids": ids(), "decoder_input_ids": ids(2, 8)}
    configs: dict[str, Callable[[], tuple[Any, Any]]] = {
        "SamModel": lambda: (zoo.SamConfig(
            vision_config={**seen, "output_channels": 32, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 128,
                           "num_pos_feats": 16},
            prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
            mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}),
            {**view, "input_points": torch.rand(2, 1, 2, 2) * 64, "input_labels": torch.tensor([[[1, 0]]] * 2), "input_boxes": torch.tensor([[[4.0, 4.0, 40.0, 50.0]]] * 2), "input_masks": torch.randn(2, 1, 16, 16)}),
        "DetrForObjectDetection": lambda: (zoo.DetrConfig(backbone_config=tiny_backbone(), **detr), view),
        "ConditionalDetrForObjectDetection": lambda: (
            zoo.ConditionalDetrConfig(backbone_config=tiny_backbone(), **detr), view),
        "DeformableDetrForObjectDetection": lambda: (
            zoo.DeformableDetrConfig(backbone_config=tiny_backbone(), num_feature_levels=3, **detr), view),
        "RTDetrForObjectDetection": lambda: (zoo.RTDetrConfig(backbone_config=tiny_backbone(), **levels), view),
        "RTDetrV2ForObjectDetection": lambda: (zoo.RTDetrV2Config(backbone_config=tiny_backbone(), **levels), view),
        "DFineForObjectDetection": lambda: (zoo.DFineConfig(backbone_config=hgnet(), **{
            **levels, "encoder_in_channels": [48, 64, 64]}), view),
        "YolosForObjectDetection": lambda: (zoo.YolosConfig(**{**seen, "image_size": [64, 64]}, num_detection_tokens=5), view),
        "SegformerForSemanticSegmentation": lambda: (zoo.SegformerConfig(
            hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4], decoder_hidden_size=64), view),
        "Mask2FormerForUniversalSegmentation": lambda: (zoo.Mask2FormerConfig(
            backbone_config=zoo.SwinConfig(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4], window_size=4,
                                           out_features=["stage1", "stage2", "stage3", "stage4"]),
            hidden_dim=64, feature_size=64, mask_feature_size=64, encoder_layers=1, decoder_layers=2, num_attention_heads=4,
            encoder_feedforward_dim=128, dim_feedforward=128, num_queries=10), view),
        "UperNetForSemanticSegmentation": lambda: (zoo.UperNetConfig(
            backbone_config=zoo.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1],
                                               out_features=["stage1", "stage2", "stage3", "stage4"]),
            hidden_size=32, use_auxiliary_head=False), view),
        "DPTForDepthEstimation": lambda: (zoo.DPTConfig(
            **{**seen, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 32, 64, 64], fusion_hidden_size=32), view),
        "CLIPModel": lambda: (zoo.CLIPConfig(text_config=text, vision_config=seen, projection_dim=32),
                              {"input_ids": ids(), **view}),
        "SiglipModel": lambda: (zoo.SiglipConfig(text_config=text, vision_config=seen), {"input_ids": ids(), **view}),
        "WhisperForConditionalGeneration": lambda: (zoo.WhisperConfig(
            **{k: v for k, v in seq.items() if k != "max_position_embeddings"}, max_source_positions=32, max_target_positions=32,
            num_mel_bins=16, suppress_tokens=None, begin_suppress_tokens=None),
            {"input_features": torch.randn(2, 16, 64), "decoder_input_ids": ids(2, 8)}),
        "Wav2Vec2ForCTC": lambda: (zoo.Wav2Vec2Config(**{k: v for k, v in text.items() if k != "max_position_embeddings"},
            conv_dim=(32,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
            {"input_values": torch.randn(2, 6400)}),
        "HubertForCTC": lambda: (zoo.HubertConfig(**{k: v for k, v in text.items() if k != "max_position_embeddings"},
            conv_dim=(32,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
            {"input_values": torch.randn(2, 6400)}),
        "T5ForConditionalGeneration": lambda: (zoo.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_layers=2,
            num_heads=4, decoder_start_token_id=0), pair),
        "BartForConditionalGeneration": lambda: (zoo.BartConfig(**seq), pair),
        "MarianMTModel": lambda: (zoo.MarianConfig(**seq), pair),
        "MixtralForCausalLM": lambda: (zoo.MixtralConfig(**text, num_key_value_heads=2, num_local_experts=4,
            num_experts_per_tok=2), {"input_ids": ids()}),
        "Qwen3MoeForCausalLM": lambda: (zoo.Qwen3MoeConfig(**text, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=32, head_dim=16), {"input_ids": ids()}),
        "MambaForCausalLM": lambda: (zoo.MambaConfig(vocab_size=100, hidden_size=64, state_size=8, num_hidden_layers=2,
            time_step_rank=4), {"input_ids": ids()}),
        "Mamba2ForCausalLM": lambda: (zoo.Mamba2Config(vocab_size=100, hidden_size=64, num_heads=16, head_dim=8, n_groups=2,
            state_size=8, chunk_size=8, num_hidden_layers=2), {"input_ids": ids()}),
        "TimeSeriesTransformerForPrediction": lambda: (zoo.TimeSeriesTransformerConfig(prediction_length=4, context_length=8,
            lags_sequence=[1, 2], d_model=16, num_time_features=1),
            {"past_values": torch.randn(2, 10), "past_time_features": torch.randn(2, 10, 1),
             "past_observed_mask": torch.ones(2, 10), "future_values": torch.randn(2, 4),
             "future_time_features": torch.randn(2, 4, 1)}),
    }  # fmt: skip
    config, inputs = configs[name]()
    return getattr(zoo, name)(config), inputs


class Tagger(nn.Module):
    """Words in, a tag for each out: an embedding, a recurrent network, a linear head."""

    def __init__(self, kind: str, **settings: Any):
        super().__init__()
        self.words = nn.Embedding(100, 24)
        self.memory = getattr(nn, kind)(24, 32, batch_first=True, **settings)
        width = settings.get("proj_size") or 32
        self.tags = nn.Linear(width * (1 + settings.get("bidirectional", False)), 9)

    def forward(self, words: Tensor) -> Tensor:
        return self.tags(self.memory(self.words(words))[0])


class PackedTagger(Tagger):
    """The same on sentences of unequal length, packed."""

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        packed = nn.utils.rnn.pack_padded_sequence(self.words(words), lengths, batch_first=True)
        return self.tags(nn.utils.rnn.pad_packed_sequence(self.memory(packed)[0], batch_first=True)[0])


class CellTagger(nn.Module):
    """A cell that is stepped by hand."""

    def __init__(self, kind: str):
        super().__init__()
        self.words, self.cell, self.tags = nn.Embedding(100, 24), getattr(nn, kind)(24, 32), nn.Linear(32, 9)

    def forward(self, words: Tensor) -> Tensor:
        state, out = None, []
        for word in self.words(words).unbind(1):
            state = self.cell(word, state)
            out.append(self.tags(state[0] if isinstance(state, tuple) else state))
        return torch.stack(out, 1)


def torch_nn(name: str) -> Built:
    taggers: dict[str, Callable[[], nn.Module]] = {
        "LSTM": lambda: Tagger("LSTM"),
        "LSTM-2-both-ways": lambda: Tagger("LSTM", num_layers=2, bidirectional=True),
        "LSTM-projected": lambda: Tagger("LSTM", num_layers=2, proj_size=16),
        "GRU-2": lambda: Tagger("GRU", num_layers=2),
        "GRU-both-ways": lambda: Tagger("GRU", bidirectional=True),
        "RNN": lambda: Tagger("RNN", num_layers=2),
        "LSTM-packed": lambda: PackedTagger("LSTM", num_layers=2, bidirectional=True),
        "GRU-packed": lambda: PackedTagger("GRU"),
        "LSTMCell": lambda: CellTagger("LSTMCell"),
        "GRUCell": lambda: CellTagger("GRUCell"),
    }
    model = taggers[name]()
    return model, (ids(), torch.tensor([12, 7])) if "packed" in name else ids()


SOURCES: dict[str, Callable[[str], Built]] = {
    "nn": torch_nn, "torchvision": torchvision, "timm": timm, "hf": hf, "diffusers": diffusers, "ultralytics": ultralytics,
}  # fmt: skip
FURTHER: dict[str, Callable[[dict[str, Any]], list[dict[str, Any]]]] = {
    "hf:SamModel": lambda given: [{k: v for k, v in given.items() if k != "input_masks"}],
}
"""Inputs that take other branches of a model than its first ones."""
NAMES = [
    line
    for line in Path(__file__).with_suffix(".txt").read_text().split("\n")
    if line and not line.startswith("#")
]


def build(name: str) -> Built:
    """The model of this name with random weights, and inputs for it."""
    torch.manual_seed(0)
    source, _, kind = name.partition(":")
    model, inputs = SOURCES[source](kind)
    return fill(model), inputs


# --- what is tried


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = as_call(inputs)
    with without_cache(model), torch.no_grad():
        return tensors(model.eval()(*args, **kwargs))


def tensors(value: Any) -> list[Tensor]:
    return flat(dict(value) if isinstance(value, Mapping) else getattr(value, "sample", value))


def trained(model: nn.Module, inputs: Any) -> str:
    """A step of SGD on the mean square of what the model returns in train mode, or on its own loss."""
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    model.train()
    args, kwargs = as_call(inputs)
    if type(model).__module__.startswith("torchvision.models.detection"):
        sizes = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0]]), "labels": torch.tensor([1]),
                 "masks": torch.ones(1, 96, 96, dtype=torch.uint8), "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17])}  # fmt: skip
        args = (*args, [sizes, sizes])
    found = [o for o in tensors(model(*args, **kwargs)) if o.requires_grad]
    loss = torch.stack([o.float().square().mean() for o in found]).sum()
    loss.backward()
    torch.optim.SGD(weights, 1e-4).step()
    moved = sum(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    finite = all(bool(torch.isfinite(p).all()) for p in weights)
    model.eval()
    return "yes" if moved and finite else f"{moved} tensors moved, {'' if finite else 'not '}finite"


def apart(a: list[Tensor], b: list[Tensor]) -> str:
    """ "yes" where these are equal to rounding."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return "other shapes"
    gaps = [
        float((x.double() - y.double()).nan_to_num().abs().max())
        for x, y in zip(a, b, strict=True)
        if x.numel()
    ]
    return "yes" if max(gaps, default=0) <= 1e-5 else f"differs by {max(gaps):.1g}"


def without_secateur(folder: Path, name: str) -> tuple[str, nn.Module | None]:
    """(the form of the folder, the model that its own loader gives)."""
    import json

    about = json.loads((folder / "report.json").read_text())["artefact"]
    if about["form"] == "module":
        spec = importlib.util.spec_from_file_location("load_pruned", folder / "load_pruned.py")
        assert spec is not None and spec.loader is not None
        loader = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loader)
        return "loader", loader.load() if "build_" not in about["load"] else loader.load(build(name)[0])
    if "timm" in about["load"]:
        import timm as zoo

        return "plain", zoo.create_model(f"local-dir:{folder}", pretrained=True)
    import transformers

    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    if about["form"] == "plain":
        return "plain", getattr(transformers, kind).from_pretrained(folder)
    loader = getattr(transformers, about["load"].partition(".")[0])
    return "custom", loader.from_pretrained(folder, trust_remote_code=True)


def tried(name: str, say: Callable[[dict[str, Any]], None]) -> None:
    """One row, told field by field, so that what was found before a limit is kept."""
    import secateur
    from secateur import SecateurError

    warnings.simplefilter("ignore")
    start = time.process_time()
    model, inputs = build(name)
    say({"params": sum(p.numel() for p in model.parameters())})
    try:
        also = FURTHER.get(name, lambda given: [])(inputs)
        pruned = secateur.prune(model, inputs, also=also, method="group-magnitude", target="macs<=50%")
    except SecateurError as error:
        say({"status": "refused", "why": str(error)[:400], "seconds": round(time.process_time() - start, 1)})
        return
    report = pruned.report
    frozen = [g for g in pruned.graph.groups if g.reason]
    by_proof = [
        note
        for note in report["notes"]
        if note.partition(":")[0] in {g["name"].partition(":")[0] for g in report["groups"]}
    ]
    frozen.sort(key=lambda g: -g.size)
    told_why: dict[str, str] = {}
    for g in frozen:
        if g.reason not in ("it is an output of the model", "a single unit", "no layer produces it"):
            told_why.setdefault(g.reason.partition(" (")[0], f"{g.name} ({g.size}): {g.reason}")
    say({
        "status": "cut" if report["met"] else "missed",
        "macs_left": round(report["after"]["macs"] / report["before"]["macs"], 3),
        "met": report["met"],
        "whole": f"{len(frozen)} of {len(report['groups'])}",
        "refused_by_proof": len(by_proof),
        "why": "; ".join([*report.get("unreached", [])[:2], *by_proof[:3], *list(told_why.values())[:3]])[:600],
        "seconds": round(time.process_time() - start, 1),
    })  # fmt: skip
    say({"trained": attempt(lambda: trained(pruned.model, inputs))})
    pruned.model.eval()
    now = outputs(pruned.model, inputs)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "saved"

        def loaded() -> str:
            pruned.save(folder)
            fresh, _ = build(name)
            described = (folder / "config.json").is_file()
            again, _ = secateur.load(folder) if described else secateur.load(folder, model=fresh)
            return apart(now, outputs(again, inputs))

        def plain() -> str:
            form, again = without_secateur(folder, name)
            assert again is not None
            same = apart(now, outputs(again, inputs))
            return form if same == "yes" else f"{form}: {same}"

        say({"loaded": attempt(loaded)})
        say({"plain": attempt(plain)})
        for suffix in ("pt2", "onnx"):
            path = Path(place) / f"model.{suffix}"
            say({suffix: attempt(lambda path=path: secateur.export(pruned.model, inputs, path) and "yes")})


def attempt(work: Callable[[], str]) -> str:
    try:
        return work()
    except Exception as error:  # noqa: BLE001  whatever fails is the result
        return re.sub(r"\S*/model\.\w+: ", "", told(error).removeprefix("SecateurError: "))


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {row["model"]: dict(row) for row in csv.DictReader(file)}


def write(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows[name] for name in NAMES if name in rows)
    writer.writerows(row for name, row in rows.items() if name not in NAMES)
    atomic_write_text(path, text.getvalue())


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as the Markdown of docs/models.md."""
    columns = {"macs_left": "multiply-adds left", "met": "met", "refused_by_proof": "groups the proof refused", "trained": "trains",
               "loaded": "saved and loaded", "plain": "without secateur", "pt2": ".pt2", "onnx": "ONNX"}  # fmt: skip
    lines = [f"| model | parameters | {' | '.join(columns.values())} |", "| --- " * (len(columns) + 2) + "|"]
    for name in [*(n for n in NAMES if n in rows), *(n for n in rows if n not in NAMES)]:
        row = rows[name]
        cells = [brief(str(row.get(key) or "")) for key in columns]
        if row["status"] not in ("cut", "missed"):
            cells = [f"{row['status']}: {brief(str(row['why']), 160)}", *[""] * (len(columns) - 1)]
        lines.append(f"| `{name}` | {int(row['params'] or 0):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def brief(text: str, most: int = 90) -> str:
    text = {"True": "yes", "False": "no"}.get(text, text.replace("|", "\\|"))
    return text if len(text) <= most else text[:most].rpartition(" ")[0] + " ..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*", help="all of the list where none is given")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--timeout", type=int, default=400, help="processor seconds for a model")
    parser.add_argument("--memory", type=float, default=16, help="GB of address space")
    parser.add_argument("--again", action="store_true", help="try rows again that the table has")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--markdown", action="store_true", help="only print the table as Markdown")
    args = parser.parse_args()
    if args.markdown:
        print(table(rows_of(args.out)))
        return
    if args.list:
        print("\n".join(NAMES))
        return
    torch.set_num_threads(1)
    import secateur  # noqa: F401  every child has it by being forked

    rows = rows_of(args.out)
    for name in args.models or NAMES:
        if name in rows and not args.again:
            continue
        source = name.partition(":")[0]
        if source in ("ultralytics", "diffusers") and importlib.util.find_spec(source) is None:
            print(f"{name}: {source} isn't installed", file=sys.stderr)
            continue
        row = limited(tried, name, args.timeout, args.memory)
        if "reason" in row:  # what ended the process
            row["why"] = row.pop("reason")
        rows[name] = {"model": name, **row}
        write(args.out, rows)
        print(rows[name], flush=True)


if __name__ == "__main__":
    main()
