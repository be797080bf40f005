"""Entry point of ``torch.hub.load(repo, "spar_encoder", folder)``."""

dependencies = ["torch", "torchvision", "timm", "open_clip", "safetensors", "cv2", "tqdm"]


def spar_encoder(folder: str, pretrained: str = "", **settings):
    """Build a dense encoder from a model folder of ``spar-d2 export folder``, or from a model name and weights.

    Args:
        folder: model folder or model name.
        pretrained: see :func:`spar_d2.encoders.build_encoder`.
        settings: other arguments of :func:`spar_d2.encoders.build_encoder`.
    """
    from spar_d2.encoders import build_encoder

    return build_encoder(folder, pretrained, **settings)
