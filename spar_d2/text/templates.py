"""Prompt templates: sentences that a word is put into before it is encoded."""

from __future__ import annotations

from pathlib import Path

from open_clip import OPENAI_IMAGENET_TEMPLATES

SIMPLE = ("a photo of a {}.",)


def load_templates(source: str) -> tuple[str, ...]:
    """Templates by name or from a file.

    Args:
        source: "imagenet" (open_clip's 80, in its order), "simple" ("a photo of a {}."), or a UTF-8 file with one
            template per line.

    Returns:
        Sentences with one "{}" each.

    Raises:
        ValueError: neither a name nor a file, or a line without exactly one "{}".
    """
    if source == "imagenet":
        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if source == "simple":
        return SIMPLE
    if not Path(source).is_file():
        raise ValueError(f'MODEL.SPAR.TEMPLATES must be "imagenet", "simple" or a file, got {source!r}')
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"MODEL.SPAR.TEMPLATES: {source} is no text file in UTF-8 ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if line.count("{}") != 1]
    if wrong or not lines:
        raise ValueError(f'MODEL.SPAR.TEMPLATES: each line of {source} must have one "{{}}", got {wrong[:1]}')
    return tuple(lines)
