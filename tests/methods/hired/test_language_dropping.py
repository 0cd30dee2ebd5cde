"""FastV and SparseVLM: scores and counts by hand, and the hooks against a decoder that is run layer by layer."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hired_parts  # pyright: ignore[reportMissingImports] (conftest.py loads it)
import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from foveate import drop_visual_tokens
from foveate.errors import InputError
from foveate.language.templates import IMAGE_ID, VIDEO_ID
from foveate.methods.hired.hosts import LlavaHost
from foveate.methods.hired.predictor import LlavaPredictor
from foveate.methods.hired.strategies import LanguageSelection, LanguageStrategy, LanguageTokens, make_strategy
from foveate.methods.hired.strategies.fastv import FastV
from foveate.methods.hired.strategies.language import attention_rows
from foveate.methods.hired.strategies.sparsevlm import SparseVLM, density_peaks, kept_in_steps

PLACEHOLDER, LAYERS = 60, 5

# -------------------------------------------------------------------- strategies by hand


def test_attention_rows_of_grouped_heads() -> None:
    # Two heads share one group of keys; q.k is log 1, log 2, log 3, and the last token is hidden from the first row.
    keys = torch.tensor([[[1.0], [2.0], [3.0]]]).log()
    query = torch.tensor([[[1.0], [0.0]], [[2.0], [4.0]]])
    visible = torch.tensor([[True, True, False], [True, True, True]])
    rows = attention_rows(query, keys, visible, 0.5)
    total = 1 + 2 + 3
    squares = 1 + 4 + 9
    half = 1 + 2**0.5
    expected = [[[1 / half, 2**0.5 / half, 0], [1 / 2, 1 / 2, 0]], [[1 / total, 2 / total, 3 / total]]]
    assert rows[0].tolist() == [pytest.approx(row, abs=1e-6) for row in expected[0]]
    assert rows[1, 0].tolist() == pytest.approx(expected[1][0], abs=1e-6)
    assert rows[1, 1].tolist() == pytest.approx([1 / squares, 4 / squares, 9 / squares], abs=1e-6)
    # A score is the mean over raters and heads.
    score = FastV(0.5).score(0, query, keys, visible, 0.5)
    assert score.tolist() == pytest.approx(rows.mean(dim=(0, 1)).tolist(), abs=1e-6)


def tokens_of(scores: Sequence[float], visual: Sequence[int], *, budget: int = 2, **changes: Any) -> LanguageTokens:
    settings = {"layer": 1, "num_layers": 32, "total": sum(visual), "states": torch.zeros(len(scores), 2)} | changes
    return LanguageTokens(visual=torch.tensor(visual).bool(), scores=torch.tensor(scores), budget=budget, **settings)


def test_fastv_keeps_what_the_last_token_looks_at_most() -> None:
    seen = tokens_of([0.9, 0.1, 0.4, 0.2, 0.3, 0.9], [0, 1, 1, 1, 1, 0])
    strategy = make_strategy("fastv", 0.3)
    assert strategy.raters(torch.zeros(6, 2), seen.visual).tolist() == [5]
    assert strategy.prune_layers(32) == (1,)
    assert make_strategy("fastv", 0.3, after=3).prune_layers(32) == (2,)
    assert strategy.select(seen).keep.nonzero()[:, 0].tolist() == [2, 4]
    # As published: round(4 * 0.3) = 1 of those that are read.
    published = make_strategy("fastv", 0.3, rate_of="read").select(seen)
    assert published.keep.nonzero()[:, 0].tolist() == [2]
    with pytest.raises(InputError, match="after 2 layers, and this language model has 2"):
        strategy.prune_layers(2)
    with pytest.raises(InputError, match="has no option 'newline'"):
        make_strategy("fastv", 0.3, newline="all")


def test_sparsevlm_has_the_published_numbers_and_their_mean() -> None:
    assert [kept_in_steps(budget, 576) for budget in (192, 128, 64)] == [(300, 200, 110), (303, 110, 36), (66, 30, 17)]
    assert kept_in_steps(96, 288) == (150, 100, 55)  # the same share of half as many tokens
    assert kept_in_steps(160, 576) == (302, 155, 73)  # between 128 and 192, rounded to even
    assert kept_in_steps(576, 576) == (576, 576, 576)
    assert kept_in_steps(1, 576) == (1, 1, 1)
    strategy = SparseVLM(0.2)
    assert strategy.prune_layers(32) == (1, 5, 14)
    assert strategy.prune_layers(6) == (0, 1, 2)
    assert strategy.prune_layers(4) == (0, 1, 2)
    with pytest.raises(InputError, match="has 3 layers; it needs 4"):
        strategy.prune_layers(3)
    for budget, kept in ((192, (300, 200, 110)), (128, (303, 110, 36)), (64, (66, 30, 17))):
        left, lengths = 576, []
        for number, layers in zip(kept, (4, 9, 17), strict=True):
            recycled = int(0.3 * (left - number)) + 1
            left = number + recycled // 10 + 1
            lengths += [left] * layers
        assert sum([576, 576, *lengths]) / 32 == pytest.approx(budget, rel=0.02)


def test_sparsevlm_asks_the_words_that_the_picture_is_like() -> None:
    visual = torch.tensor([0, 1, 1, 0, 0, 0]).bool()
    embeds = torch.tensor([[9.0, 9.0], [1, 0], [1, 0], [0, 1], [2, 0], [0, 0]])
    # Of the three words behind the picture the softmax of 0, 2, 0 is highest at the second; the first of all, though
    # most alike, stands before the picture.
    assert SparseVLM(0.5).raters(embeds, visual).tolist() == [4]
    # Equal words: none is above the mean, so the last one is asked.
    assert SparseVLM(0.5).raters(torch.ones(6, 2), visual).tolist() == [5]
    assert SparseVLM(0.5).raters(torch.ones(3, 2), torch.tensor([0, 1, 1]).bool()).tolist() == [2]


def test_density_peaks_are_the_middles_of_clusters() -> None:
    # Clusters of seven around 0 and around 100; each has one point in the middle of six others.
    ring = torch.tensor([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [0.7, 0.7], [-0.7, -0.7]])
    points = torch.cat([ring[1:4], ring[:1], ring[4:], ring + 100])
    assert sorted(density_peaks(points, 2).tolist()) == [3, 7]
    assert density_peaks(points[:1], 1).tolist() == [0]
    assert len(set(density_peaks(torch.zeros(6, 2), 3).tolist())) == 3


def test_sparsevlm_recycles_the_best_of_what_it_drops() -> None:
    scores = [0.0, *(float(n) for n in range(12)), 0.0]
    states = torch.arange(14.0)[:, None]
    seen = tokens_of(scores, [0, *[1] * 12, 0], states=states, budget=9)
    assert kept_in_steps(9, 12)[0] == 10
    chosen = SparseVLM(0.75).select(seen)
    assert chosen.keep.nonzero()[:, 0].tolist() == list(range(3, 13))
    assert chosen.merged is not None
    assert chosen.places is not None
    # The two that are dropped are 1 and 2; int(0.3 * 2) + 1 = 1 of them, the better, is recycled.
    assert chosen.merged.tolist() == [[2.0]]
    assert chosen.places.tolist() == [2]
    assert SparseVLM(0.75, recycle=False).select(seen).merged is None
    # With a smaller budget, 4 of 9 dropped ones: equally near on a line, their mean is one token.
    fewer = SparseVLM(0.25).select(tokens_of(scores, [0, *[1] * 12, 0], states=states, budget=2))
    count = kept_in_steps(2, 12)[0]
    recycled = int(0.3 * (12 - count)) + 1
    assert fewer.merged is not None
    last = 12 - count
    assert fewer.merged.flatten().tolist() == [pytest.approx(sum(range(last - recycled + 1, last + 1)) / recycled)]


# -------------------------------------------------------------------- the hooks


def make_model(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=PLACEHOLDER,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        vision_feature_layer=-1,
    )
    model: Any = LlavaNextForConditionalGeneration(config).eval()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def make_inputs(model: Any, sizes: Sequence[tuple[int, int]], words: Sequence[int] = (), seed: int = 0) -> dict:
    """A row a picture, padded on the left, as the processor writes it."""
    generator = torch.Generator().manual_seed(seed)
    layouts = LlavaHost(model).layouts(torch.tensor(sizes), len(sizes))
    pixels = torch.zeros(len(sizes), max(layout.count for layout in layouts), 3, 8, 8)
    rows = []
    for number, layout in enumerate(layouts):
        pixels[number, : layout.count] = torch.randn(layout.count, 3, 8, 8, generator=generator)
        text = torch.randint(1, 50, (words[number] if words else 4,), generator=generator)
        rows.append(torch.cat([torch.tensor([1, 2]), torch.full((layout.full_length,), PLACEHOLDER), text]))
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(longest - len(row), dtype=torch.long), row]) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def one_of(inputs: dict, row: int) -> dict:
    """A row by itself, without padding."""
    alone = {key: value[row : row + 1] for key, value in inputs.items()}
    real = alone["attention_mask"][0].bool()
    return alone | {"input_ids": alone["input_ids"][:, real], "attention_mask": alone["attention_mask"][:, real]}


class LastOnes(LanguageStrategy):
    """Keeps the visual tokens that are read last, so that a test knows which; with a merged token of all dropped."""

    def __init__(self, budget: float, layers: tuple[int, ...], *, merge: bool = False) -> None:
        super().__init__(budget)
        self.at, self.merge = layers, merge

    def prune_layers(self, num_layers: int) -> tuple[int, ...]:
        return self.at

    def select(self, tokens: LanguageTokens) -> LanguageSelection:
        visual = tokens.visual.nonzero()[:, 0]
        count = tokens.budget - self.at.index(tokens.layer)
        keep = torch.zeros_like(tokens.visual)
        keep[visual[-count:]] = True
        if not self.merge:
            return LanguageSelection(keep)
        dropped = visual[:-count]
        return LanguageSelection(keep, tokens.states[dropped].mean(dim=0, keepdim=True), dropped[:1])


@torch.no_grad()
def layer_by_layer(model: Any, inputs: dict, strategy: Any, budget: int, later: Tensor) -> Tensor:
    """Logits of a prompt without padding and of the tokens after it, in one pass without hooks or cache.

    Tokens are dropped by moving states, with a mask and angles that are written out.
    """
    host = model.model
    pictures = host.get_image_features(inputs["pixel_values"], inputs["image_sizes"], return_dict=True).pooler_output
    ids = torch.cat([inputs["input_ids"], later], dim=1)
    states = model.get_input_embeddings()(ids).clone()
    visual = ids[0] == PLACEHOLDER
    states[0, visual] = torch.cat(list(pictures))
    decoder = host.language_model
    positions = torch.arange(len(visual))
    prompt = positions < inputs["input_ids"].shape[1]
    total = int(visual.sum())
    raters = strategy.raters(states[0, prompt], visual[prompt])
    asking = torch.zeros(len(visual), dtype=torch.bool)
    asking[raters] = True
    for number, layer in enumerate(decoder.layers):
        angles = decoder.rotary_emb(states, positions[None])
        length = len(positions)
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        normed = layer.input_layernorm(states)
        attended, weights = layer.self_attn(normed, position_embeddings=angles, attention_mask=mask)
        states = states + attended
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        if number not in strategy.prune_layers(LAYERS):
            continue
        if weights is None:  # of sdpa
            scores = torch.zeros(int(prompt.sum()))
        else:
            scores = weights[0][:, asking][:, :, prompt].mean(dim=(0, 1))
        seen = LanguageTokens(number, LAYERS, states[0, prompt], visual[prompt], scores, total, budget)
        chosen = strategy.select(seen)
        order = [n for n in range(int(prompt.sum())) if chosen.keep[n] or not visual[n]]
        parts = [states[0, n] for n in order]
        places = [int(positions[n]) for n in order]
        marks = [bool(visual[n]) for n in order]
        asks = [bool(asking[n]) for n in order]
        if chosen.merged is not None and chosen.places is not None:
            last = int(seen.visual.nonzero()[-1])
            behind = sum(n <= last for n in order)
            for extra, origin in zip(reversed(chosen.merged), reversed(chosen.places.tolist()), strict=True):
                parts.insert(behind, extra)
                places.insert(behind, int(positions[origin]))
                marks.insert(behind, True)
                asks.insert(behind, False)
        rest = (~prompt).nonzero()[:, 0]
        states = torch.cat([torch.stack(parts), states[0, rest]])[None]
        positions = torch.cat([torch.tensor(places), positions[rest]])
        visual = torch.cat([torch.tensor(marks), visual[rest]])
        asking = torch.cat([torch.tensor(asks), asking[rest]])
        prompt = torch.cat([torch.ones(len(parts), dtype=torch.bool), prompt[rest]])
    return model.lm_head(decoder.norm(states))[0, -1 - later.shape[1] :]


STRATEGIES = [
    FastV(0.3),
    SparseVLM(0.3),
    LastOnes(0.3, (1, 3)),
    LastOnes(0.3, (0, 2), merge=True),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["fastv", "sparsevlm", "twice", "merged"])
def test_prompt_and_new_tokens_are_as_without_hooks_and_cache(strategy: Any) -> None:
    eager = make_model("eager")
    inputs = one_of(make_inputs(eager, [(12, 16)]), 0)
    candidates = 5 * 16
    with drop_visual_tokens(eager, strategy=strategy):
        said = eager.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    new = said.sequences[:, inputs["input_ids"].shape[1] :]
    expected = layer_by_layer(eager, inputs, strategy, int(candidates * 0.3), new[:, :-1])
    torch.testing.assert_close(torch.cat(said.logits), expected, atol=2e-4, rtol=1e-4)
    # The rest of the layers reads fewer tokens: that is the point.
    lengths = [layer.get_seq_length() for layer in said.past_key_values.layers]
    layers = strategy.prune_layers(LAYERS)
    assert lengths[: layers[0] + 1] == [inputs["input_ids"].shape[1] + 3] * (layers[0] + 1)
    assert max(lengths[layers[0] + 1 :]) < lengths[0] - 20
    if isinstance(strategy, FastV):
        assert lengths[2:] == [2 + 24 + 4 + 3] * (LAYERS - 2)
    eager.set_attn_implementation("sdpa")
    with drop_visual_tokens(eager, strategy=strategy):
        fast = eager.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    torch.testing.assert_close(torch.cat(fast.logits), torch.cat(said.logits), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["fastv", "sparsevlm"])
def test_rows_of_a_batch_are_as_alone_with_beams_too(model: Any, name: str) -> None:
    inputs = make_inputs(model, [(16, 16), (12, 16), (6, 16)], words=(5, 3, 4))
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(**inputs, **settings)
    with drop_visual_tokens(model, 0.25, name):
        for beams in (1, 3):
            together = model.generate(**inputs, **settings, num_beams=beams)
            for row in range(3):
                own = one_of(inputs, row)
                alone = model.generate(**own, **settings, num_beams=beams)
                assert together[row, -5:].tolist() == alone[0, -5:].tolist()
    # Removed, the model is what it was; nothing hangs on it.
    assert torch.equal(model.generate(**inputs, **settings), plain)
    assert not model._forward_pre_hooks
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.model.language_model.modules())


def test_a_budget_of_all_and_texts_without_pictures_are_left_alone(model: Any) -> None:
    inputs = make_inputs(model, [(16, 16)])
    text = {"input_ids": torch.tensor([[1, 2, 3, 4]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        plain, said = model(**inputs).logits, model(**text).logits
        with drop_visual_tokens(model, 1.0, "fastv"):
            assert torch.equal(model(**inputs).logits, plain)
        with drop_visual_tokens(model, 0.2, "fastv"):
            assert torch.equal(model(**text).logits, said)
            shorter = model(**inputs).logits
            # A cache that has read a picture may go on with text.
            cache = DynamicCache(config=model.config.get_text_config())
            first = model(**inputs, past_key_values=cache, use_cache=True)
            second = model(input_ids=text["input_ids"], past_key_values=cache, use_cache=True).logits
        assert shorter.shape[1] == 2 + 16 + 4
        assert torch.equal(first.logits, shorter)
        with drop_visual_tokens(model, 0.2, "fastv"):
            cache = DynamicCache(config=model.config.get_text_config())
            model(**inputs, past_key_values=cache, use_cache=True)
            steps = [
                model(input_ids=text["input_ids"][:, n : n + 1], past_key_values=cache, use_cache=True).logits
                for n in range(4)
            ]
        torch.testing.assert_close(second, torch.cat(steps, dim=1), atol=1e-5, rtol=1e-5)


def test_what_does_not_work_is_refused(model: Any) -> None:
    inputs = make_inputs(model, [(16, 16)])
    with drop_visual_tokens(model, 0.2, "fastv"):
        with pytest.raises(InputError, match="generate with the dynamic cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=True)
            with pytest.raises(InputError, match="goes on from a cache"):
                model(**(inputs | {"attention_mask": None}), past_key_values=cache, use_cache=True)
            layer: Any = cache.layers[3]
            layer.keys = layer.keys[:, :, 1:]
            with pytest.raises(InputError, match="the cache was shortened"):
                model(input_ids=torch.tensor([[3]]), past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match="drops visual tokens already"):
            drop_visual_tokens(model, 0.2)
        model.train()
        try:
            with pytest.raises(InputError, match="call eval"):
                model(**inputs)
        finally:
            model.eval()
    compiled = make_model()
    decoder = compiled.model.language_model
    decoder._compiled_call_impl = decoder._call_impl  # which `compile()` sets, slowly
    with pytest.raises(InputError, match="this LlamaModel is compiled"):
        drop_visual_tokens(compiled, 0.2, "fastv")
    with pytest.raises(InputError, match="after 7 layers, and this language model has 5"):
        drop_visual_tokens(model, 0.2, "fastv", after=7)
    assert not model._forward_pre_hooks


# -------------------------------------------------------------------- other hosts


class Recording(FastV):
    """FastV after the first layer that notes where the visual tokens are, and how many may stay."""

    def __init__(self, budget: float) -> None:
        super().__init__(budget, after=1)
        self.seen: list[tuple[list[int], int]] = []

    def select(self, tokens: LanguageTokens) -> LanguageSelection:
        self.seen.append((tokens.visual.nonzero()[:, 0].tolist(), tokens.budget))
        return super().select(tokens)


def test_llava_15_drops_them_too(llava_model: Any, llava_processor: Any) -> None:
    pictures = [hired_parts.make_picture(30, 20), hired_parts.make_picture(20, 30, seed=1)]
    texts = ["<image>\nwhat is it?", "well, <image> how many?"]
    inputs = llava_processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    strategy = Recording(0.25)
    with drop_visual_tokens(llava_model, strategy=strategy), torch.no_grad():
        logits = llava_model(**inputs).logits
    assert [budget for _, budget in strategy.seen] == [9, 9]
    for row, (places, _) in enumerate(strategy.seen):
        real = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert places == (real == llava_model.config.image_token_id).nonzero()[:, 0].tolist()
    assert logits.shape[1] == inputs["input_ids"].shape[1] - (36 - 9)


def test_a_predictor_drops_them_as_generate_does(next_model: Any, next_processor: Any) -> None:
    predictor = LlavaPredictor(
        next_model, next_processor.image_processor, next_processor.tokenizer, hired_parts.TEMPLATE
    )
    pictures: list[Any] = [hired_parts.make_picture(44, 60), hired_parts.make_picture(90, 30, seed=3), None]
    questions = ["what is it?", "and this one?", "hello there"]
    strategy = Recording(0.25)
    with drop_visual_tokens(predictor, strategy=strategy):
        together = predictor.ask(pictures, questions, max_new_tokens=6)
        # 36 tokens of each partition, of which there are 5 and 4.
        assert [budget for _, budget in strategy.seen] == [45, 36]
        assert together[:2] == [predictor.ask(pictures[row], questions[row], max_new_tokens=6) for row in range(2)]
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": questions[0]}]}]
        text = next_processor.apply_chat_template(messages, add_generation_prompt=True)
        given = next_processor(images=pictures[0], text=text, return_tensors="pt", add_special_tokens=False)
        wanted = next_model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert together[0].text == predictor.tokenizer.decode(wanted, skip_special_tokens=True).strip()
    assert predictor.ask(None, questions[2], max_new_tokens=6) == together[2]


def test_mg_llava_keeps_its_object_tokens() -> None:
    path = Path(__file__).parents[1] / "mg_llava" / "parts.py"
    spec = importlib.util.spec_from_file_location("mg_llava_parts_for_dropping", path)
    assert spec is not None
    assert spec.loader is not None
    parts: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    model = parts.make_model()
    generator = torch.Generator().manual_seed(0)
    pictures = {
        "pixel_values": torch.randn(2, 3, 16, 16, generator=generator),
        "pixel_values_aux": torch.randn(2, 3, 64, 64, generator=generator),
        "boxes": [torch.tensor([[4.0, 4, 40, 40]]), torch.tensor([[0.0, 0, 30, 20], [8, 8, 60, 60], [3, 3, 9, 9]])],
    }
    rows = [[256, 70, IMAGE_ID, 71, 72], [256, IMAGE_ID, 73]]
    ids = torch.tensor([rows[0], [0, 0, *rows[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    strategy = Recording(0.5)
    with drop_visual_tokens(model, strategy=strategy):
        together = model.generate(ids, mask, **pictures, **settings)
        # Two of four image tokens may stay; the objects that follow them are not among them.
        assert strategy.seen == [([2, 3, 4, 5], 2), ([1, 2, 3, 4], 2)]
        for row, own in enumerate(rows):
            picture = {name: value[row : row + 1] for name, value in pictures.items()}
            alone = model.generate(torch.tensor([own]), **picture, **settings)
            assert together[row].tolist() == alone[0].tolist()
        assert model.generate(torch.tensor([[256, 70, 71]]), **settings).shape == (1, 6)
        with pytest.raises(InputError, match="tokens of videos are not dropped"):
            model.generate(torch.tensor([[256, VIDEO_ID, 71]]), **pictures, visual_counts=[2], **settings)
    assert "assemble" not in vars(model)
