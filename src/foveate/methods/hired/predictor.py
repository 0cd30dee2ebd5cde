"""`foveate.load` of a LLaVA-1.5 or LLaVA-NeXT checkpoint of transformers: pictures and questions in, answers out.

The same calls as MG-LLaVA's predictor has. `foveate.drop_visual_tokens(predictor, 0.2)`, or `keep_tokens=0.2` of
`foveate.load`, lets it drop visual tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from foveate.checkpoints import find_checkpoint, read_config, warn_of_the_world
from foveate.errors import CheckpointError, InputError
from foveate.language.chat import ChatPredictor, read_sampling, refuse_placeholders, with_placeholder
from foveate.language.decoding import Sampling, TextStream
from foveate.language.lm import check_tokenizer, load_tokenizer
from foveate.language.pretrained import first_line, load_exactly
from foveate.language.templates import IMAGE
from foveate.vision.images import load_image
from foveate.vision.kept_tokens import KeptTokens, square_region
from foveate.vision.video import is_video

from .dropping import LlavaDropping, active_dropping
from .hosts import LlavaHost, VisualSequence
from .language_dropping import LanguageDropping

MODELS: dict[str, Any] = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}
"""`model_type` of config.json -> class of transformers."""
IMAGE_PROCESSORS: dict[str, Any] = {
    "CLIP": CLIPImageProcessorPil,
    "LlavaNext": LlavaNextImageProcessorPil,
    "Llava": LlavaImageProcessorPil,
    "Siglip": SiglipImageProcessorPil,
}
"""What precedes "ImageProcessor" in a checkpoint's settings -> the class that needs no torchvision."""
GENERATION: dict[str, Any] = {"max_new_tokens": 100, "temperature": 0.0}


@dataclass(frozen=True)
class Answer:
    """What the model said.

    Attributes:
        text: the answer.
        finish: "stop" at an end token or stop string, "length" where the limit of new tokens cut it off.
        tokens: number of tokens generated.
        visual_tokens: tokens of the picture that the language model read; 0 without a picture.
        milliseconds: where the time went: "pictures", "towers", "answer".
        kept: of the picture, which of its tokens these are; empty where none are dropped.
        boxes, labels: empty; a LLaVA has no tokens of objects.
    """

    text: str
    finish: str
    tokens: int
    visual_tokens: int = 0
    milliseconds: dict[str, float] = field(default_factory=dict, compare=False)
    kept: tuple[KeptTokens, ...] = field(default=(), compare=False)
    boxes: tuple[Any, ...] = ()
    labels: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "answer": self.text,
            "finish": self.finish,
            "tokens": self.tokens,
            "visual_tokens": self.visual_tokens,
            "milliseconds": {stage: round(value, 1) for stage, value in self.milliseconds.items()},
        }


@dataclass(frozen=True)
class Seen:
    """A picture as the language model takes it, computed once.

    Attributes:
        tokens: what of it reaches the language model.
        milliseconds, kept, boxes, labels: as in `Answer`.
        kind: `<image>`.
    """

    tokens: VisualSequence
    milliseconds: dict[str, float]
    kept: tuple[KeptTokens, ...] = ()
    kind: str = IMAGE
    boxes: tuple[Any, ...] = ()
    labels: tuple[Any, ...] = ()


