"""`foveate.drop_visual_tokens` on unmodified transformers: what is kept, where it stands, that nothing stays behind."""

from __future__ import annotations

import threading
from typing import Any

import hired_parts as parts  # pyright: ignore[reportMissingImports] (conftest.py)
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.errors import InputError
from foveate.methods.hired.dropping import active_dropping
from foveate.methods.hired.hosts import LlavaHost

SIZES = [(60, 60), (30, 90), (90, 30), (44, 60), (100, 40), (24, 24)]
NEW = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def drop(*args: Any, **options: Any) -> Any:
    """The handle, of whichever kind."""
    return foveate.drop_visual_tokens(*args, **options)


def inputs_of(processor: Any, texts: list[str], pictures: list[Any] | None, **options: Any) -> dict[str, Any]:
    return dict(processor(images=pictures or None, text=texts, return_tensors="pt", padding=True, **options))


@pytest.fixture(params=["next", "llava"])
def host(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """(model, processor) of both families."""
    return request.getfixturevalue(f"{request.param}_model"), request.getfixturevalue(f"{request.param}_processor")


# ---------------------------------------------------------------- what reaches the language model


@pytest.mark.parametrize("strategy", ["hired", "random", "spatial"])
def test_kept_tokens_are_those_of_the_host_at_their_places(next_model: Any, next_processor: Any, strategy: str) -> None:
    pictures = [parts.make_picture(*size, seed=number) for number, size in enumerate(SIZES)]
    given = inputs_of(next_processor, ["<image>" * len(SIZES)], pictures)
    with torch.no_grad():
        whole = next_model.model.get_image_features(
            given["pixel_values"], given["image_sizes"], return_dict=True
        ).pooler_output
        with drop(next_model, 0.3, strategy) as handle:
            visuals = handle.encode(given["pixel_values"], given["image_sizes"])
    for full, visual in zip(whole, visuals, strict=True):
        assert visual.length == len(full)
        torch.testing.assert_close(visual.embeds, full[visual.places], atol=1e-6, rtol=1e-5)
        assert (visual.places.diff() > 0).all()
        # The exact budget, which padding does not eat.
        assert len(visual.embeds) == min(int(visual.layout.candidates * 0.3), int(visual.layout.valid.sum()))
        assert int(visual.keep.sum()) == len(visual.embeds)


def test_newlines_stay_where_they_are_asked_for(next_model: Any, next_processor: Any) -> None:
    given = inputs_of(next_processor, ["<image>"], [parts.make_picture(30, 90)])
    whole = next_model.model.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output[0]
    lengths = {}
    for newline in ("none", "rows", "all"):
        with drop(next_model, 0.2, preset="paper", newline=newline) as handle:
            visual = handle.encode(given["pixel_values"], given["image_sizes"])[0]
        torch.testing.assert_close(visual.embeds, whole[visual.places], atol=1e-6, rtol=1e-5)
        lengths[newline] = len(visual.embeds)
        top, bottom, left, right = visual.layout.crop
        if newline == "none":
            rows = {(int(place) - 36) // (right - left + 1) for place in visual.places if place >= 36}
    assert lengths["rows"] - lengths["none"] == len(rows) > 0
    assert lengths["all"] - lengths["none"] == bottom - top > lengths["rows"] - lengths["none"]
    # In an exact budget newlines count.
    with drop(next_model, 0.4, newline="all") as handle:
        visual = handle.encode(given["pixel_values"], given["image_sizes"])[0]
    assert len(visual.embeds) == int(visual.layout.candidates * 0.4)


def test_the_language_model_reads_fewer_tokens(host: Any) -> None:
    model, processor = host
    given = inputs_of(processor, ["<image>\nwhat?"], [parts.make_picture(60, 60)])
    text = int((given["input_ids"] != parts.IMAGE_ID).sum())
    with torch.no_grad(), drop(model, budget=0.2) as handle:
        count = len(handle.encode(given["pixel_values"], given.get("image_sizes"))[0].embeds)
        output = model(**given)
    assert output.past_key_values.get_seq_length() == text + count
    assert output.logits.shape[1] == text + count < given["input_ids"].shape[1]
    assert count == int((180 if "image_sizes" in given else 36) * 0.2)


def test_generate_is_greedy_decoding_of_the_shortened_prompt(host: Any) -> None:
    model, processor = host
    pictures = [parts.make_picture(60, 60), parts.make_picture(30, 90, seed=1), parts.make_picture(44, 60, seed=2)]
    # Two rows of unequal length: two pictures next to each other in the first, one after text in the second.
    given = inputs_of(processor, ["<image><image>\nwhich is larger?", "see <image>"], pictures)
    with torch.no_grad(), drop(model, budget=0.25) as handle:
        out = model.generate(**given, **NEW)
        prompt = handle.prepare(**given)
        embed = model.get_input_embeddings()
        for row in range(2):
            own = prompt["attention_mask"][row].bool()
            embeds = prompt["inputs_embeds"][row : row + 1, own]
            said: list[int] = []
            for _ in range(6):  # without a cache, mask or padding
                token = int(model(inputs_embeds=embeds).logits[0, -1].argmax())
                said.append(token)
                embeds = torch.cat([embeds, embed(torch.tensor([[token]]))], dim=1)
            assert out[row, given["input_ids"].shape[1] :].tolist() == said
    assert torch.equal(out[:, : given["input_ids"].shape[1]], given["input_ids"])
    last = prompt["position_ids"][:, -1]
    assert last.tolist() == (prompt["attention_mask"].sum(dim=1) - 1).tolist()
    assert (prompt["position_ids"][prompt["attention_mask"] == 0] == 1).all()


def test_a_batch_is_its_rows_alone(host: Any) -> None:
    model, processor = host
    pictures = [parts.make_picture(60, 60), parts.make_picture(100, 40, seed=1)]
    texts = ["<image> what is that thing there?", "a <image>", "no picture at all"]
    with drop(model, budget=0.2):
        together = model.generate(**inputs_of(processor, texts, pictures), **NEW)[:, -6:]
        beams = model.generate(**inputs_of(processor, texts, pictures), **NEW, num_beams=3, num_return_sequences=2)
        for row, text in enumerate(texts):
            alone = inputs_of(processor, [text], pictures[row : row + 1])
            assert torch.equal(model.generate(**alone, **NEW)[0, -6:], together[row])
            best = model.generate(**alone, **NEW, num_beams=3)
            assert torch.equal(best[0, -6:], beams[2 * row, -6:])
    assert len(beams) == 6


def test_a_static_cache_and_a_compiled_language_model(next_model: Any, next_processor: Any) -> None:
    given = inputs_of(
        next_processor, ["<image> what?", "and <image>"], [parts.make_picture(*size) for size in SIZES[:2]]
    )
    with drop(next_model, budget=0.2):
        wanted = next_model.generate(**given, **NEW)
        assert torch.equal(next_model.generate(**given, **NEW, cache_implementation="static"), wanted)
        inner = next_model.model.language_model
        compiled: list[int] = []

        def backend(graph: Any, _: Any) -> Any:
            compiled.append(1)
            return graph.forward

        try:
            next_model.model.language_model = torch.compile(inner, backend=backend)
            found = next_model.generate(**given, **{**NEW, "max_new_tokens": 2})
            assert torch.equal(found, wanted[:, :-4])
        finally:
            next_model.model.language_model = inner
            torch.compiler.reset()
    assert compiled


def test_the_loss_is_that_of_the_text(host: Any) -> None:
    model, processor = host
    given = inputs_of(processor, ["<image> it is red", "so <image>"], [parts.make_picture(60, 60)] * 2)
    labels = given["input_ids"].where(given["attention_mask"].bool() & (given["input_ids"] != parts.IMAGE_ID), -100)
    with torch.no_grad(), drop(model, budget=0.2) as handle:
        loss = model(**given, labels=labels).loss
        prompt = handle.prepare(**given, labels=labels)
        logits = model(inputs_embeds=prompt["inputs_embeds"], attention_mask=prompt["attention_mask"]).logits
    assert int((prompt["labels"] != -100).sum()) == int((labels != -100).sum())
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), prompt["labels"][:, 1:].flatten())
    torch.testing.assert_close(loss, wanted)


