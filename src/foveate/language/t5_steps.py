"""The decoder of a T5, one token at a time, without what its modules do for every other use of them.

A step through transformers' modules builds masks, biases and output records anew in each layer, and keeps the keys and
values of the cross-attention once a beam. Here the relative position bias is computed once a batch, and the beams of a
row query one copy of its keys and values together. The weights are called where they are, so whatever replaces a
linear layer (an adapter, int8) takes part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Block, T5ForConditionalGeneration

# Multiply-adds that are worth another call of the encoder.
_WORTH_A_CALL = 2**30
_BUCKET = 8


def has_plain_steps(model: Any) -> bool:
    """Whether `T5Steps` runs this model: a T5 whose blocks nothing wraps (sharding, offloading), and not in float16, in
    which transformers clamps what overflows."""
    if type(model) is not T5ForConditionalGeneration or model.dtype == torch.float16:
        return False
    return not hasattr(model, "hf_device_map") and all(type(block) is T5Block for block in model.decoder.block)


class T5Steps:
    """Keys, values and position of a batch of captions that are being written.

    Args:
        model: one for which `has_plain_steps` holds, in evaluation mode.
        inputs_embeds: (R, L, C) encoder inputs.
        attention_mask: (R, L), 1 for real positions.
        steps: most tokens that will be asked for.
    """

    def __init__(self, model: Any, inputs_embeds: Tensor, attention_mask: Tensor, steps: int) -> None:
        self._model = model
        self._heads = model.config.num_heads
        blocks = list(model.decoder.block)
        memory = _encode(model, inputs_embeds, attention_mask)
        self._bias = blocks[0].layer[0].SelfAttention.compute_bias(steps, steps)  # (1, H, steps, steps)
        masked = torch.finfo(memory.dtype).min
        self._mask = memory.new_zeros(attention_mask.shape).masked_fill_(attention_mask == 0, masked)[:, None, None]
        self._cross = [
            [self._split(layer(memory)).contiguous() for layer in _keys_and_values(block, 1)] for block in blocks
        ]
        self._own: list[Tensor | None] = [None] * len(blocks)  # per block (2, rows * beams, H, t, D)
        self._step = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """(R, k) the newest tokens of k beams of each row -> (R, k, V) logits of the next ones."""
        model, step = self._model, self._step
        rows, beams = tokens.shape
        hidden = model.decoder.embed_tokens(tokens)
        bias = self._bias[:, :, step : step + 1, : step + 1]
        for number, block in enumerate(model.decoder.block):
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            query = self._split(attention.q(normed).flatten(0, 1)[:, None])  # (R k, H, 1, D)
            new = torch.stack([self._split(f(normed).flatten(0, 1)[:, None]) for f in _keys_and_values(block, 0)])
            before = self._own[number]
            keys, values = self._own[number] = new if before is None else torch.cat([before, new], dim=3)
            found = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)
            hidden = hidden + attention.o(found.reshape(rows, beams, -1))

            attention = block.layer[1].EncDecAttention
            query = self._split(attention.q(block.layer[1].layer_norm(hidden)))  # (R, H, k, D)
            keys, values = self._cross[number]
            mask = self._mask.expand(-1, -1, beams, -1)
            found = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
            hidden = hidden + attention.o(found.transpose(1, 2).flatten(2))
            hidden = block.layer[2](hidden)
        self._step += 1
        hidden = model.decoder.final_layer_norm(hidden)
        if model.config.scale_decoder_outputs:
            hidden = hidden * model.model_dim**-0.5
        return model.lm_head(hidden)

    def keep(self, parents: Tensor) -> None:
        """Each row goes on from these of its own beams: (R, k) places among the beams so far."""
        rows, beams = len(parents), self._beams
        parents = parents + beams * torch.arange(rows, device=parents.device)[:, None]
        self._select(parents.flatten())

    def keep_rows(self, rows: Tensor) -> None:
        """Only these rows (K,) go on."""
        beams = torch.arange(self._beams, device=rows.device)
        self._select((rows[:, None] * self._beams + beams).flatten())
        self._mask = self._mask[rows]
        self._cross = [[keys[rows], values[rows]] for keys, values in self._cross]

    @property
    def _beams(self) -> int:
        own = self._own[0]
        assert own is not None
        return own.shape[1] // len(self._mask)

    def _select(self, index: Tensor) -> None:
        self._own = [own if own is None else own.index_select(1, index) for own in self._own]

    def _split(self, projected: Tensor) -> Tensor:
        """(B, L, H D) -> (B, H, L, D)."""
        return projected.unflatten(-1, (self._heads, -1)).transpose(1, 2)


def _encode(model: Any, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
    """The encoder's output; rows of like length together, where the padding so saved is worth the calls."""
    config, length = model.config, inputs_embeds.shape[1]
    positions = torch.arange(1, length + 1, device=attention_mask.device)
    lengths = (positions * (attention_mask != 0)).amax(dim=1)
    widths = (lengths + _BUCKET - 1).div(_BUCKET, rounding_mode="floor").mul(_BUCKET).clamp(max=length)
    per_layer = 4 * config.num_heads * config.d_kv + (3 if config.is_gated_act else 2) * config.d_ff
    saved = int((length - widths).sum()) * config.num_layers * per_layer * config.d_model
    buckets = widths.unique().tolist()
    if saved < _WORTH_A_CALL * (len(buckets) - 1) or buckets == [length]:
        return model.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state
    memory = torch.zeros_like(inputs_embeds)
    for width in buckets:
        rows = (widths == width).nonzero()[:, 0]
        found = model.encoder(inputs_embeds=inputs_embeds[rows, :width], attention_mask=attention_mask[rows, :width])
        memory[rows, :width] = found.last_hidden_state
    return memory


def _keys_and_values(block: Any, layer: int) -> tuple[Any, Any]:
    attention = block.layer[0].SelfAttention if layer == 0 else block.layer[1].EncDecAttention
    return attention.k, attention.v
