"""Prints figures on the shape of the code: ``python tests/journeys.py``.

The files that one image passes in a distillation step, the calls between them, repeated work at start, and sizes.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "spar_d2"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


class Journey:
    """Records calls between files of the package.

    Attributes:
        files: calls into each file, by its path within the package.
        moves: calls from one file into another; each has a return.
    """

    def __init__(self) -> None:
        self.files: Counter[str] = Counter()
        self.moves = 0

    def __enter__(self) -> Journey:
        sys.setprofile(self._record)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _record(self, frame, event, argument) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(str(PACKAGE)):
            return
        # Comprehensions and lambdas belong to their function.
        if frame.f_code.co_name.startswith("<") and frame.f_code.co_name != "<lambda>":
            return
        place = str(Path(frame.f_code.co_filename).relative_to(PACKAGE))
        self.files[place] += 1
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(str(PACKAGE)):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != frame.f_code.co_filename:
            self.moves += 1


def distillation_step(folder: Path) -> tuple[Journey, Journey, Counter[str]]:
    """Start and second step of a distillation with the toy encoder, and counts of look-ups."""
    from PIL import Image

    from reference import reference_image
    from spar_d2.encoders import model_configs, registry
    from spar_d2.engine.setup import load_config
    from spar_d2.engine.trainer import Trainer

    for number in range(2):
        Image.fromarray(reference_image(96, 128, number)).save(folder / f"{number}.png")
    sizes = ["SPAR.DATA.SCALE_BOX", "(192,96)", "SPAR.DATA.MIN_SHORT_SIDE", 64, "SPAR.DATA.CROP_MIN_SIDE", 48]
    few = ["SPAR.TEACHER.WINDOWS_PER_IMAGE", 4, "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0]
    places = ["SPAR.DATA.IMAGES", str(folder), "OUTPUT_DIR", str(folder), "MODEL.DEVICE", "cpu", "DATASETS.TEST", ()]
    cfg = load_config("toy/distill.yaml", [*sizes, *few, *places])
    counts: Counter[str] = Counter()

    def counting(module, name: str):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        for each in [m for m in list(sys.modules.values()) if getattr(m, name, None) is function]:
            setattr(each, name, counted)

    counting(registry, "find_family")
    # Behind the cache, so only real reads count.
    model_configs._read_version.cache_clear()
    with Journey() as start:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
    counts["model config reads"] = model_configs._read_version.cache_info().misses
    from detectron2.utils.events import EventStorage

    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        for trainer.iter in range(2):
            trainer.before_step()
            with Journey() as step:
                trainer.run_step()
                trainer.after_step()
    return start, step, counts


def main() -> None:
    warnings.simplefilter("ignore")
    import logging

    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        start, step, counts = distillation_step(Path(folder))
    print(f"distillation step: {len(step.files)} files, {step.moves} calls between files")
    for place, calls in step.files.most_common():
        print(f"    {calls:4d}  {place}")
    print(f"start of a distillation: {len(start.files)} files, {start.moves} calls between files")
    print("    " + ", ".join(f"{name}: {count}" for name, count in counts.items()))
    lines = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    packages: Counter[str] = Counter()
    for path, count in lines.items():
        packages[path.relative_to(PACKAGE).parts[0]] += count
    print(f"spar_d2/: {sum(lines.values())} lines in {len(lines)} files")
    print("    " + ", ".join(f"{name} {count}" for name, count in packages.most_common() if not name.endswith(".py")))
    long = {str(path.relative_to(PACKAGE)): count for path, count in lines.items() if count > 300}
    print(f"files above 300 lines: {long or 'none'}")


if __name__ == "__main__":
    main()