def test_original_positions_leave_gaps(next_model: Any, next_processor: Any) -> None:
    given = inputs_of(next_processor, ["ab<image>cd"], [parts.make_picture(60, 60)])
    kept = (given["input_ids"][0] != parts.IMAGE_ID).nonzero()[:, 0]
    with torch.no_grad(), drop(next_model, budget=0.2, positions="original") as handle:
        visual = handle.encode(given["pixel_values"], given["image_sizes"])[0]
        prompt = handle.prepare(**given)
        out = next_model.generate(**given, **NEW)
        first = int((given["input_ids"][0] == parts.IMAGE_ID).nonzero()[0])
        wanted = torch.cat([kept, visual.places + first]).sort().values
        assert torch.equal(prompt["position_ids"][0], wanted)
        # Decoding goes on from the length of the whole prompt.
        embeds, positions = prompt["inputs_embeds"], prompt["position_ids"]
        for token in out[0, -6:]:
            logits = next_model(inputs_embeds=embeds, position_ids=positions).logits[0, -1]
            assert int(logits.argmax()) == int(token)
            embeds = torch.cat([embeds, next_model.get_input_embeddings()(token.view(1, 1))], dim=1)
            positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)


def test_max_length_counts_the_prompt_as_it_was_given(llava_model: Any, llava_processor: Any) -> None:
    given = inputs_of(llava_processor, ["<image> hm"], [parts.make_picture(30, 30)])
    length = given["input_ids"].shape[1]
    with drop(llava_model, budget=0.2):
        out = llava_model.generate(**given, max_length=length + 4, do_sample=False, eos_token_id=None)
        details = llava_model.generate(**given, **NEW, return_dict_in_generate=True, output_scores=True)
    assert out.shape[1] == length + 4
    assert details.sequences.shape[1] == length + 6
    assert len(details.scores) == 6


