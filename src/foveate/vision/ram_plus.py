"""RAM++: which of a list of tags an image shows (Huang et al., arXiv 2310.15200; MG-LLaVA spec 2.8).

    picture -> Swin -> tokens, their mean first -> projection e
    each tag's descriptions, weighted by their likeness to the mean token -> a query -> cross-attention to e -> a logit

Shapes: B pictures, L tokens, V and P channels of the tokens before and after their projection, C tags with D
descriptions each, H channels of the decoder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from foveate.checkpoints import read_config
from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_folder
from foveate.language.official import read_safetensors, read_tensors, refuse, write_json, write_safetensors
from foveate.language.words import read_lines

MODEL_TYPE = "foveate_ram_plus"

_DROPPED = ("relative_position_index", "attn_mask")
"""Constants that official files repeat for each layer."""


class WindowAttention(nn.Module):
    """Self-attention within a window of w x w tokens, with a learned bias for each relative position."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, windows: Tensor, mask: Tensor | None) -> Tensor:
        """(M, w * w, V) windows, and (windows of a picture, w * w, w * w) of what may not be seen -> (M, w * w, V)."""
        q, k, v = rearrange(self.qkv(windows), "m n (three h d) -> three m h n d", three=3, h=self.heads)
        places = torch.stack(
            torch.meshgrid(torch.arange(self.window), torch.arange(self.window), indexing="ij")
        ).flatten(1)
        offset = (places[:, :, None] - places[:, None]) + self.window - 1
        index = offset[0] * (2 * self.window - 1) + offset[1]
        bias = self.relative_position_bias_table[index.to(windows.device)].permute(2, 0, 1)[None]
        if mask is not None:
            shut = torch.zeros_like(mask, dtype=bias.dtype).masked_fill(mask, -100.0)
            bias = bias + shut.repeat(len(windows) // len(mask), 1, 1)[:, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype).expand(len(windows), -1, -1, -1))
        return self.proj(rearrange(attended, "m h n d -> m n (h d)"))


class SwinBlock(nn.Module):
    """Window attention and a feed-forward layer, each with norm before and residual; every second block is shifted."""

    def __init__(self, width: int, heads: int, grid: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.grid, self.window = grid, min(window, grid)
        # A single window has nothing to shift to.
        self.shift = window // 2 if shifted and grid > window else 0
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, self.window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, grid * grid, V) -> the same."""
        square = rearrange(self.norm1(tokens), "b (y x) c -> b y x c", y=self.grid)
        mask = None
        if self.shift:
            square = square.roll((-self.shift, -self.shift), (1, 2))
            mask = self._other_regions(tokens.device)
        size = {"p": self.window, "q": self.window}
        windows = rearrange(square, "b (y p) (x q) c -> (b y x) (p q) c", **size)
        side = self.grid // self.window
        square = rearrange(self.attn(windows, mask), "(b y x) (p q) c -> b (y p) (x q) c", y=side, x=side, **size)
        if self.shift:
            square = square.roll((self.shift, self.shift), (1, 2))
        tokens = tokens + square.flatten(1, 2)
        return tokens + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(tokens))))

    def _other_regions(self, device: torch.device) -> Tensor:
        """(windows, w * w, w * w), True where two tokens of a shifted window come from opposite edges."""
        line = torch.zeros(self.grid, dtype=torch.long, device=device)
        line[-self.window :] = 1
        line[-self.shift :] = 2
        regions = line[:, None] * 3 + line
        windows = rearrange(regions, "(y p) (x q) -> (y x) (p q)", p=self.window, q=self.window)
        return windows[:, :, None] != windows[:, None]


class SwinStage(nn.Module):
    """Blocks of one resolution, then, but for the last stage, 2 x 2 tokens become one of twice the width."""

    def __init__(self, width: int, heads: int, grid: int, window: int, depth: int, last: bool) -> None:
        super().__init__()
        self.grid = grid
        self.blocks = nn.ModuleList(SwinBlock(width, heads, grid, window, bool(i % 2)) for i in range(depth))
        if not last:
            self.downsample = nn.ModuleDict(
                {"norm": nn.LayerNorm(4 * width), "reduction": nn.Linear(4 * width, 2 * width, bias=False)}
            )
        self.last = last

    def forward(self, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens)
        if self.last:
            return tokens
        merged = rearrange(tokens, "b (y p x q) c -> b (y x) (q p c)", p=2, q=2, y=self.grid // 2)
        return self.downsample["reduction"](self.downsample["norm"](merged))


class Swin(nn.Module):
    """Swin transformer (Liu et al., ICCV 2021) with the mean of its tokens in front of them.

    Args:
        image_size, patch_size: of the square picture, in pixels.
        width: channels of the first stage; each later one has twice as many.
        depths, heads: of each stage.
        window: side of the attention windows in tokens.
    """

    def __init__(
        self,
        image_size: int = 384,
        width: int = 192,
        depths: Sequence[int] = (2, 2, 18, 2),
        heads: Sequence[int] = (6, 12, 24, 48),
        window: int = 12,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        grid = image_size // patch_size
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, width, patch_size, stride=patch_size), "norm": nn.LayerNorm(width)}
        )
        self.layers = nn.ModuleList(
            SwinStage(width * 2**i, heads[i], grid // 2**i, window, depth, last=i == len(depths) - 1)
            for i, depth in enumerate(depths)
        )
        self.width = width * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(self.width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, 1 + L, V), the mean token first."""
        tokens = self.patch_embed["norm"](self.patch_embed["proj"](pixel_values).flatten(2).transpose(1, 2))
        for stage in self.layers:
            tokens = stage(tokens)
        tokens = self.norm(tokens)
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)


