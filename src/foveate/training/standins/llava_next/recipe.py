"""Training of `llava-next-world`: a LLaVA-NeXT of transformers between the stand-ins clip-world and llama-world.

It learns from conversations about rendered scenes in LLaVA's form, as the original does from its mix: projector,
newline token and language model learn from the answers; the vision tower stays as it is, unless the recipe says
otherwise. What is saved is a folder of transformers, with a processor that has a chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from foveate.checkpoints import find_checkpoint
from foveate.data.llava import Conversations
from foveate.errors import CheckpointError, RecipeError
from foveate.language.templates import IGNORED, IMAGE, IMAGE_ID, TEMPLATES, encode_turns, find_template
from foveate.training.conversations import (
    ConversationData,
    check_root,
    open_questions,
    open_samples,
    plain_question,
    present_samples,
    turns,
    write_answers,
)
from foveate.training.recipes import LARGEST, Recipe, RecipeSection
from foveate.training.sampling import SampleLengths, SampleRandom, SeededDataset
from foveate.training.standins.loading import load_stand_in, load_stand_in_model
from foveate.training.trainer import TrainingTask
from foveate.vision.images import load_image
from foveate.vision.towers import VisionTower, load_tower

Tiles = Annotated[int, Field(gt=0, le=16)]


class LlavaNextSettings(RecipeSection):
    """What the model is made of."""

    vision: str = Field("clip-world", description="CLIP whose vision tower sees")
    language: str = Field("llama-world", description="a Llama with its tokenizer")
    grids: tuple[tuple[Tiles, Tiles], ...] = Field(
        ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)),
        min_length=1,
        description="rows and columns of sub-images that a picture may be cut into; the one that shows most is taken",
    )
    vision_layer: int = Field(-2, description="whose output the visual tokens are, as in LLaVA")
    train_vision: bool = Field(False, description="train the vision tower too")
    remember_pictures: bool = Field(
        False, description="keep what the frozen tower sees of each picture in memory, 2 bytes a number"
    )
    template: str = Field("vicuna", description="of the conversations")
    length: int = Field(640, gt=0, le=100_000, description="most tokens of a conversation, visual ones included")

    @model_validator(mode="after")
    def _known_template(self) -> LlavaNextSettings:
        if self.template not in TEMPLATES:
            raise ValueError(f"template is {self.template!r}; use one of {', '.join(TEMPLATES)}")
        if self.train_vision and self.remember_pictures:
            raise ValueError("remember_pictures keeps what a frozen tower sees; turn it or train_vision off")
        return self


class LlavaNextEvaluation(RecipeSection):
    """Questions to be answered, and how."""

    data: ConversationData
    batch_size: int = Field(16, gt=0, le=LARGEST)
    max_new_tokens: int = Field(24, gt=0, le=100_000)


class LlavaNextRecipe(Recipe):
    data: ConversationData
    model: LlavaNextSettings = Field(default_factory=lambda: LlavaNextSettings.model_validate({}))
    evaluation: LlavaNextEvaluation


RECIPE = LlavaNextRecipe


# -------------------------------------------------------------------- data


class PictureConversations(SeededDataset):
    """A sample: `input_ids` with all visual placeholders, `labels` of the answers, and the picture's tensors.

    Turns are drawn in an order of their own, as many as fit; the picture stands before the first.

    Args:
        look: (P, 3, s, s) -> (P, n, w), what the tower sees. With it a sample has these in place of pixels, and each
            picture is looked at once.
    """

    def __init__(
        self,
        samples: Conversations,
        index: Sequence[int],
        processor: LlavaNextProcessor,
        settings: LlavaNextSettings,
        look: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.samples, self.index, self.processor, self.settings = samples, list(index), processor, settings
        self.look = look
        self._seen: dict[Path, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.index)

    def lengths(self) -> SampleLengths:
        """Words of each conversation; kind 1 has a picture."""
        lengths, kinds = [], []
        for place in self.index:
            sample = self.samples[place]
            lengths.append(sum(len(message.text.split()) for message in sample.messages))
            kinds.append(int(sample.image is not None))
        return SampleLengths(lengths, kinds)

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        sample = self.samples[self.index[index]]
        if sample.video is not None:
            raise RecipeError(f"the sample {sample.sample_id} has a video, which this model does not see")
        seen = None if sample.image is None else self._see(sample.image)
        pairs = [(plain_question(asked), answer) for asked, answer, _, _ in turns(sample)]
        random.numpy.shuffle(pairs)
        ids, labels = conversation(pairs, seen, self.processor, self.settings)
        return {"input_ids": ids, "labels": labels, "seen": seen}

    def _see(self, path: Path) -> dict[str, Any]:
        if self.look is None:
            return see(load_image(path), self.processor)
        if path not in self._seen:
            seen = see(load_image(path), self.processor)
            features = self.look(seen.pop("pixel_values")).half()
            if not torch.isfinite(features).all():
                raise RecipeError("the tower's features are beyond what float16 holds; turn remember_pictures off")
            self._seen[path] = seen | {"tower_features": features}
        return self._seen[path]


def see(image: Image.Image, processor: Any) -> dict[str, Any]:
    """pixel_values (P, 3, s, s), image_size (height, width), and count, the picture's placeholders."""
    given = processor.image_processor(images=[image], return_tensors="pt")
    inputs = {"image_sizes": given["image_sizes"].tolist(), "pixel_values": given["pixel_values"]}
    text = processor.replace_image_token(inputs, 0)
    return {
        "pixel_values": given["pixel_values"][0],
        "image_size": given["image_sizes"][0],
        "count": text.count(processor.image_token),
    }