# ---------------------------------------------------------------- that nothing stays behind


def test_detached_and_at_full_budget_the_model_is_what_it_was(host: Any) -> None:
    model, processor = host
    given = inputs_of(processor, ["<image> what?"], [parts.make_picture(44, 60)])
    attention = model.config.vision_config._attn_implementation
    with torch.no_grad():
        before, said = model(**given).logits, model.generate(**given, **NEW)
        with drop(model, budget=1.0):
            assert torch.equal(model(**given).logits, before)
            assert torch.equal(model.generate(**given, **NEW), said)
        handle = drop(model, budget=0.2)
        assert active_dropping(model) is handle
        assert not torch.equal(model(**given).logits[:, -1], before[:, -1])
        handle.remove()
        handle.remove()
        assert torch.equal(model(**given).logits, before)
        assert torch.equal(model.generate(**given, **NEW), said)
    assert active_dropping(model) is None
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks
    assert model.config.vision_config._attn_implementation == attention == "sdpa"


def test_an_exception_in_the_tower_leaves_no_hook(next_model: Any, next_processor: Any) -> None:
    given = inputs_of(next_processor, ["<image>"], [parts.make_picture(60, 60)])
    layers = next_model.model.vision_tower.encoder.layers
    attention = layers[0].self_attn
    with drop(next_model, budget=0.2):
        bad = layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next_model(**given)
        bad.remove()
        assert not attention.q_proj._forward_hooks
        assert not attention.k_proj._forward_hooks
        assert next_model(**given).logits.shape[1] < given["input_ids"].shape[1]


def test_no_square_of_the_tokens_is_ever_made(next_model: Any, next_processor: Any) -> None:
    given = inputs_of(next_processor, ["<image>"], [parts.make_picture(60, 60)])
    shapes: list[torch.Size] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            shapes.extend(
                one.shape for one in (out if isinstance(out, tuple | list) else [out]) if hasattr(one, "shape")
            )
            return out

    with torch.no_grad(), drop(next_model, budget=0.2) as handle, Watch():
        handle.encode(given["pixel_values"], given["image_sizes"])
    assert len(shapes) > 50
    assert not [shape for shape in shapes if len(shape) > 1 and min(shape[-2:]) >= 36]


