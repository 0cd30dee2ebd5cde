"""The two kinds of captioner: what the language model reads, and where in it the caption stands (spec 2.10, 2.11).

An encoder-decoder (FLAN-T5) reads region tokens and control words in its encoder and writes the caption in its decoder.
A decoder-only model (Vicuna, or another one laid out as Llama) has one sequence for all three. Both are frozen; the
weights belong to `DynReferModel`, so nothing here holds any.

Shapes: R regions, Q region tokens, L tokens of a text, D width of the language model, V its vocabulary.
"""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel, PreTrainedTokenizerBase

from foveate.errors import CheckpointError
from foveate.language.lm import check_tokenizer, load_language_config, load_language_model

PADDING = "[PAD]"
END = "</s>"


class Captioner(ABC):
    """What differs between the kinds. Classes are used as they are, without instances.

    Attributes:
        model_class: of transformers, with `from_config`.
        projection: name of the layer from region tokens to the language model, as the official weights have it.
        official: prefix of the language model in the official weights.
        text_tokens: how many tokens of control words, and of a caption, the official class reads.
        repeated: weights that only refer to others.
        vocabulary: weights with a row for each token.
    """

    model_class: ClassVar[Any]
    projection: ClassVar[str]
    official: ClassVar[str]
    text_tokens: ClassVar[int]
    repeated: ClassVar[tuple[str, ...]] = ()
    vocabulary: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    @abstractmethod
    def layers(language_model: Any) -> list[nn.Module]:
        """The layers that a sharded training splits between processes."""

    @staticmethod
    @abstractmethod
    def prepare_config(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Changes a language model's configuration to what runs with the prepared `tokenizer`."""

    @staticmethod
    @abstractmethod
    def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """The tokenizer with the special tokens of this kind; idempotent, the argument is not changed.

        Raises:
            CheckpointError: it has no token that ends a text.
        """

    @staticmethod
    @abstractmethod
    def token_rows(tokenizer: Any, texts: Sequence[str], *, caption: bool) -> list[list[int]]:
        """Ids of control texts or of captions, as the model reads them."""

    @staticmethod
    @abstractmethod
    def prompt(visual: Tensor, control: Tensor, control_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What a caption is generated from.

        Args:
            visual: (R, Q, D) projected region tokens.
            control: (R, L, D) embedded control words, their memory added.
            control_mask: (R, L), 0 for padding, on whichever side.
        Returns:
            inputs_embeds (R, Q + L, D), attention_mask (R, Q + L).
        """

    @staticmethod
    @abstractmethod
    def teach(
        language_model: Any, visual: Tensor, control: Tensor, control_mask: Tensor, captions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of the captions when each token is told the ones before it.

        Args:
            visual, control, control_mask: as in `prompt`.
            captions: (R, L') token ids.
            labels: (R, L') the same with -100 for padding.
        Returns:
            logits (R, T, V) and the labels (R, T) that belong to them, -100 where there is nothing to learn.
        """


class EncoderDecoder(Captioner):
    """[region tokens ; control words </s>] -> encoder; the caption is the decoder's (spec 2.10)."""

    model_class = AutoModelForSeq2SeqLM
    projection = "t5_proj"
    official = "t5_model."
    text_tokens = 32
    repeated = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

    @staticmethod
    def layers(language_model: Any) -> list[nn.Module]:
        parts: Any = [language_model.get_encoder(), language_model.get_decoder()]
        return [layer for part in parts for layer in (part.block if hasattr(part, "block") else part.layers)]

    @staticmethod
    def prepare_config(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        pass  # what T5 is told by its checkpoint

    @staticmethod
    def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        return tokenizer

    @staticmethod
    def token_rows(tokenizer: Any, texts: Sequence[str], *, caption: bool) -> list[list[int]]:
        return tokenizer(list(texts), verbose=False)["input_ids"]

    @staticmethod
    def prompt(visual: Tensor, control: Tensor, control_mask: Tensor) -> tuple[Tensor, Tensor]:
        return _join(visual, control, control_mask)

    @staticmethod
    def teach(
        language_model: Any, visual: Tensor, control: Tensor, control_mask: Tensor, captions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs_embeds, attention_mask = _join(visual, control, control_mask)
        output = language_model(
            inputs_embeds=inputs_embeds.to(language_model.dtype),
            attention_mask=attention_mask,
            decoder_input_ids=language_model.prepare_decoder_input_ids_from_labels(labels),
            use_cache=False,
        )
        return output.logits, labels


class DecoderOnly(Captioner):
    """One sequence, [region tokens ; BOS control words ; caption </s>], with the loss on the caption alone (spec 2.11).

    Padding is moved behind the caption in training, and between region tokens and BOS where a caption is generated,
    which thus begins right after the control words of every row. Position ids count real tokens only.
    """

    model_class = AutoModelForCausalLM
    projection = "llm_proj"
    official = "llm_model."
    text_tokens = 256
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")

    @staticmethod
    def layers(language_model: Any) -> list[nn.Module]:
        return list(language_model.get_decoder().layers)

    @staticmethod
    def prepare_config(config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        config.vocab_size = max(config.vocab_size, len(tokenizer))
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id

    @staticmethod
    def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Texts of Llama's kind begin and end with "</s>", and "[PAD]" is added; a tokenizer without "</s>" keeps its
        own end token, begins with its own start token if it has one, and keeps its padding."""
        tokenizer = copy.deepcopy(tokenizer)
        if END in tokenizer.get_vocab():
            tokenizer.add_special_tokens({"bos_token": END, "eos_token": END, "unk_token": END, "pad_token": PADDING})
            return tokenizer
        if tokenizer.eos_token is None:
            raise CheckpointError(
                f"the tokenizer of the language model knows neither {END!r} nor an end token of its own; add an "
                "eos_token to its tokenizer_config.json"
            )
        tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
        if tokenizer.pad_token is None:
            tokenizer.add_special_tokens({"pad_token": PADDING})
        return tokenizer

    @staticmethod
    def token_rows(tokenizer: Any, texts: Sequence[str], *, caption: bool) -> list[list[int]]:
        # Not left to the tokenizer: a fast one goes on adding the start token that its file was written with.
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        if caption:
            return [[*row, tokenizer.eos_token_id] for row in rows]
        return [[tokenizer.bos_token_id, *row] for row in rows]

    @staticmethod
    def prompt(visual: Tensor, control: Tensor, control_mask: Tensor) -> tuple[Tensor, Tensor]:
        order = control_mask.argsort(dim=1, stable=True)  # padding first, the words in their order after it
        return _join(visual, _reorder(control, order), control_mask.gather(1, order))

    @staticmethod
    def teach(
        language_model: Any, visual: Tensor, control: Tensor, control_mask: Tensor, captions: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        embedded = language_model.get_input_embeddings()(captions).to(visual.dtype)
        mask = torch.cat([control_mask, (labels != -100).to(control_mask.dtype)], dim=1)
        order = mask.argsort(dim=1, descending=True, stable=True)
        words, mask = _reorder(torch.cat([control, embedded], dim=1), order), mask.gather(1, order)
        targets = torch.cat([torch.full_like(control_mask, -100), labels], dim=1).gather(1, order)
        inputs_embeds, attention_mask = _join(visual, words, mask)
        # Of the words only: nothing is learnt from what the region tokens predict, and V is large.
        output = language_model(
            inputs_embeds=inputs_embeds.to(language_model.dtype),
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=words.shape[1],
        )
        return output.logits[:, :-1], targets[:, 1:]


def captioner_of(language_config: Any) -> type[Captioner]:
    """The kind of a language model, by its configuration."""
    return EncoderDecoder if language_config.is_encoder_decoder else DecoderOnly


def load_captioner(
    path: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A language model as DynRefer runs it, and its tokenizer as it is in the checkpoint.

    Raises:
        CheckpointError: as `load_language_model`, or the two do not belong together, or a decoder-only model is laid
            out in another way than Llama.
        InputError: as `load_language_model`.
    """
    # BLIP-2 runs FLAN-T5 with the exact GELU (spec 2.10).
    activation = "gelu" if load_language_config(path).is_encoder_decoder else None
    model, tokenizer = load_language_model(path, dtype=dtype, feed_forward_activation=activation)
    check_tokenizer(tokenizer, model.config.vocab_size, f"the tokenizer of {os.fspath(path)}")
    if not (model.config.is_encoder_decoder or isinstance(getattr(model.get_decoder(), "layers", None), nn.ModuleList)):
        raise CheckpointError(
            f"{os.fspath(path)} is a {model.config.model_type!r}, which is not laid out as Llama is; give a Vicuna, "
            "another model of Llama's layout, or a FLAN-T5"
        )
    return model, tokenizer


def with_padding_row(weights: Mapping[str, Tensor], kind: type[Captioner], vocabulary_size: int) -> dict[str, Tensor]:
    """The weights of a language model, with a last row for the "[PAD]" that its tokenizer has in addition.

    The row is the mean of the others, which no input sees (padding is masked) and no output prefers; other sizes are
    left to whoever compares them.
    """
    grown = dict(weights)
    for key in kind.vocabulary:
        weight = grown.get(key)
        if weight is not None and weight.ndim == 2 and len(weight) + 1 == vocabulary_size:
            mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
            grown[key] = torch.cat([weight, mean])
    return grown


def _join(visual: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    attention_mask = torch.cat([mask.new_ones(visual.shape[:2]), mask], dim=1)
    return torch.cat([visual, words.to(visual.dtype)], dim=1), attention_mask


def _reorder(words: Tensor, order: Tensor) -> Tensor:
    return words.gather(1, order[..., None].expand(-1, -1, words.shape[-1]))
