"""A folder that looks like a clone of the dinov3 repository from outside, for tests where there is none.

It has the entry point of DINOv3.txt, and tiny towers with the names that ``DINOtxtEncoder`` relies on. The ViT is
timm's DINOv3, so that what comes out can be compared with it.
"""

import timm
import torch
from torch import nn

dependencies = ["torch", "timm"]

WIDTH, DEPTH, HEADS = 96, 3, 3


class Block(nn.Module):
    """Takes rotations as a pair, where timm's takes them in one tensor."""

    def __init__(self, block):
        super().__init__()
        self.attn, self.mlp, self.norm1, self.norm2 = block.attn, block.mlp, block.norm1, block.norm2

    def forward(self, x, rope=None):
        rope = None if rope is None else torch.cat(rope, dim=-1)
        x = x + self.attn(self.norm1(x), rope=rope)
        return x + self.mlp(self.norm2(x))


class Rotations(nn.Module):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope

    def forward(self, *, H, W):
        return self.rope.get_embed(shape=[H, W]).chunk(2, dim=-1)


class Backbone(nn.Module):
    def __init__(self, vit):
        super().__init__()
        self.patch_size, self.embed_dim, self.n_storage_tokens = vit.patch_embed.patch_size[0], vit.embed_dim, 4
        self.cls_token, self.storage_tokens = vit.cls_token, vit.reg_token
        self.mask_token = nn.Parameter(torch.zeros(1, vit.embed_dim))
        self.patch_embed = vit.patch_embed.proj
        self.rope_embed = Rotations(vit.rope)
        self.blocks = nn.ModuleList(Block(block) for block in vit.blocks)
        self.norm = vit.norm

    def prepare_tokens_with_masks(self, x):
        patches = self.patch_embed(x)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token + 0 * self.mask_token, self.storage_tokens)]
        return torch.cat([*prefix, patches.flatten(2).transpose(1, 2)], dim=1), tuple(patches.shape[-2:])

    def get_intermediate_layers(self, x, *, n=1):
        tokens, (height, width) = self.prepare_tokens_with_masks(x)
        outputs = []
        for block in self.blocks:
            tokens = block(tokens, self.rope_embed(H=height, W=width))
            outputs.append(self.norm(tokens)[:, 1 + self.n_storage_tokens :])
        return tuple(outputs[-n:])


class VisionHead(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.blocks = nn.ModuleList([Block(block)])
        self.ln_final = nn.LayerNorm(WIDTH)
        self.linear_projection = nn.Identity()

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.linear_projection(self.ln_final(x))


class VisionTower(nn.Module):
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def get_class_and_patch_tokens(self, images):
        tokens, (height, width) = self.backbone.prepare_tokens_with_masks(images)
        for block in self.backbone.blocks:
            tokens = block(tokens, self.backbone.rope_embed(H=height, W=width))
        tokens = self.backbone.norm(tokens)
        after = self.head(tokens)
        first = 1 + self.backbone.n_storage_tokens
        return after[:, 0], after[:, first:], tokens[:, first:]


class TextTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"token_embedding": nn.Embedding(256, 32), "ln_final": nn.LayerNorm(32)})
        self.head = nn.ModuleDict({"linear_projection": nn.Linear(32, 2 * WIDTH, bias=False)})

    def forward(self, tokens):
        x = self.backbone["ln_final"](self.backbone["token_embedding"](tokens)).mean(1)
        return self.head["linear_projection"](x)


class DINOTxt(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = {"img_size": 64, "embed_dim": WIDTH, "depth": DEPTH + 1, "num_heads": HEADS, "init_values": None}
        vit = timm.create_model("vit_small_patch16_dinov3", num_classes=0, **sizes)
        head = VisionHead(vit.blocks[-1])
        del vit.blocks[-1]
        self.visual_model = VisionTower(Backbone(vit), head)
        self.text_model = TextTower()
        self.logit_scale = nn.Parameter(torch.zeros(1))


class Tokenizer:
    def tokenize(self, texts):
        rows = [list(text.encode())[:16] for text in texts]
        return torch.tensor([row + [0] * (16 - len(row)) for row in rows])


def dinov3_vitl16_dinotxt_tet1280d20h24l(*, pretrained=True, bpe_path_or_url="https://example.org/bpe.gz"):
    if pretrained or "://" in bpe_path_or_url:
        raise RuntimeError("nothing is downloaded here")
    return DINOTxt(), Tokenizer()
