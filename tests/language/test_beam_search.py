"""The beam search of our own against `generate` of transformers, and what it spares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from foveate.language import t5_steps
from foveate.language.beam_search import can_search
from foveate.language.generation import generate_finite

SIZES: dict[str, Any] = {"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 3}
SIZES |= {"num_decoder_layers": 2, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


def t5(seed: int = 0, end_bias: float = 1.0, **overrides: Any) -> Any:
    """A T5 with weights large enough that beams cross, whose captions end at different steps."""
    torch.manual_seed(seed)
    model: Any = T5ForConditionalGeneration(T5Config(**{**SIZES, **overrides})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.7)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda _m, _i, out: out + end_bias * (torch.arange(out.shape[-1]) == 1))
    return model


def inputs(seed: int = 1, rows: int = 6) -> dict[str, Any]:
    """Rows of 3 to 9 real positions, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(9) < torch.tensor([[9], [3], [5], [8], [4], [6]])[:rows]).long()
    return {"inputs_embeds": torch.randn(rows, 9, 16, generator=generator), "attention_mask": mask}


def without_padding(sequences: torch.Tensor) -> list[list[int]]:
    """Ids up to the first end token: what follows is padding, of which there are two kinds."""
    rows = [row.tolist() for row in sequences]
    return [row[: row.index(1) + 1] if 1 in row else row for row in rows]


def assert_as_generate(model: Any, given: dict[str, Any], **settings: Any) -> None:
    output = generate_finite(model, **given, **settings)
    plain = model.generate(
        **given,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **{"min_length": 0, "length_penalty": 0.0, **settings},
    )
    assert without_padding(output.sequences) == without_padding(plain.sequences)
    torch.testing.assert_close(output.log_scores, plain.sequences_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beams", [2, 5])
@pytest.mark.parametrize(("length_penalty", "penalty", "min_length"), [(0.0, 1.5, 1), (1.0, 1.0, 4), (-1.0, 1.2, 0)])
def test_equals_generate(seed: int, beams: int, length_penalty: float, penalty: float, min_length: int) -> None:
    model = t5(seed)
    assert can_search(model)
    settings = {"length_penalty": length_penalty, "repetition_penalty": penalty, "min_length": min_length}
    assert_as_generate(model, inputs(seed), num_beams=beams, max_new_tokens=9, **settings)


@pytest.mark.parametrize(
    "overrides",
    [
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {"eos_token_id": [1, 7]},
        {"vocab_size": 8},  # fewer words than candidates
        {"end_bias": -50.0},  # no caption ends by itself
        {"end_bias": 50.0},  # all do at once
    ],
    ids=str,
)
def test_equals_generate_for_other_models(overrides: dict[str, Any]) -> None:
    model = t5(**overrides)
    assert can_search(model)
    beams = 3 if "vocab_size" not in overrides else 4
    assert_as_generate(model, inputs(), num_beams=beams, max_new_tokens=6)


def test_finished_rows_leave_and_the_first_step_runs_once_a_row() -> None:
    """Rows of the decoder at each step: 6, then 6 x 3 beams, then fewer as captions end."""
    model = t5(end_bias=2.0)
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _i, out: rows.append(out.flatten(0, -2).shape[0]))
    generate_finite(model, **inputs(), num_beams=3, max_new_tokens=12)
    assert rows[:2] == [6, 18]
    assert rows == [6, *sorted(rows[1:], reverse=True)]
    assert rows[-1] < 18
    assert all(count % 3 == 0 for count in rows)


def test_rows_of_like_length_are_encoded_together_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = t5(), {**inputs(), "num_beams": 2, "max_new_tokens": 5}
    whole = generate_finite(model, **given)
    shapes: list[tuple[int, ...]] = []
    model.encoder.register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.last_hidden_state.shape[:2])))
    generate_finite(model, **given)
    assert shapes == [(6, 9)]  # so small that another call would cost more than the padding
    shapes.clear()
    monkeypatch.setattr(t5_steps, "_WORTH_A_CALL", 1)
    bucketed = generate_finite(model, **given)
    assert shapes == [(5, 8), (1, 9)]  # of 9, 3, 5, 8, 4 and 6 positions
    assert torch.equal(bucketed.sequences, whole.sequences)
    torch.testing.assert_close(bucketed.log_scores, whole.log_scores, rtol=1e-5, atol=1e-5)


def test_a_batch_is_its_rows() -> None:
    model, given = t5(2), inputs(3)
    together = generate_finite(model, **given, num_beams=3, max_new_tokens=8, repetition_penalty=1.5)
    for row in range(6):
        alone = generate_finite(
            model,
            **{name: value[row : row + 1] for name, value in given.items()},
            num_beams=3,
            max_new_tokens=8,
            repetition_penalty=1.5,
        )
        assert without_padding(alone.sequences)[0] == without_padding(together.sequences)[row]
        torch.testing.assert_close(alone.log_scores[0], together.log_scores[row], rtol=1e-4, atol=1e-4)


def test_what_it_does_not_know_is_left_to_generate() -> None:
    """Rules of a checkpoint's own, half precision that transformers clamps, wrapped blocks, other architectures."""
    model = t5(end_bias=-50.0)
    model.generation_config.no_repeat_ngram_size = 1
    assert not can_search(model)
    assert_as_generate(model, inputs(), num_beams=2, max_new_tokens=6)
    for row in generate_finite(model, **inputs(), num_beams=2, max_new_tokens=6).sequences:
        assert len(set(row[1:].tolist())) == 6  # the rule is kept
    model.generation_config.no_repeat_ngram_size = None
    assert can_search(model)

    forced = t5(end_bias=-50.0)
    forced.generation_config.forced_eos_token_id = 1
    assert not can_search(forced)
    assert (generate_finite(forced, **inputs(), max_new_tokens=4).sequences[:, -1] == 1).all()

    assert not can_search(t5().half())
    wrapped = t5()
    wrapped.decoder.block[0].__class__ = type("Sharded", (type(wrapped.decoder.block[0]),), {})
    assert not can_search(wrapped)
    assert_as_generate(wrapped, inputs(), num_beams=2, max_new_tokens=5)

    assert not can_search(MT5ForConditionalGeneration(MT5Config(**SIZES)))
    bart_sizes: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    bart_sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 24}
    assert not can_search(BartForConditionalGeneration(BartConfig(**bart_sizes)))
    llama_sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    assert not can_search(LlamaForCausalLM(LlamaConfig(vocab_size=24, **llama_sizes)))


def test_bfloat16() -> None:
    model, given = t5(4).bfloat16(), inputs()
    given["inputs_embeds"] = given["inputs_embeds"].bfloat16()
    output = generate_finite(model, **given, num_beams=2, max_new_tokens=5)
    assert output.log_scores.dtype == torch.float32
    assert output.log_scores.isfinite().all()
    exact = generate_finite(t5(4), **inputs(), num_beams=2, max_new_tokens=5)
    torch.testing.assert_close(output.log_scores, exact.log_scores, rtol=0.1, atol=0.3)
