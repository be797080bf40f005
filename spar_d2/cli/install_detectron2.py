"""Install Detectron2 into the running Python: from its git repository, a prebuilt wheel, or a pure-Python copy.

Detectron2 is on no package registry under its own name. By default its git repository is tried first, which compiles
the optional `_C` extension. If that cannot be reached or built, the pure-Python copy in the LabGym wheel is renamed
back, changed in one line for NumPy 2, and installed. "--source prebuilt" installs a compiled wheel for the installed
PyTorch from the index of github.com/MiroPsota/torch_packages_builder, a third party.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

GIT_URL = "https://github.com/facebookresearch/detectron2.git"
GIT_COMMIT = "02b5c4e295e990042a714712c21dc79b731e8833"
PREBUILT = "https://miropsota.github.io/torch_packages_builder/detectron2/"
_PYTHON_TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"
WHEEL = "LabGym==3.1.2"
WHEEL_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
# In NumPy 2, `copy=False` means "never copy" and raises an error.
MENDED = "detectron2/evaluation/sem_seg_evaluation.py"
OLD_CODE, NEW_CODE = "Image.open(f), copy=copy, ", "Image.open(f), copy=copy or None, "
FOLDER, OLD_PREFIX, NEW_PREFIX = "LabGym/detectron2/", "LabGym.detectron2", "detectron2"
VERSION = "0.6+pure.python"
REQUIREMENTS = (
    "Pillow", "matplotlib", "pycocotools", "termcolor", "yacs", "tabulate", "cloudpickle", "tqdm", "tensorboard",
    "fvcore", "iopath", "omegaconf", "hydra-core", "packaging", "setuptools",
)  # fmt: skip
NOTICE = f"""Detectron2, Copyright (c) Facebook, Inc. and its affiliates.
Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
Source: https://github.com/facebookresearch/detectron2

This is the pure-Python part of Detectron2 0.6, without the compiled extension detectron2._C, taken from the folder
{FOLDER} of the wheel {WHEEL}. The import prefix {OLD_PREFIX} was replaced by {NEW_PREFIX}, and in
{MENDED} "{OLD_CODE.strip()}" by "{NEW_CODE.strip()}", which NumPy 2
needs; nothing else was changed.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source",
        choices=("auto", "git", "prebuilt", "wheel"),
        default="auto",
        help="git: compile from the repository; prebuilt: compiled by a third party for some versions of PyTorch; "
        "wheel: the pure-Python copy; auto (default): git, then wheel",
    )
    parser.add_argument("--wheel-file", type=Path, help="use a local LabGym wheel instead of downloading it")
    parser.add_argument("--force", action="store_true", help="install even if detectron2 is already installed")
    args = parser.parse_args()
    if args.wheel_file and args.source in ("git", "prebuilt"):
        parser.error(f"--wheel-file requires --source wheel or auto, not {args.source}")

    version = installed_version()
    if version and not args.force:
        print(f"detectron2 {version} is already installed; nothing to do.")
        return 0
    if importlib.util.find_spec("torch") is None:
        print("detectron2 requires torch: install this project first (pip install -e .), then run this command again.")
        return 1
    if args.source == "prebuilt":
        return report() if install_prebuilt() else 1
    if args.source == "git" or (args.source == "auto" and not args.wheel_file):
        if install_from_git():
            return report()
        if args.source == "git":
            return 1
        print("Falling back to the pure-Python copy.")
    return report() if install_from_wheel(args.wheel_file) else 1


def installed_version() -> str:
    """Return the version of the installed detectron2, or "" if it cannot be imported."""
    probe = "import detectron2, importlib.metadata as m\n"
    probe += "try: print(m.version('detectron2'))\nexcept m.PackageNotFoundError: print(detectron2.__version__)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tempfile.gettempdir())
    return done.stdout.strip() if done.returncode == 0 else ""


def report() -> int:
    version = installed_version()
    print(f"detectron2 {version} is installed." if version else "detectron2 was installed but cannot be imported.")
    return 0 if version else 1


def pip(*arguments: str) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode == 0


