"""Evidence on a real encoder: DINOv2 ViT-S/14, CamVid frames and photographs, see docs/real_encoder.md.

    python -m benchmarks.real_encoder --weights dinov2_vits14.safetensors --camvid CAMVID --photos PHOTOS --output OUT

CAMVID has the folders images/{train,val,test} and labels/{train,val,test} (480x360, labels 0..10, 255 ignored). PHOTOS
is any folder of images. Each frame is encoded once per method and size; the features are stored in OUT/features. All
parts can be stopped and run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import describe_machine
from benchmarks.real_encoder_directions import RANGES, principal_directions, unexplained
from benchmarks.real_encoder_features import CLASSES, STRIDE, Features, frames, photographs
from benchmarks.real_encoder_labels import Scores, label_by_examples, train_and_label
from spar_d2.evaluation.feature_evaluator import FeatureEvaluator
from spar_d2.modeling.refinement import Refinement, parse_refine
from spar_d2.utils.io import write_text
from spar_d2.utils.selection import evenly_spread
from spar_d2.utils.tables import format_table
from spar_d2.visualization import class_colors, draw_panels, fit_pca_colors

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/distill/dinov2_vit_s_14_small.yaml"
# Short sides of the frames in pixels, multiples of the patch size: about 1, 1.5, 2 and 3 times the original frames. The
# second one is the pre-training size.
SIDES = (364, 518, 714, 1078)
PARTS = ("distill", "encode", "distance", "directions", "probe", "examples", "pictures")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    for name in ("weights", "camvid", "photos", "output"):
        add(f"--{name}", type=Path, required=True)
    add("--student", type=Path, help="weights of the student (default: that of the part distill)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--sides", nargs="+", type=int, default=SIDES, help="short sides of the frames (default: %(default)s)")
    add("--strides", nargs="*", type=int, default=[], help=f"other strides than {STRIDE} of the sliding window")
    add("--seeds", type=int, default=3, help="number of probes with different seeds (default: %(default)s)")
    add("--train-frames", type=int, default=36, help="labeled training frames (default: %(default)s)")
    add("--test-frames", type=int, default=24, help="labeled test frames (default: %(default)s)")
    add("--neighbours", nargs="*", type=int, default=[400, 50], help="of LPOSS, in examples (default: %(default)s)")
    add("--refine", nargs="*", default=["lposs"], help="refinements, in examples; as MODEL.SPAR.REFINE, but anyup")
    add("--split", default="test", choices=("val", "test"), help="split of the test frames (default: %(default)s)")
    add("opts", nargs="*", metavar="KEY VALUE", help="config keys of the distillation to override, after --")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    args.student = args.student or args.output / "student/student.safetensors"
    for part in args.parts:
        started = time.time()
        print(f"{part} ...", flush=True)
        globals()[f"run_{part}"](args)
        minutes = (time.time() - started) / 60
        print(f"{part}: {minutes:.1f} minutes on {describe_machine(torch.device('cpu'))}", flush=True)


def run_distill(args: argparse.Namespace) -> None:
    """Distill on the training frames and the photographs."""
    images = f"{args.camvid.resolve() / 'images/train'}:{args.photos.resolve()}"
    keys = ["MODEL.SPAR.PRETRAINED", args.weights.resolve(), "SPAR.DATA.IMAGES", images]
    keys += ["SPAR.TEACHER.CACHE_DIR", args.output.resolve() / "teacher_cache"]
    keys += ["OUTPUT_DIR", args.student.resolve().parent]
    keys += ["MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu", *args.opts]
    command = ["train", "--config-file", RECIPE, "--resume", *keys]
    subprocess.run([sys.executable, "-m", "spar_d2.cli", *map(str, command)], check=True, cwd=ROOT)


def features_at(args: argparse.Namespace, side: int) -> dict[str, Features]:
    """Return the features of each method at a size."""
    folder, single = args.output / "features", "single pass"
    methods = {
        f"pre-trained, {single}": Features(folder, args.weights, side),
        "pre-trained, sliding window": Features(folder, args.weights, side, STRIDE),
    }
    for stride in args.strides:
        methods[f"pre-trained, sliding window, stride {stride}"] = Features(folder, args.weights, side, stride)
    if args.student.is_file():
        methods[f"student, {single}"] = Features(folder, args.student, side)
    return methods


def run_encode(args: argparse.Namespace) -> None:
    """Encode the labeled frames, and measure the seconds of each method."""
    rows = []
    files = [f for split, count in _splits(args) for f in frames(args.camvid, split, count)]
    for side in args.sides:
        for name, features in features_at(args, side).items():
            for file in tqdm(files, desc=f"{name}, {side}", unit="frame"):
                features(file)
            rows.append([side, name, f"{features.seconds(files):.2f}"])
    write_text(format_table(["short side", "method", "seconds per frame"], rows) + "\n", args.output / "seconds.md")


def _splits(args: argparse.Namespace) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("train", args.train_frames), (args.split, args.test_frames)


def run_distance(args: argparse.Namespace) -> None:
    """Compare single passes with the sliding window, on test frames and photographs."""
    rows = []
    sources = {"CamVid": frames(args.camvid, *_splits(args)[1]), "photographs": photographs(args.photos, 6)}
    for title, files in sources.items():
        for side in args.sides if title == "CamVid" else args.sides[1:3]:
            methods = features_at(args, side)
            target = methods.pop("pre-trained, sliding window")
            for name, features in methods.items():
                evaluator = FeatureEvaluator(lambda: torch.nn.Identity(), distributed=False)
                for file in tqdm(files, desc=f"{title}, {name}, {side}", unit="image"):
                    evaluator.process([{"image": target(file)}], [{"features": features(file)}])
                scores = (evaluator.evaluate() or {})["features"]
                rows.append([title, side, name, f"{scores['cosine']:.1f}", f"{scores['unexplained']:.1f}"])
    heads = ["images", "short side", "features", "cosine to the window, %", "unexplained variance, %"]
    write_text(format_table(heads, rows) + "\n", args.output / "distance.md")


def run_directions(args: argparse.Namespace) -> None:
    """Compare single passes with the sliding window along the principal directions of the window's features."""
    rows = []
    for side in args.sides:
        methods = features_at(args, side)
        target = methods.pop("pre-trained, sliding window")
        directions = None
        for split, count in _splits(args):
            files = frames(args.camvid, split, count)
            targets = [target(file) for file in files]
            directions = principal_directions(targets) if directions is None else directions
            for name, features in methods.items():
                parts = unexplained(targets, [features(file) for file in files], directions)
                rows.append([side, split, name, *(f"{error:.0f} ({share:.0f})" for share, error in parts)])
    heads = [f"{first + 1} to {last}" if last else f"from {first + 1}" for first, last in RANGES]
    table = format_table(["short side", "frames", "features", *heads, "all"], rows, left=3)
    write_text(table + "\n", args.output / "directions.md")


