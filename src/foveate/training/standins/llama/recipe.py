"""Pre-training of `llama-world`: a Llama that answers questions about scenes of the rendered world from words.

What a picture would tell stands in words where the picture's tokens will be: the objects of a scene, each with its
attributes and what it is beside; or, as a picture's object tokens are, each object in one token, whose embedding is the
sum of those of its words. Conversations are in Vicuna's template. Colours, categories and the words on signs are
exchanged at random, so that the answer has to be read and cannot be known; signs with random letters have it learn to
spell. Captions by themselves teach the language.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from foveate.errors import RecipeError
from foveate.language.templates import IGNORED, TEMPLATES, encode_turns, find_template, render_conversation
from foveate.training.recipes import LARGEST, Recipe, RecipeSection
from foveate.training.sampling import SampleRandom, SeededDataset
from foveate.training.standins.loading import load_stand_in
from foveate.training.standins.rendered import MAX_SCENES
from foveate.training.trainer import TrainingTask
from foveate.world.grammar import relation_clause, scene_caption, with_articles
from foveate.world.scenes import Instance, Scene, SceneQuestion, render_scenes
from foveate.world.vocabulary import category_names, colour_names, raw_vocabulary

BRIEFLY = "describe the picture briefly."
OBJECTS = "describe the objects in the picture."
_ALSO_SAID = (
    "user assistant a an the and with in is are it this that there of to no yes not or object objects picture image "
    "scene describe answer question using single word phrase which letter next beside sign says"
)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_KINDS = ("what", "colour", "count", "where", "text")


class SceneData(RecipeSection):
    """Scenes whose objects are put into words."""

    first_seed: int = Field(ge=0, le=LARGEST)
    count: int = Field(gt=0, le=MAX_SCENES)
    processes: int = Field(2, gt=0, le=64)


class LlamaSizes(RecipeSection):
    """Sizes of the network, and what it learns from."""

    width: int = Field(128, gt=0, le=8192)
    layers: int = Field(6, gt=0, le=128)
    heads: int = Field(4, gt=0, le=256)
    feed_forward: int = Field(384, gt=0, le=65536)
    positions: int = Field(2048, ge=256, le=1_000_000, description="longest sequence that the configuration promises")
    template: str = Field("vicuna", description="of the conversations")
    length: int = Field(224, gt=0, le=100_000, description="tokens that a conversation is filled to with questions")
    text_share: float = Field(0.1, ge=0, lt=1, description="samples that are a caption by itself")
    focus: float = Field(
        0.6,
        ge=0,
        le=1,
        description="conversations about one to four objects of the scene, from which reading is learnt",
    )
    bags: float = Field(
        0.5, ge=0, le=1, description="conversations about objects that are one token each, the sum of their words"
    )
    prompt_weight: float = Field(0.2, ge=0, description="factor of the loss on what is not an answer")

    @model_validator(mode="after")
    def _fit_together(self) -> LlamaSizes:
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} does not split into {self.heads} heads of an even width")
        if self.template not in TEMPLATES:
            raise ValueError(f"template is {self.template!r}; use one of {', '.join(TEMPLATES)}")
        return self


class LlamaRecipe(Recipe):
    data: SceneData
    model: LlamaSizes = Field(default_factory=lambda: LlamaSizes.model_validate({}))
    evaluation: SceneData


RECIPE = LlamaRecipe


# -------------------------------------------------------------------- words


def world_words() -> list[str]:
    """Every word of the world's language in lower case, sorted, and the numbers that are counted to."""
    raw = raw_vocabulary()
    texts = [*category_names(), *raw["sign_words"], *raw["relations"], *raw["patterns_as_nouns"].values()]
    texts += [value for family in raw["families"].values() for value in family["values"]]
    texts += [*raw["backgrounds"].values(), *raw["captions"], *raw["questions"].values(), _ALSO_SAID]
    texts += [raw[key] for key in ("relation_clause", "text_clause", "pattern_clause", "scene")]
    spoken = " ".join(re.sub(r"\{(a )?\w+\}", " ", text) for text in texts).lower()
    return sorted({*re.findall(r"[a-z]+", spoken), *map(str, range(10))})


