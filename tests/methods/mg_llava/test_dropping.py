"""`foveate.drop_visual_tokens` on an MG-LLaVA: image tokens go, object tokens stay."""

from __future__ import annotations

from typing import Any

import mg_llava_parts as parts  # pyright: ignore[reportMissingImports] (conftest.py)
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import foveate
from foveate.errors import InputError
from foveate.methods.mg_llava.modeling import VisualTokens
from foveate.methods.mg_llava.predictor import MGLlavaPredictor
from foveate.methods.mg_llava.processing import MGLlavaProcessor, stack_pictures

TOWER = {**parts.VISION, "num_hidden_layers": 3, "image_size": 32}  # 4 x 4 tokens
SIZES = {"vision_config": TOWER, "high_res_size": 128}


@pytest.fixture(scope="module")
def wide() -> Any:
    """A model with 16 image tokens; remove what you attach."""
    return parts.make_model(**SIZES)


@pytest.fixture(scope="module")
def predictor(wide: Any, tokenizer: PreTrainedTokenizerFast) -> MGLlavaPredictor:
    return MGLlavaPredictor(wide, MGLlavaProcessor(tokenizer, wide.config))


def encoded(predictor: MGLlavaPredictor, pictures: list[Any]) -> VisualTokens:
    batch = stack_pictures([predictor.processor.picture(picture, [[2, 2, 30, 30]]) for picture in pictures])
    boxes = [own[:count] for own, count in zip(batch["boxes"], batch["box_counts"], strict=True)]
    with torch.no_grad():
        return predictor.model.encode(batch["pixel_values"], batch["pixel_values_aux"], boxes)


def test_the_tokens_that_the_class_row_points_at_stay(predictor: MGLlavaPredictor, picture: Any) -> None:
    model = predictor.model
    pictures = [picture(seed) for seed in range(3)]
    whole = encoded(predictor, pictures)
    values = torch.stack([predictor.processor.picture(one).pixel_values for one in pictures])
    # The whole map of the layer that gives the features, by transformers itself.
    tower = model.vision_tower.model
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(values, output_attentions=True).attentions[1]
    tower.set_attn_implementation("sdpa")
    wanted = maps[:, :, 0, 1:].sum(dim=1).topk(4).indices.sort().values
    with foveate.drop_visual_tokens(predictor, budget=0.3):
        kept = encoded(predictor, pictures)
    assert kept.kept is not None
    assert torch.equal(kept.kept.nonzero()[:, 1].view(3, 4), wanted)
    for number in range(3):
        torch.testing.assert_close(kept.image[number], whole.image[number][wanted[number]], atol=1e-6, rtol=1e-5)
        assert torch.equal(kept.objects[number], whole.objects[number])
    some = kept.take([2, 0])
    assert torch.equal(VisualTokens.join([some.take([1]), some.take([0])]).sequence(1), kept.sequence(2))


def test_answers_come_from_what_is_kept(predictor: MGLlavaPredictor, picture: Any) -> None:
    pictures, questions = [picture(1), picture(2)], ["what is it?", "where is the square, left or right?"]
    before = predictor.ask(pictures, questions)
    with foveate.drop_visual_tokens(predictor, budget=0.25):
        together = predictor.ask(pictures, questions)
        assert [predictor.ask(one, text) for one, text in zip(pictures, questions, strict=True)] == together
        talk = predictor.conversation(pictures[0])
        assert talk.ask(questions[0]).text == together[0].text
        # Prompt, 4 image tokens and 1 object token are in the cache, and the answer but its last token.
        read = len(predictor._prompt(questions[0], "<image>")) - 1 + 4 + 1
        assert read <= talk._cache.get_seq_length() <= read + together[0].tokens
    assert predictor.ask(pictures, questions) == before
    with foveate.drop_visual_tokens(predictor, budget=1.0):
        assert predictor.ask(pictures, questions) == before
    assert not {"encode", "project_image"} & set(vars(predictor.model))


def test_every_strategy_runs(predictor: MGLlavaPredictor, picture: Any) -> None:
    for strategy, count in (("random", 4), ("spatial", 4), ("prumerge", 4), ("prumerge+", 4)):
        with foveate.drop_visual_tokens(predictor.model, 0.3, strategy):
            tokens = encoded(predictor, [picture(0), picture(1)])
        assert [len(own) for own in tokens.image] == [count, count]


def test_what_cannot_be_dropped_is_refused(predictor: MGLlavaPredictor) -> None:
    with pytest.raises(InputError, match="less than one token"):
        foveate.drop_visual_tokens(predictor, budget=0.05)
    with pytest.raises(InputError, match="'resampler' mixes image tokens"):
        foveate.drop_visual_tokens(parts.make_model(fusion="resampler"))
    with foveate.drop_visual_tokens(predictor), pytest.raises(InputError, match="not encoded by this call"):
        predictor.model.project_image(torch.zeros(1, 16, 16))
