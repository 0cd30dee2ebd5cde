"""The decoder-only captioner: what stands where in its sequence, what is learnt of it, and that rows never mix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import foveate
from foveate.errors import CheckpointError, InputError
from foveate.methods.dynrefer.captioners import load_captioner
from foveate.methods.dynrefer.modeling import DynReferModel
from foveate.methods.dynrefer.predictor import DynReferPredictor
from foveate.methods.dynrefer.processing import DynReferProcessor

Build = Callable[..., DynReferModel]
QUERIES = 5
CONTROLS = ["red,car|", "|"]
CAPTIONS = ["red car", "a small dog"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def vicuna(processor: DynReferProcessor) -> DynReferProcessor:
    """The raw tokenizer is one that would begin texts with <s>, as Vicuna's own does."""
    return DynReferProcessor(
        processor.vocabulary, processor.text_tokenizer, processor.text_tokenizer, max_text_tokens=12, decoder_only=True
    )


@pytest.fixture(scope="module")
def llama(vicuna: DynReferProcessor) -> dict[str, Any]:
    """Two layers with grouped heads, a row for each word and one for [PAD]."""
    tokenizer: Any = vicuna.language_tokenizer
    return {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


@pytest.fixture(scope="module")
def model(make_model: Build, llama: dict[str, Any]) -> DynReferModel:
    """Shared: copy it before changing it."""
    return make_model(language_config=llama)


@pytest.fixture(scope="module")
def queries() -> Tensor:
    return draw(2, QUERIES, 24)


class TestWords:
    def test_special_tokens(self, vicuna: DynReferProcessor, processor: DynReferProcessor) -> None:
        """Spec 2.11: [PAD] is added, all others are </s>."""
        tokenizer: Any = vicuna.language_tokenizer
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("</s>",) * 3
        assert tokenizer.pad_token == "[PAD]"
        assert len(tokenizer) == len(processor.text_tokenizer) + 1
        assert tokenizer.pad_token_id == len(tokenizer) - 1
        assert processor.text_tokenizer.pad_token == "<pad>", "the tokenizer that was given is not changed"
        again = DynReferProcessor(vicuna.vocabulary, None, tokenizer, decoder_only=True)
        assert len(again.language_tokenizer) == len(tokenizer)

    def test_controls_begin_and_captions_end(self, vicuna: DynReferProcessor) -> None:
        words: Any = vicuna.language_tokenizer.convert_ids_to_tokens
        ids, mask = vicuna.language_ids(CONTROLS)
        assert [words(row) for row in ids.tolist()] == [
            ["</s>", "red", ",", "car", "|"],
            ["</s>", "|", "[PAD]", "[PAD]", "[PAD]"],
        ]
        assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
        ids, mask = vicuna.language_ids(CAPTIONS, caption=True)
        assert [words(row) for row in ids.tolist()] == [
            ["red", "car", "</s>", "[PAD]"],
            ["a", "small", "dog", "</s>"],
        ]
        assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
        assert vicuna.decode(ids) == ["red car", "a small dog"]

    def test_what_is_cut_keeps_its_last_token(self, vicuna: DynReferProcessor) -> None:
        words: Any = vicuna.language_tokenizer.convert_ids_to_tokens
        ids, _ = vicuna.language_ids([",".join(["car"] * 20) + "|"])
        assert words(ids[0].tolist()) == ["</s>", *["car", ","] * 5, "|"]
        ids, _ = vicuna.language_ids(["car " * 20], caption=True)
        assert words(ids[0].tolist()) == [*["car"] * 11, "</s>"]

    def test_a_tokenizer_without_llamas_end_keeps_its_own(self, vicuna: DynReferProcessor) -> None:
        raw = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "red": 2, "|": 3}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
        plain = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")
        with pytest.raises(CheckpointError, match="knows neither '</s>' nor an end token of its own"):
            DynReferProcessor(vicuna.vocabulary, None, plain, decoder_only=True)
        plain.eos_token = "<end>"
        tokenizer: Any = DynReferProcessor(vicuna.vocabulary, None, plain, decoder_only=True).language_tokenizer
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<end>", "[PAD]")
        assert tokenizer.unk_token == "<unk>"

    def test_limits_of_the_official_classes(self, make_model: Build, llama: dict[str, Any]) -> None:
        assert make_model(fresh=True).config.max_text_tokens == 32
        assert make_model(fresh=True, language_config=llama).config.max_text_tokens == 256


