#!/usr/bin/env python
"""Pre-train a tiny CLIP model on captioned images of the toy data set.

Takes 40 minutes on two CPU cores. The weights of tiny_clip are included in configs/toy.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from spar_d2.encoders import describe_encoder
from spar_d2.model_zoo import config_folder
from spar_d2.toy.scenes import GROUNDS, SCENE_CLASSES, training_scene

DEMO = config_folder() / "toy"
POOL_SEED = 1
CAPTION_STARTS = ("a photo of", "a picture of", "an image of", "")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO / "tiny_clip.json", help="open_clip model config")
    parser.add_argument("--output", type=Path, default=DEMO / "tiny_clip.safetensors", help="weights file to write")
    parser.add_argument("--steps", type=int, default=14000, help="optimizer steps")
    parser.add_argument("--scenes", type=int, default=24000, help="number of training images, generated first")
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    parser.add_argument("--lr", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights, captions and image order")
    return parser.parse_args()


def draw_pool(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Generate images (count, 3, 64, 64) uint8, and bool (count, 13): the classes that each image shows."""
    images = torch.empty(count, 3, 64, 64, dtype=torch.uint8)
    shown = torch.zeros(count, len(SCENE_CLASSES), dtype=torch.bool)
    for index in tqdm(range(count), desc="drawing scenes"):
        scene = training_scene(POOL_SEED, index)
        images[index] = torch.from_numpy(scene.image).permute(2, 0, 1)
        for name in scene.visible():
            shown[index, SCENE_CLASSES.index(name)] = True
    return images, shown


def write_caption(rng: np.random.Generator, shown: np.ndarray) -> tuple[str, np.ndarray]:
    """Write a caption such as "a photo of a star and a ring on grass". Also returns bool (13,): the named classes."""
    named = np.flatnonzero(shown)
    if rng.random() < 0.6:
        named = rng.permutation(named)[: rng.integers(1, len(named) + 1)]
    named = rng.permutation(named)
    things = [SCENE_CLASSES[k] for k in named if SCENE_CLASSES[k] not in GROUNDS]
    stuff = [SCENE_CLASSES[k] for k in named if SCENE_CLASSES[k] in GROUNDS]
    things_text = " and ".join(f"a {word}" for word in things)
    stuff_text = " and ".join(f"a {word}" if rng.random() < 0.3 else word for word in stuff)
    text = f"{things_text} on {stuff_text}" if things and stuff else things_text or stuff_text
    text = f"{CAPTION_STARTS[rng.integers(len(CAPTION_STARTS))]} {text}".strip()
    mask = np.zeros(len(SCENE_CLASSES), dtype=bool)
    mask[named] = True
    return text + ("." if rng.random() < 0.5 else ""), mask


def augment(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Random flips, random brightness and normalization: (B, 3, H, W) uint8 to float32."""
    x = images.float() / 255
    flip = torch.rand(len(x)) < 0.5
    x[flip] = x[flip].flip(-1)
    x = (x * (0.8 + 0.4 * torch.rand(len(x), 1, 1, 1))).clamp(0, 1)
    return (x - mean) / std


def pairwise_sigmoid_loss(logits: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Sigmoid loss of image-text pairs (SigLIP, arXiv:2303.15343, eq. 1), where an image may match several texts.

    Args:
        logits: (B, B) scaled and biased cosine similarities.
        positive: (B, B) bool, whether every class that the text names is in the image.
    """
    return F.softplus(torch.where(positive, -logits, logits)).sum() / len(logits)


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    open_clip.add_model_config(args.model)
    model = open_clip.create_model(args.model.stem, pretrained=None).train()
    tokenize = open_clip.get_tokenizer(args.model.stem)
    info = describe_encoder(str(args.model))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (info.pixel_mean, info.pixel_std))
    images, shown = draw_pool(args.scenes)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warm_up = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 * (1 + np.cos(np.pi * step / args.steps))),
    )
    progress, smooth, started = tqdm(range(args.steps), desc="pre-training"), None, time.time()
    for step in progress:
        picked = torch.from_numpy(rng.integers(0, args.scenes, args.batch))
        texts, masks = zip(*(write_caption(rng, row) for row in shown[picked].numpy()))
        named = torch.from_numpy(np.stack(masks))
        # A pair is positive if every class that the text names is in the image.
        positive = ~(named[None] & ~shown[picked][:, None]).any(-1)
        image_vectors, text_vectors, scale, bias = model(augment(images[picked], mean, std), tokenize(list(texts)))
        loss = pairwise_sigmoid_loss(scale * image_vectors @ text_vectors.T + bias, positive)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{smooth:.3f}")
        if step % 2000 == 1999 or step == args.steps - 1:
            write_weights(model, args.output)
            progress.write(f"step {step + 1}: loss {smooth:.4f}, {time.time() - started:.0f} s, wrote {args.output}")


def write_weights(model: torch.nn.Module, path: Path) -> None:
    """Write half-precision safetensors, through a temporary file so that no incomplete file is left behind."""
    tensors = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
