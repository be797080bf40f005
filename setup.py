from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="spar_d2",
    version="0.1.0",
    description="SPAR (Single-Pass Any-Resolution ViT) for Detectron2",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["spar_d2", "spar_d2.*"]),
    package_data={"spar_d2.text": ["vocabularies/*.txt"]},
    # Detectron2 itself is on no package registry: tools/install_detectron2.py installs it.
    install_requires=[
        "torch>=2.1",
        "torchvision>=0.16",
        "open_clip_torch>=3.0",
        "timm>=1.0.20",
        # SigLIP's tokenizers.
        "transformers>=4.40",
        "numpy>=1.24",
        "safetensors>=0.4",
        "opencv-python>=4.6",
        "Pillow>=9.4",
        "tqdm>=4.60",
        # What Detectron2's Python part imports.
        "fvcore>=0.1.5",
        "iopath>=0.1.9",
        "pycocotools>=2.0.6",
        "omegaconf>=2.1",
        "hydra-core>=1.1",
        "yacs>=0.1.8",
        "tabulate>=0.8",
        "termcolor>=1.1",
        "cloudpickle>=2.0",
        "tensorboard>=2.10",
        "matplotlib>=3.6",
        "packaging",
        # Its model zoo imports pkg_resources, which later versions no longer have.
        "setuptools<81",
    ],
    extras_require={
        # Reads the official labels of Pascal Context, which are MATLAB files.
        "datasets": ["scipy>=1.9"],
        "test": ["pytest>=7.0", "pytest-xdist>=3.5", "hypothesis>=6.80", "ruff~=0.17.0", "scipy>=1.9"],
    },
)
