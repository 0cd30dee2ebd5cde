"""Beam search that pays for what is still open, by the rules of transformers' `generate`.

`generate` runs the first step for every beam, though all are equal then, and carries finished captions on until the
last one is finished. Here the first step runs once a row, and finished rows leave the batch. Tokens and scores are
those of `generate` with its default `early_stopping`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from foveate.language.t5_steps import T5Steps, has_plain_steps

# transformers' score of what is not to be chosen.
_NEVER = -1e9
# Rows leave when so large a share of the batch is finished: each time the keys and values of the others are copied.
_WORTH_LEAVING = 0.125
# What a checkpoint may say without asking for a rule of its own (forced tokens, forbidden n-grams, ...).
_PLAIN_SETTINGS = frozenset(
    {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "transformers_version"}
    | {"_from_model_config", "use_cache", "output_attentions", "output_hidden_states", "output_scores"}
    | {"return_dict_in_generate", "max_length", "max_new_tokens", "num_beams", "do_sample", "min_length"}
    | {"length_penalty", "repetition_penalty", "remove_invalid_values", "renormalize_logits"}
)


def can_search(model: Any) -> bool:
    """Whether `beam_search` does for this model what `generate` would."""
    if not has_plain_steps(model):
        return False
    settings = model.generation_config
    asked = {name for name, value in settings.to_diff_dict().items() if value is not None and value is not False}
    return (
        isinstance(settings.decoder_start_token_id, int)
        and isinstance(settings.eos_token_id, int | list)
        and (asked <= _PLAIN_SETTINGS)
    )


def beam_search(
    model: Any,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    processors: LogitsProcessorList,
    *,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
) -> tuple[Tensor, Tensor]:
    """The best sequence of each row and its score.

    Args:
        model: one for which `can_search` holds, in evaluation mode.
        inputs_embeds: (R, L, C) encoder inputs.
        attention_mask: (R, L), 1 for real positions.
        processors: turn logits (rows, V) and the ids (rows, T) before them into log-probabilities.
        max_new_tokens, num_beams, length_penalty: as in `foveate.language.generation.generate_finite`.

    Returns:
        (R, T) ids, the start token first, padded behind the end; (R,) float32 scores: sum of the processed
        log-probabilities / number of tokens ** length_penalty.
    """
    settings, device = model.generation_config, inputs_embeds.device
    ends = torch.tensor(settings.eos_token_id, device=device).reshape(-1)
    padding = int(ends[0]) if settings.pad_token_id is None else settings.pad_token_id
    count, beams = len(inputs_embeds), num_beams
    kept = max(2, 1 + len(ends)) * beams  # so many candidates that `beams` of them go on even if all others end

    steps = T5Steps(model, inputs_embeds, attention_mask, max_new_tokens)
    rows = torch.arange(count, device=device)  # those that are still in the batch
    is_open = torch.ones(count, dtype=torch.bool, device=device)
    # What runs, best first. At the start all beams are equal, so all but one are ruled out.
    running = torch.full((count, beams, 1), settings.decoder_start_token_id, device=device)
    scores = torch.full((count, beams), _NEVER, device=device)
    scores[:, 0] = 0.0
    # What has ended, best first, of all rows.
    ended = torch.full((count, beams, 1 + max_new_tokens), padding, device=device)
    ended_scores = torch.full((count, beams), _NEVER, device=device)
    has_ended = torch.zeros(count, beams, dtype=torch.bool, device=device)
    lengths = torch.zeros(count, beams, dtype=torch.long, device=device)

    for step in range(1, max_new_tokens + 1):
        logits = steps(running[:, :1, -1] if step == 1 else running[..., -1]).float().expand(-1, beams, -1)
        log_probabilities = processors(running.flatten(0, 1), logits.flatten(0, 1)).view_as(logits)
        best, place = (log_probabilities + scores[..., None]).flatten(1).topk(kept)
        parents, tokens = place // logits.shape[-1], place % logits.shape[-1]
        sequences = torch.cat([_pick(running, parents), tokens[..., None]], dim=-1)
        ends_here = torch.isin(tokens, ends) if step < max_new_tokens else torch.ones_like(tokens, dtype=torch.bool)

        # Of what ends, only the best `beams` candidates count.
        counts = ends_here & is_open[:, None]
        counts[:, beams:] = False
        final = (best / step**length_penalty).where(counts, _NEVER)
        ended_scores[rows], order = torch.cat([ended_scores[rows], final], dim=1).topk(beams)
        padded = torch.nn.functional.pad(sequences, (0, max_new_tokens - step), value=padding)
        ended[rows] = _pick(torch.cat([ended[rows], padded], dim=1), order)
        has_ended[rows] = torch.cat([has_ended[rows], counts], dim=1).gather(1, order)
        lengths[rows] = torch.cat([lengths[rows], torch.full_like(tokens, step + 1)], dim=1).gather(1, order)
        if step == max_new_tokens:
            break

        scores, order = (best + ends_here * _NEVER).topk(beams)
        running, parents = _pick(sequences, order), parents.gather(1, order)
        # A row is done when all its beams have ended and, by now, none that runs is better than the worst of them.
        worst = ended_scores[rows].amin(dim=1, keepdim=True).where(has_ended[rows], _NEVER)
        is_open = is_open & (scores[:, :1] / step**length_penalty > worst).any(dim=1)
        remaining = int(is_open.sum())
        if remaining == 0:
            break
        steps.keep(parents)
        if len(rows) - remaining >= _WORTH_LEAVING * len(rows):
            stay = is_open.nonzero()[:, 0]
            rows, running, scores, is_open = rows[stay], running[stay], scores[stay], is_open[stay]
            steps.keep_rows(stay)
    return ended[:, 0, : int(lengths[:, 0].max())], ended_scores[:, 0]


def _pick(sequences: Tensor, index: Tensor) -> Tensor:
    """(R, K, T) sequences and (R, k) places among the K -> (R, k, T)."""
    return sequences.take_along_dim(index[..., None], dim=1)
