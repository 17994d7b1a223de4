"""Prompts that are trained in both towers of a frozen model of pictures and words."""

from secateur.prompts.files import load_prompts, save_prompts
from secateur.prompts.method import PromptMethod, Seen
from secateur.prompts.train import Prompted, train_prompts

__all__ = ["PromptMethod", "Prompted", "Seen", "load_prompts", "save_prompts", "train_prompts"]