def build_tokenizer(positions: int = 2048) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer whose pieces are the world's words, with and without a space before, and single letters.

    Text is read in lower case. Words win by their score, so known ones are one token and others are spelt.
    """
    pieces: dict[str, float] = {"<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, "<pad>": 0.0, "▁": -4.0, "▁\n": -2.0, "\n": -2.0}
    pieces |= dict.fromkeys(".,:;?!'\"()-|<>/_", -2.0)
    for word in world_words():
        pieces.setdefault(f"▁{word}", -6.0)
        pieces.setdefault(word, -7.0)
    for letter in [*_LETTERS, *map(str, range(10))]:
        # Where a letter is a word ("a"), it is cheap only behind a space.
        pieces[letter] = -20.0
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", list(pieces).index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=positions,
    )


# -------------------------------------------------------------------- scenes in words


@dataclass(frozen=True)
class SceneWords:
    """A scene without its picture.

    Attributes:
        background: "a green field".
        objects: one phrase per object, the largest first.
        things: "a red car" per object.
        plain: the phrases without what an object is beside.
        described: per object, whether it is large and plain enough that descriptions speak of it.
        asked: one question of each kind that the scene has; `about` is a place in `objects`.
        questions: all of them.
    """

    background: str
    objects: tuple[str, ...]
    things: tuple[str, ...]
    described: tuple[bool, ...]
    asked: tuple[SceneQuestion, ...]
    questions: tuple[SceneQuestion, ...]
    plain: tuple[str, ...] = ()

    @classmethod
    def of(cls, scene: Scene) -> SceneWords:
        """What is true of the scene: the canonical caption where an object has one, else its colour and category."""
        areas = [(item.box[2] - item.box[0]) * (item.box[3] - item.box[1]) for item in scene.instances]
        largest = sorted(range(len(areas)), key=lambda k: -areas[k])
        items = [scene.instances[k] for k in largest]

        def listed(questions: Sequence[SceneQuestion]) -> tuple[SceneQuestion, ...]:
            return tuple(replace(each, about=largest.index(each.about)) for each in questions)

        things = tuple(with_articles(f"a {item.attributes['colour']} {item.category}") for item in items)
        return cls(
            background=raw_vocabulary()["backgrounds"][scene.background],
            objects=tuple(
                item.captions[0] if item.captions else thing for item, thing in zip(items, things, strict=True)
            ),
            things=things,
            plain=tuple(
                _without_relation(scene, item) if item.captions else thing
                for item, thing in zip(items, things, strict=True)
            ),
            described=tuple(item.describable for item in items),
            asked=listed(scene.questions),
            questions=listed(scene.all_questions),
        )

    def context(self, order: Sequence[int] | None = None) -> str:
        """ "a green field: a red car above a black sign; a small wooden black sign that says bus below a red car" """
        listed = range(len(self.objects)) if order is None else order
        return f"{self.background}: {'; '.join(self.objects[k] for k in listed)}"

    def bags_context(self, mark: str) -> str:
        """As `context`, a mark for each object."""
        return f"{self.background}: {mark * len(self.objects)}"

    def described_objects(self, order: Sequence[int]) -> str:
        """The phrases of the describable objects."""
        return "; ".join(self.objects[k] for k in order if self.described[k])

    def summary(self) -> str:
        """The three largest things in their place."""
        largest = [thing for thing, described in zip(self.things, self.described, strict=True) if described][:3]
        return scene_caption_of(self.background, largest)

    def focused(self, kept: Sequence[int]) -> SceneWords:
        """Some of the objects, and the questions that their phrases answer; how many there are is not among these."""

        def left(questions: Sequence[SceneQuestion]) -> tuple[SceneQuestion, ...]:
            return tuple(
                replace(each, about=kept.index(each.about))
                for each in questions
                if each.about in kept and each.kind != "count"
            )

        return replace(
            self,
            objects=tuple(self.objects[k] for k in kept),
            things=tuple(self.things[k] for k in kept),
            plain=tuple(self.plain[k] for k in kept),
            described=tuple(self.described[k] for k in kept),
            asked=left(self.asked),
            questions=left(self.questions),
        )

    def exchanged(self, change: Callable[[str], str]) -> SceneWords:
        """The scene with every phrase changed by the same function."""

        def asked(questions: Sequence[SceneQuestion]) -> tuple[SceneQuestion, ...]:
            # The answer of a "text" question is a word on a sign, which the function knows by what stands before it.
            return tuple(
                replace(
                    each,
                    question=change(each.question),
                    answer=change(f"says {each.answer}").removeprefix("says ")
                    if each.kind == "text"
                    else change(each.answer),
                )
                for each in questions
            )

        return replace(
            self,
            objects=tuple(map(change, self.objects)),
            things=tuple(map(change, self.things)),
            plain=tuple(map(change, self.plain)),
            asked=asked(self.asked),
            questions=asked(self.questions),
        )


def _without_relation(scene: Scene, item: Instance) -> str:
    """The canonical caption without its clause."""
    phrase = item.captions[0]
    for relation in item.relations[:1]:
        other = scene.instances[relation.object_index]
        phrase = phrase.replace(relation_clause(relation.predicate, other.attributes["colour"], other.category), "")
    return " ".join(phrase.split())


def scene_caption_of(background: str, things: Sequence[str]) -> str:
    """ "a street with a red car and a white cat", or only the background where there is nothing."""
    names = {phrase: name for name, phrase in raw_vocabulary()["backgrounds"].items()}
    return scene_caption(names[background], things) if things else background


def read_scenes(data: SceneData) -> list[SceneWords]:
    """Scenes in words; those without objects are left out."""
    scenes = render_scenes(data.first_seed, data.count, size=128, processes=data.processes)
    return [SceneWords.of(scene) for scene in scenes if scene.instances]


def exchange_words(words: Mapping[str, str], said: Mapping[str, str]) -> Callable[[str], str]:
    """A function that changes a phrase: `words` for words, `said` for the word behind "says"; articles follow suit."""

    def change(text: str) -> str:
        before, changed = "", []
        for token in text.split():
            word = token.rstrip("?;.,")
            new = said.get(word, word) if before == "says" else words.get(word, word)
            changed.append(new + token[len(word) :])
            before = word
        return re.sub(
            r"\ban? (?=([a-z]))", lambda match: "an " if match.group(1) in "aeiou" else "a ", " ".join(changed)
        )

    return change


def random_exchange(draw: np.random.Generator) -> Callable[[str], str]:
    """Colours and categories change places, so that what was one of a kind still is; signs say something else."""
    signs = [word.lower() for word in raw_vocabulary()["sign_words"]]
    words: dict[str, str] = {}
    if draw.random() < 0.7:
        words |= dict(zip(colour_names(), draw.permutation(colour_names()).tolist(), strict=True))
    if draw.random() < 0.3:  # not signs, or something else would say a word
        names = [name for name in category_names() if name != "sign"]
        words |= dict(zip(names, draw.permutation(names).tolist(), strict=True))
    said = dict(zip(signs, draw.permutation(signs).tolist(), strict=True))
    if draw.random() < 0.5:
        said = {word: "".join(draw.choice(list(_LETTERS), int(draw.integers(2, 6)))) for word in signs}
    return exchange_words(words, said)


def conversation_ids(
    context: str, pairs: Sequence[tuple[str, str]], tokenizer: Any, template: str, length: int
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation whose first question has the scene in words before it.

    Args:
        pairs: questions and answers; those after the first are left out from where they no longer fit into `length`.
    """
    messages = []
    for number, (asked, answer) in enumerate(pairs):
        messages.append({"from": "human", "value": asked if number else f"{context}\n{asked}"})
        messages.append({"from": "gpt", "value": answer})
    ids: list[int] = []
    labels: list[int] = []
    for turn in render_conversation(messages, find_template(template)):
        more, learnt = encode_turns([turn], tokenizer, first=not ids)
        if ids and len(ids) + len(more) > length:
            break
        ids += more
        labels += learnt
    return ids, labels