class LlavaPredictor(ChatPredictor):
    """Answers questions about pictures. Thread-safe to call: nothing is changed by a call.

    Args:
        model: a LLaVA of transformers, in evaluation mode, on its device.
        image_processor: of its checkpoint, from PIL images to `pixel_values`.
        tokenizer: of its checkpoint, which knows `<image>` as one token.
        chat_template: Jinja text of its checkpoint.
    """

    seen_type = Seen

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, chat_template: str, *, name: str = "") -> None:
        self.model = model.eval()
        self.host = LlavaHost(model)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self.name = name

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> LlavaPredictor:
        """Load a checkpoint in the layout of transformers ("llava-hf/...").

        Args:
            device: default CUDA if there is one, else CPU.
            dtype: default bfloat16 on CUDA, float32 on CPU.

        Raises:
            InputError: there is no such model, it is of another kind, or its tokens cannot be handled one by one.
            CheckpointError: a file of it is missing, damaged, or does not fit the others; the sentence names it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        folder = find_checkpoint(folder)
        model_type = str(read_config(folder).get("model_type"))
        if model_type not in MODELS:
            raise InputError(f"{folder} is a {model_type!r} model, not a LLaVA of transformers.")
        image_processor = _load_image_processor(folder)
        tokenizer = load_tokenizer(folder)
        template = _chat_template(folder, tokenizer)
        model = load_exactly(MODELS[model_type].from_pretrained, folder, what="the LLaVA checkpoint", dtype=dtype)
        check_tokenizer(tokenizer, model.config.text_config.vocab_size, f"the tokenizer of {folder}")
        image = tokenizer.convert_tokens_to_ids(IMAGE)
        if image != model.config.image_token_id:
            raise CheckpointError(
                f"the tokenizer of {folder} has {image} for {IMAGE}, and the model {model.config.image_token_id}; "
                "copy both from one checkpoint."
            )
        warn_of_the_world(folder, "give a LLaVA that has seen some, such as llava-hf/llava-v1.6-vicuna-7b-hf")
        return cls(model.to(device), image_processor, tokenizer, template, name=folder.name)

    # ---------------------------------------------------------------- public calls

    @torch.inference_mode()
    def see_all(self, sources: Sequence[Any], boxes: Sequence[Any]) -> list[Seen | None]:
        """As `see`, several that are encoded together."""
        for own in boxes:
            if own is not None and (not isinstance(own, list | tuple) or len(own)):
                raise InputError("a LLaVA has no tokens of objects; leave the boxes out, or ask an MG-LLaVA.")
        started = time.perf_counter()
        images = [load_image(source) for source in sources if source is not None]
        if not images:
            return [None] * len(sources)
        batch = self.image_processor(images=images, return_tensors="pt")
        prepared = self._milliseconds(started) / len(images)
        started = time.perf_counter()
        sequences, dropping = self._encode(batch["pixel_values"], batch.get("image_sizes"))
        times = {"pictures": prepared, "towers": self._milliseconds(started) / len(images)}
        found = iter(
            Seen(sequence, times, (self._kept(sequence, image),) if dropping else ())
            for sequence, image in zip(sequences, images, strict=True)
        )
        return [None if source is None else next(found) for source in sources]

    # ---------------------------------------------------------------- inside

    def _encode(self, pixel_values: Tensor, image_sizes: Any) -> tuple[list[VisualSequence], bool]:
        """Pictures as the language model reads them, and whether tokens were dropped."""
        pixel_values = pixel_values.to(self.model.device, self.model.dtype)
        dropping = active_dropping(self.model)
        if isinstance(dropping, LlavaDropping) and not dropping.strategy.off:
            if dropping.strategy.positions != "contiguous":
                raise InputError("a predictor reads what is kept without gaps; use positions 'contiguous'.")
            return dropping.encode(pixel_values, image_sizes), True
        layouts = self.host.layouts(image_sizes, len(pixel_values))
        sizes = {} if image_sizes is None else {"image_sizes": torch.as_tensor(image_sizes)}
        features = self.model.model.get_image_features(pixel_values, return_dict=True, **sizes).pooler_output
        whole = [
            VisualSequence(own, torch.arange(len(own)), len(own), layout.valid, layout)
            for own, layout in zip(features, layouts, strict=True)
        ]
        return whole, False

    def _kept(self, sequence: VisualSequence, image: Image.Image) -> KeptTokens:
        if self.host.high_resolution:
            regions = sequence.layout.regions()
        elif getattr(self.image_processor, "do_pad", False):
            regions = square_region(*image.size, padded=True)
        elif getattr(self.image_processor, "do_center_crop", False):
            regions = square_region(*image.size, padded=False)
        else:
            regions = np.array([[0.0, 0.0, *image.size]])
        return KeptTokens(sequence.keep.cpu().numpy(), regions, sequence.length, len(sequence.embeds))

    def _kind(self, source: Any) -> str | None:
        if source is not None and is_video(source):
            raise InputError("a LLaVA of transformers answers about images here, not videos; ask an MG-LLaVA.")
        return None if source is None else IMAGE

    def _sampling(self, generation: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        return read_sampling(generation, GENERATION)

    def _prompt(self, question: str, kind: str | None, turns: Sequence[tuple[str, Any]] = ()) -> list[int]:
        """Ids of a question in the checkpoint's template; of a later turn those that follow the answer before.

        Raises:
            InputError: no text, or more or other placeholders than pictures.
            CheckpointError: a template that says earlier turns in another way once there are later ones.
        """
        parts = with_placeholder(question, kind)
        if not turns:
            return self._ids(self._render([_message("user", parts)]))
        said = [
            message
            for asked, answer in turns
            for message in (_message("user", asked), _message("assistant", answer.text))
        ]
        before = self._render(said[:-1])
        whole = self._render([*said, _message("user", parts)])
        rest = whole[len(before) :].lstrip()
        answer = turns[-1][1].text
        if not whole.startswith(before) or not rest.startswith(answer):
            raise CheckpointError(
                "the chat template of the checkpoint changes earlier turns when a later one follows, so that a "
                "conversation cannot go on from its cache; ask each question by itself."
            )
        return self.tokenizer.encode(rest[len(answer) :], add_special_tokens=False)

    def prompt_ids(self, question: str, kind: str | None, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        """As any chat model's, in the words of the checkpoint's template."""
        messages: list[dict[str, Any]] = []
        for asked, answer in turns:
            text = refuse_placeholders(asked) if messages else with_placeholder(asked, kind)
            messages += [_message("user", text), _message("assistant", refuse_placeholders(answer))]
        text = refuse_placeholders(question) if messages else with_placeholder(question, kind)
        return self._ids(self._render([*messages, _message("user", text)]))

    def _render(self, messages: Sequence[dict[str, Any]]) -> str:
        return self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
        )

    def _ids(self, text: str) -> list[int]:
        start = self.tokenizer.bos_token
        return self.tokenizer.encode(text, add_special_tokens=start is None or not text.startswith(start))

    def _after(self, text: TextStream) -> list[int]:
        return []  # which the template has, and `_prompt` takes from it

    @property
    def _context(self) -> int | None:
        return getattr(self.model.config.text_config, "max_position_embeddings", None)

    @property
    def _speaker(self) -> tuple[Any, Any]:
        return self.model, self.tokenizer

    def _embed(self, prompts: Sequence[list[int]], seen: Sequence[Seen | None]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        visuals = [one.tokens for one in seen if one is not None]
        inputs = self.host.assemble(ids, mask, visuals, left_padding=True)
        dropping = active_dropping(self.model)
        if isinstance(dropping, LanguageDropping) and not dropping.strategy.off:
            dropping.expect(inputs["input_ids"], visuals)
        return inputs["inputs_embeds"], inputs["attention_mask"]

    def _finished(self, text: TextStream, seen: Seen | None, milliseconds: float) -> Answer:
        finish = "stop" if text.stopped else "length"
        if seen is None:
            return Answer(text.text.strip(), finish, len(text.ids), milliseconds={"answer": milliseconds})
        return Answer(
            text.text.strip(),
            finish,
            len(text.ids),
            len(seen.tokens.embeds),
            {**seen.milliseconds, "answer": milliseconds},
            seen.kept,
        )


def _message(role: str, text: str) -> dict[str, Any]:
    """A turn as chat templates of pictures take it, each placeholder a part of its own."""
    content: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE)):
        if number:
            content.append({"type": "image"})
            piece = piece.removeprefix("\n")  # which templates write themselves
        if piece:
            content.append({"type": "text", "text": piece})
    return {"role": role, "content": content or [{"type": "text", "text": ""}]}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the checkpoint again.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object; copy the checkpoint again.")
    return content


def _load_image_processor(folder: Path) -> Any:
    """The checkpoint's image processor, in the class that needs no torchvision."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not (folder / name).is_file():
            continue
        settings = _read_json(folder / name)
        settings = settings.get("image_processor", {}) if name == "processor_config.json" else settings
        kind = str(settings.get("image_processor_type", "")).partition("ImageProcessor")[0]
        if kind not in IMAGE_PROCESSORS:
            continue
        try:
            return IMAGE_PROCESSORS[kind](
                **{key: value for key, value in settings.items() if not key.endswith(("_type", "_class"))}
            )
        except Exception as error:  # transformers raises many types on values that it did not expect
            raise CheckpointError(f"{folder / name} cannot be used: {first_line(error)}") from error
    raise CheckpointError(
        f"{folder} has no settings of an image processor of LLaVA, CLIP or SigLIP; add its preprocessor_config.json."
    )


def _chat_template(folder: Path, tokenizer: Any) -> str:
    """The checkpoint's chat template."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file() and isinstance(found := _read_json(folder / name).get("chat_template"), str):
            return found
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    raise CheckpointError(f"{folder} has no chat template; add the chat_template.jinja that belongs to the model.")
