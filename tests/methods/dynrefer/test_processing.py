"""Crops and words to tensors, and the files beside a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from foveate.errors import CheckpointError, InputError
from foveate.methods.dynrefer.processing import (
    PROCESSOR_FILE,
    VOCABULARY_FILE,
    Attribute,
    DynReferProcessor,
    Vocabulary,
    attribute_prompts,
    control_text,
)


class TestPrompts:
    def test_is_and_has(self) -> None:
        assert attribute_prompts("colour:red/crimson") == [
            "the red",
            "the  is red",
            "the crimson",
            "the  is crimson",
        ]
        assert attribute_prompts("hair tone:dark", "has") == ["the dark hair", "the  has dark hair"]
        # "tone" alone is a type, not a suffix.
        assert attribute_prompts("tone:dark", "has") == ["the dark tone", "the  has dark tone"]
        assert attribute_prompts("striped") == ["the striped", "the  is striped"]

    def test_extra_synonyms(self) -> None:
        assert len(attribute_prompts("maturity:young/baby")) == 16
        assert attribute_prompts("maturity:adult/old/aged")[-2:] == ["the elder", "the  is elder"]

    def test_unknown_kind(self) -> None:
        with pytest.raises(InputError, match="kind 'is' or 'has', not 'was'"):
            attribute_prompts("colour:red", "was")

    def test_control_text(self) -> None:
        assert control_text(["red", "left of"]) == "red,left of|"
        assert control_text([]) == "|"


class TestVocabulary:
    def test_groups(self) -> None:
        vocabulary = Vocabulary.from_words(["a"], ["red", "size:small/tiny"], ["car"])
        assert vocabulary.group_sizes == [2, 4]
        assert vocabulary.prompts[:3] == ["the red", "the  is red", "the small"]
        assert Vocabulary().prompts == []

    def test_round_trip(self, tmp_path: Path) -> None:
        vocabulary = Vocabulary(("naïve café", "b"), (Attribute("x", ("the x", "xx")),), ("Hat",), "somewhere")
        vocabulary.save(tmp_path / "v.json")
        assert Vocabulary.load(tmp_path / "v.json") == vocabulary

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("", ""),
            ("[]", ""),
            ("[" * 100_000, "recursion"),
            ('{"tags": []}', "'attributes' is missing"),
            ('{"tags": [], "attributes": [1], "classes": []}', ""),
            ('{"tags": "abc", "attributes": [], "classes": []}', "tags must be a list of words, not 'abc'"),
            ('{"tags": ["a", 5], "attributes": [], "classes": []}', "tags must be a list of words, and 5 is none"),
            ('{"tags": [], "attributes": [], "classes": ["\\ud800"]}', "classes must be words in Unicode"),
            ('{"tags": [], "attributes": {"name": "red"}, "classes": []}', ""),
            (
                '{"tags": [], "attributes": [{"name": "red", "prompts": "the"}], "classes": []}',
                "prompts of 'red' must be",
            ),
            ('{"tags": [], "attributes": [{"name": "red", "prompts": []}], "classes": []}', "'red' has no prompt"),
        ],
    )
    def test_damaged(self, tmp_path: Path, text: str, reason: str) -> None:
        (tmp_path / "v.json").write_text(text)
        with pytest.raises(CheckpointError, match=f"cannot read the vocabulary .*v.json: .*{reason}"):
            Vocabulary.load(tmp_path / "v.json")
        with pytest.raises(CheckpointError, match="cannot read the vocabulary"):
            Vocabulary.load(tmp_path / "none.json")


class TestTensors:
    def test_pixel_values_by_hand(self, processor: DynReferProcessor) -> None:
        crops = np.zeros((2, 3, 3, 3), np.uint8)
        crops[1, 0, 2] = (255, 128, 0)
        values = processor.pixel_values(crops)
        assert values.shape == (2, 3, 3, 3)
        assert values.dtype == torch.float32
        mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
        expected = [(level / 255 - m) / s for level, m, s in zip((255, 128, 0), mean, std, strict=True)]
        assert values[1, :, 0, 2].tolist() == pytest.approx(expected, rel=1e-6)
        assert values[0, :, 1, 1].tolist() == pytest.approx([-m / s for m, s in zip(mean, std, strict=True)], rel=1e-6)

    def test_own_normalisation(self, processor: DynReferProcessor) -> None:
        other = DynReferProcessor(processor.vocabulary, None, None, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
        assert other.pixel_values(np.full((1, 2, 2, 3), 255, np.uint8)).unique().tolist() == [1]

    def test_text_keeps_its_end_when_cut(self, processor: DynReferProcessor) -> None:
        ids, mask = processor.text_ids(["the car", "a " * 40])
        assert ids.shape == mask.shape == (2, 16)
        words = processor.text_tokenizer.convert_ids_to_tokens
        assert words(ids[0].tolist())[:5] == ["<s>", "the", "car", "</s>", "<pad>"]
        assert words(ids[1].tolist())[-2:] == ["a", "</s>"]
        assert mask[0].tolist() == [1] * 4 + [0] * 12

    def test_controls_and_captions(self, processor: DynReferProcessor) -> None:
        ids, mask = processor.language_ids(["red,car|", "|", "a " * 40])
        assert ids.shape == (3, 12)  # max_text_tokens
        words = processor.language_tokenizer.convert_ids_to_tokens
        assert words(ids[0].tolist())[:6] == ["red", ",", "car", "|", "</s>", "<pad>"]
        assert words(ids[1].tolist())[:2] == ["|", "</s>"]
        assert mask.sum(dim=1).tolist() == [5, 2, 12]
        assert processor.decode(torch.tensor([[0, 9, 17, 1, 0]])) == ["a red"]


class TestFiles:
    def test_round_trip(self, processor: DynReferProcessor, tmp_path: Path) -> None:
        other = DynReferProcessor(
            processor.vocabulary,
            processor.text_tokenizer,
            processor.language_tokenizer,
            image_mean=(0.1, 0.2, 0.3),
            image_std=(1.0, 2.0, 3.0),
            max_text_tokens=9,
        )
        other.save_pretrained(tmp_path / "new" / "folder")
        loaded = DynReferProcessor.from_pretrained(tmp_path / "new" / "folder")
        assert loaded.vocabulary == processor.vocabulary
        assert (loaded.image_mean, loaded.image_std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
        assert loaded.max_text_tokens == 9
        texts = ["the red car", "dog"]
        for name in ("text_ids", "language_ids"):
            for one, two in zip(getattr(loaded, name)(texts), getattr(other, name)(texts), strict=True):
                assert torch.equal(one, two)

    def test_tokenizers_of_base_models_stay_there(self, processor: DynReferProcessor, tmp_path: Path) -> None:
        base = tmp_path / "t5"
        processor.language_tokenizer.save_pretrained(base)
        (base / "config.json").write_text("{}")
        processor.save_pretrained(tmp_path / "model", base_models={"language": str(base)})
        assert (tmp_path / "model" / "text_tokenizer").is_dir()
        assert not (tmp_path / "model" / "language_tokenizer").exists()
        loaded = DynReferProcessor.from_pretrained(tmp_path / "model", base_models={"language": str(base)})
        assert torch.equal(loaded.language_ids(["red car"])[0], processor.language_ids(["red car"])[0])
        with pytest.raises(CheckpointError, match="language_tokenizer' has no usable tokenizer"):
            DynReferProcessor.from_pretrained(tmp_path / "model")

    def test_damaged(self, checkpoint: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
        settings = json.loads((folder / PROCESSOR_FILE).read_text())
        wrong: list[dict[str, object]] = [{"image_mean": None}, {"image_mean": "123"}, {"image_mean": [0.5, 0.5]}]
        wrong += [{"image_std": [0.5, 0.5, 0]}, {"image_std": [0.5, 0.5, float("nan")]}, {"max_text_tokens": "32"}]
        wrong += [{"max_text_tokens": 0}, {"max_text_tokens": 3.7}, {"max_text_tokens": float("inf")}]
        damaged = [json.dumps({**settings, **change}) for change in wrong]
        for text in ("", "{", "[]", "{}", "[" * 100_000, *damaged):
            (folder / PROCESSOR_FILE).write_text(text)
            with pytest.raises(CheckpointError, match=PROCESSOR_FILE):
                DynReferProcessor.from_pretrained(folder)
        (folder / PROCESSOR_FILE).write_text(json.dumps(settings))
        (folder / VOCABULARY_FILE).unlink()
        with pytest.raises(CheckpointError, match="cannot read the vocabulary"):
            DynReferProcessor.from_pretrained(folder)
