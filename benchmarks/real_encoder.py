"""Evidence on a real encoder: DINOv2 ViT-S/14, CamVid frames and photographs, see docs/real_encoder.md.

    python -m benchmarks.real_encoder --weights dinov2_vits14.safetensors --camvid CAMVID --photos PHOTOS --output OUT

CAMVID has the folders images/{train,val,test} and labels/{train,val,test} (480x360, labels 0..10, 255 ignored). PHOTOS
is any folder of images. Most parts run commands of spar-d2; they can be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.measure import describe_machine
from spar_d2.encoders import DenseEncoder, build_encoder
from spar_d2.evaluation.feature_evaluator import FeatureEvaluator
from spar_d2.modeling.example_embeddings import encoder_pixels
from spar_d2.teacher import SlidingWindowTeacher
from spar_d2.utils.io import write_text
from spar_d2.utils.selection import evenly_spread
from spar_d2.utils.tables import format_table
from spar_d2.visualization import draw_panels, fit_pca_colors

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/distill/dinov2_vit_s_14_small.yaml"
CLASSES = ["sky", "building", "pole", "road", "pavement", "tree"]
CLASSES += ["sign symbol", "fence", "car", "pedestrian", "bicyclist"]
ENCODER = "vit_small_patch14_dinov2"
WINDOW, STRIDE = 518, 224
# Short sides of the frames: near the pre-training size, 1.5, 2 and 3 times the original frames.
SIDES = (518, 546, 714, 1078)
PARTS = ("distill", "distance", "probe", "examples", "pictures")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name in ("weights", "camvid", "photos", "output"):
        add(f"--{name}", type=Path, required=True)
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--sides", nargs="+", type=int, default=SIDES, help="short sides of the frames (default: %(default)s)")
    add("--seeds", type=int, default=3, help="number of probes with different seeds (default: %(default)s)")
    add("--frames", type=int, default=24, help="frames for distances and pictures (default: %(default)s)")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys of the distillation to override, after --")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    write_inputs(args)
    for part in args.parts:
        started = time.time()
        print(f"{part} ...", flush=True)
        globals()[f"run_{part}"](args)
        print(
            f"{part}: {(time.time() - started) / 60:.1f} minutes on {describe_machine(torch.device('cpu'))}", flush=True
        )


def write_inputs(args: argparse.Namespace) -> None:
    """Write the data-set file and the examples file: five frames for each class."""
    splits = {name: {kind: f"{kind}/{name}" for kind in ("images", "labels")} for name in ("train", "val", "test")}
    dataset = {"name": "camvid", "root": str(args.camvid.resolve()), "classes": CLASSES, "splits": splits}
    write_text(yaml.safe_dump(dataset, sort_keys=False), args.output / "camvid.yaml")
    examples: list[list[dict]] = [[] for _ in CLASSES]
    for labels in sorted((args.camvid.resolve() / "labels/train").glob("*.png")):
        counts = np.bincount(np.asarray(Image.open(labels)).ravel(), minlength=256)
        image = next((args.camvid.resolve() / "images/train").glob(f"{labels.stem}.*"))
        for number, listed in enumerate(examples):
            if counts[number] >= 200 and len(listed) < 5:
                listed.append({"image": str(image), "mask": str(labels), "value": number})
    classes = [{"name": name, "examples": listed} for name, listed in zip(CLASSES, examples)]
    content = {"classes": classes, "center": True, "clusters": 3}
    write_text(yaml.safe_dump(content, sort_keys=False), args.output / "examples.yaml")


def command(name: str, *words: object) -> None:
    """Run a sub-command of spar-d2."""
    subprocess.run([sys.executable, "-m", "spar_d2.cli", name, *map(str, words)], check=True, cwd=ROOT)


def model_keys(args: argparse.Namespace, side: int) -> list[object]:
    """Config keys of the encoder, the sliding window and the size of the frames."""
    encoder = [
        "MODEL.SPAR.ENCODER",
        ENCODER,
        "MODEL.SPAR.PRETRAINED",
        args.weights.resolve(),
        "MODEL.SPAR.READOUT",
        "value",
    ]
    teacher = ["SPAR.TEACHER.WINDOW", WINDOW, "SPAR.TEACHER.STRIDE", STRIDE, "MODEL.SPAR.PRECISION", "float32"]
    sizes = ["INPUT.MIN_SIZE_TRAIN", f"({side},)", "INPUT.MIN_SIZE_TEST", side]
    data = ["SPAR.DATA.REGISTER", f"('{(args.output / 'camvid.yaml').resolve()}',)", "SPAR.TEST.BOUNDARY_IOU", True]
    return [*encoder, *teacher, *sizes, *data, "MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu"]


def student_file(args: argparse.Namespace) -> Path:
    return args.output.resolve() / "student" / "student.safetensors"


def run_distill(args: argparse.Namespace) -> None:
    """Distill on the training frames and the photographs."""
    images = f"{args.camvid.resolve() / 'images/train'}:{args.photos.resolve()}"
    keys = ["MODEL.SPAR.PRETRAINED", args.weights.resolve(), "SPAR.DATA.IMAGES", images]
    keys += ["SPAR.TEACHER.CACHE_DIR", args.output.resolve() / "teacher_cache", "OUTPUT_DIR", student_file(args).parent]
    keys += ["MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu", *args.opts]
    command("train", "--config-file", RECIPE, "--resume", *keys)


def run_distance(args: argparse.Namespace) -> None:
    """Compare single passes with the sliding window, on test frames and photographs."""
    encoders = {"pre-trained": encoder(args.weights)}
    if student_file(args).is_file():
        encoders["student"] = encoder(student_file(args))
    teacher = SlidingWindowTeacher(encoders["pre-trained"], WINDOW, STRIDE)
    rows = []
    folders = {"CamVid test": args.camvid / "images/test", "photographs": args.photos}
    for title, folder in folders.items():
        for side in args.sides:
            files = evenly_spread(sorted(folder.iterdir()), args.frames)
            evaluators = {name: FeatureEvaluator(lambda: torch.nn.Identity(), False) for name in encoders}
            for file in files:
                x = frame(encoders["pre-trained"], file, side)
                with torch.inference_mode():
                    target = teacher.targets([x[0]])[0][0]
                    for name, single in encoders.items():
                        evaluators[name].process([{"image": target}], [{"features": single(x)[0]}])
            for name, evaluator in evaluators.items():
                scores = (evaluator.evaluate() or {})["features"]
                rows.append([title, side, name, f"{scores['cosine']:.1f}", f"{scores['unexplained']:.1f}"])
            print(rows[-len(encoders) :], flush=True)
    heads = ["images", "short side", "single pass of", "cosine to the window, %", "unexplained variance, %"]
    write_text(format_table(heads, rows) + "\n", args.output / "distance.md")


def run_probe(args: argparse.Namespace) -> None:
    """Train linear probes on single pass, sliding window and student, for every size and seed."""
    rows = []
    for side in args.sides:
        values: dict[str, list[tuple[float, float, float]]] = {}
        for seed in range(args.seeds):
            folder = args.output.resolve() / f"probe_{side}_{seed}"
            keys = [*model_keys(args, side), "DATASETS.TRAIN", "('camvid_train',)", "DATASETS.TEST", "('camvid_test',)"]
            keys += ["SEED", seed + 1, "SOLVER.BASE_LR", 0.03, "SPAR.DATA.EPOCHS", 40]
            student = ["--student", student_file(args)] if student_file(args).is_file() else []
            config = ["--config-file", ROOT / "configs/linear_probe/own_data.yaml", *student, "--output", folder]
            command("probe", *config, "--", *keys)
            for record in json.loads((folder / "table.json").read_text()):
                scores = record["scores"]
                found = (scores["mIoU"], scores.get("BoundaryIoU", float("nan")), record["seconds per image"])
                values.setdefault(record["method"], []).append(found)
        for method, found in values.items():
            mean, deviation = np.mean(found, axis=0), np.std(found, axis=0)
            rows.append([side, method, f"{mean[0]:.1f} ± {deviation[0]:.1f}", f"{mean[1]:.1f}", f"{mean[2]:.2f}"])
    heads = ["short side", "features", "mIoU", "boundary IoU", "seconds per image"]
    write_text(format_table(heads, rows) + "\n", args.output / "probe.md")


def run_examples(args: argparse.Namespace) -> None:
    """Segment by five frames of examples for each class."""
    for side in args.sides:
        folder = args.output.resolve() / f"examples_{side}"
        student = ["--student", student_file(args)] if student_file(args).is_file() else []
        keys = [*model_keys(args, side), "MODEL.SPAR.VOCABULARY", (args.output / "examples.yaml").resolve()]
        command("evaluate", "--datasets", "camvid_test", *student, "--output", folder, "--opts", *keys)


def run_pictures(args: argparse.Namespace) -> None:
    """Draw the features of single pass, sliding window and student in one projection."""
    pretrained = encoder(args.weights)
    singles = {"pre-trained, single pass": pretrained}
    if student_file(args).is_file():
        singles["student, single pass"] = encoder(student_file(args))
    teacher = SlidingWindowTeacher(pretrained, WINDOW, STRIDE)
    rows = []
    folders = (args.camvid / "images/test", args.photos)
    for file in (file for folder in folders for file in evenly_spread(sorted(folder.iterdir()), 2)):
        x = frame(pretrained, file, max(args.sides[:3]))
        with torch.inference_mode():
            maps = [teacher.targets([x[0]])[0][0], *(single(x)[0] for single in singles.values())]
        colors = fit_pca_colors(maps)
        height, width = x.shape[-2:]
        picture = np.asarray(Image.open(file).convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
        rows.append([picture, *(colors(one).permute(1, 2, 0).numpy() for one in maps)])
    draw_panels(rows, ["image", "sliding window", *singles], args.output / "features.png")


def encoder(weights: Path) -> DenseEncoder:
    """Build DINOv2 with the read-out of the recipe."""
    return build_encoder(ENCODER, str(weights), readout="value").freeze()


def frame(like: DenseEncoder, file: Path, side: int) -> torch.Tensor:
    """Read an image with the given short side, as encoder input (1, 3, H, W)."""
    image = Image.open(file).convert("RGB")
    scale = side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return encoder_pixels(like, np.asarray(image.resize(size, Image.Resampling.BICUBIC)), "cpu")


if __name__ == "__main__":
    main()
