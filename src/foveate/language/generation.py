"""Text generation with probabilities, in which non-finite numbers are an error and never a caption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from foveate.errors import CheckpointError, InputError
from foveate.language.beam_search import beam_search, can_search

_SETTINGS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 4096),
    "num_beams": (1, 64),
    "min_length": (0, 4096),
    "length_penalty": (-100.0, 100.0),
    "repetition_penalty": (0.01, 100.0),
}
"""Least and most that a setting may be; integers where only whole numbers are meant."""


@dataclass(frozen=True, slots=True)
class GeneratedSequences:
    """What `generate_finite` returns.

    Attributes:
        sequences: (B, T) token ids, padded; those of an encoder-decoder begin with its start token.
        scores: (B,) float32, exp of the sequence score: sum of the log-probabilities of the generated tokens (end token
            included, after repetition penalty) divided by their number to the power of `length_penalty`.
        log_scores: (B,) float32, the sequence scores themselves, which no length turns into 0.
    """

    sequences: Tensor
    scores: Tensor
    log_scores: Tensor


class FiniteLogits(LogitsProcessor):
    """Raises CheckpointError when a step's logits hold NaN or +inf, or leave no token possible.

    -inf alone is legitimate: it is how a token is forbidden.
    """

    def __init__(self, model: Any) -> None:
        self.description = f"{type(model).__name__} in {str(model.dtype).removeprefix('torch.')} on {model.device}"

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # NaN and +inf carry through max(), a row of -inf has it as its maximum: one small reduction, one host check
        if not torch.isfinite(scores.amax(dim=-1)).all():
            raise CheckpointError(
                f"The language model gives non-finite logits ({self.description}); load it in bf16 on hardware that "
                "has it or in fp32, never in fp16, and check that the checkpoint is intact."
            )
        return scores


class _LogSoftmax(LogitsProcessor):
    """Greedy search of `generate` masks and penalises raw logits, beam search log-probabilities; with this first in
    line, greedy does as beams do."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.log_softmax(scores, dim=-1)


def check_generation(settings: Any) -> None:
    """Checks settings of `generate_finite` that a recipe, a checkpoint or a caller gives by name; any may be left out.

    Raises:
        InputError: an unknown name, or a value out of range.
    """
    if not isinstance(settings, Mapping):
        raise InputError(f"generation settings must be a mapping of names to numbers, got {settings!r}.")
    for name, value in settings.items():
        if name not in _SETTINGS:
            raise InputError(f"{name!r} is not a generation setting; known are {', '.join(_SETTINGS)}.")
        low, high = _SETTINGS[name]
        whole = isinstance(low, int)
        right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        # NaN is in no range.
        if not right or not low <= value <= high:
            kind = "an integer" if whole else "a number"
            raise InputError(f"{name} must be {kind} from {low} to {high}, got {value!r}.")


