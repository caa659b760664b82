"""Builds the tokenizer and pretrains the text encoder as a classifier of captions.

Each position from the end token on must tell shape, foreground and background ("unknown" where
the caption leaves one out), and each position before it must still tell its own token, so that
words the classifier has no class for keep an identity that a LoRA can use.  Then it is frozen.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.shapes import tokenizer as vocabulary
from examples.shapes.common import Clock, arguments
from examples.shapes.draw import COLOURS, SHAPES, TRIGGERS, article, caption, random_scene

WIDTH = 128
BATCH = 64
ATTRIBUTES = {"shape": SHAPES, "fg": tuple(COLOURS), "bg": tuple(COLOURS)}


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a fresh two-layer text encoder of width 128 for 77 tokens."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=vocabulary.MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def encode(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return token ids [n, 77], padded with the end token as the pipeline does."""
    options = {"padding": "max_length", "truncation": True, "max_length": vocabulary.MAX_LENGTH}
    return tokenizer(captions, return_tensors="pt", **options).input_ids


def sample(rng: np.random.Generator, words: list[str]) -> tuple[str, list[int]]:
    """Return one caption and its classes (the last class of each attribute means unknown)."""
    scene = random_scene(rng)
    names = [scene.shape, scene.fg, scene.bg]
    classes = [values.index(name) for name, values in zip(names, ATTRIBUTES.values(), strict=True)]
    unknown = [len(values) for values in ATTRIBUTES.values()]
    kind = rng.random()
    if kind < 0.05:
        return "", unknown
    if kind < 0.10:
        return f"{article(scene.fg)} {scene.fg} {scene.shape}", [classes[0], classes[1], unknown[2]]
    if kind < 0.13:
        return f"{article(scene.shape)} {scene.shape}", [classes[0], *unknown[1:]]
    if kind < 0.16:
        return f"{article(scene.bg)} {scene.bg} background", [*unknown[:2], classes[2]]
    extra = [str(rng.choice(words)) for _ in range(int(rng.integers(1, 3)))] if rng.random() < 0.25 else []
    text = caption(rng, scene)
    if rng.random() < 0.12:
        text = text.replace(scene.shape, str(rng.choice(words)))
        classes[0] = unknown[0]
    return ", ".join([text, *extra]), classes


class Heads(nn.Module):
    """Linear read-outs on hidden states [..., 128]: one per attribute and one for the token."""

    def __init__(self, vocab_size: int) -> None:
        """Create the read-outs; they are thrown away after training."""
        super().__init__()
        self.attributes = nn.ModuleList(nn.Linear(WIDTH, len(v) + 1) for v in ATTRIBUTES.values())
        self.token = nn.Linear(WIDTH, vocab_size)

    def loss(
        self, hidden: torch.Tensor, ids: torch.Tensor, classes: torch.Tensor, end: int
    ) -> tuple[torch.Tensor, float]:
        """Return the loss and the attribute accuracy; ``hidden`` [n, 77, 128], ``classes`` [n, 3]."""
        rows = torch.arange(len(ids))
        first = (ids == end).int().argmax(dim=1)
        later = first + (torch.rand(len(ids)) * (ids.shape[1] - first)).long()
        read = torch.cat([hidden[rows, first], hidden[rows, later]])
        wanted = torch.cat([classes, classes])
        logits = [head(read) for head in self.attributes]
        loss = torch.stack([functional.cross_entropy(x, wanted[:, i]) for i, x in enumerate(logits)]).sum()
        correct = torch.stack([x.argmax(1) == wanted[:, i] for i, x in enumerate(logits)]).float().mean()
        spoken = torch.arange(ids.shape[1])[None] < first[:, None]
        loss = loss + 0.3 * functional.cross_entropy(self.token(hidden[spoken]), ids[spoken])
        return loss, float(correct)


def main() -> None:
    """Train for some minutes and write ``tokenizer`` and ``text_encoder`` into the work folder."""
    options = arguments(__doc__ or "", minutes=2.5, seed=1).parse_args()
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    tokenizer = vocabulary.build(options.work / "tokenizer")
    model = build_encoder(tokenizer)
    heads = Heads(len(tokenizer))
    words = sorted({*vocabulary.COMMON.split(), *TRIGGERS.values()} - set(SHAPES) - set(COLOURS))
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
    clock = Clock(options.minutes)
    for step in clock.steps():
        pairs = [sample(rng, words) for _ in range(BATCH)]
        ids = encode(tokenizer, [text for text, _ in pairs])
        # Nothing after the first end token differs but its position: 32 positions most of the time will do.
        length = 77 if step % 4 == 0 else 32
        hidden = model(ids[:, :length]).last_hidden_state
        classes = torch.tensor([c for _, c in pairs])
        loss, correct = heads.loss(hidden, ids[:, :length], classes, tokenizer.eos_token_id)
        optimizer.param_groups[0]["lr"] = clock.rate(step, 1.5e-3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        clock.log(step, loss=loss, correct=correct)
    model.save_pretrained(options.work / "text_encoder")


if __name__ == "__main__":
    main()