def conversation(
    pairs: Sequence[tuple[str, str]], seen: dict[str, Any] | None, processor: Any, settings: LlavaNextSettings
) -> tuple[list[int], list[int]]:
    """Token ids and labels, as the processor would write the text; turns after the first that do not fit are left out.

    Raises:
        RecipeError: the first turn does not fit.
    """
    template = find_template(settings.template)
    ids: list[int] = []
    labels: list[int] = []
    for number, (asked, answer) in enumerate(pairs):
        question = asked if number or seen is None else f"{IMAGE}\n{asked}"
        more, learnt = encode_turns([template.render(question, answer)], processor.tokenizer, first=not ids)
        if seen is not None and not number:
            place = more.index(IMAGE_ID)
            more[place : place + 1] = [processor.image_token_id] * seen["count"]
            learnt[place : place + 1] = [IGNORED] * seen["count"]
        if len(ids) + len(more) > settings.length:
            if not ids:
                raise RecipeError(
                    f"model.length is {settings.length}, and a picture with a question has {len(more)} tokens; raise it"
                )
            break
        ids += more
        labels += learnt
    return ids, labels


def collate(pad: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Samples -> what `LlavaNextForConditionalGeneration.forward` takes, padded on the right."""

    def join(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(sample["input_ids"]) for sample in samples)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([sample[key] + [value] * (longest - len(sample[key])) for sample in samples])

        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch = {
            "input_ids": padded("input_ids", pad),
            "labels": padded("labels", IGNORED),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }
        return batch | pictures_of([sample["seen"] for sample in samples if sample["seen"] is not None])

    return join


def pictures_of(seen: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """image_sizes (V, 2), and of V pictures either pixel_values (V, P, 3, s, s), filled up with zeros, or
    tower_features (sum of their P, n, w) with tiles (V,), their P; nothing of no pictures."""
    if not seen:
        return {}
    sizes = {"image_sizes": torch.stack([one["image_size"] for one in seen])}
    if "tower_features" in seen[0]:
        features = [one["tower_features"].float() for one in seen]
        return sizes | {"tower_features": torch.cat(features), "tiles": torch.tensor([len(one) for one in features])}
    most = max(len(one["pixel_values"]) for one in seen)
    pixels = torch.zeros(len(seen), most, *seen[0]["pixel_values"].shape[1:])
    for row, one in zip(pixels, seen, strict=True):
        row[: len(one["pixel_values"])] = one["pixel_values"]
    return sizes | {"pixel_values": pixels}


# -------------------------------------------------------------------- model


class LlavaNextTraining(nn.Module):
    """The model; a text without a picture has nothing to do with the towers, and the loss says so by its graph."""

    def __init__(self, model: Any, *, train_vision: bool) -> None:
        super().__init__()
        self.llava = model
        model.model.vision_tower.requires_grad_(train_vision)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        if "tower_features" in batch:
            features, tiles = batch.pop("tower_features"), batch.pop("tiles")
            batch["inputs_embeds"] = self.embed(batch.pop("input_ids"), features, tiles, batch.pop("image_sizes"))
        return {"loss": self.llava(**batch, use_cache=False).loss}

    def embed(self, input_ids: Tensor, features: Tensor, tiles: Tensor, image_sizes: Tensor) -> Tensor:
        """What the language model reads where the tower has seen the pictures already: as the model does it itself."""
        base = self.llava.model
        projected = base.multi_modal_projector(features).split(tiles.tolist())
        visual, _ = base.pack_image_features(
            projected,
            image_sizes,
            vision_feature_select_strategy="default",
            image_newline=base.image_newline,
        )
        embeds = self.llava.get_input_embeddings()(input_ids)
        place = (input_ids == self.llava.config.image_token_id)[..., None].expand_as(embeds)
        return embeds.masked_scatter(place, torch.cat(list(visual)))

    def look(self, pixel_values: Tensor) -> Tensor:
        """(P, 3, s, s) -> (P, n, w), the tower's tokens without the class token."""
        base = self.llava.model
        with torch.no_grad():
            states = base.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        return states[self.llava.config.vision_feature_layer][:, 1:]


def build_model(settings: LlavaNextSettings) -> tuple[Any, LlavaNextProcessor]:
    """A LLaVA-NeXT with fresh projector and newline token, and its processor.

    Raises:
        InputError, CheckpointError: a part is missing, damaged or of another kind.
        RecipeError: the parts do not fit each other.
    """
    tower = load_tower(find_checkpoint(settings.vision), dtype=torch.float32, freeze=False)
    language, tokenizer = load_stand_in(LlamaForCausalLM, settings.language)
    if not tower.has_cls:
        raise RecipeError(f"model.vision must have a class token, as CLIP has; {settings.vision!r} has none")
    if not -tower.num_layers <= settings.vision_layer <= -1:
        raise RecipeError(
            f"model.vision_layer is {settings.vision_layer}; give one of -1 to -{tower.num_layers}, of the "
            f"{tower.num_layers} layers of {settings.vision!r}"
        )
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # for generation, and saved
    if image_id >= language.config.vocab_size:
        # A picture's tokens take the place of this one, so that its embedding is never read.
        language.resize_token_embeddings(image_id + 1, mean_resizing=False)
    side = tower.image_size
    config = LlavaNextConfig(
        vision_config=_plain(tower.model.config),
        text_config=_plain(language.config),
        image_token_index=image_id,
        image_grid_pinpoints=[[rows * side, columns * side] for rows, columns in settings.grids],
        vision_feature_layer=settings.vision_layer,
        vision_feature_select_strategy="default",
    )
    model: Any = LlavaNextForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.model.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(tokenizer, name))
    return model, build_processor(tokenizer, tower, config, settings.template)


