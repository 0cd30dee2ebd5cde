from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from foveate.errors import CheckpointError, InputError
from foveate.language.generation import FiniteLogits, generate_finite
from foveate.language.lm import untie_lm_head

GOLDEN = Path(__file__).parents[1] / "golden" / "dynrefer" / "llm.safetensors"


def flan_like() -> T5ForConditionalGeneration:
    """The golden captioner: gated feed-forward with exact GELU, lm_head of its own."""
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    sizes |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    config = T5Config(**sizes)
    config.dense_act_fn = "gelu"
    model = T5ForConditionalGeneration(config).eval()
    untie_lm_head(model)
    prefix = "sd.t5_model."
    state = {key.removeprefix(prefix): value for key, value in load_file(GOLDEN).items() if key.startswith(prefix)}
    lacking = model.load_state_dict(state, strict=False).missing_keys
    assert all("embed_tokens" in key for key in lacking)
    return model


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def captioner() -> T5ForConditionalGeneration:
    return flan_like()


def inputs_of(golden: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {"inputs_embeds": golden["mid.inputs_embeds"], "attention_mask": golden["mid.attention_mask"]}


def beam_of_one(
    model: Any, inputs: dict[str, Any], row: int, steps: int, penalty: float, min_length: int = 0
) -> tuple[list[int], float]:
    """Beam search with one beam, written out: penalised log-probabilities, the best token, their sum."""
    embeds, mask = inputs["inputs_embeds"][row : row + 1], inputs["attention_mask"][row : row + 1]
    ids: list[int] = [model.config.decoder_start_token_id] if model.config.is_encoder_decoder else []
    total = 0.0
    for _ in range(steps):
        if model.config.is_encoder_decoder:
            output = model(inputs_embeds=embeds, attention_mask=mask, decoder_input_ids=torch.tensor([ids]))
        else:
            kept = embeds[:, mask[0].bool()]
            words = model.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))
            output = model(inputs_embeds=torch.cat([kept, words], dim=1))
        scores = output.logits[0, -1].log_softmax(-1)
        for token in set(ids):
            scores[token] *= penalty
        if len(ids) < min_length:
            scores[1] = -torch.inf
        token = int(scores.argmax())
        total += float(scores[token])
        ids.append(token)
        if token == 1:
            break
    return ids, total


