"""Prompt templates, into which class names are inserted."""

from __future__ import annotations

from pathlib import Path

from open_clip import OPENAI_IMAGENET_TEMPLATES

SIMPLE = ("a photo of a {}.",)


def load_templates(source: str) -> tuple[str, ...]:
    """Load prompt templates by name or from a file.

    Args:
        source: "imagenet" (the 80 templates of open_clip, in the same order), "simple" ("a photo of a {}."), or a UTF-8
            file with one template per line.

    Returns:
        Prompt templates with one "{}" each.

    Raises:
        ValueError: ``source`` is neither a known name nor a file, the file is not UTF-8 or empty, or a line does not
            have exactly one "{}".
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
        raise ValueError(f"MODEL.SPAR.TEMPLATES: {source} is not a UTF-8 text file ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    invalid = [line for line in lines if line.count("{}") != 1]
    if invalid or not lines:
        raise ValueError(f'MODEL.SPAR.TEMPLATES: each line of {source} must have one "{{}}", got {invalid[:1]}')
    return tuple(lines)