@torch.inference_mode()
def generate_finite(
    model: Any,
    *,
    inputs_embeds: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    num_beams: int = 1,
    min_length: int = 0,
    length_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
) -> GeneratedSequences:
    """Beam or greedy search from input embeddings, with a probability for each sequence.

    Greedy search is beam search with one beam: minimum length and repetition penalty act on log-probabilities in both,
    so that scores compare. With `length_penalty` 0 and no repetition penalty a score is the product of the token
    probabilities.

    Args:
        model: a Hugging Face model with `generate`, encoder-decoder or decoder-only (left-padded inputs).
        inputs_embeds: (B, L, C) encoder inputs, or the prompt of a decoder-only model.
        attention_mask: (B, L), 1 for real positions.
        max_new_tokens: most tokens generated per sequence.
        num_beams: 1 for greedy. DynRefer (spec section 4.1 step 7): 2 beams, 20 tokens, repetition penalty 1.5.
        min_length: fewest ids in `sequences` before the end token (an encoder-decoder's start token counts).
        length_penalty: exponent of the length that a score is divided by; > 0 favours longer sequences.
        repetition_penalty: > 1 penalises tokens that were generated before.

    Raises:
        InputError: settings out of range, or shapes that do not fit.
        CheckpointError: non-finite input embeddings, logits or scores; the sentence names dtype and hardware.
    """
    _check_inputs(inputs_embeds, attention_mask)
    check_generation(
        {
            "max_new_tokens": max_new_tokens,
            "num_beams": num_beams,
            "min_length": min_length,
            "length_penalty": length_penalty,
            "repetition_penalty": repetition_penalty,
        }
    )
    if not torch.isfinite(inputs_embeds).all():
        raise CheckpointError(
            f"The input embeddings of the language model are not finite (dtype {inputs_embeds.dtype}); run the vision "
            "part in bf16 or fp32 and check its checkpoint."
        )
    searched = can_search(model)
    # Else `generate` does this: beams by its own settings, and for greedy search, which has no log-probabilities, here.
    by_us = searched or num_beams == 1
    processors = LogitsProcessorList([FiniteLogits(model)])
    if by_us:
        processors.append(_LogSoftmax())
        ends = _end_tokens(model)
        if min_length > 0 and len(ends) > 0:
            processors.append(MinLengthLogitsProcessor(min_length, ends.tolist(), device=str(inputs_embeds.device)))
    if repetition_penalty != 1.0:
        # As a setting of generate() it would spare as many tokens as a row of embeddings is padded on the left.
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if searched:
        sequences, log_scores = beam_search(
            model,
            inputs_embeds,
            attention_mask,
            processors,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            length_penalty=length_penalty,
        )
    else:
        # generate() counts a decoder-only model's prompt as part of the length, `sequences` does not hold it
        prompt_length = 0 if model.config.is_encoder_decoder else inputs_embeds.shape[1]
        output = model.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=False,
                min_length=0 if by_us else min_length + prompt_length,
                length_penalty=None if num_beams == 1 else length_penalty,  # greedy search would warn of it
                repetition_penalty=1.0,
                # would replace NaN before it is seen, should the checkpoint's own generation_config ask for it
                remove_invalid_values=False,
                renormalize_logits=False,
                return_dict_in_generate=True,
                output_scores=True,
            ),
            logits_processor=processors,
        )
        sequences = output.sequences
        log_scores = _greedy_scores(model, output, length_penalty) if num_beams == 1 else output.sequences_scores
    log_scores = log_scores.float()
    if not torch.isfinite(log_scores).all():
        raise CheckpointError(
            f"The language model gives non-finite sequence scores ({FiniteLogits(model).description})."
        )
    return GeneratedSequences(sequences, log_scores.exp(), log_scores)


def _greedy_scores(model: Any, output: Any, length_penalty: float) -> Tensor:
    """(B,) sum of the chosen tokens' processed log-probabilities / length ** length_penalty, up to the end token."""
    steps = torch.stack(output.scores, dim=1)
    tokens = output.sequences[:, -steps.shape[1] :]
    token_scores = steps.gather(-1, tokens[..., None])[..., 0]
    is_end = torch.isin(tokens, _end_tokens(model).to(tokens.device))
    generated = (is_end.cumsum(dim=1) - is_end.long()) == 0
    length = generated.sum(dim=1)
    return token_scores.where(generated, 0.0).sum(dim=1) / length**length_penalty


def _end_tokens(model: Any) -> Tensor:
    """Ids of the end tokens, possibly none."""
    ends = model.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)


def _check_inputs(inputs_embeds: Tensor, attention_mask: Tensor) -> None:
    if inputs_embeds.ndim != 3 or 0 in inputs_embeds.shape:
        raise InputError(f"inputs_embeds must be a non-empty tensor (B, L, C), got shape {tuple(inputs_embeds.shape)}.")
    if attention_mask.shape != inputs_embeds.shape[:2]:
        raise InputError(
            f"attention_mask must have shape {tuple(inputs_embeds.shape[:2])} as inputs_embeds, "
            f"got {tuple(attention_mask.shape)}."
        )
