"""Images, regions and words <-> tensors of DynRefer; saved beside the model with `save_pretrained`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveate.checkpoints import find_checkpoint
from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_write
from foveate.language.lm import load_tokenizer
from foveate.language.words import check_words

from .captioners import DecoderOnly, EncoderDecoder
from .configuration import is_number, is_whole

VOCABULARY_FILE = "vocabulary.json"
PROCESSOR_FILE = "processor_config.json"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLASS_TEMPLATE = "the {}"

_EXTRA_SYNONYMS = {
    "young/baby": ("kid", "kids", "child", "toddler", "boy", "girl"),
    "adult/old/aged": ("teen", "elder"),
}


def attribute_prompts(name: str, kind: str = "is") -> list[str]:
    """Prompts of an attribute in OVAD's notation `type:syn1/syn2` (spec 2.9).

    Args:
        name: "type:synonym/synonym"; a bare word counts as one synonym without a type.
        kind: "is" or "has".
    """
    kind_name, _, synonyms = name.rpartition(":")
    words = [*synonyms.split("/"), *_EXTRA_SYNONYMS.get(synonyms, ())]
    if kind == "is":
        return [prompt for word in words for prompt in (f"the {word}", f"the  is {word}")]
    if kind == "has":
        noun = kind_name.replace(" tone", "")
        return [prompt for word in words for prompt in (f"the {word} {noun}", f"the  has {word} {noun}")]
    raise InputError(f"an attribute is of kind 'is' or 'has', not {kind!r}")


def control_text(words: Sequence[str]) -> str:
    """Control words as the captioner reads them: joined by commas, closed by a bar; "|" alone for none (spec 2.10)."""
    return ",".join(words) + "|"


@dataclass(frozen=True)
class Attribute:
    """An attribute and the prompts whose best score is its score."""

    name: str
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """The lists that a model answers from: tags, attributes with their prompts, classes. All can be swapped."""

    tags: tuple[str, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    classes: tuple[str, ...] = ()
    source: str = field(default="")

    @classmethod
    def from_words(
        cls, tags: Iterable[str], attributes: Iterable[str], classes: Iterable[str], source: str = ""
    ) -> Vocabulary:
        """Plain words; each attribute gets the two "is" prompts of spec 2.9."""
        return cls(
            tags=tuple(tags),
            attributes=tuple(Attribute(name, tuple(attribute_prompts(name))) for name in attributes),
            classes=tuple(classes),
            source=source,
        )

    @property
    def prompts(self) -> list[str]:
        """All attribute prompts in order; `group_sizes` says how many belong to each attribute."""
        return [prompt for attribute in self.attributes for prompt in attribute.prompts]

    @property
    def group_sizes(self) -> list[int]:
        return [len(attribute.prompts) for attribute in self.attributes]

    def save(self, path: Path) -> None:
        with atomic_write(path) as file:
            json.dump(asdict(self), file, indent=1, ensure_ascii=False)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            names = check_words([item["name"] for item in raw["attributes"]], "attributes")
            prompts = [check_words(item["prompts"], f"prompts of {item['name']!r}") for item in raw["attributes"]]
            if not all(prompts):
                raise ValueError(f"the attribute {names[prompts.index(())]!r} has no prompt")
            return cls(
                check_words(raw["tags"], "tags"),
                tuple(map(Attribute, names, prompts)),
                check_words(raw["classes"], "classes"),
                str(raw.get("source", "")),
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise CheckpointError(f"cannot read the vocabulary {path}: {reason}") from error


class DynReferProcessor:
    """Turns crops into pixel values and words into ids.

    Args:
        vocabulary: the lists the model answers from.
        text_tokenizer: of the text encoder (CLIP BPE).
        language_tokenizer: of the captioner.
        image_mean, image_std: per channel, of pixel values in [0, 1].
        max_text_tokens: limit for control words and captions.
        decoder_only: whether the captioner is a decoder-only model; its tokenizer gets the special tokens that
            DynRefer's Vicuna has (spec 2.11).

    Raises:
        CheckpointError: the tokenizer of a decoder-only model has no end token.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        text_tokenizer: Any,
        language_tokenizer: Any,
        *,
        image_mean: Sequence[float] = CLIP_MEAN,
        image_std: Sequence[float] = CLIP_STD,
        max_text_tokens: int = 32,
        decoder_only: bool = False,
    ) -> None:
        self.vocabulary = vocabulary
        self.text_tokenizer = text_tokenizer
        self.decoder_only = decoder_only
        self.captioner = DecoderOnly if decoder_only else EncoderDecoder
        self.language_tokenizer = self.captioner.prepare_tokenizer(language_tokenizer)
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.max_text_tokens = max_text_tokens

    def pixel_values(self, crops: np.ndarray, device: torch.device | str | None = None) -> Tensor:
        """(U, s, s, 3) uint8 -> (U, 3, s, s) float32, scaled to [0, 1] and normalised; on the device, to which bytes
        travel faster than floats."""
        pixels = torch.from_numpy(np.ascontiguousarray(crops)).to(device).permute(0, 3, 1, 2).float().div_(255)
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (self.image_mean, self.image_std))
        return pixels.sub_(mean).div_(std)

    @property
    def max_prompt_tokens(self) -> int:
        """The most tokens that the text encoder reads of a text."""
        return min(77, getattr(self.text_tokenizer, "model_max_length", 77))

    def text_ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(V, L) ids and attention mask for the text encoder, truncated with the end token kept (spec 2.8)."""
        limit = self.max_prompt_tokens
        batch = self.text_tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    def text_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the text encoder would read, were there no limit."""
        return [len(row) for row in self.text_tokenizer(list(texts), verbose=False)["input_ids"]]

    def language_ids(self, texts: Sequence[str], *, caption: bool = False) -> tuple[Tensor, Tensor]:
        """(R, L) ids and attention mask of control texts, or of captions, for the captioner.

        Right-padded, at most `max_text_tokens`: of what is longer the last token is kept (the end of a text, or the bar
        after a decoder-only model's control words) and those before it are left out.
        """
        rows = self.captioner.token_rows(self.language_tokenizer, texts, caption=caption)
        limit = self.max_text_tokens
        rows = [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        mask = (torch.arange(max(map(len, rows), default=0)) < lengths[:, None]).long()
        ids = torch.full(mask.shape, self.language_tokenizer.pad_token_id)
        ids[mask.bool()] = torch.tensor([token for row in rows for token in row], dtype=torch.long)
        return ids, mask

    def control_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens the captioner would read of control texts, were there no limit."""
        return [len(row) for row in self.captioner.token_rows(self.language_tokenizer, texts, caption=False)]

    def decode(self, sequences: Tensor) -> list[str]:
        """Token ids -> captions without special tokens."""
        return [text.strip() for text in self.language_tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    def save_pretrained(self, folder: str | Path, *, base_models: dict[str, str] | None = None) -> None:
        """Write the vocabulary, the settings, and the tokenizers of parts that no base model brings."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.vocabulary.save(folder / VOCABULARY_FILE)
        with atomic_write(folder / PROCESSOR_FILE) as file:
            settings = {
                "processor_class": type(self).__name__,
                "image_mean": self.image_mean,
                "image_std": self.image_std,
                "max_text_tokens": self.max_text_tokens,
                "decoder_only": self.decoder_only,
            }
            json.dump(settings, file, indent=1)
        for part, tokenizer in (("text", self.text_tokenizer), ("language", self.language_tokenizer)):
            if part not in (base_models or {}):
                tokenizer.save_pretrained(folder / f"{part}_tokenizer")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, base_models: dict[str, str] | None = None) -> DynReferProcessor:
        """Read what `save_pretrained` wrote; tokenizers of base models come from their checkpoints."""
        folder = Path(folder)
        try:
            raw = json.loads((folder / PROCESSOR_FILE).read_text(encoding="utf-8"))
            settings = {name: raw[name] for name in ("image_mean", "image_std", "max_text_tokens")}
            for name in ("image_mean", "image_std"):
                three = isinstance(settings[name], list) and len(settings[name]) == 3
                lowest = -1e3 if name == "image_mean" else 1e-6
                if not three or not all(is_number(value, lowest, 1e3) for value in settings[name]):
                    raise ValueError(f"{name} must be three numbers, one per channel, not {settings[name]!r}")
            if not is_whole(settings["max_text_tokens"]) or not 1 <= settings["max_text_tokens"] <= 65536:
                raise ValueError(f"max_text_tokens must be a whole number of at least 1: {raw['max_text_tokens']!r}")
            settings["decoder_only"] = raw.get("decoder_only", False)  # what older versions wrote does not say
            if not isinstance(settings["decoder_only"], bool):
                raise ValueError(f"decoder_only must be true or false, not {settings['decoder_only']!r}")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"cannot read {folder / PROCESSOR_FILE}: {type(error).__name__} {error}") from error
        tokenizers = {}
        for part in ("text", "language"):
            base = (base_models or {}).get(part)
            source = find_checkpoint(base) if base else folder / f"{part}_tokenizer"
            tokenizers[part] = load_tokenizer(source)
        return cls(
            Vocabulary.load(folder / VOCABULARY_FILE),
            tokenizers["text"],
            tokenizers["language"],
            **settings,
        )
