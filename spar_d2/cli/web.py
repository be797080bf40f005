"""Open a page on which images are segmented with a model of this machine.

spar-d2 web --encoder ViT-B-16 --pretrained student.safetensors
"""

from __future__ import annotations

from spar_d2.cli import serve


def main() -> None:
    serve.run(__doc__, page=True)