def _plain(config: Any) -> dict[str, Any]:
    """A part's configuration without what belongs to the checkpoint that it was in."""
    left_out = ("dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version")
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def build_processor(tokenizer: Any, tower: VisionTower, config: Any, template: str) -> LlavaNextProcessor:
    """As LLaVA-NeXT's, with the tower's normalisation, and the template of the conversations as a chat template."""
    pictures = LlavaNextImageProcessorPil(
        size={"shortest_edge": tower.image_size},
        crop_size={"height": tower.image_size, "width": tower.image_size},
        image_grid_pinpoints=config.image_grid_pinpoints,
        image_mean=list(tower.mean),
        image_std=list(tower.std),
    )
    return LlavaNextProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template(template),
    )


def chat_template(name: str) -> str:
    """A template of `foveate.language.templates` in Jinja, of turns whose user may show a picture first.

    The start token is the tokenizer's to write, before the first turn; turns that follow an end token have their own.
    """
    template = find_template(name)
    before, _, after = template.user.partition("{input}")
    ends = "{{ eos_token }}" if template.adds_eos else ""
    again = "{% if not loop.first %}{{ bos_token }}{% endif %}" if template.adds_eos else ""
    said = "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    said += "{% if part.type == 'image' %}" + IMAGE + "\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    user = again + _quoted(before) + said
    asking = _quoted(after.rstrip(" "))
    answer = asking + _quoted(" " if after[-1:] not in ("\n", "") else "") + said + _quoted(template.suffix) + ends
    answer += _quoted(template.separator)
    return (
        "{% for message in messages %}{% if message.role == 'user' %}" + user + "{% else %}" + answer + "{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + asking + "{% endif %}"
    )


