"""Trains the lab's CLIP: open_clip's own classes, a ModifiedResNet and a text transformer. Called by `build_models`.

Two things differ from plain CLIP training, both stated in the model card. The towers keep a constant offset (the last
layer's bias, frozen) so that matched cosines and the modality gap are those of real CLIPs. And a head that does not
ship asks the image embedding for everything in the scene, so that it holds more than captions say.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .build_run import Pictures, Trainer
from .shapes import BACKGROUNDS, COLORS, POSITIONS, SHAPES, SIZES, TEXTURES, Scene

WIDTH = 128
CONFIG = {
    "embed_dim": WIDTH,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 24, "head_width": 64, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 4, "layers": 3},
}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
OFFSET_NORM, EMBEDDING_NORM = 11.0, 15.5  # the frozen offset, and the length that raw embeddings are kept near
FINAL_OFFSET = (
    1.15  # the offset grows by this once trained: rankings stay, matched cosines of full captions fall below 0.5
)
BATCH = 128
_FULL_SHARE = 0.5  # of captions that say everything
_SLOT_SIZES = (2, len(SHAPES), len(COLORS), len(TEXTURES), len(SIZES))
_DETAILS = 7  # x, y, angle, radius, rgb


class Vocabulary:
    """The tokens that captions use, renumbered 0..n−1; start and end come last, so argmax still finds the end."""

    def __init__(self, pictures: Pictures) -> None:
        self._tokenizer = open_clip.SimpleTokenizer()
        rng = np.random.default_rng(5)
        texts = [pictures.world.caption(pictures.scene(i), rng) for i in range(4000)]
        texts += [pictures.world.full_caption(pictures.scene(i)) for i in range(4000)]
        used = sorted({token for text in texts for token in self._tokenizer.encode(text)})
        self.tokens = [0, *used, self._tokenizer.sot_token_id, self._tokenizer.eot_token_id]
        self._number = {token: i for i, token in enumerate(self.tokens)}

    def ids(self, text: str) -> list[int]:
        words = [self._number[t] for t in self._tokenizer.encode(text)][:75]
        return [len(self.tokens) - 2, *words, len(self.tokens) - 1]


class Towers(nn.Module):
    """The CLIP with a small vocabulary while it trains, and the head that asks for the whole scene."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        text = {**CONFIG["text_cfg"], "vocab_size": vocabulary}
        self.clip: Any = open_clip.CLIP(WIDTH, CONFIG["vision_cfg"], text)  # type: ignore[arg-type]
        slots = len(POSITIONS) * (sum(_SLOT_SIZES) + _DETAILS)
        self.head = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, slots + len(BACKGROUNDS) + 3))
        self._place_cones()

    def _place_cones(self) -> None:
        generator = torch.Generator().manual_seed(3)
        image, text = nn.init.orthogonal_(torch.empty(2, WIDTH), generator=generator) * OFFSET_NORM
        pool, norm = self.clip.visual.attnpool.c_proj.bias, self.clip.ln_final.bias
        with torch.no_grad():
            pool.copy_(image)
            projection = torch.as_tensor(self.clip.text_projection)
            norm.copy_(torch.linalg.lstsq(projection.T, text[:, None]).solution[:, 0])
        # The projection is frozen with the bias: together they hold the text cone in place.
        for frozen in (pool, norm, self.clip.logit_scale, self.clip.text_projection):
            frozen.requires_grad_(False)

    def image(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
        return self.clip.visual(((pixels - mean) / std).contiguous(memory_format=torch.channels_last))

    def text(self, ids: list[list[int]]) -> Tensor:
        """Pooled embeddings (B, 128); captions run in groups of like length: attention is causal."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out = [torch.empty(0)] * len(ids)
        for start in range(0, len(ids), 32):
            group = order[start : start + 32]
            width = max(len(ids[i]) for i in group)
            tokens = torch.tensor([ids[i] + [0] * (width - len(ids[i])) for i in group])
            x = self.clip.token_embedding(tokens) + self.clip.positional_embedding[:width]
            x = self.clip.ln_final(self.clip.transformer(x, attn_mask=self.clip.attn_mask[:width, :width]))
            ends = torch.tensor([len(ids[i]) - 1 for i in group])
            for i, row in zip(group, x[torch.arange(len(group)), ends] @ self.clip.text_projection, strict=True):
                out[i] = row
        return torch.stack(out)


def scene_targets(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Slot classes (B, 9, 5), −1 where empty; slot details (B, 9, 7); scene values (B, 4): background, grey, light."""
    places = {name: i for i, name in enumerate(POSITIONS)}
    classes = torch.full((len(scenes), len(places), 5), -1, dtype=torch.int64)
    classes[:, :, 0] = 0
    details = torch.zeros(len(scenes), len(places), _DETAILS)
    whole = torch.zeros(len(scenes), 4)
    for row, scene in enumerate(scenes):
        for t in scene.things:
            slot = places[t.position]
            known = (1, SHAPES.index(t.shape), COLORS.index(t.color), TEXTURES.index(t.texture), SIZES.index(t.size))
            classes[row, slot] = torch.tensor(known)
            cx, cy = POSITIONS[t.position]
            details[row, slot] = torch.tensor(
                [(t.x - cx) / 4, (t.y - cy) / 4, t.angle * 4, (t.radius - 11.5) / 2, *t.rgb]
            )
        whole[row] = torch.tensor(
            [BACKGROUNDS.index(scene.background), scene.background_rgb[0], *(v * 20 for v in scene.light)]
        )
    return classes, details, whole


def scene_loss(head: Tensor, classes: Tensor, details: Tensor, whole: Tensor) -> tuple[Tensor, float]:
    """Cross-entropy of the slots' attributes and squared error of their details; and the share of attributes right."""
    batch, places = classes.shape[:2]
    slots = head[:, : places * (sum(_SLOT_SIZES) + _DETAILS)].view(batch, places, -1)
    logits = slots[..., : sum(_SLOT_SIZES)].split(list(_SLOT_SIZES), dim=-1)
    there = classes[..., 0] == 1
    loss = 3 * F.cross_entropy(logits[0].flatten(0, 1), classes[..., 0].flatten())
    right = []
    for k in range(1, 5):
        loss = loss + F.cross_entropy(logits[k][there], classes[..., k][there])
        right.append((logits[k][there].argmax(-1) == classes[..., k][there]).float().mean())
    loss = loss + F.mse_loss(slots[..., sum(_SLOT_SIZES) :][there], details[there])
    loss = loss + F.cross_entropy(head[:, -6:-3], whole[:, 0].long()) + F.mse_loss(head[:, -3:], whole[:, 1:])
    return loss, torch.stack(right).mean().item()


def build(folder: Path, pictures: Pictures, steps: int) -> None:
    """Train and write `folder/clip`: open_clip_config.json and open_clip_model.safetensors (float16)."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(pictures)
    towers = Towers(len(vocabulary.tokens)).to(memory_format=torch.channels_last)
    trainer = Trainer("clip", folder, towers, steps, learning_rate=1e-3, ema_decay=0.995)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng([21, step])
        rows = np.sort(rng.choice(pictures.count, BATCH, replace=False))
        scenes = [pictures.scene(int(i)) for i in rows]
        full = rng.random(BATCH) < _FULL_SHARE
        texts = [
            pictures.world.full_caption(s) if f else pictures.world.caption(s, rng)
            for s, f in zip(scenes, full, strict=True)
        ]
        image, text = towers.image(pictures.tensor(rows)), towers.text([vocabulary.ids(t) for t in texts])
        scale = min(100.0, 20.0 + 80.0 * step / (0.3 * steps))  # the temperature comes down to 0.01 and stays
        similarity = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        target = torch.arange(BATCH)
        contrast = (F.cross_entropy(similarity * scale, target) + F.cross_entropy(similarity.T * scale, target)) / 2
        asked, right = scene_loss(towers.head(image), *scene_targets(scenes))
        length = sum((e.norm(dim=1) - EMBEDDING_NORM).square().mean() for e in (image, text))
        figures = {
            "contrast": contrast.item(), "asked": asked.item(), "right": right,
            "matched": similarity.diag().mean().item(),
            "r1": (similarity.argmax(1) == target).float().mean().item(),
        }  # fmt: skip
        return contrast + 0.5 * asked + 0.02 * length, figures

    trainer.run(loss_of)
    save(towers, vocabulary, folder / "clip")


def save(towers: Towers, vocabulary: Vocabulary, out: Path) -> None:
    """Write the CLIP as open_clip's `local-dir:` reads it: the full token table, rows of unused tokens zero."""
    state = {name: value.detach().clone() for name, value in towers.clip.state_dict().items() if name != "attn_mask"}
    table = torch.zeros(CONFIG["text_cfg"]["vocab_size"], WIDTH)
    table[vocabulary.tokens] = state["token_embedding.weight"]
    state["token_embedding.weight"] = table
    state["logit_scale"] = torch.tensor(math.log(100.0))
    for bias in ("visual.attnpool.c_proj.bias", "ln_final.bias"):
        state[bias] = state[bias] * FINAL_OFFSET
    out.mkdir(parents=True, exist_ok=True)
    half = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}
    save_file(half, out / "open_clip_model.safetensors", {"format": "pt"})
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    (out / "open_clip_model.safetensors").chmod(0o644)
    config = {"model_cfg": CONFIG, "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