class WorldTalk(SeededDataset):
    """A sample: `ids`, and `labels` of the same length: of the answers of a conversation, of all of a caption; and
    `bags`, the words of each object that is one token, where the ids have padding."""

    def __init__(self, scenes: Sequence[SceneWords], tokenizer: Any, sizes: LlamaSizes) -> None:
        self.scenes = scenes
        self.tokenizer = tokenizer
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.scenes)

    def sample(self, index: int, random: SampleRandom) -> dict[str, Any]:
        draw = random.numpy
        scene = self.scenes[index]
        if draw.random() < self.sizes.focus:
            number = min(int(draw.integers(1, 5)), len(scene.objects))
            scene = scene.focused(sorted(draw.choice(len(scene.objects), number, replace=False).tolist()))
        scene = scene.exchanged(random_exchange(draw))
        if draw.random() < self.sizes.text_share:
            phrase = scene.summary() if draw.random() < 0.2 else str(draw.choice(scene.objects))
            ids = self.tokenizer.encode(phrase, add_special_tokens=False)
            ids = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
            return {"ids": ids, "labels": ids}
        if draw.random() < self.sizes.bags:
            return self._of_bags(scene, draw)
        order = list(range(len(scene.objects)))
        by_size = draw.random() < 0.5
        if not by_size:
            draw.shuffle(order)
        pairs = self._questions(scene, draw)
        if draw.random() < 0.15 and any(scene.described):
            pairs.insert(0, (OBJECTS, scene.described_objects(order)))
        if by_size and draw.random() < 0.2:  # what is largest can only be told from the order
            pairs.insert(0, (BRIEFLY, scene.summary()))
        if not pairs:
            pairs.append((BRIEFLY, scene.summary()))
        ids, labels = conversation_ids(
            scene.context(order), pairs, self.tokenizer, self.sizes.template, self.sizes.length
        )
        return {"ids": ids, "labels": labels}

    def _of_bags(self, scene: SceneWords, draw: np.random.Generator) -> dict[str, Any]:
        """A conversation about one token an object, in any order; what is where cannot be told from these."""
        order = draw.permutation(len(scene.objects)).tolist()
        pairs = self._questions(
            replace(
                scene, questions=tuple(each for each in scene.questions if each.kind in ("colour", "count", "text"))
            ),
            draw,
        )
        if draw.random() < 0.3 or not pairs:
            pairs.insert(0, (OBJECTS, "; ".join(scene.plain[k] for k in order)))
        bags = [self.tokenizer.encode(scene.plain[k], add_special_tokens=False) for k in order]
        ids, labels = conversation_ids(
            scene.bags_context(self.tokenizer.pad_token), pairs, self.tokenizer, self.sizes.template, self.sizes.length
        )
        return {"ids": ids, "labels": labels, "bags": bags}

    def _questions(self, scene: SceneWords, draw: np.random.Generator) -> list[tuple[str, str]]:
        """All questions of the scene, each kind in turn as long as it has some left."""
        pool: defaultdict[str, list[SceneQuestion]] = defaultdict(list)
        for number in draw.permutation(len(scene.questions)):
            pool[scene.questions[number].kind].append(scene.questions[number])
        chosen: list[SceneQuestion] = []
        while any(pool.values()):
            kinds = [kind for kind in _KINDS if pool[kind]]
            chosen += [pool[kind].pop() for kind in draw.permutation(kinds)]
        return [(each.question, each.answer) for each in chosen]


