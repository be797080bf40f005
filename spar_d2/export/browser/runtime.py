"""Files of onnxruntime-web, from npm or from a folder."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from spar_d2.utils.io import atomic_write

# This version was tested; npm checks its integrity.
PACKAGE = "onnxruntime-web@1.30.0"
_SCRIPTS = ("ort.wasm.bundle.min.mjs", "ort.webgpu.bundle.min.mjs")
# For the CPU, and for the GPU. They are compressed to a third, which the page undoes.
_BINARIES = ("ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.asyncify.wasm")
_NOTICE = f"""{PACKAGE} (ort.*.mjs, ort-*.wasm.gz)
Copyright (c) Microsoft Corporation. Licensed under the MIT License.
"""


def copy_runtime(folder: Path, package: str | os.PathLike = "") -> list[Path]:
    """Write the files of onnxruntime-web to a folder.

    Args:
        folder: output folder.
        package: folder of the unpacked npm package; "" downloads it with npm.

    Returns:
        The written files.

    Raises:
        FileNotFoundError: ``package`` has no such files.
        RuntimeError: npm is not installed, or cannot download the package.
    """
    if package:
        return _copy(folder, lambda name: _in_folder(Path(package), name))
    if shutil.which("npm") is None:
        raise RuntimeError(f"the page needs {PACKAGE}: install npm, or unpack that package and use --runtime FOLDER")
    with tempfile.TemporaryDirectory() as temporary:
        command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", temporary]
        result = subprocess.run(command, capture_output=True, text=True, cwd=temporary)
        archives = list(Path(temporary).glob("*.tgz"))
        if result.returncode or not archives:
            raise RuntimeError(
                f"npm cannot download {PACKAGE}: {result.stderr.strip()[-300:]}; or use --runtime FOLDER"
            )
        with tarfile.open(archives[0]) as archive:
            return _copy(folder, lambda name: _in_archive(archive, name))


def _copy(folder: Path, read: Callable[[str], bytes]) -> list[Path]:
    contents = {name: read(name) for name in _SCRIPTS}
    # Without a time, so that equal inputs give equal files.
    contents |= {f"{name}.gz": gzip.compress(read(name), mtime=0) for name in _BINARIES}
    contents["onnxruntime-web.txt"] = _NOTICE.encode()
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            Path(temporary).write_bytes(content)
    return [folder / name for name in contents]


def _in_folder(package: Path, name: str) -> bytes:
    path = package / "dist" / name
    if not path.is_file():
        raise FileNotFoundError(f"--runtime must be the unpacked npm package {PACKAGE}: there is no file {path}")
    return path.read_bytes()


def _in_archive(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(f"package/dist/{name}")
    assert file is not None
    return file.read()
