"""Vision-language models and vision transformers, a small file a family: facts that running the model cannot tell."""

from secateur.families.vlm.facts import Facts, Layout

__all__ = ["Facts", "Layout"]
