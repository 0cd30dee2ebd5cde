from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from foveate.errors import InputError
from foveate.language.decoding import Sampling, TextStream, TokenStream, crop_cache


class Letters:
    """One letter a token; 200 and 201 are halves of one character."""

    eos_token_id = 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text = "".join(map(chr, ids))
        return text.replace("\xc8\xc9", "é").replace("\xc8", "\N{REPLACEMENT CHARACTER}")


def stream(text: str, *stops: str, ends: tuple[int, ...] = ()) -> tuple[list[str], TextStream]:
    found = TextStream(Letters(), stops=stops, ends=ends)
    pieces = [found.push(ord(letter)) for letter in text]
    pieces.append(found.close())
    return pieces, found


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def run(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> list[list[int]]:
    embeds = model.get_input_embeddings()(ids).detach()
    steps = list(TokenStream(model, Sampling(**settings)).run(embeds, mask))
    return torch.stack(steps, dim=1).tolist()


def test_greedy_is_that_of_transformers(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, 4:].tolist()
    assert run(model, ids, max_new_tokens=12) == [expected]


def test_rows_padded_on_the_left_are_what_they_are_alone(model: Any) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    together = run(model, ids, mask, max_new_tokens=8)
    assert together[0] == run(model, ids[:1], max_new_tokens=8)[0]
    assert together[1] == run(model, ids[1:, 2:], max_new_tokens=8)[0]


def test_a_cache_is_as_good_as_reading_anew(model: Any) -> None:
    embed = model.get_input_embeddings()
    first, second = torch.tensor([[5, 6, 7]]), torch.tensor([[11, 12]])
    talk = TokenStream(model, Sampling(max_new_tokens=4))
    said = torch.stack(list(talk.run(embed(first).detach())), dim=1)
    # The last token was given out, but has not been read.
    assert talk.cache.get_seq_length() == 3 + 3
    crop_cache(talk.cache, 3 + 2)
    rest = torch.cat([said[:, 2:], second], dim=1)
    again = TokenStream(model, Sampling(max_new_tokens=5), talk.cache)
    cached = torch.stack(list(again.run(embed(rest).detach())), dim=1).tolist()
    assert cached == run(model, torch.cat([first, said, second], dim=1), max_new_tokens=5)


def test_repetition_penalty_and_sampling_follow_their_definitions() -> None:
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.0]])
    given = torch.tensor([[0, 2]])

    def choose(**settings: Any) -> list[int]:
        stream = TokenStream(_Nothing(), Sampling(**settings))
        return [int(stream._choose(logits, given)) for _ in range(200)]

    # 2 / 4 = 0.5 falls below 1; -1 * 4 stays below.
    assert set(choose(repetition_penalty=4.0)) == {1}
    assert set(choose(temperature=1.0, top_k=2)) == {0, 1}
    # Probabilities 0.61, 0.22, 0.03, 0.08: the first alone reaches 0.6, two reach 0.8, three 0.9.
    assert set(choose(temperature=1.0, top_p=0.6)) == {0}
    assert set(choose(temperature=1.0, top_p=0.8)) == {0, 1}
    assert set(choose(temperature=1.0, top_p=0.9)) == {0, 1, 3}
    assert set(choose(temperature=1e-300)) == {0}
    assert choose(temperature=1.0, seed=3) == choose(temperature=1.0, seed=3)
    share = choose(temperature=1.0).count(0) / 200
    assert share == pytest.approx(0.64, abs=0.1)


class _Nothing:
    dtype, device = torch.float32, "cpu"


def test_text_comes_as_soon_as_it_is_sure() -> None:
    pieces, found = stream("one two")
    assert pieces == [*"one two", ""]
    assert not found.stopped


def test_what_may_become_a_stop_is_held_back() -> None:
    pieces, found = stream("a<|e|x", "<|end|>")
    assert pieces == ["a", "", "", "", "<|e|", "x", ""]
    pieces, found = stream("a<|end|>bc", "<|end|>")
    assert "".join(pieces) == "a"
    assert found.stopped
    assert found.ids == [ord("a")]
    pieces, found = stream("a<|en", "<|end|>")
    assert "".join(pieces) == "a<|en"
    assert not found.stopped


def test_the_first_of_several_stops_ends_the_answer() -> None:
    pieces, found = stream("one. two\n", "\n", ". t")
    assert "".join(pieces) == "one"
    assert found.ids == [ord(letter) for letter in "one"]


def test_end_tokens_are_not_part_of_the_answer() -> None:
    _, found = stream("ab\x00c", ends=(0,))
    assert (found.text, found.ids, found.stopped) == ("ab", [97, 98], True)


def test_half_characters_wait_for_their_other_half() -> None:
    found = TextStream(Letters())
    assert [found.push(token) for token in (97, 200, 201, 98)] == ["a", "", "é", "b"]


@pytest.mark.parametrize(
    "settings",
    [{"top_p": 1.5}, {"top_k": 1.5}, {"temperature": -1}, {"seed": True}, {"beams": 2}, {"top_p": float("nan")}],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Sampling.of(settings)