class _Attention(nn.Module):
    """Cross-attention of tag queries to picture tokens, with residual and norm (post-norm BERT)."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self = nn.ModuleDict(
            {"query": nn.Linear(width, width), "key": nn.Linear(context, width), "value": nn.Linear(context, width)}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (
            rearrange(self.self[name](source), "b n (h d) -> b h n d", h=self.heads)
            for name, source in (("query", queries), ("key", tokens), ("value", tokens))
        )
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return self.output["LayerNorm"](self.output["dense"](attended) + queries)


class _Layer(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.crossattention = _Attention(width, context, heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = nn.ModuleDict({"dense": nn.Linear(4 * width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        queries = self.crossattention(queries, tokens)
        expanded = self.output["dense"](F.gelu(self.intermediate["dense"](queries)))
        return self.output["LayerNorm"](expanded + queries)


class RamPlus(nn.Module):
    """RAM++ whole. Module names are the official file's, so that its keys need only be cleaned.

    Args:
        swin: the image encoder.
        tags, descriptions: C and D.
        projected: P, width of the shared space of pictures and texts.
        hidden, heads, layers: of the decoder.
    """

    def __init__(
        self,
        swin: Swin,
        *,
        tags: int = 4585,
        descriptions: int = 51,
        projected: int = 512,
        hidden: int = 768,
        heads: int = 4,
        layers: int = 2,
    ) -> None:
        super().__init__()
        self.tags = tags
        self.visual_encoder = swin
        self.image_proj = nn.Linear(swin.width, projected)
        self.label_embed = nn.Parameter(torch.zeros(tags * descriptions, projected))
        self.reweight_scale = nn.Parameter(torch.tensor(1.0 * math.log(1 / 0.07)))
        self.wordvec_proj = nn.Linear(projected, hidden)
        self.tagging_head = nn.ModuleDict(
            {
                "encoder": nn.ModuleDict(
                    {"layer": nn.ModuleList(_Layer(hidden, projected, heads) for _ in range(layers))}
                )
            }
        )
        self.fc = nn.Linear(hidden, 1)

    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, 1 + L, P), the mean token first."""
        return self.image_proj(self.visual_encoder(pixel_values))

    def label_queries(self, image_embeds: Tensor) -> Tensor:
        """(B, C, P): each tag's descriptions weighted by a softmax of their likeness to the picture's mean token."""
        mean = F.normalize(image_embeds[:, 0], dim=-1)
        texts = self.label_embed.unflatten(0, (self.tags, -1))  # may be kept in half precision: 479 MB in single
        logits = self.reweight_scale.exp() * torch.einsum("bp,cdp->bcd", mean.to(texts.dtype), texts).float()
        weights = logits.softmax(dim=-1)
        return torch.einsum("bcd,cdp->bcp", weights.to(texts.dtype), texts).to(image_embeds.dtype)

    def decode(self, queries: Tensor, image_embeds: Tensor) -> Tensor:
        """(B, C, P) tag queries and (B, 1 + L, P) tokens -> (B, C) logits."""
        hidden = F.relu(self.wordvec_proj(queries))
        layers: Any = self.tagging_head["encoder"]
        for layer in layers["layer"]:
            hidden = layer(hidden, image_embeds)
        return self.fc(hidden)[..., 0]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, side, side) -> (B, C) logits; a tag shows where the sigmoid exceeds its own threshold."""
        embeds = self.image_embeds(pixel_values)
        return self.decode(self.label_queries(embeds), embeds)


def clean_keys(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """An official RAM++ state dict under the names of `RamPlus`, and the keys that it has no use for.

    Older files call the decoder `vision_multi`. Constants of the attention and the text side of training are left out.

    Raises:
        CheckpointError: keys that are neither, all listed.
    """
    cleaned: dict[str, Tensor] = {}
    unused, unknown = [], []
    for key, value in official.items():
        name = key.replace("vision_multi.", "tagging_head.", 1) if key.startswith("vision_multi.") else key
        if name.endswith(_DROPPED) or name.startswith(_TEXT_SIDE):
            unused.append(key)
        elif name.startswith(_PARTS):
            cleaned[name] = value.reshape(()) if name == "reweight_scale" else value
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are not RAM++'s: {', '.join(sorted(unknown))}")
    return cleaned, unused


_PARTS = (
    "visual_encoder.",
    "image_proj.",
    "wordvec_proj.",
    "fc.",
    "label_embed",
    "reweight_scale",
    "tagging_head.encoder.layer.",
)
_TEXT_SIDE = (
    "text_decoder.",
    "tag_encoder.",
    "tagging_head.embeddings.",
    "tokenizer.",
    "text_proj.",
    "visual_encoder.head.",
)


# -------------------------------------------------------------------- folders


def load_ram_plus(folder: Path) -> tuple[RamPlus, dict[str, Any]]:
    """What `convert_ram_plus` wrote: the network in evaluation mode, and its `tags`, `thresholds` and `image_size`.

    Raises:
        InputError: the folder is of another model.
        CheckpointError: a file is damaged, or weights are missing or too many.
    """
    content = read_config(folder)
    if content.get("model_type") != MODEL_TYPE:
        raise InputError(f"{folder} is a {content.get('model_type')!r} model, not a RAM++.")
    try:
        sizes = {name: content[name] for name in ("image_size", "tags", "thresholds", "swin", "head")}
        with torch.device("meta"):
            model = RamPlus(Swin(sizes["image_size"], **sizes["swin"]), tags=len(sizes["tags"]), **sizes["head"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a RAM++: {error}.") from None
    weights = read_safetensors(folder)
    _fill(model, weights, str(folder))
    return model.eval(), sizes


def convert_ram_plus(
    official: str | os.PathLike[str],
    *,
    tags: str | os.PathLike[str],
    thresholds: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    image_size: int = 384,
) -> list[str]:
    """The official file -> a folder that `load_ram_plus` reads; the 4585 x 51 text embeddings in half precision.

    Sizes are read off the weights. The decoder has 4 heads, which no shape shows.

    Args:
        official: `ram_plus_swin_large_14m.pth`.
        tags, thresholds: `ram_tag_list.txt` and `ram_tag_list_threshold.txt`, which are not in it.
        out: folder to write, new or empty; None only compares the files.
        image_size: side of the pictures that the model was trained on.
    Returns:
        The keys of the file that are not used.

    Raises:
        InputError: a file is missing or empty, or the lists and the weights do not agree.
        CheckpointError: the file is damaged, or keys are missing, unknown or of another shape; all are listed.
    """
    names = read_lines(tags, "tag")
    limits = read_lines(thresholds, "threshold")
    try:
        levels = [float(limit) for limit in limits]
        if not all(0 <= level <= 1 for level in levels):
            raise ValueError("a threshold is not from 0 to 1")
    except ValueError as error:
        raise InputError(f"{os.fspath(thresholds)} is no list of thresholds ({error}); give a number a line.") from None
    if len(names) != len(levels):
        raise InputError(f"there are {len(names)} tags and {len(levels)} thresholds; give lists of one model.")
    weights, unused = clean_keys(read_tensors(official, skip_objects=True))
    try:
        swin, head = _sizes(weights, len(names))
        with torch.device("meta"):
            model = RamPlus(Swin(image_size, **swin), tags=len(names), **head)
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{os.fspath(official)} is not a RAM++ of {len(names)} tags ({error}).") from None
    weights["label_embed"] = weights["label_embed"].half()
    _fill(model, weights, os.fspath(official))
    if out is not None:
        content = {
            "model_type": MODEL_TYPE,
            "image_size": image_size,
            "swin": swin,
            "head": head,
            "tags": names,
            "thresholds": levels,
        }
        with atomic_folder(out) as folder:
            write_safetensors(model.state_dict(), folder, None, "2GB", lambda: None)
            write_json(folder / "config.json", content)
    return unused


def _sizes(weights: Mapping[str, Tensor], tags: int) -> tuple[dict[str, Any], dict[str, int]]:
    """What shapes say: the arguments of `Swin` and `RamPlus` besides the picture's size and the number of tags."""
    stages = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("visual_encoder.layers."))
    bias = "visual_encoder.layers.{}.blocks.{}.attn.relative_position_bias_table"
    depths = [next(j for j in count() if bias.format(i, j) not in weights) for i in range(stages)]
    table = weights[bias.format(0, 0)]
    layers = "tagging_head.encoder.layer.{}.output.dense.weight"
    rows = weights["label_embed"].shape[0]
    if rows % tags:
        raise ValueError(f"its {rows} text embeddings are no multiple of them")
    swin = {
        "width": weights["visual_encoder.patch_embed.proj.weight"].shape[0],
        "depths": depths,
        "heads": [weights[bias.format(i, 0)].shape[1] for i in range(stages)],
        "window": (math.isqrt(table.shape[0]) + 1) // 2,
        "patch_size": weights["visual_encoder.patch_embed.proj.weight"].shape[-1],
    }
    head = {
        "descriptions": rows // tags,
        "projected": weights["image_proj.weight"].shape[0],
        "hidden": weights["wordvec_proj.weight"].shape[0],
        "layers": next(j for j in count() if layers.format(j) not in weights),
    }
    return swin, head


def _fill(model: RamPlus, weights: Mapping[str, Tensor], what: str) -> None:
    expected = {key: value.shape for key, value in model.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - weights.keys()),
        "unknown": sorted(weights.keys() - expected.keys()),
        "of another shape": [key for key in expected if key in weights and weights[key].shape != expected[key]],
        "with values that are not finite": [key for key, value in weights.items() if not value.isfinite().all()],
    }
    refuse(f"{what} does not fit RAM++", problems, "give the complete checkpoint")
    model.load_state_dict(dict(weights), assign=True)