def run_probe(args: argparse.Namespace) -> None:
    """Train linear probes on the features of each method, for every size and seed."""
    rows, (train, test) = [], (frames(args.camvid, *part) for part in _splits(args))
    for side in args.sides:
        for name, features in features_at(args, side).items():
            found = []
            for seed in tqdm(range(args.seeds), desc=f"probe, {name}, {side}", unit="seed"):
                scores = Scores()
                for file, labels in train_and_label(features, train, test, seed):
                    scores.add(file, labels)
                found.append(scores.of_all())
            (miou, boundary), (deviation, _) = np.mean(found, axis=0), np.std(found, axis=0)
            rows.append([side, name, f"{miou:.1f} ± {deviation:.1f}", f"{boundary:.1f}"])
            print(rows[-1], flush=True)
    write_text(format_table(["short side", "features", "mIoU", "boundary IoU"], rows) + "\n", args.output / "probe.md")


def run_examples(args: argparse.Namespace) -> None:
    """Segment by five frames of examples for each class, also with refinements."""
    refinements = {"": Refinement(())}
    for value in args.refine:
        steps = parse_refine(value)
        if "lposs" in steps:
            refinements |= {f" + {value}, {k} neighbors": Refinement(steps, k) for k in args.neighbours}
        else:
            refinements[f" + {value}"] = Refinement(steps)
    rows, (train, test) = [], (frames(args.camvid, *part) for part in _splits(args))
    for side in args.sides:
        for name, features in features_at(args, side).items():
            scores = {refined: Scores() for refined in refinements}
            path = args.output / "examples.yaml"
            for refined, file, labels in label_by_examples(features, train, test, path, refinements):
                scores[refined].add(file, labels)
            found = {refined: one.of_all() for refined, one in scores.items()}
            rows += [[side, name + key, f"{miou:.1f}", f"{boundary:.1f}"] for key, (miou, boundary) in found.items()]
    heads = ["short side", "features", "mIoU", "boundary IoU"]
    write_text(format_table(heads, rows) + "\n", args.output / "examples.md")


def run_pictures(args: argparse.Namespace) -> None:
    """Draw the features of all methods in one projection, and labels of the probes of the first seed."""
    side = args.sides[min(2, len(args.sides) - 1)]
    methods = features_at(args, side)
    train, test = (frames(args.camvid, *part) for part in _splits(args))
    chosen = evenly_spread(test, 3)
    palette = np.asarray([*class_colors(CLASSES), (0, 0, 0)], dtype=np.uint8)
    labeled = {name: dict(train_and_label(features, train, chosen, 0)) for name, features in methods.items()}
    feature_rows, label_rows = [], []
    for file in [*chosen, *photographs(args.photos, 2)]:
        maps = [features(file) for features in methods.values()]
        colors = fit_pca_colors(maps)
        picture = np.asarray(Image.open(file).convert("RGB").resize((side * 4 // 3, side), Image.Resampling.BICUBIC))
        feature_rows.append([picture, *(colors(one).numpy() for one in maps)])
        if file in chosen:
            truth = np.minimum(Scores.truth(file), len(CLASSES))
            label_rows.append([picture, palette[truth], *(palette[found[file].numpy()] for found in labeled.values())])
    draw_panels(feature_rows, ["image", *methods], args.output / "features.png")
    legend = dict(zip(CLASSES, palette.tolist()))
    draw_panels(label_rows, ["image", "ground truth", *methods], args.output / "labels.png", legend)


if __name__ == "__main__":
    main()