class TestGolden:
    def test_official_captions(self, golden: Any, captioner: Any) -> None:
        output = generate_finite(captioner, **inputs_of(golden), num_beams=2, max_new_tokens=8, repetition_penalty=1.5)
        assert torch.equal(output.sequences, golden["out.sequences"])
        torch.testing.assert_close(output.scores, golden["out.scores_exp"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.scores.log(), golden["out.sequences_scores"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["t5", "llama"])
class TestSearch:
    @pytest.fixture
    def case(self, family: str, golden: Any, captioner: Any) -> tuple[Any, dict[str, Any]]:
        if family == "t5":
            return captioner, inputs_of(golden)
        embeds = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]])  # padded on the left
        return llama(), {"inputs_embeds": embeds, "attention_mask": mask}

    @pytest.mark.parametrize("penalty", [1.0, 1.5])
    @pytest.mark.parametrize("min_length", [0, 4])
    @torch.no_grad()
    def test_greedy_is_beam_search_with_one_beam(self, case: Any, penalty: float, min_length: int) -> None:
        model, inputs = case
        output = generate_finite(model, **inputs, max_new_tokens=7, repetition_penalty=penalty, min_length=min_length)
        for row in range(3):
            ids, total = beam_of_one(model, inputs, row, 7, penalty, min_length)
            assert output.sequences[row, : len(ids)].tolist() == ids
            assert not output.sequences[row, len(ids) :].any()
            assert output.scores[row].log().item() == pytest.approx(total, abs=1e-4)

    @torch.no_grad()
    def test_end_token_stops_the_score_and_min_length_holds_it_back(self, case: Any) -> None:
        """A head that prefers the end token: p(end) alone is the score, and later padding does not count."""
        model, inputs = case
        head = model.get_output_embeddings()
        hook = head.register_forward_hook(lambda _m, _i, out: out + 300 * (torch.arange(out.shape[-1]) == 1))
        try:
            output = generate_finite(model, **inputs, max_new_tokens=6, min_length=0)
            start = 1 if model.config.is_encoder_decoder else 0
            assert output.sequences[:, start:].tolist() == [[1]] * 3
            assert (output.scores > 0.99).all()
            for beams in (1, 2):
                late = generate_finite(model, **inputs, max_new_tokens=6, num_beams=beams, min_length=4)
                assert late.sequences.shape == (3, 5)
                assert (late.sequences == 1).sum().item() == 3
                assert (late.sequences[:, 4] == 1).all()
                assert (late.scores < 0.01).all()
        finally:
            hook.remove()

    def test_beams_equal_plain_generate_of_each_row(self, case: Any) -> None:
        """Without its padding: where it stands on the left, transformers 5.23 lets tokens escape the penalty."""
        model, inputs = case
        output = generate_finite(
            model, **inputs, max_new_tokens=6, num_beams=3, length_penalty=1.0, repetition_penalty=1.3, min_length=0
        )
        for row in range(3):
            kept = inputs["attention_mask"][row].bool()
            plain = model.generate(
                inputs_embeds=inputs["inputs_embeds"][row : row + 1, kept],
                attention_mask=torch.ones(1, int(kept.sum()), dtype=torch.long),
                max_new_tokens=6,
                num_beams=3,
                do_sample=False,
                length_penalty=1.0,
                repetition_penalty=1.3,
                return_dict_in_generate=True,
                output_scores=True,
            )
            length = plain.sequences.shape[1]
            assert torch.equal(output.sequences[row, :length], plain.sequences[0])
            assert not output.sequences[row, length:].any()
            torch.testing.assert_close(output.log_scores[row], plain.sequences_scores[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(output.scores[row], plain.sequences_scores[0].exp(), rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_greedy_equals_plain_generate_and_length_penalty_divides(self, case: Any) -> None:
        model, inputs = case
        output = generate_finite(model, **inputs, max_new_tokens=6)
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
        assert torch.equal(output.sequences, plain)
        start = 1 if model.config.is_encoder_decoder else 0
        lengths = torch.tensor([len(beam_of_one(model, inputs, row, 6, 1.0)[0]) - start for row in range(3)])
        mean = generate_finite(model, **inputs, max_new_tokens=6, length_penalty=1.0)
        torch.testing.assert_close(mean.scores.log() * lengths, output.scores.log(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("beams", [1, 2])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_non_finite_logits(self, case: Any, beams: int, value: float) -> None:
        model, inputs = case
        head = model.get_output_embeddings()
        # from the third step on: the check looks at every step, not the first only
        steps: list[int] = []

        def spoil(_module: Any, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
            steps.append(1)
            return out if len(steps) < 3 else out.index_fill(-1, torch.tensor([7]), value)

        hook = head.register_forward_hook(spoil)
        model.generation_config.remove_invalid_values = True  # would hide it
        try:
            with pytest.raises(CheckpointError, match=r"non-finite logits \(\w+ in float32 on cpu\); load it in bf16"):
                generate_finite(model, **inputs, max_new_tokens=6, num_beams=beams, min_length=6)
        finally:
            hook.remove()
            model.generation_config.remove_invalid_values = None
        assert len(steps) == 3

    def test_bad_settings(self, case: Any) -> None:
        model, inputs = case
        for name, value in (
            ("num_beams", 0),
            ("max_new_tokens", 0),
            ("min_length", -1),
            ("num_beams", 1.5),
            ("max_new_tokens", True),
            ("repetition_penalty", 0.0),
            ("repetition_penalty", float("nan")),
            ("repetition_penalty", float("inf")),
            ("length_penalty", float("nan")),
            ("length_penalty", "1"),
            ("num_beams", 10**6),
        ):
            with pytest.raises(InputError, match=name):
                generate_finite(model, **inputs, **{"max_new_tokens": 3, name: value})
        embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
        with pytest.raises(InputError, match="attention_mask must have shape"):
            generate_finite(model, inputs_embeds=embeds, attention_mask=mask[:, 1:], max_new_tokens=3)
        with pytest.raises(InputError, match="non-empty"):
            generate_finite(model, inputs_embeds=embeds[:0], attention_mask=mask[:0], max_new_tokens=3)
        with pytest.raises(CheckpointError, match="input embeddings of the language model are not finite"):
            generate_finite(model, inputs_embeds=embeds * torch.nan, attention_mask=mask, max_new_tokens=3)


def test_finite_logits_allows_forbidden_tokens(captioner: Any) -> None:
    check = FiniteLogits(captioner)
    ids = torch.zeros(1, 1, dtype=torch.long)
    allowed = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert torch.equal(check(ids, allowed), allowed)
    for row in ([0.0, torch.nan], [0.0, torch.inf], [-torch.inf, -torch.inf], [-torch.inf, torch.nan]):
        with pytest.raises(CheckpointError, match="non-finite"):
            check(ids, torch.tensor([[0.0, 0.0], row]))


def test_a_t5_that_overflows_in_fp16_is_an_error_there_and_a_caption_in_bf16() -> None:
    """The best-known failure of the original code: captions "ssss" with score nan (DynRefer spec section 8)."""
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    sizes |= {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    config = T5Config(**sizes)
    torch.manual_seed(0)
    model: Any = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        # One factor of the gated layers outgrows 65504, the largest number of float16, where the other is 0.
        for block in (*model.encoder.block, *model.decoder.block):
            block.layer[-1].DenseReluDense.wi_0.weight.mul_(100)
            block.layer[-1].DenseReluDense.wi_1.weight.fill_(1e4)
    inputs: dict[str, Any] = {
        "inputs_embeds": torch.ones(2, 3, 32),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
    }
    for dtype in (torch.float32, torch.bfloat16):
        output = generate_finite(
            model.to(dtype), **{**inputs, "inputs_embeds": inputs["inputs_embeds"].to(dtype)}, max_new_tokens=4
        )
        assert output.scores.isfinite().all()
    half: dict[str, Any] = {**inputs, "inputs_embeds": inputs["inputs_embeds"].half()}
    with pytest.raises(CheckpointError, match=r"non-finite logits \(T5\w+ in float16 on cpu\); load it in bf16"):
        generate_finite(model.half(), **half, max_new_tokens=4)