class TestSequence:
    def parts(
        self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor, list[int]]]:
        """Of each row, without any padding: visual tokens, control words with memory, caption, and its ids."""
        embed = model.language_model.get_input_embeddings()
        rows = []
        for row, (control, caption) in enumerate(zip(CONTROLS, CAPTIONS, strict=True)):
            said = vicuna.language_ids([caption], caption=True)[0]
            words = embed(vicuna.language_ids([control])[0])[0] + model.cem_memory
            rows.append((model.llm_proj(queries[row]), words, embed(said)[0], said[0].tolist()))
        return rows

    @torch.no_grad()
    def test_training_layout(self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor) -> None:
        """[region tokens ; BOS control words ; caption </s> ; padding], targets at the caption's tokens alone."""
        seen: list[dict[str, Any]] = []
        handle = model.language_model.register_forward_pre_hook(lambda *a: seen.append(a[2]), with_kwargs=True)
        try:
            control, caption = vicuna.language_ids(CONTROLS), vicuna.language_ids(CAPTIONS, caption=True)
            model.caption_loss(queries, *control, *caption)
            visual, words = model.llm_proj(queries), model.language_model.get_input_embeddings()(control[0])
            labels = caption[0].masked_fill(caption[1] == 0, -100)
            logits, targets = model.captioner.teach(
                model.language_model, visual, words + model.cem_memory, control[1], caption[0], labels
            )
        finally:
            handle.remove()
        inputs, mask = seen[0]["inputs_embeds"], seen[0]["attention_mask"]
        assert mask.tolist() == [[1] * (5 + 5 + 3) + [0], [1] * (5 + 2 + 4) + [0] * 3]
        for row, (seen_tokens, controls, said, ids) in enumerate(self.parts(model, vicuna, queries)):
            whole = torch.cat([seen_tokens, controls, said])
            torch.testing.assert_close(inputs[row, : len(whole)], whole)
            # Targets are those of the words but the first, each beside the logits of the token before it.
            before = len(controls) - 1
            assert targets[row].tolist() == [-100] * before + ids + [-100] * (8 - before - len(ids))
        assert logits.shape == (2, 8, len(vicuna.language_tokenizer))

    @torch.no_grad()
    def test_loss_by_hand(self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor) -> None:
        """Each row alone and unpadded: -log p of every caption token after all that stands before it, their mean."""
        total, count = 0.0, 0
        for visual, controls, said, ids in self.parts(model, vicuna, queries):
            logits = model.language_model(inputs_embeds=torch.cat([visual, controls, said])[None]).logits[0]
            first = len(visual) + len(controls)
            for place, token in enumerate(ids):
                total -= float(logits[first + place - 1].log_softmax(dim=-1)[token])
                count += 1
        control, caption = vicuna.language_ids(CONTROLS), vicuna.language_ids(CAPTIONS, caption=True)
        loss = model.caption_loss(queries, *control, *caption)
        assert count == 3 + 4
        assert loss.item() == pytest.approx(total / count, rel=1e-5)

    @torch.no_grad()
    def test_the_side_of_the_padding_does_not_matter(
        self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor
    ) -> None:
        control, caption = vicuna.language_ids(CONTROLS), vicuna.language_ids(CAPTIONS, caption=True)
        expected = model.caption_loss(queries, *control, *caption)

        def flipped(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            order = mask.argsort(dim=1, stable=True)
            return ids.gather(1, order), mask.gather(1, order)

        torch.testing.assert_close(model.caption_loss(queries, *flipped(*control), *flipped(*caption)), expected)
        wider = [
            (torch.nn.functional.pad(i, (0, 4)), torch.nn.functional.pad(m, (0, 4))) for i, m in (control, caption)
        ]
        torch.testing.assert_close(model.caption_loss(queries, *wider[0], *wider[1]), expected)

    @torch.no_grad()
    def test_prompt_layout(self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor) -> None:
        """Padded on the left of the words, so that every row ends with its bar."""
        ids, mask = vicuna.language_ids(CONTROLS)
        inputs, attention = model.language_inputs(queries, ids, mask)
        assert attention.tolist() == [[1] * 10, [1] * 5 + [0, 0, 0, 1, 1]]
        visual, control, _, _ = self.parts(model, vicuna, queries)[1]
        torch.testing.assert_close(inputs[1, :5], visual)
        torch.testing.assert_close(inputs[1, 8:], control)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_batch_equals_one_by_one(self, model: DynReferModel, vicuna: DynReferProcessor, beams: int) -> None:
        controls = ["|", "red,car,small,striped|", "dog|", "the,red|"]
        tokens = draw(4, QUERIES, 24, seed=2)
        together = model.generate(tokens, *vicuna.language_ids(controls), num_beams=beams)
        captions = vicuna.decode(together.sequences)
        for row, control in enumerate(controls):
            alone = model.generate(tokens[row : row + 1], *vicuna.language_ids([control]), num_beams=beams)
            assert vicuna.decode(alone.sequences) == [captions[row]]
            torch.testing.assert_close(alone.log_scores[0], together.log_scores[row], rtol=1e-4, atol=1e-5)
        assert len(set(captions)) > 1
        other = model.generate(tokens, *vicuna.language_ids(["blue,dog|"] * 4), num_beams=beams)
        assert not torch.equal(other.scores, together.scores)

    @torch.no_grad()
    def test_score_by_hand(self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor) -> None:
        """The product of the tokens' probabilities after the repetition penalty, as with an encoder-decoder."""
        steps = 5
        found = model.generate(
            queries, *vicuna.language_ids(CONTROLS), num_beams=1, max_new_tokens=steps, repetition_penalty=1.5
        )
        embed = model.language_model.get_input_embeddings()
        for row, (visual, controls, _, _) in enumerate(self.parts(model, vicuna, queries)):
            ids: list[int] = []
            total = 0.0
            while len(ids) < steps and 1 not in ids:
                sequence = torch.cat([visual, controls, embed(torch.tensor(ids, dtype=torch.long))])[None]
                scores = model.language_model(inputs_embeds=sequence).logits[0, -1].log_softmax(dim=-1)
                scores[ids] *= 1.5
                if not ids:
                    scores[1] = -torch.inf  # a caption has at least one token
                ids.append(int(scores.argmax()))
                total += float(scores[ids[-1]])
            assert found.sequences[row, : len(ids)].tolist() == ids
            assert found.log_scores[row].item() == pytest.approx(total, abs=1e-4)


class TestModel:
    def test_gradients_reach_the_trained_parts_only(
        self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor
    ) -> None:
        model = copy.deepcopy(model).train()
        control, caption = vicuna.language_ids(CONTROLS), vicuna.language_ids(CAPTIONS, caption=True)
        model.caption_loss(queries, *control, *caption).backward()
        reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert reached == {"llm_proj.weight", "llm_proj.bias", "cem_memory"}
        assert not any(parameter.requires_grad for parameter in model.language_model.parameters())
        assert not any(name.startswith("t5_proj") for name, _ in model.named_parameters())
        layers: Any = model.language_model
        assert model.language_layers() == list(layers.model.layers)

    def test_round_trip(self, model: DynReferModel, vicuna: DynReferProcessor, queries: Tensor, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        vicuna.save_pretrained(tmp_path)
        loaded = AutoModel.from_pretrained(tmp_path)
        assert type(loaded) is DynReferModel
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
        words = DynReferProcessor.from_pretrained(tmp_path)
        assert words.decoder_only
        assert words.max_text_tokens == 12
        before = model.generate(queries, *vicuna.language_ids(CONTROLS))
        after = loaded.generate(queries, *words.language_ids(CONTROLS))
        assert torch.equal(before.sequences, after.sequences)
        torch.testing.assert_close(before.log_scores, after.log_scores)
        # Half precision is for the weights: positions keep theirs.
        halved = DynReferModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in halved.parameters()} == {torch.bfloat16}
        frequencies = halved.language_model.model.rotary_emb.inv_freq
        assert torch.equal(frequencies, model.language_model.model.rotary_emb.inv_freq)
        assert frequencies.dtype == torch.float32
        assert copy.deepcopy(model).cast_frozen(torch.bfloat16).language_model.model.rotary_emb.inv_freq.dtype == (
            torch.float32
        )

    def test_a_base_model_without_padding_gets_a_row_for_it(
        self, make_model: Build, llama: dict[str, Any], processor: DynReferProcessor, tmp_path: Path
    ) -> None:
        words = len(processor.text_tokenizer)
        plain = LlamaForCausalLM(LlamaConfig(**{**llama, "vocab_size": words, "pad_token_id": None}))
        plain.save_pretrained(tmp_path / "vicuna")
        processor.text_tokenizer.save_pretrained(tmp_path / "vicuna")
        model = make_model(language_config=llama, base_models={"language": str(tmp_path / "vicuna")})
        model.load_base_models()
        for name, expected in (
            ("model.embed_tokens.weight", plain.model.embed_tokens.weight),
            ("lm_head.weight", plain.lm_head.weight),
        ):
            found = model.language_model.get_parameter(name)
            assert torch.equal(found[:-1], expected)
            torch.testing.assert_close(found[-1], expected.mean(dim=0))
        model.save_pretrained(tmp_path / "saved")
        again = DynReferModel.from_pretrained(tmp_path / "saved").state_dict()
        assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())
        larger = {**llama, "vocab_size": llama["vocab_size"] + 1}
        with pytest.raises(CheckpointError, match="does not fit this configuration"):
            make_model(
                fresh=True, language_config=larger, base_models={"language": str(tmp_path / "vicuna")}
            ).load_base_models()

    def test_language_models_that_do_not_serve(
        self, make_model: Build, llama: dict[str, Any], processor: DynReferProcessor, tmp_path: Path
    ) -> None:
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
        LlamaForCausalLM(LlamaConfig(**{**llama, "vocab_size": 9, "pad_token_id": 0})).save_pretrained(tmp_path / "few")
        for name in ("gpt2", "few"):
            processor.text_tokenizer.save_pretrained(tmp_path / name)
        with pytest.raises(CheckpointError, match="is a 'gpt2', which is not laid out as Llama is"):
            load_captioner(tmp_path / "gpt2")
        with pytest.raises(CheckpointError, match=r"few has .* entries, but its model has 9"):
            load_captioner(tmp_path / "few")
        with pytest.raises(CheckpointError, match="does not fit this configuration"):
            make_model(fresh=True, language_config=llama, base_models={"language": "t5-world"}).load_base_models()


