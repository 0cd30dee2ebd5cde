"""What names tags: RAM++ from its released files, CLIP over a vocabulary, DynRefer's tag head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel

from foveate.checkpoints import WEIGHTS, fingerprint
from foveate.cli import main
from foveate.errors import CheckpointError, InputError
from foveate.language.lm import load_tokenizer
from foveate.vision.ram_plus import RamPlus, Swin, convert_ram_plus
from foveate.vision.taggers import (
    ClipTagger,
    DescriberTagger,
    RamPlusTagger,
    VocabularyTagger,
    load_tagger,
)
from foveate.vision.zero_shot import ZeroShot
from foveate.world.scenes import render_scene

TAGS = ("Cat", "dog", "red", "bus", "sky")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (height, 70, 3), dtype=np.uint8)) for height in (40, 90)]


@pytest.fixture(scope="module")
def ram_plus() -> RamPlus:
    torch.manual_seed(0)
    model = RamPlus(Swin(48, 12, (2, 2), (2, 4), 6), tags=5, descriptions=3, projected=16, hidden=24, heads=4)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def release(ram_plus: RamPlus, tmp_path: Path) -> Path:
    """The files as they are downloaded: old names, constants of the layers, parts of training."""
    state = {key.replace("tagging_head.", "vision_multi."): value for key, value in ram_plus.state_dict().items()}
    state["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(1)
    state["text_proj.weight"] = torch.zeros(2, 2)
    torch.save({"model": state}, tmp_path / "ram.pth")
    (tmp_path / "tags.txt").write_text("\n".join(TAGS))
    (tmp_path / "thresholds.txt").write_text("0.65\n0.1\n0.8\n0.45\n1.0\n")
    return tmp_path


def convert(folder: Path, out: str | None = "out") -> list[str]:
    where = None if out is None else folder / out
    return convert_ram_plus(
        folder / "ram.pth", tags=folder / "tags.txt", thresholds=folder / "thresholds.txt", out=where, image_size=48
    )


def test_tags_above_their_own_thresholds(ram_plus: RamPlus, pictures: list[Image.Image]) -> None:
    squares = [np.asarray(picture.resize((48, 48), Image.Resampling.BILINEAR)) / 255 for picture in pictures]
    pixels = (np.stack(squares) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        logits = ram_plus(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    scores = logits.sigmoid().numpy()
    # Between the two pictures, so that each threshold is passed by one of them at most.
    thresholds = [float(row.mean()) for row in scores.T]
    found = RamPlusTagger(ram_plus, TAGS, thresholds, image_size=48)(pictures)
    for row, tags in zip(scores, found, strict=True):
        named = [tag.lower() for tag, score, limit in zip(TAGS, row, thresholds, strict=True) if score > limit]
        assert list(tags) == named, "in the order of the list"
        assert list(tags.values()) == pytest.approx([row[[t.lower() for t in TAGS].index(tag)] for tag in named])
    assert sum(map(len, found)) == 5
    assert RamPlusTagger(ram_plus, TAGS, [1.0] * 5, image_size=48)(pictures) == [{}, {}]
    assert RamPlusTagger(ram_plus, TAGS, thresholds, image_size=48)([]) == []
    with pytest.raises(CheckpointError, match="5 outputs, 5 tags and 4 thresholds"):
        RamPlusTagger(ram_plus, TAGS, thresholds[:4])


def test_the_released_files_become_a_folder(release: Path, ram_plus: RamPlus, pictures: list[Image.Image]) -> None:
    assert sorted(convert(release)) == ["text_proj.weight", "visual_encoder.layers.0.blocks.1.attn_mask"]
    tagger = load_tagger(release / "out")
    assert isinstance(tagger, RamPlusTagger)
    assert tagger.thresholds == (0.65, 0.1, 0.8, 0.45, 1.0)
    assert tagger.model.label_embed.dtype == torch.float16
    direct = RamPlusTagger(ram_plus, TAGS, tagger.thresholds, image_size=48)(pictures)
    for own, expected in zip(tagger(pictures), direct, strict=True):
        assert own == pytest.approx(expected, abs=1e-2)
    with pytest.raises(InputError, match="names tags of its own list; leave the vocabulary out"):
        load_tagger(release / "out", vocabulary=["cat"])


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tags.txt", "cat\n\ndog", "has an empty line 2"),
        ("tags.txt", "cat\ndog", "2 tags and 5 thresholds"),
        ("thresholds.txt", "0.6\n0.6\n0.6\n0.6\nhigh", "no list of thresholds"),
        ("thresholds.txt", "0.6\n0.6\n0.6\n0.6\n60", "a threshold is not from 0 to 1"),
        ("thresholds.txt", None, "does not exist"),
    ],
)
def test_wrong_lists(release: Path, file: str, content: str | None, sentence: str) -> None:
    if content is None:
        (release / file).unlink()
    else:
        (release / file).write_text(content)
    with pytest.raises(InputError, match=sentence):
        convert(release)
    assert not (release / "out").exists()


def test_wrong_weights_are_listed(release: Path) -> None:
    state = torch.load(release / "ram.pth", weights_only=True)["model"]
    del state["fc.bias"]
    state["fc.weight"] = torch.zeros(1, 7)
    state["wordvec_proj.bias"][3] = torch.nan
    torch.save({"model": state}, release / "ram.pth")
    with pytest.raises(CheckpointError) as caught:
        convert(release)
    for part in ("1 missing (fc.bias)", "1 of another shape (fc.weight)", "not finite (wordvec_proj.bias)"):
        assert part in str(caught.value)
    torch.save({"model": {**state, "other": torch.zeros(1)}}, release / "ram.pth")
    with pytest.raises(CheckpointError, match=r"1 keys are not RAM\+\+'s: other"):
        convert(release)
    (release / "out2").mkdir()
    (release / "out2" / "config.json").write_text('{"model_type": "foveate_ram_plus", "tags": []}')
    with pytest.raises(CheckpointError, match="does not describe a RAM"):
        load_tagger(release / "out2")


def test_convert_on_the_command_line(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lists = ["--tags", str(release / "tags.txt"), "--thresholds", str(release / "thresholds.txt")]
    with pytest.raises(SystemExit) as caught:
        main(["convert", "ram_plus", str(release / "ram.pth"), *lists])
    assert caught.value.code == 2
    assert "--out is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["convert", "ram_plus", str(release / "ram.pth"), *lists, "--check"])
    assert caught.value.code == 0
    assert "not used: 2 tensors: " in capsys.readouterr().out


# -------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def clip() -> ZeroShot:
    return ZeroShot.from_pretrained("clip-world")


def test_clip_gives_what_transformers_gives(clip: ZeroShot, pictures: list[Image.Image]) -> None:
    words = ["cat", "sign with a long name", "bus"]
    model = CLIPModel.from_pretrained(WEIGHTS / "clip-world", dtype=torch.float32).eval()
    tokenizer = load_tokenizer(WEIGHTS / "clip-world")
    pixels = CLIPImageProcessorPil.from_pretrained(WEIGHTS / "clip-world")(images=pictures, return_tensors="pt")
    texts = tokenizer([f"a photo of {word}" for word in words], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(
            input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], pixel_values=pixels["pixel_values"]
        ).logits_per_image.softmax(-1)
    np.testing.assert_allclose(clip(pictures, words, batch_size=1), expected.numpy(), atol=1e-5)
    assert clip([], words).shape == (0, 3)
    with pytest.raises(InputError, match=r"the word '(very ?)+' for CLIP has \d+ tokens, more than the 40"):
        clip(pictures, ["very " * 60])


def _cut(pixels: np.ndarray, box: Any) -> Image.Image:
    left, top, right, bottom = map(int, box)
    return Image.fromarray(pixels[top:bottom, left:right])


def test_clip_chooses_from_a_vocabulary(clip: ZeroShot) -> None:
    scenes = [render_scene(seed, size=128) for seed in range(9_000_000, 9_000_006)]
    crops, truth = [], []
    for scene in scenes:
        for thing in scene.instances[:2]:
            crops.append(_cut(scene.image, thing.box))
            truth.append(thing.category)
    vocabulary = sorted({*truth, "car", "dog", "tree", "sign", "chair"})
    tagger = ClipTagger(clip, vocabulary, top_k=1)
    right = [list(tags) == [name] for tags, name in zip(tagger(crops), truth, strict=True)]
    assert sum(right) / len(right) > 0.8
    rows = clip(crops[:2], vocabulary)
    for row, tags in zip(rows, ClipTagger(clip, vocabulary, top_k=3, threshold=0.01)(crops[:2]), strict=True):
        best = [k for k in np.argsort(-row)[:3] if row[k] >= 0.01]
        assert list(tags.items()) == [(vocabulary[k], float(row[k])) for k in best]
    assert tagger.settings != ClipTagger(clip, vocabulary, top_k=2).settings


def test_bad_vocabularies(clip: ZeroShot, owlv2_folder: Path) -> None:
    with pytest.raises(InputError, match="chooses tags from a vocabulary and none is given"):
        load_tagger("clip-world")
    assert isinstance(load_tagger("clip-world", default_vocabulary=["cat"]), ClipTagger)
    with pytest.raises(InputError, match="top_k must be a whole number"):
        ClipTagger(clip, ["cat"], top_k=0)
    with pytest.raises(InputError, match="the threshold of the tags must be a number from 0 to 1"):
        ClipTagger(clip, ["cat"], threshold=2)
    with pytest.raises(InputError, match="is a 'owlv2' model, which names no tags"):
        load_tagger(owlv2_folder)
    with pytest.raises(InputError, match="not a CLIP"):
        ZeroShot.from_pretrained(owlv2_folder)


# -------------------------------------------------------------------- others


def test_a_describer_tags_the_whole_and_the_parts(pictures: list[Image.Image]) -> None:
    def region(**scores: float) -> Any:
        return SimpleNamespace(tags=[tag for tag in scores if scores[tag] > 0.5], tag_scores=scores)

    def describe(images: Any, *, tasks: list[str], everything: bool = False) -> list[list[Any]]:
        assert tasks == ["tags"]
        whole, parts = [region(cat=0.6, sky=0.9, bus=0.1)], [region(cat=0.8, dog=0.4), region(dog=0.7)]
        return [parts if everything else whole for _ in images]

    tagger: Callable[..., Any] = DescriberTagger(describe)
    assert [list(tags.items()) for tags in tagger(pictures)] == [[("sky", 0.9), ("cat", 0.8), ("dog", 0.7)]] * 2
    assert DescriberTagger(describe, everything=False)(pictures[:1]) == [{"sky": 0.9, "cat": 0.6}]
    assert tagger([]) == []


def test_the_shipped_describer_names_what_stands_in_a_scene() -> None:
    with pytest.warns(UserWarning, match="knows the rendered world only"):
        tagger = load_tagger("dynrefer-world")
    assert isinstance(tagger, DescriberTagger)
    assert tagger.everything
    scene = render_scene(9_000_003, size=192)
    [tags] = tagger([Image.fromarray(scene.image)])
    things = {thing.category for thing in scene.instances}
    assert len(things & set(tags)) >= len(things) / 2


def test_the_same_words_for_all(pictures: list[Image.Image]) -> None:
    assert load_tagger(None) is None
    tagger = load_tagger(None, vocabulary=["bus", "cat"])
    assert isinstance(tagger, VocabularyTagger)
    assert tagger(pictures) == [{"bus": 1.0, "cat": 1.0}] * 2


def test_a_fingerprint_tells_trainings_apart(tmp_path: Path) -> None:
    large = np.zeros(5 * 2**20, dtype=np.uint8)
    (tmp_path / "model.safetensors").write_bytes(large.tobytes())
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    large[-5] = 1
    (tmp_path / "model.safetensors").write_bytes(large.tobytes())
    second = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert len({first, second, fingerprint(tmp_path)}) == 3
