"""The text tower of a model for the page: an ONNX file and a tokenizer."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from spar_d2.encoders import TextTower
from spar_d2.encoders.model_configs import known_config, known_name
from spar_d2.export.browser.packages import write_files
from spar_d2.export.onnx import save_onnx
from spar_d2.export.packages import check_packages

TEXT, TOKENIZER = "text.onnx", "tokenizer.json.gz"
# Contractions, words, digits, and everything else, as in CLIP.
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ExportedText(nn.Module):
    """Text embeddings of tokens (N, context length) int64: unit vectors (N, D) float32."""

    input_names: tuple[str, ...] = ("tokens",)
    output_name = "text"

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        self.model = tower.model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.model.encode_text(tokens), dim=-1)


def export_words(name: str, tower: TextTower, folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Write the text tower (float16 weights) and its tokenizer.

    Args:
        name: model name.
        tower: its text tower.
        folder: output folder.

    Returns:
        The written files, and the settings of the tokens: "start", "end" and "length".

    Raises:
        ValueError: the model does not use CLIP's tokenizer.
        RuntimeError: a required package is missing, or the text tower cannot be exported.
    """
    tokenizer = clip_tokenizer(name)
    written = write_files(folder, {TOKENIZER: gzip.compress(tokenizer_json(tokenizer).encode(), mtime=0)})
    free, length = torch.export.Dim.DYNAMIC, tokenizer.context_length
    model = ExportedText(tower).cpu().eval().requires_grad_(False)
    save_onnx(model, (torch.zeros(3, length, dtype=torch.int64),), ({0: free},), folder / TEXT, "float16")
    settings = {"start": tokenizer.sot_token_id, "end": tokenizer.eot_token_id, "length": length}
    return [*written, folder / TEXT], settings


def clip_tokenizer(name: str) -> Any:
    """Return the tokenizer of a model.

    Raises:
        ValueError: it is not CLIP's tokenizer.
    """
    # Other tokenizers may need a download.
    other = known_config(name)["text_cfg"].get("hf_tokenizer_name")
    tokenizer = None if other else open_clip.get_tokenizer(known_name(name))
    if not isinstance(tokenizer, SimpleTokenizer) or tokenizer.reduction_fn is not None:
        raise ValueError(f"--words: free words need CLIP's tokenizer, and {name} has another one; leave out --words")
    return tokenizer


def tokenizer_json(tokenizer: Any) -> str:
    """Convert CLIP's tokenizer to the format of the tokenizers library."""
    check_packages("tokenizers")
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)
    model = models.BPE(
        vocab=tokenizer.encoder,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        unk_token="<end_of_text>",
    )
    converted = Tokenizer(model)
    converted.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True)
    converted.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return converted.to_str()