def _quoted(text: str) -> str:
    """Text that Jinja writes as it is; a line feed behind a tag would be lost."""
    return "{{ " + repr(text) + " }}" if text else ""


# -------------------------------------------------------------------- the recipe's parts


def build(recipe: LlavaNextRecipe) -> TrainingTask:
    """Data, model, collation and what is saved.

    Raises:
        InputError, CheckpointError, RecipeError: a part or a file of the data is not there, damaged or does not fit.
    """
    check_root(recipe.evaluation.data, "evaluation.data")
    check_root(recipe.data, "data")
    model, processor = build_model(recipe.model)
    samples, index = open_samples(recipe.data, recipe.seed)
    index = present_samples(samples, index, recipe.data.skip_bad)
    training = LlavaNextTraining(model, train_vision=recipe.model.train_vision)
    look = training.look if recipe.model.remember_pictures else None
    dataset = PictureConversations(samples, index, processor, recipe.model, look)

    def save(folder: Path) -> None:
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)

    tokenizer: Any = processor.tokenizer
    return TrainingTask(
        model=training,
        train_dataset=dataset,
        collate=collate(tokenizer.pad_token_id),
        save=save,
        save_frozen=False,
        lengths=dataset.lengths(),
    )


def load_llava_next(folder: Path) -> tuple[Any, Any]:
    """A model of this kind in float32, and its processor.

    Raises:
        InputError: it is of another kind.
        CheckpointError: it is damaged, not finite, or has no processor.
    """
    model = load_stand_in_model(LlavaNextForConditionalGeneration, folder)
    try:
        processor = LlavaNextProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"the processor of {folder} cannot be loaded: {error}") from None
    return model, processor


def evaluate(recipe: LlavaNextRecipe, model_path: Path) -> dict[str, Any]:
    """Accuracy of greedy answers, by kind of question and size of what it is about.

    An answer is right if it is the expected one after VQA's normalisation. OUTPUT/answers.jsonl has every answer,
    OUTPUT/accuracy.md the table.

    Raises:
        InputError: the model is none of this kind.
        CheckpointError: it is damaged.
    """
    model, processor = load_llava_next(model_path)
    settings = recipe.evaluation
    questions = open_questions(settings.data)
    said = answers(
        model,
        processor,
        [(question.sample.image, question.question) for question in questions],
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
    )
    return write_answers(recipe.output, questions, said)


@torch.inference_mode()
def answers(
    model: Any, processor: Any, asked: Sequence[tuple[Path | None, str]], *, batch_size: int, max_new_tokens: int
) -> list[str]:
    """Greedy answers of questions about pictures."""
    written: list[str] = []
    for start in range(0, len(asked), batch_size):
        texts, pictures = [], []
        for path, question in asked[start : start + batch_size]:
            content: list[dict[str, Any]] = [{"type": "text", "text": question}]
            if path is not None:
                content.insert(0, {"type": "image"})
                pictures.append(load_image(path))
            texts.append(
                processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            )
        inputs = processor(images=pictures or None, text=texts, padding=True, return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        written += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return written