def _collate(pad: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(sample["ids"]) for sample in samples)

        def padded(key: str, value: int) -> Tensor:
            return torch.tensor([sample[key] + [value] * (longest - len(sample[key])) for sample in samples])

        lengths = torch.tensor([len(sample["ids"]) for sample in samples])
        mask = (torch.arange(longest) < lengths[:, None]).long()
        batch = {"input_ids": padded("ids", pad), "attention_mask": mask, "labels": padded("labels", IGNORED)}
        bags = [torch.tensor(bag) for sample in samples for bag in sample.get("bags", ())]
        return batch | ({"bags": pad_sequence(bags, batch_first=True, padding_value=pad)} if bags else {})

    return collate


def embed_bags(embed: nn.Module, input_ids: Tensor, attention_mask: Tensor, bags: Tensor, pad: int) -> Tensor:
    """Embeddings of the ids, and at the padding among them, in order, the sum of each bag's words.

    Args:
        embed: (..., ) ids -> (..., C).
        input_ids, attention_mask: (B, T).
        bags: (N, L) ids of words, padded.

    Returns:
        (B, T, C).
    """
    words = embed(input_ids)
    sums = (embed(bags) * (bags != pad).unsqueeze(-1)).sum(dim=1)
    return words.masked_scatter(((input_ids == pad) & attention_mask.bool()).unsqueeze(-1), sums)