def install_from_git() -> bool:
    if shutil.which("git") is None:
        print("git is not installed.")
        return False
    print(f"Connecting to {GIT_URL} ...", flush=True)
    try:
        probe = subprocess.run(
            ["git", "ls-remote", GIT_URL, "HEAD"],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "GIT_TERMINAL_PROMPT": "0"},
        )
        reason = probe.stderr.strip().splitlines()[-1:] if probe.returncode else []
    except subprocess.TimeoutExpired:
        probe, reason = None, ["timeout after 30 s"]
    if probe is None or probe.returncode:
        print(f"The repository cannot be reached: {' '.join(reason)}")
        return False
    print("Compiling detectron2; this takes a few minutes.", flush=True)
    if pip("install", "--no-build-isolation", f"git+{GIT_URL}@{GIT_COMMIT}"):
        return True
    print("The build failed (its output is above).")
    return False


def install_prebuilt() -> bool:
    import torch

    platform = "cpu" if torch.version.cuda is None else f"cu{torch.version.cuda.replace('.', '')}"
    wanted = f"pt{torch.__version__.partition('+')[0]}{platform}"
    print(f"Looking for {wanted} in {PREBUILT} ...", flush=True)
    try:
        with urllib.request.urlopen(PREBUILT, timeout=30) as answer:
            page = answer.read().decode()
    except OSError as error:
        print(f"The index cannot be reached: {error}")
        return False
    version = prebuilt_version(page, wanted)
    if not version:
        print(f"There is no wheel of {wanted} for {_PYTHON_TAG}; PyTorch 2.3 to 2.13 on x86-64 have some.")
        return False
    return pip("install", "--no-deps", "--only-binary", ":all:", "--find-links", PREBUILT, f"detectron2=={version}")


def prebuilt_version(page: str, wanted: str) -> str:
    """Newest version in an HTML index of wheels that was built for a PyTorch ("pt2.3.0cpu") and this Python, or ""."""
    names = re.findall(r"detectron2-([\w.+]+)-(cp\d+)-", urllib.parse.unquote(page))
    fitting = [version for version, python in names if version.endswith(wanted) and python == _PYTHON_TAG]
    return fitting[-1] if fitting else ""


def install_from_wheel(wheel: Path | None) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            print(f"Downloading {WHEEL} (1.9 MB) ...", flush=True)
            options = ("--quiet", "--no-deps", "--ignore-requires-python", "--only-binary", ":all:")
            if not pip("download", *options, "--dest", folder, WHEEL):
                print("pip failed to download it. To use a local file: --source wheel --wheel-file FILE")
                return False
            wheel = next(Path(folder).glob("*.whl"))
        if not wheel.is_file():
            print(f"--wheel-file: there is no file {wheel}")
            return False
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            print(f"{wheel.name} is not the expected file: its sha256 is {digest}, expected {WHEEL_SHA256}.")
            return False
        return pip("install", "--quiet", "--force-reinstall", "--no-deps", str(repack(wheel, Path(folder))))


def repack(source: Path, folder: Path) -> Path:
    """Write a wheel that contains only detectron2, with metadata, license notice and RECORD."""
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if name.startswith(FOLDER) and not name.endswith("/"):
                content = archive.read(name)
                if name.endswith(".py"):
                    content = content.replace(OLD_PREFIX.encode(), NEW_PREFIX.encode())
                target = "detectron2/" + name[len(FOLDER) :]
                if target == MENDED:
                    content = content.replace(OLD_CODE.encode(), NEW_CODE.encode())
                files[target] = content
    info = f"detectron2-{VERSION}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {VERSION}", "License: Apache-2.0"]
    metadata += ["Summary: Detectron2 without its compiled extension", "Home-page: " + GIT_URL.removesuffix(".git")]
    metadata += [f"Requires-Dist: {name}" for name in REQUIREMENTS]
    files[f"{info}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    files[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: install_detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/NOTICE"] = NOTICE.encode()
    record = [f"{name},sha256={_record_hash(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = ("\n".join([*record, f"{info}/RECORD,,"]) + "\n").encode()
    packed = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed


def _record_hash(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main())