@pytest.fixture(scope="module")
def folder(model: DynReferModel, vicuna: DynReferProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model saved whole; do not write into it."""
    folder = tmp_path_factory.mktemp("vicuna") / "tiny"
    model.save_pretrained(folder)
    vicuna.save_pretrained(folder)
    return folder


class TestPredictor:
    def test_regions_together_and_alone(self, folder: Path, photo: Image.Image) -> None:
        describer = foveate.load(folder, device="cpu")
        boxes = [[20, 10, 50, 30], [50, 40, 95, 75], [0, 0, 96, 80]]
        together = describer(photo, boxes=boxes, controls=["small"])
        for box, region in zip(boxes, together, strict=True):
            alone = describer(photo, boxes=[box], controls=["small"])[0]
            assert alone.caption == region.caption
            assert alone.caption_score == pytest.approx(region.caption_score, abs=1e-5)
            assert 0 < region.caption_score <= 1
        with pytest.raises(InputError, match=r"the controls: 15 tokens are more than the 12 that this model reads"):
            describer(photo, controls=["car", "dog", "red", "small", "striped", "blue", "the"])

    def test_float16_is_for_llama(self, folder: Path, photo: Image.Image) -> None:
        describer = foveate.load(folder, device="cpu", dtype="float16")
        assert {parameter.dtype for parameter in describer.model.parameters()} == {torch.float16}
        assert describer(photo, boxes=[[20, 10, 50, 30]])[0].caption is not None

    def test_words_and_weights_of_different_kinds(
        self, folder: Path, processor: DynReferProcessor, tmp_path: Path, model: DynReferModel
    ) -> None:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"decoder_only false, but the language model of .* is a 'llama'"):
            DynReferPredictor.from_pretrained(tmp_path)

    def test_non_finite_logits_are_no_caption(self, model: DynReferModel, vicuna: DynReferProcessor) -> None:
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.language_model.get_parameter("lm_head.weight").view(-1)[0] = float("nan")
        with pytest.raises(CheckpointError, match=r"non-finite logits \(LlamaForCausalLM in float32 on cpu\)"):
            DynReferPredictor(broken, vicuna)(np.full((40, 50, 3), 90, np.uint8), tasks="caption")