# -------------------------------------------------------------------- the recipe's parts


class LlamaPretraining(nn.Module):
    """The language model; what is learnt and what else is read have a loss each."""

    def __init__(self, llama: LlamaForCausalLM, prompt_weight: float) -> None:
        super().__init__()
        self.llama = llama
        self.prompt_weight = prompt_weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, bags: Tensor | None = None
    ) -> dict[str, Any]:
        read: dict[str, Tensor] = {"input_ids": input_ids}
        pad = self.llama.config.pad_token_id
        if bags is not None:
            embed = self.llama.get_input_embeddings()
            read = {"inputs_embeds": embed_bags(embed, input_ids, attention_mask, bags, pad)}
        logits = self.llama(**read, attention_mask=attention_mask, use_cache=False).logits
        each = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), input_ids[:, 1:], reduction="none")
        learnt = labels[:, 1:] != IGNORED
        others = ~learnt & (attention_mask[:, 1:] > 0) & (input_ids[:, 1:] != pad)
        losses = {
            name: weight * (each * mask).sum() / mask.sum().clamp(min=1)
            for name, weight, mask in (("answers", 1.0, learnt), ("prompts", self.prompt_weight, others))
        }
        return {"loss": losses["answers"] + losses["prompts"], "losses": losses}


def _config(sizes: LlamaSizes, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=sizes.positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build(recipe: LlamaRecipe) -> TrainingTask:
    """Put the scenes into words, make the tokenizer and set the model up.

    Raises:
        RecipeError: no scene has an object.
    """
    sizes = recipe.model
    scenes = read_scenes(recipe.data)
    if not scenes:
        raise RecipeError("the scenes of data have no object; raise data.count")
    tokenizer: Any = build_tokenizer(sizes.positions)
    llama = LlamaForCausalLM(_config(sizes, tokenizer))

    def save(folder: Path) -> None:
        llama.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return TrainingTask(
        model=LlamaPretraining(llama, sizes.prompt_weight),
        train_dataset=WorldTalk(scenes, tokenizer, sizes),
        collate=_collate(tokenizer.pad_token_id),
        save=save,
    )


def evaluate(recipe: LlamaRecipe, model_path: Path) -> dict[str, Any]:
    """Questions about scenes in words that must be answered to the letter, by kind, of colour and sign also where each
    object is one token ("_of_bags"); questions for words on signs that the world does not have; and the perplexity of
    captions, per token.

    Raises:
        InputError: the model is none of this kind.
        CheckpointError: it is damaged.
        RecipeError: the scenes have nothing to ask.
    """
    model, tokenizer = load_stand_in(LlamaForCausalLM, model_path)
    scenes = read_scenes(recipe.evaluation)
    asked = [(scene.context(), each) for scene in scenes for each in scene.asked]
    if not asked:
        raise RecipeError("the scenes of evaluation have nothing to ask; raise evaluation.count")
    draw = np.random.default_rng(0)
    for scene in scenes:  # a new word on every sign that is asked for
        said = {
            each.answer: "".join(draw.choice(list(_LETTERS), int(draw.integers(3, 6))))
            for each in scene.asked
            if each.kind == "text"
        }
        if said:
            changed = scene.exchanged(exchange_words({}, said))
            asked += [
                (changed.context(), replace(each, kind="new_word")) for each in changed.asked if each.kind == "text"
            ]
    bags = [
        (scene.bags_context(tokenizer.pad_token), replace(each, kind=f"{each.kind}_of_bags"), scene.plain)
        for scene in scenes
        for each in scene.asked
        if each.kind in ("colour", "text")
    ]
    plain = len(asked)
    asked += [(context, each) for context, each, _ in bags]
    written = _answers(
        model,
        tokenizer,
        [(context, each.question) for context, each in asked],
        recipe.model.template,
        [()] * plain + [phrases for _, _, phrases in bags],
    )
    right = np.array([answer == each.answer for answer, (_, each) in zip(written, asked, strict=True)])
    kinds = np.array([each.kind for _, each in asked])
    in_words = np.isin(kinds, _KINDS)
    metrics: dict[str, Any] = {
        "questions": int(in_words.sum()),
        "answer_accuracy": float(right[in_words].mean()),
    }
    for kind in (*_KINDS, "new_word", "colour_of_bags", "text_of_bags"):
        metrics[f"{kind}_accuracy"] = float(right[kinds == kind].mean()) if (kinds == kind).any() else float("nan")
    captions = sorted({phrase for scene in scenes for phrase in scene.objects})
    return metrics | {"captions": len(captions), "perplexity": _perplexity(model, tokenizer, captions)}


@torch.inference_mode()
def _answers(
    model: Any,
    tokenizer: Any,
    asked: Sequence[tuple[str, str]],
    template: str,
    bags: Sequence[Sequence[str]] | None = None,
) -> list[str]:
    """Greedy answers, in batches of questions of like length, which are padded on the left.

    Args:
        bags: for each question, the phrases whose marks are in its context.
    """
    rendered = find_template(template)
    prompts = [encode_turns([rendered.render(f"{context}\n{each}")], tokenizer)[0] for context, each in asked]
    order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
    written = [""] * len(prompts)
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        longest = max(len(prompts[k]) for k in chosen)
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompts[k])) + prompts[k] for k in chosen])
        mask = torch.tensor([[0] * (longest - len(prompts[k])) + [1] * len(prompts[k]) for k in chosen])
        shown = [
            torch.tensor(tokenizer.encode(phrase, add_special_tokens=False))
            for k in chosen
            for phrase in (bags[k] if bags is not None else ())
        ]
        read: dict[str, Tensor] = {"input_ids": ids}
        start_of_answer = longest
        if shown:
            pad = tokenizer.pad_token_id
            filled = pad_sequence(shown, batch_first=True, padding_value=pad)
            read = {"inputs_embeds": embed_bags(model.get_input_embeddings(), ids, mask, filled, pad)}
            start_of_answer = 0  # then only what is new comes back
        output = model.generate(
            **read,
            attention_mask=mask,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for k, answer in zip(
            chosen, tokenizer.batch_decode(output[:, start_of_answer:], skip_special_tokens=True), strict=True
        ):
            stop = [answer.find(mark) for mark in rendered.stops if mark in answer]
            written[k] = answer[: min(stop, default=len(answer))].strip()
    return written


@torch.inference_mode()
def _perplexity(model: Any, tokenizer: Any, captions: Sequence[str]) -> float:
    """exp of the mean negative log-likelihood of the tokens of captions and of their ends."""
    collate = _collate(tokenizer.pad_token_id)
    total, count = 0.0, 0
    for start in range(0, len(captions), 64):
        samples = []
        for caption in captions[start : start + 64]:
            ids = [*tokenizer(caption)["input_ids"], tokenizer.eos_token_id]
            samples.append({"ids": ids, "labels": ids})
        batch = collate(samples)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        target = batch["labels"][:, 1:]
        total += float(F.cross_entropy(logits[:, :-1].transpose(1, 2), target, ignore_index=IGNORED, reduction="sum"))
        count += int((target != IGNORED).sum())
    return float(np.exp(total / count))
