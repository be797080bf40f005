"""Files of npm packages for the page."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spar_d2.utils.io import atomic_write


@dataclass(frozen=True)
class Package:
    """An npm package.

    Attributes:
        name, version: tested version; npm checks its integrity.
        scripts: files that are copied.
        binaries: files that are compressed, which the page undoes.
        notice: copyright and license.
    """

    name: str
    version: str
    scripts: tuple[str, ...]
    binaries: tuple[str, ...]
    notice: str


RUNTIME = Package(
    "onnxruntime-web",
    "1.30.0",
    ("ort.wasm.bundle.min.mjs", "ort.webgpu.bundle.min.mjs"),
    # For the CPU, and for the GPU.
    ("ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.asyncify.wasm"),
    "Copyright (c) Microsoft Corporation. MIT License.",
)
TOKENIZERS = Package(
    "@huggingface/tokenizers",
    "0.2.0",
    ("tokenizers.min.mjs",),
    (),
    "Copyright The Hugging Face team. Apache License 2.0.",
)


def copy_package(package: Package, folder: Path, node_modules: str | os.PathLike = "") -> list[Path]:
    """Write the files of a package to a folder.

    Args:
        package: package.
        folder: output folder.
        node_modules: folder in which npm installed the package; "" downloads it with npm.

    Returns:
        The written files.

    Raises:
        FileNotFoundError: ``node_modules`` has no such files.
        RuntimeError: npm is not installed, or cannot download the package.
    """
    if node_modules:
        return _copy(package, folder, lambda name: _in_folder(package, Path(node_modules), name))
    full_name = f"{package.name}@{package.version}"
    if shutil.which("npm") is None:
        raise RuntimeError(f"the page needs the npm package {full_name}: install npm, or use --node-modules DIR")
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", full_name, "--silent", "--pack-destination", temporary]
        result = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        archives = list(Path(temporary).glob("*.tgz"))
        if result.returncode or not archives:
            reason = result.stderr.strip()[-300:]
            raise RuntimeError(f"npm cannot download {full_name}: {reason}; or use --node-modules DIR")
        with tarfile.open(archives[0]) as archive:
            return _copy(package, folder, lambda name: _in_archive(archive, name))


def _copy(package: Package, folder: Path, read: Callable[[str], bytes]) -> list[Path]:
    contents = {name: read(name) for name in package.scripts}
    # Without a time, so that equal inputs give equal files.
    contents |= {f"{name}.gz": gzip.compress(read(name), mtime=0) for name in package.binaries}
    notice = f"{package.name} {package.version}: {', '.join(contents)}\n{package.notice}\n"
    contents[f"{package.name.rpartition('/')[2]}.txt"] = notice.encode()
    return write_files(folder, contents)


def write_files(folder: Path, contents: dict[str, bytes]) -> list[Path]:
    """Atomically write files by name, and return their paths."""
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            Path(temporary).write_bytes(content)
    return [folder / name for name in contents]


def _in_folder(package: Package, node_modules: Path, name: str) -> bytes:
    path = node_modules / package.name / "dist" / name
    if not path.is_file():
        advice = f"npm install {package.name}@{package.version}"
        raise FileNotFoundError(f"--node-modules: there is no file {path}; run {advice} in the folder above it")
    return path.read_bytes()


def _in_archive(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/dist/{name}")
    assert file is not None
    return file.read()