def test_threads_do_not_meet(next_model: Any, next_processor: Any) -> None:
    all_given = [
        inputs_of(next_processor, ["<image>"], [parts.make_picture(*size, seed=number)])
        for number, size in enumerate(SIZES[:4])
    ]
    with torch.no_grad(), drop(next_model, budget=0.2) as handle:
        wanted = [handle.encode(given["pixel_values"], given["image_sizes"])[0].places for given in all_given]
        found: dict[int, list[torch.Tensor]] = {}

        def work(number: int) -> None:
            given = all_given[number]
            with torch.no_grad():
                found[number] = [handle.encode(given["pixel_values"], given["image_sizes"])[0].places for _ in range(4)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, places in enumerate(wanted):
        assert all(torch.equal(places, other) for other in found[number])


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"budget": 0}, "above 0 and at most 1, not 0"),
        ({"budget": 1.5}, "not 1.5"),
        ({"budget": float("nan")}, "not nan"),
        ({"budget": True}, "not True"),
        ({"budget": "half"}, "not 'half'"),
        ({"budget": 0.01}, "less than one token for each partition"),
        ({"strategy": "hird"}, "did you mean 'hired'"),
        ({"alpah": 0.3}, "did you mean 'alpha'"),
        ({"alpha": 1.1}, "alpha must be a number from 0 to 1, not 1.1"),
        ({"preset": "exakt"}, "did you mean 'exact'"),
        ({"strategy": "random", "alpha": 0.5}, "has no option 'alpha'"),
        ({"init_layer": 2}, "init_layer 2 is not among the layers 0 to 1"),
        ({"newline": "rows"}, "cannot be combined"),
    ],
)
def test_bad_options_get_a_sentence(next_model: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        drop(next_model, **options)
    assert active_dropping(next_model) is None
    assert not next_model._forward_pre_hooks


def test_models_that_cannot_drop_get_a_sentence(next_model: Any) -> None:
    with pytest.raises(InputError, match="not in Linear"):
        drop(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="a str is no model"):
        drop("llava")
    with pytest.raises(InputError, match="not in LlavaNextModel"):
        drop(next_model.model)
    with drop(next_model), pytest.raises(InputError, match="drops visual tokens already"):
        drop(next_model)


def test_a_tower_without_class_token_takes_plain_strategies_only(llava_processor: Any) -> None:
    siglip = {**parts.VISION, "model_type": "siglip_vision_model"}
    siglip.pop("projection_dim")
    model = parts.make_llava(vision_config=siglip, vision_feature_select_strategy="full")
    given = inputs_of(llava_processor, ["<image>"], [parts.make_picture(30, 30)])
    with pytest.raises(InputError, match="has none; use strategy 'random' or 'spatial'"):
        drop(model)
    with torch.no_grad(), drop(model, 0.5, "spatial") as handle:
        assert len(handle.encode(given["pixel_values"])[0].embeds) == 18
    with pytest.raises(InputError, match="drops a patch"):
        LlavaHost(parts.make_llava(vision_config=siglip))


def test_bad_calls_get_a_sentence(next_model: Any, next_processor: Any) -> None:
    given = inputs_of(next_processor, ["<image> x"], [parts.make_picture(60, 60)])
    ids, mask = given["input_ids"], given["attention_mask"]
    changes: list[tuple[dict[str, Any], str]] = [
        ({"image_sizes": None}, "1 pictures need as many image_sizes, none given"),
        ({"input_ids": ids[:, 5:], "attention_mask": mask[:, 5:]}, "placeholders of pictures, and 1 pictures of"),
        ({"attention_mask": mask[:, 3:]}, "pass the whole prompt"),
        ({"vision_feature_layer": -1}, "vision_feature_layer of a call"),
        ({"mm_encoder_outputs": {"image": 1}}, "encoded already"),
        ({"pixel_values": given["pixel_values"][0, 0, 0]}, "4 or 5 dimensions"),
        ({"pixel_values": given["pixel_values"][0, :3]}, "3 partitions are given for pictures that have 5"),
    ]
    with drop(next_model, budget=0.2):
        for change, sentence in changes:
            with pytest.raises(InputError, match=sentence):
                next_model(**{**given, **change})
        for setting in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}):
            with pytest.raises(InputError, match="does not go with dropped visual tokens"):
                next_model.generate(**given, **setting)
        # A single placeholder for a picture does as well as all of them.
        first = int((ids[0] == parts.IMAGE_ID).nonzero()[0])
        text = ids[0][ids[0] != parts.IMAGE_ID]
        single = torch.cat([text[:first], torch.tensor([parts.IMAGE_ID]), text[first:]])[None]
        out = next_model.generate(single, pixel_values=given["pixel_values"], image_sizes=given["image_sizes"], **NEW)
        assert torch.equal(out[0, -6:], next_model.generate(**given, **NEW)[0, -6:])
        assert torch.equal(out[:, :-6], single)
