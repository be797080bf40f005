"""Packages only: metadata and dependencies are in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["spar_d2", "spar_d2.*"]), "spar_d2.configs"],
    # Configs lie beside the package, where users of Detectron2 look for them, and are installed within it.
    package_dir={"spar_d2.configs": "configs"},
    package_data={
        "spar_d2": ["py.typed"],
        "spar_d2.export.browser": ["page/*"],
        "spar_d2.text": ["vocabularies/*.txt"],
        "spar_d2.service": ["page/*"],
        "spar_d2.configs": ["*.yaml", "*/*"],
    },
)
