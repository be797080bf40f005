"""Serve an encoder over HTTP: requests have an image and class names, responses have the segmentation.

spar-d2 serve --encoder ViT-B-16 --pretrained student.safetensors
curl -F image=@photo.jpg --form-string words="cat, kitten; dog; sky" http://127.0.0.1:8000/segment
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import socket
import sys
from pathlib import Path

from spar_d2.utils.errors import make_logs_printable, readable_errors

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def parse_args(description: str | None) -> argparse.Namespace:
    from spar_d2.service.limits import Limits

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--encoder", required=True, metavar="NAME", help="model, as in MODEL.SPAR.ENCODER")
    add("--pretrained", required=True, metavar="TAG_OR_FILE", help='weights, as in MODEL.SPAR.PRETRAINED ("": random)')
    add(
        "--vocabulary",
        default="",
        metavar="CLASSES",
        help="classes of requests without words; see spar-d2 segment (default: words are required)",
    )
    add("--templates", default="imagenet", help="prompt templates, as in MODEL.SPAR.TEMPLATES (default: %(default)s)")
    add("--device", help='"cpu", "cuda", ... (default: cuda if there is a GPU)')
    add("--precision", default="auto", help="as in MODEL.SPAR.PRECISION (default: %(default)s)")
    add("--anyup", default="", metavar="FILE", help="weights of AnyUp, for the refinement anyup")
    add("--dinov3-repo", default="", metavar="DIR", help="clone of the dinov3 repository, for DINOv3.txt")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, default=8000, help="port to listen at; 0 for a free one (default: %(default)s)")
    allowed = "another name by which browsers reach the service, such as that of a proxy; repeatable"
    add("--allow-host", action="append", default=[], metavar="NAME", help=allowed)
    limits = parser.add_argument_group("limits of requests")
    helps = {
        "max_bytes": "size of a request",
        "max_pixels": "pixels of an image",
        "max_patches": "patches of an image",
        "max_waiting": "requests that wait for the model; others get the status 503",
        "max_classes": "classes of a vocabulary",
        "max_words": "class names and synonyms of a vocabulary",
        "max_windows": "windows of an image with inference=sliding_window",
        "head_seconds": "seconds in which the head of a request must be received",
        "body_seconds": "seconds in which the rest of a request must be received",
    }
    for name, text in helps.items():
        default = getattr(Limits, name)
        flag, kind = f"--{name.replace('_', '-')}", type(default)
        limits.add_argument(flag, type=kind, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    args = parser.parse_args()
    args.limits = {name: getattr(args, name) for name in helps}
    return args


def main() -> None:
    run(__doc__, page=False)


def run(description: str | None, page: bool) -> None:
    """Parse the command line, and serve until the process is stopped."""
    args = parse_args(description)
    with readable_errors():
        serve(args, page)


def serve(args: argparse.Namespace, page: bool) -> None:
    try:
        import python_multipart  # noqa: F401
        import uvicorn
        from fastapi import FastAPI  # noqa: F401
    except ImportError as error:
        raise RuntimeError('the service needs more packages: pip install "spar_d2[web]"') from error
    import torch

    from spar_d2.predict import Predictor
    from spar_d2.service.app import Settings, create_app
    from spar_d2.service.limits import Limits
    from spar_d2.service.model import Model
    from spar_d2.service.server import server_config
    from spar_d2.text import Vocabulary

    # Warnings quote the words of clients.
    make_logs_printable(logging.getLogger("spar_d2"))
    limits = Limits(**args.limits)
    with listen(args.host, args.port) as listener:
        vocabulary = Vocabulary.load(args.vocabulary) if args.vocabulary else None
        options = {name: getattr(args, name) for name in ("templates", "device", "dinov3_repo", "precision", "anyup")}
        predictor = Predictor(args.encoder, args.pretrained, **options)
        model = Model(predictor, args.encoder, args.pretrained, bool(args.anyup), vocabulary)
        local = args.host in _LOOPBACK
        hosts = {*_LOOPBACK, args.host, *args.allow_host} if local or args.allow_host else None
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        settings = Settings(Path(args.encoder).stem, device, vocabulary)
        app = create_app(model, settings, limits, page, hosts)
        if not local:
            print(
                f"warning: --host {args.host}: everyone who reaches this address may use the service. It has neither "
                "passwords nor encryption; put it behind a proxy that has.",
                file=sys.stderr,
            )
        address = f"[{args.host}]" if ":" in args.host else args.host
        what = "The page is at" if page else f"Serving {settings.encoder} on {settings.device} at"
        print(f"{what} http://{address}:{listener.getsockname()[1]} (stop with Ctrl-C)", flush=True)
        # Ctrl-C is raised again after the server has stopped.
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(server_config(app, limits, log_level="warning")).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Open the port before the model is loaded. Raises ``ValueError`` or ``RuntimeError`` if that fails."""
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be in 0..65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise RuntimeError(f"--host {host} --port {port} cannot be used: {error}; try another --port") from error
