"""A text encoder and a small transformer that draws the digit that a prompt asks for, by a rectified flow."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.training.sampling import Sampler, sample
from secateur.utils.random import seeded

WIDTH, HEADS, INNER, SIZE, PATCH = 64, 4, 128, 8, 2
STEPS = 20
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = {
    "a {}": 0,
    "the digit {}": 0,
    "draw the number {}": 0,
    "the digit after {}": 1,
    "the digit before {}": -1,
}
"""What a prompt says, and how far the digit that it asks for is from the one that it names."""
WORDS = ("", "a", "the", "digit", "draw", "number", "after", "before", *DIGITS)
LENGTH = 4


def prompts(count: int) -> tuple[list[str], Tensor]:
    """(prompts, the digits they ask for): 0 to 9 in turn, with each template in turn.

    >>> prompts(40)[0][13], prompts(40)[0][33], prompts(40)[1][33].item()
    ('the digit three', 'the digit after two', 3)
    """
    digits, texts = torch.arange(count) % 10, []
    for number, digit in enumerate(digits.tolist()):
        template, away = [*TEMPLATES.items()][number // 10 % len(TEMPLATES)]
        if not 0 <= digit - away < 10:  # nothing comes before zero
            template, away = "the digit {}", 0
        texts.append(template.format(DIGITS[digit - away]))
    return texts, digits


def encode(texts: Sequence[str]) -> Tensor:
    """Numbers of the words, int64 [B, 4]; shorter prompts are filled up with an empty word.

    >>> encode(["a three"]).tolist()
    [[1, 11, 0, 0]]

    Raises `SecateurError` for a word that there isn't, and more than four.
    """
    rows = []
    for text in texts:
        words = text.lower().split()
        if unknown := next((word for word in words if word not in WORDS), None):
            raise SecateurError(
                f"the word {unknown!r} isn't known", where=f"prompt {text!r}", fix=", ".join(WORDS[1:])
            )
        if len(words) > LENGTH:
            raise SecateurError(f"more than {LENGTH} words", where=f"prompt {text!r}", fix="say less")
        rows.append([WORDS.index(word) for word in words] + [0] * (LENGTH - len(words)))
    return torch.tensor(rows, dtype=torch.int64).view(-1, LENGTH)


class Attention(nn.Module):
    """Attention of x [B, N, width] to `seen` [B, M, width], or to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = HEADS, WIDTH // HEADS
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (
            layer(y).view(y.shape[0], y.shape[1], self.heads, self.head_dim).transpose(1, 2)
            for layer, y in ((self.to_q, x), (self.to_k, seen), (self.to_v, seen))
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.to_out(out.reshape(x.shape[0], x.shape[1], self.heads * self.head_dim))


class Block(nn.Module):
    """Attention to itself, to the prompt where there is one, and a feed-forward part, each behind a norm."""

    def __init__(self, prompted: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        if prompted:
            self.norm2, self.cross = nn.LayerNorm(WIDTH), Attention()
        self.norm3 = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor, prompt: Tensor | None = None) -> Tensor:
        seen = self.norm1(x)
        x = x + self.attention(seen, seen)
        if prompt is not None:
            x = x + self.cross(self.norm2(x), prompt)
        return x + self.down(F.gelu(self.up(self.norm3(x))))


class TextEncoder(nn.Module):
    """Two blocks over the words of a prompt: int64 [B, 4] -> [B, 4, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Block(prompted=False) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Denoiser(nn.Module):
    """Three blocks over patches of 2 x 2 pixels, which read the prompt by cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.places = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, WIDTH))
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block(prompted=True) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.leave = nn.ConvTranspose2d(WIDTH, 1, PATCH, stride=PATCH)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        frequencies = 1000.0 ** (-torch.arange(WIDTH // 2, device=t.device) / (WIDTH // 2 - 1))
        angles = 100 * t * frequencies.to(t.dtype)
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        h = self.enter(x).flatten(2).transpose(1, 2) + self.places + time[:, None]
        for block in self.blocks:
            h = block(h, prompt)
        return self.leave(self.norm(h).transpose(1, 2).unflatten(2, (SIZE // PATCH, SIZE // PATCH)))


class DigitsDiffusion(nn.Module):
    """Predicts the velocity from noise to the picture that a prompt asks for.

    >>> DigitsDiffusion()(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1), encode(["a three", "the digit after one"])).shape
    torch.Size([2, 1, 8, 8])

    x: [B, 1, 8, 8]; t: [B, 1] in 0..1, 0 is noise; words: int64 [B, 4], as `encode` gives them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder, self.denoiser = TextEncoder(), Denoiser()

    def forward(self, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
        return self.denoiser(x, t, self.text_encoder(words))

    def example_inputs(self, shape: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Noise half way, and two prompts."""
        noise, words = sampler().start(2, 0)
        device = self.denoiser.places.device
        return noise.to(device), torch.full((2, 1), 0.5, device=device), words.to(device)

    @torch.no_grad()
    def calibration_inputs(self, samples: int, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the model meets while it draws, in batches of 16: drawing i at step i of its way, from the first again behind
        the last."""
        states: list[Tensor] = []
        device = self.denoiser.places.device
        noise, words = (part.to(device) for part in sampler().start(samples, seed))

        def kept(model: nn.Module, x: Tensor, number: int, words: Tensor) -> Tensor:
            states.append(x)
            return step(model, x, number, words)

        sample(self, Sampler(STEPS, sampler().start, kept), noise, words)
        numbers = torch.arange(samples, device=device) % STEPS
        x = torch.stack(states)[numbers, torch.arange(samples, device=device)]
        return [*zip(*(part.split(16) for part in (x, numbers[:, None] / STEPS, words)), strict=True)]


def step(model: nn.Module, x: Tensor, number: int, words: Tensor, steps: int = STEPS) -> Tensor:
    """One Euler step of the flow."""
    return x + model(x, x.new_full((len(x), 1), number / steps), words) / steps


def sampler(steps: int = STEPS) -> Sampler:
    """Noise of the seed, and prompts for the digits 0 to 9 in turn."""

    def start(count: int, seed: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(count, 1, SIZE, SIZE, generator=seeded(seed, "digits-diffusion"))
        return noise, encode(prompts(count)[0])

    return Sampler(steps, start, functools.partial(step, steps=steps))
