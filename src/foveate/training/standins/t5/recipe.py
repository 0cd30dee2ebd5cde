"""Pre-training of `t5-world`: a T5 that writes the captions of the rendered world from words.

Four ways of asking, mixed: a caption with some words missing; its content words in order; the same shuffled;
control words as DynRefer gives them ("red,car,left,tree|"). So a caption can be steered both by soft tokens that stand
for words and by control words, which is what a frozen FLAN-T5 offers.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field
from transformers import T5Config, T5ForConditionalGeneration, T5Tokenizer

from foveate.errors import RecipeError
from foveate.training.recipes import LARGEST, Recipe, RecipeSection
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.standins.loading import load_stand_in
from foveate.training.standins.rendered import MAX_SCENES
from foveate.training.trainer import TrainingTask
from foveate.world.scenes import render_scenes
from foveate.world.vocabulary import category_names, colour_names, raw_vocabulary, tag_vocabulary

STOP_WORDS = frozenset({"a", "an", "the", "to", "of", "in", "that", "is", "and", "with"})


class LanguageData(RecipeSection):
    """Scenes whose captions are read; what stands for what is then exchanged to get every combination."""

    first_seed: int = Field(ge=0, le=LARGEST)
    count: int = Field(gt=0, le=MAX_SCENES)
    processes: int = Field(2, gt=0, le=64)


class T5Sizes(RecipeSection):
    """Sizes of encoder and decoder."""

    width: int = Field(128, gt=0, le=8192)
    layers: int = Field(2, gt=0, le=128)
    heads: int = Field(4, gt=0, le=256)
    head_width: int = Field(32, gt=0, le=1024)
    feed_forward: int = Field(256, gt=0, le=65536)
    dropout: float = Field(0.05, ge=0, lt=1)


class T5Recipe(Recipe):
    data: LanguageData
    model: T5Sizes = Field(default_factory=lambda: T5Sizes.model_validate({}))
    evaluation: LanguageData


RECIPE = T5Recipe


def build_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A Unigram tokenizer whose pieces are the words of the captions, with and without a space before, and letters.

    Words come first by their score, so known words are one token and unknown ones are spelt.
    """
    words = sorted(Counter(word for caption in captions for word in caption.split()) | Counter(tag_vocabulary()))
    words = sorted({piece for word in words for piece in word.split()})
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789'-") | {c for word in words for c in word})
    pieces: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -4.0, ",": -2.0, "|": -2.0}
    for word in words:
        pieces.setdefault(f"▁{word}", -6.0)
        pieces.setdefault(word, -7.0)
    for letter in letters:
        pieces.setdefault(letter, -20.0)
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=64)


def read_captions(data: LanguageData) -> list[str]:
    """Canonical captions and paraphrases of the describable objects of rendered scenes."""
    scenes = render_scenes(data.first_seed, data.count, size=128, processes=data.processes)
    return [caption for scene in scenes for item in scene.instances if item.describable for caption in item.captions]


class WordsToCaption(SeededDataset):
    """A sample: words of a caption, disturbed, and the caption. Categories and colours are exchanged at random."""

    def __init__(self, captions: list[str]) -> None:
        self.captions = sorted(set(captions))
        signs = [word.lower() for word in raw_vocabulary()["sign_words"]]
        self.exchange = {word: names for names in (category_names(), colour_names()) for word in names}
        self.exchange_after = {"says": signs}
        self.tags = set(tag_vocabulary())

    def __len__(self) -> int:
        return len(self.captions)

    def _exchanged(self, word: str, before: str, draw: np.random.Generator) -> str:
        names = self.exchange_after.get(before) or self.exchange.get(word)
        return str(draw.choice(names)) if names else word

    def sample(self, index: int, random: SampleRandom) -> dict[str, str]:
        draw = random.numpy
        words = self.captions[index].split()
        if draw.random() < 0.7:
            words = [self._exchanged(word, before, draw) for before, word in zip(["", *words], words, strict=False)]
        caption = re.sub(r"\ban? (?=([a-z]))", lambda m: "an " if m.group(1) in "aeiou" else "a ", " ".join(words))
        content = [word for word in words if word not in STOP_WORDS]
        tags = [word for word in dict.fromkeys(content) if word in self.tags]
        kind = draw.random()
        if kind < 0.5:
            kept = [word for word in words if draw.random() >= 0.08]
        else:
            kept = [word for word in content if draw.random() >= 0.03]
        if 0.75 <= kind < 0.85:  # the subject can only be guessed
            draw.shuffle(kept)
        source = " ".join(kept) if kind < 0.85 else ""
        if kind >= 0.85 or draw.random() < 0.5:
            shown = [tag for tag in tags if draw.random() >= 0.1]
            if kind < 0.95:
                draw.shuffle(shown)
            source = f"{source} {','.join(shown)}|"
        else:
            source = f"{source} |"
        return {"source": source.strip(), "caption": caption}


def _collate(tokenizer: T5Tokenizer) -> Any:
    def collate(samples: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        source = tokenizer([sample["source"] for sample in samples], padding=True, return_tensors="pt")
        target = tokenizer([sample["caption"] for sample in samples], padding=True, return_tensors="pt")
        labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        return {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": labels}

    return collate


def build(recipe: T5Recipe) -> TrainingTask:
    """Read the captions, make the tokenizer and set the model up."""
    captions = read_captions(recipe.data)
    tokenizer = build_tokenizer(captions)
    sizes = recipe.model
    settings: dict[str, Any] = dict(
        vocab_size=len(tokenizer),
        d_model=sizes.width,
        d_kv=sizes.head_width,
        d_ff=sizes.feed_forward,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        dropout_rate=sizes.dropout,
        feed_forward_proj="gated-gelu",
        dense_act_fn="gelu",
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = T5Config(**settings)
    # BLIP-2 runs FLAN-T5 with the exact GELU; the stand-in is trained as it will be run.
    config.dense_act_fn = "gelu"
    model = T5ForConditionalGeneration(config)

    def save(folder: Path) -> None:
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return TrainingTask(model=model, train_dataset=WordsToCaption(captions), collate=_collate(tokenizer), save=save)


def evaluate(recipe: T5Recipe, model_path: Path) -> dict[str, Any]:
    """Share of captions written back word for word from their own words.

    Raises:
        InputError: the model is none of this kind.
        CheckpointError: it is damaged.
        RecipeError: the scenes have nothing to describe.
    """
    model, tokenizer = load_stand_in(T5ForConditionalGeneration, model_path)
    captions = sorted(set(read_captions(recipe.evaluation)))
    if not captions:
        raise RecipeError("the scenes of evaluation have no object with a caption; raise evaluation.count")
    captions = [captions[k] for k in np.random.default_rng(0).permutation(len(captions))[:512]]
    sources = [f"{caption} |" for caption in captions]
    batch = tokenizer(sources, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**batch, max_new_tokens=32, do_sample=False)
    written = tokenizer.batch_decode(output, skip_special_tokens=True)
    return {
        "captions": len(captions),
        "exact": float(np.mean([a == b for a, b in zip(written, captions, strict=True)])),
    }
