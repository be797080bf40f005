#!/usr/bin/env python
"""Train a MaskTransformer on some classes of the toy data set, and test it on all: PQ of seen and unseen classes.

Rows: single pass of the pre-trained encoder, and the student in a single pass and with a sliding window for the pooled
features. A last row gives the masks of the first model random classes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from panoptic import fine_tune, measured_once, spread
from torch import nn

import spar_d2  # noqa: F401  registers data sets and models
from spar_d2.engine.setup import load_config
from spar_d2.engine.trainer import Trainer
from spar_d2.model_zoo import get_config_file
from spar_d2.utils.errors import readable_errors
from spar_d2.utils.io import write_text
from spar_d2.utils.tables import format_table

COLUMNS = ("PQ seen", "PQ unseen", "PQ things", "PQ stuff")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config-file", default=get_config_file("toy/open_vocabulary.yaml"), help="training config")
    add("--student", type=Path, default=Path("output/demo/student.safetensors"), help="weights of the student")
    add("--seeds", type=int, default=3, help="number of trainings of each encoder (default: %(default)s)")
    add(
        "--output", type=Path, default=Path("output/demo_open_vocabulary"), help="output folder; finished runs are kept"
    )
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    with readable_errors():
        if args.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
        if not args.student.is_file():
            raise FileNotFoundError(f"--student: {args.student} does not exist; make demo creates it")
        rows: dict[str, list[dict]] = {}
        for seed in range(args.seeds):
            for name, weights in (("pre-trained", ""), ("student", str(args.student.resolve()))):
                for mode, scores in scores_of(args, name, weights, seed).items():
                    rows.setdefault(f"{name}, {mode}", []).append(scores)
    table = format_table(
        ["encoder", *COLUMNS],
        [[name, *(spread([scores[c] for scores in runs]) for c in COLUMNS)] for name, runs in rows.items()],
    )
    write_text(table + "\n", args.output / "table.md")
    print(f"\n{table}\n\nThe table is in {args.output}.")


def scores_of(args: argparse.Namespace, name: str, weights: str, seed: int) -> dict[str, dict[str, float]]:
    """Return the scores of one model, which is trained and tested unless this was done before."""
    overrides = [
        "OUTPUT_DIR",
        str(args.output / f"{name}_{seed}"),
        "SEED",
        seed,
        *(["MODEL.SPAR.PRETRAINED", weights] if weights else []),
    ]
    cfg = load_config(args.config_file, [*args.opts, *overrides])
    return measured_once(cfg, lambda: tested(args, cfg, f"{name}, seed {seed}", bool(weights)))


def tested(args: argparse.Namespace, cfg: CfgNode, name: str, is_student: bool) -> dict[str, dict[str, float]]:
    """Train and test one model."""
    scores, model = fine_tune(cfg, args.config_file, name)
    unseen = set(cfg.MODEL.MASK_TRANSFORMER.UNSEEN)
    found = {"single pass": summary(scores, unseen, cfg.DATASETS.TEST[0])}
    if is_student:
        model.inference = "sliding_window"
        found["sliding window"] = summary(Trainer.test(cfg, model)["panoptic_seg"], unseen, cfg.DATASETS.TEST[0])
    else:
        with random_classes(model):
            found["random classes"] = summary(Trainer.test(cfg, model)["panoptic_seg"], unseen, cfg.DATASETS.TEST[0])
    return found


def summary(scores: dict[str, float], unseen: set[str], dataset: str) -> dict[str, float]:
    """Average the PQ of the classes."""
    metadata = MetadataCatalog.get(dataset)
    names = [*metadata.thing_classes, *metadata.stuff_classes[1:]]
    groups = (set(names) - unseen, unseen)
    seen_pq, unseen_pq = (float(np.mean([scores[f"PQ-{name}"] for name in sorted(group)])) for group in groups)
    return dict(zip(COLUMNS, (seen_pq, unseen_pq, scores["PQ_th"], scores["PQ_st"])))


class random_classes:
    """Context manager in which the classes of a model's queries are permuted at random, separately for each query."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        plain, generator = self.model._probabilities, torch.Generator().manual_seed(0)

        def permuted(*arguments) -> torch.Tensor:
            probabilities = plain(*arguments)
            order = torch.rand(probabilities[..., :-1].shape, generator=generator).argsort(-1)
            return torch.cat([probabilities[..., :-1].gather(-1, order), probabilities[..., -1:]], dim=-1)

        self.model._probabilities = permuted

    def __exit__(self, *_) -> None:
        del self.model._probabilities


if __name__ == "__main__":
    main()
