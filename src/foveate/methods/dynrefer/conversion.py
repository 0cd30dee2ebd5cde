"""Official DynRefer weights -> a folder of ours (spec 6). Nothing is silently dropped and nothing may be missing.

The released file holds the trained tensors only. The frozen parts come from where the authors took them: the vision
tower, the query tokens and the language model (FLAN-T5 or Vicuna) from a BLIP-2 checkpoint, the text encoder from
EVA-CLIP. The Vicuna of the authors is a later one than BLIP-2's, so that it may come from a folder of its own.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection

from foveate import __version__
from foveate.checkpoints import find_checkpoint, read_config
from foveate.data.records import read_json
from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_folder
from foveate.language.lm import check_tokenizer, load_config, load_text_encoder, load_tokenizer, untie_lm_head
from foveate.language.official import (
    files_of,
    read_tensors,
    refuse,
    sha256,
    weight_files,
    write_json,
    write_safetensors,
)
from foveate.language.pretrained import first_line
from foveate.language.words import COCO_CLASSES, read_lines
from foveate.methods import find_dtype

from .captioners import Captioner, DecoderOnly, EncoderDecoder, captioner_of, with_padding_row
from .configuration import DynReferConfig
from .modeling import AlignModule, DynReferModel
from .processing import Attribute, DynReferProcessor, Vocabulary, attribute_prompts

# Constants that the official model recomputes from its word lists at every start; we compute them from the vocabulary.
DERIVED = ("clip_embeds", "att_embeds", "ov_embeds", "Qformer.bert.embeddings.position_ids", "text.logit_scale")

MANIFEST_FILE = "manifest.json"

EVA_TEXT_HEADS = 12
"""Attention heads of the EVA-CLIP text encoder, which no shape shows (spec 2.8)."""

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
"""Whose tokenizer goes with `eva_clip_psz14.pt`, which brings none: any CLIP's (spec 2.8)."""

# Key prefixes, theirs and ours; # is the number of a layer. The first that fits counts, in either direction.
_OFFICIAL = (
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.encoder.layer.#.attention.self.", "qformer.encoder.layer.#.attention.attention."),
    ("Qformer.bert.encoder.layer.#.crossattention.self.", "qformer.encoder.layer.#.crossattention.attention."),
    ("Qformer.bert.", "qformer."),
    ("ln_vision.", "vision_tower.model.post_layernorm."),
    ("text.token_embedding.", "text_encoder.text_model.embeddings.token_embedding."),
    ("text.positional_embedding", "text_encoder.text_model.embeddings.position_embedding.weight"),
    ("text.ln_final.", "text_encoder.text_model.final_layer_norm."),
    ("text.transformer.resblocks.#.ln_1.", "text_encoder.text_model.encoder.layers.#.layer_norm1."),
    ("text.transformer.resblocks.#.ln_2.", "text_encoder.text_model.encoder.layers.#.layer_norm2."),
    ("text.transformer.resblocks.#.attn.out_proj.", "text_encoder.text_model.encoder.layers.#.self_attn.out_proj."),
    ("text.transformer.resblocks.#.mlp.c_fc.", "text_encoder.text_model.encoder.layers.#.mlp.fc1."),
    ("text.transformer.resblocks.#.mlp.c_proj.", "text_encoder.text_model.encoder.layers.#.mlp.fc2."),
)
_BLIP2 = (
    ("vision_model.", "vision_tower.model."),
    ("language_model.", "language_model."),
    ("query_tokens", "query_tokens"),
    ("qformer.", "qformer."),
)
_SAME = re.compile(
    r"^(cvem_align|cvem_mlp|tag_head|attr_head|(tag|attr)_(vision_proj|text_proj|fc)|(t5|llm)_proj)\."
    r"|^(cem_memory|attr_t|attr_b|query_tokens)$"
)
# What a file of the Vicuna variant may hold besides: the Q-Former's branch for texts, which is given none (spec 2.11),
# and the frequencies of positions that older versions of transformers saved.
_UNUSED_WITH_VICUNA = re.compile(
    r"^Qformer\.bert\.(embeddings\.(word|position)_embeddings"
    r"|encoder\.layer\.\d+\.(intermediate\.dense|output\.(dense|LayerNorm)))\.(weight|bias)$"
    r"|^llm_model\..*\.inv_freq$"
)
_IN_PROJECTION = re.compile(r"^text\.transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
_TEXT_PROJECTION = ("text.text_projection", "text_encoder.text_projection.weight")

# The parts that the released file does not hold, as prefixes of our keys.
_LANGUAGE = "language_model."
_FROZEN = ("vision_tower.", _LANGUAGE, "query_tokens")

_PARTS = {
    "vision tower": ("vision_tower.",),
    "align module": ("cvem_align.",),
    "fusion": ("cvem_mlp.",),
    "Q-Former": ("qformer.", "query_tokens"),
    "tag head": ("tag_",),
    "contrast head": ("attr_",),
    "text encoder": ("text_encoder.",),
    "captioner's input": ("t5_proj.", "llm_proj.", "cem_memory"),
    "language model": ("language_model.",),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ConvertedPart:
    """A row of what was found: how many tensors and parameters a part of the model has, and from which file."""

    name: str
    source: str
    tensors: int
    parameters: int
    dtype: str


@dataclass(frozen=True)
class Conversion:
    """What a conversion takes from where.

    Attributes:
        config: of the model, derived from the files.
        parts: of the model.
        unused: source ("official", "base", "language", "text") -> its keys that the model has no use for.
        folder: what was written; None if the files were only compared.
    """

    config: DynReferConfig
    parts: tuple[ConvertedPart, ...]
    unused: dict[str, tuple[str, ...]]
    folder: Path | None = None


# ---------------------------------------------------------------- keys


def _rules(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    return [(re.compile("^" + re.escape(old).replace(r"\#", r"(\d+)")), new.replace("#", r"\1")) for old, new in pairs]


class _Names:
    """Rules between the keys of files and ours, for one kind of captioner."""

    def __init__(self, kind: type[Captioner]) -> None:
        official = (*_OFFICIAL, (kind.official, "language_model."))
        blip2 = (*_BLIP2, ("language_projection.", f"{kind.projection}."))
        self.from_official, self.to_official = _rules(official), _rules((ours, theirs) for theirs, ours in official)
        self.from_blip2, self.to_blip2 = _rules(blip2), _rules((ours, theirs) for theirs, ours in blip2)


_NAMES: dict[type[Captioner], _Names] = {kind: _Names(kind) for kind in (EncoderDecoder, DecoderOnly)}


def _renamed(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, key)
        if count:
            return renamed
    return None


def _is_unused(key: str, kind: type[Captioner]) -> bool:
    return key in DERIVED or (kind is DecoderOnly and _UNUSED_WITH_VICUNA.match(key) is not None)


def _translate(
    official: Mapping[str, Tensor], kind: type[Captioner]
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Official tensors under our keys, our key -> the official one, and the keys that belong to no part."""
    converted: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unknown = []
    rules = _NAMES[kind]
    for key, value in official.items():
        if _is_unused(key, kind):
            continue
        projection = _IN_PROJECTION.match(key)
        renamed = key if _SAME.match(key) else _renamed(key, rules.from_official)
        if projection:
            layer, what = projection.groups()
            thirds = value.tensor_split(3) if value.ndim else [value] * 3
            for name, third in zip("qkv", thirds, strict=True):
                target = f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{name}_proj.{what}"
                converted[target], names[target] = third.clone(), key
        elif key == _TEXT_PROJECTION[0]:
            converted[_TEXT_PROJECTION[1]] = value.T.contiguous() if value.ndim == 2 else value
            names[_TEXT_PROJECTION[1]] = key
        # There and back again: a key that only looks like ours must not pass for the official one.
        elif renamed is not None and (renamed == key or _renamed(renamed, rules.to_official) == key):
            converted[renamed], names[renamed] = value, key
        else:
            unknown.append(key)
    return converted, names, unknown


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, split and transpose the official tensors of any part of the model.

    Args:
        official: keys as in the released files: `cvem_*`, `Qformer.*`, `tag_*`, `attr_*`, `t5_*` or `llm_*`, `text.*`,
            ...
    Returns:
        The same values under the keys of `DynReferModel`; `DERIVED` constants are left out, and with `llm_*` the
        Q-Former's branch for texts.
    Raises:
        CheckpointError: keys that belong to no part of DynRefer, all listed.
    """
    kind = DecoderOnly if any(key.startswith("llm_") for key in official) else EncoderDecoder
    converted, _, unknown = _translate(official, kind)
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are not DynRefer's: {', '.join(sorted(unknown))}")
    return converted


def load_converted(model: torch.nn.Module, state: Mapping[str, Tensor], *, allow_missing: Iterable[str] = ()) -> None:
    """Load converted weights; every key that is missing (outside the given prefixes) or unexpected is an error.

    A T5's output layer gets its own weights first: transformers ties it to the embedding when a model is freshly built.
    """
    language_model = getattr(model, "language_model", None)
    if language_model is not None and "language_model.lm_head.weight" in state:
        untie_lm_head(language_model)
        embedding = state.get("language_model.shared.weight")
        if embedding is not None:
            # The official file holds the embedding once; encoder and decoder refer to it.
            state = dict(state)
            for part in ("encoder", "decoder"):
                state.setdefault(f"language_model.{part}.embed_tokens.weight", embedding)
    try:
        result = model.load_state_dict(dict(state), strict=False)
    except RuntimeError as error:  # a tensor of another shape
        raise CheckpointError(f"the checkpoint does not fit this configuration: {first_line(error)}") from error
    missing = sorted(key for key in result.missing_keys if not key.startswith(tuple(allow_missing)))
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors ({', '.join(missing)}) "
            f"and has {len(result.unexpected_keys)} unknown ones ({', '.join(sorted(result.unexpected_keys))})"
        )


# ---------------------------------------------------------------- public doors


def check_checkpoint(
    official: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    text: str | os.PathLike[str],
    language: str | os.PathLike[str] | None = None,
    text_heads: int = EVA_TEXT_HEADS,
) -> Conversion:
    """Compare keys and shapes as `convert_checkpoint` does, and write nothing.

    Raises:
        InputError, CheckpointError: as `convert_checkpoint`.
    """
    return _plan(official, base, language, text, text_heads).conversion


def convert_checkpoint(
    official: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str],
    text: str | os.PathLike[str],
    tags: str | os.PathLike[str],
    out: str | os.PathLike[str],
    language: str | os.PathLike[str] | None = None,
    attributes: str | os.PathLike[str] | None = None,
    classes: str | os.PathLike[str] | None = None,
    text_tokenizer: str | os.PathLike[str] | None = None,
    text_heads: int = EVA_TEXT_HEADS,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a folder that `foveate.load` and `transformers.AutoModel.from_pretrained` read, whole or not at all.

    The folder stands alone: the frozen parts are copied into it. `manifest.json` in it has the SHA-256 of every source
    file and of every written file, what each part was taken from, and the keys that were not used.

    Args:
        official: released file (`vg1.2_5e.pth`, `refcocog_ft.pth`) or a bare state dict. Only tensors are read of it;
            code in it does not run. A frozen tensor that it holds is preferred to that of `base` or `text`.
        base: BLIP-2 checkpoint with a T5, or with a Vicuna for weights of that variant: a folder of safetensors, or a
            hub name (Salesforce/blip2-flan-t5-xl).
        text: EVA-CLIP file (`eva_clip_psz14.pt`), or a CLIP checkpoint in Hugging Face layout.
        tags: text file with a tag a line (`ram_tag_list.txt`).
        out: folder to write; new or empty.
        language: language model and tokenizer in place of the base's, of the same kind: a folder of safetensors or a
            hub name. The authors' Vicuna is version 1.5, BLIP-2's an earlier one (spec 2.11).
        attributes: `ovad2000.json`, whose attributes get the prompts of spec 2.9; without it the model has none.
        classes: text file with a class a line; COCO's 80 by default.
        text_tokenizer: checkpoint with the CLIP tokenizer; by default that of `text`, or `CLIP_TOKENIZER` for a file.
        text_heads: attention heads of the text encoder in an EVA-CLIP file.
        dtype: "float32", "bfloat16", "float16" or torch's own, of all weights; None keeps that of each tensor.
        max_shard_size: weights beyond it are split into several files.
        progress: called with (tensors done, tensors in all).

    Raises:
        InputError: a file is missing or of another format, `out` is not empty, or there is no such dtype.
        CheckpointError: a checkpoint is damaged or holds more than tensors, or keys are missing, unknown or of another
            shape (one error that lists them all), or numbers are not finite or do not fit `dtype`.
    """
    precision = find_dtype(dtype)
    with atomic_folder(out) as folder:
        tag_names = read_lines(tags, "tag")
        class_names = COCO_CLASSES if classes is None else read_lines(classes, "class")
        groups = () if attributes is None else read_attributes(attributes)
        plan = _plan(official, base, language, text, text_heads)
        if plan.tag_count not in (None, len(tag_names)):
            raise InputError(
                f"{os.fspath(tags)} has {len(tag_names)} tags, but {os.fspath(official)} was trained with "
                f"{plan.tag_count}; give the list that belongs to it."
            )
        lists = [str(Path(path).name) for path in (tags, attributes, classes) if path is not None]
        vocabulary = Vocabulary(tag_names, groups, class_names, ", ".join(lists))
        processor = _processor(plan, vocabulary, base if language is None else language, text, text_tokenizer)

        config, tensors = plan.conversion.config, plan.tensors
        kept = {tensor.dtype for tensor in tensors.values()}
        # A single dtype for what `AutoModel` loads by default: where they differ, the one that loses nothing.
        config.dtype = precision or (kept.pop() if len(kept) == 1 else torch.float32)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        done = _Steps(2 * len(tensors), progress)
        _refuse_non_finite(plan, precision, done)
        write_safetensors(tensors, folder, precision, max_shard_size, done.advance)
        sources = {
            "official": [official],
            "base": files_of(find_checkpoint(base)),
            "language": [] if language is None else files_of(find_checkpoint(language)),
            "text": files_of(Path(text).expanduser() if _is_text_file(text) else find_checkpoint(text)),
            "lists": [path for path in (tags, attributes, classes) if path is not None],
        }
        found = {name: [Path(path) for path in paths] for name, paths in sources.items() if paths}
        _write_manifest(folder, plan, found)
    return Conversion(config, plan.conversion.parts, plan.conversion.unused, Path(out))


def convert_text_encoder(
    text: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text_tokenizer: str | os.PathLike[str] = CLIP_TOKENIZER,
    text_heads: int = EVA_TEXT_HEADS,
) -> Path:
    """Write the text encoder of `eva_clip_psz14.pt` as a CLIP text checkpoint, which a training recipe names as its
    base model `text` (spec 2.8).

    Args:
        text: EVA-CLIP file, or a CLIP checkpoint, of which the text part is taken.
        out: folder to write; new or empty.
        text_tokenizer, text_heads: as in `convert_checkpoint`.
    Raises:
        InputError, CheckpointError: as in `convert_checkpoint`.
    """
    source = _read_text(text, text_heads)
    with torch.device("meta"):
        model = CLIPTextModelWithProjection(source.config)
    mine = "text_encoder."
    problems = {
        "missing": [
            _source_key(mine + key, EncoderDecoder) for key in model.state_dict() if mine + key not in source.tensors
        ],
        "unknown": source.unknown,
        "of another shape": [
            source.names[mine + key]
            for key, value in model.state_dict().items()
            if mine + key in source.tensors and source.tensors[mine + key].shape != value.shape
        ],
    }
    refuse(f"{os.fspath(text)} does not make a text encoder", problems, "check that the file is whole")
    weights = {key.removeprefix(mine): value for key, value in source.tensors.items()}
    with atomic_folder(out) as folder:
        model.load_state_dict(weights, assign=True)
        model.eval().save_pretrained(folder)
        load_tokenizer(text_tokenizer).save_pretrained(folder)
    return Path(out)


def initialise_from_blip2(model: DynReferModel, base: str | os.PathLike[str]) -> DynReferModel:
    """Start the region encoder from BLIP-2, as the paper's training does (spec 2.5).

    Fills the Q-Former (stage-2 weights; cross-attention in the even layers, no text branch), the query tokens and the
    projection into the language model. The fusion, the align module and the heads stay fresh; the frozen parts come
    from `DynReferModel.load_base_models`.

    Args:
        model: changed in place.
        base: BLIP-2 checkpoint, as in `convert_checkpoint`.
    Raises:
        CheckpointError: the checkpoint cannot be read, lacks a tensor of these, or has it in another shape.
    """
    wanted = ("qformer.", "query_tokens", f"{model.captioner.projection}.")
    state = {key: value for key, value in _read_blip2(base).tensors.items() if key.startswith(wanted)}
    others = tuple(key for key in model.state_dict() if not key.startswith(wanted))
    load_converted(model, state, allow_missing=others)
    return model


def read_attributes(path: str | os.PathLike[str]) -> tuple[Attribute, ...]:
    """The attributes of an OVAD file (`ovad2000.json`) in their order, with the prompts of spec 2.9.

    Raises:
        InputError: the file is missing or not OVAD's.
    """
    path = Path(path)
    content = read_json(path, dict)
    entries = content.get("attributes", content.get("attrs"))
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} has no list of attributes under 'attributes' or 'attrs'; give OVAD's ovad2000.json.")
    groups = []
    for index, entry in enumerate(entries):
        name, kind = (entry.get("name"), entry.get("is_has_att")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or kind not in ("is", "has"):
            raise InputError(
                f"{path}: attribute {index} needs a 'name' and 'is_has_att' of 'is' or 'has', and is {entry!r}; "
                "give OVAD's ovad2000.json."
            )
        groups.append(Attribute(name, tuple(attribute_prompts(name, kind))))
    return tuple(groups)


# ---------------------------------------------------------------- reading


@dataclass
class _Source:
    """Tensors of a file under our keys, each a view of the file on the disk."""

    tensors: dict[str, Tensor]
    names: dict[str, str]  # our key -> the file's
    unknown: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    config: Any = None


@dataclass
class _Plan:
    conversion: Conversion
    tensors: dict[str, Tensor]
    names: dict[str, str]
    tag_count: int | None  # of the list that the official file was trained with, where it says so


def _plan(
    official: str | os.PathLike[str],
    base: str | os.PathLike[str],
    language: str | os.PathLike[str] | None,
    text: str | os.PathLike[str],
    text_heads: int,
) -> _Plan:
    """Which tensor comes from where, and the configuration that they make."""
    raw = read_tensors(official)
    blip2 = _read_blip2(base)
    # What comes later is preferred.
    sources = {"base": blip2}
    if language is not None:
        sources["language"] = _read_language_model(language, blip2.config.text_config, base)
    language_config = blip2.config.text_config if language is None else sources["language"].config
    kind = captioner_of(language_config)
    sources["text"] = _read_text(text, text_heads)
    sources["official"] = _Source(*_translate(raw, kind), unused=[key for key in raw if _is_unused(key, kind)])
    frozen = _FROZEN if language is None else tuple(prefix for prefix in _FROZEN if prefix != _LANGUAGE)
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, source in sources.items():
        taken = {key: value for key, value in source.tensors.items() if name != "base" or key.startswith(frozen)}
        tensors |= taken
        origin |= dict.fromkeys(taken, name)
    for alias in (_LANGUAGE + key for key in kind.repeated):
        if alias in tensors:  # what T5 files repeat under these names is one tensor
            value, name = tensors.pop(alias), origin.pop(alias)
            if "language_model.shared.weight" not in tensors:
                tensors["language_model.shared.weight"], origin["language_model.shared.weight"] = value, name
    if kind is DecoderOnly:
        tokenizer, own_size = load_tokenizer(find_checkpoint(language or base)), language_config.vocab_size
        check_tokenizer(tokenizer, own_size, f"the tokenizer of {os.fspath(language or base)}")
        kind.prepare_config(language_config, kind.prepare_tokenizer(tokenizer))
        if language_config.vocab_size > own_size:
            mine = {key.removeprefix(_LANGUAGE): value for key, value in tensors.items() if key.startswith(_LANGUAGE)}
            grown = with_padding_row(mine, kind, language_config.vocab_size)
            tensors |= {_LANGUAGE + key: value for key, value in grown.items()}

    config = _configuration(blip2.config, language_config, sources["text"].config, tensors)
    names = {key: sources[name].names[key] for key, name in origin.items()}
    _refuse_misfits(config, tensors, names, [key for source in sources.values() for key in source.unknown])
    unused = {
        name: tuple(
            sorted([*source.unused, *(theirs for key, theirs in source.names.items() if origin.get(key) != name)])
        )
        for name, source in sources.items()
    }
    derived = raw.get("clip_embeds")
    tag_count = len(derived) if derived is not None and derived.ndim else None
    return _Plan(Conversion(config, tuple(_table(tensors, origin)), unused), tensors, names, tag_count)


def _read_blip2(base: str | os.PathLike[str]) -> _Source:
    """A BLIP-2 checkpoint: its configuration, and its tensors under our keys."""
    folder = find_checkpoint(base)
    model_type = read_config(folder).get("model_type")
    if model_type != "blip-2":
        raise CheckpointError(
            f"{os.fspath(base)} has model_type {model_type!r}; the base must be a BLIP-2 checkpoint, such as "
            "Salesforce/blip2-flan-t5-xl."
        )
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises its own
        raise CheckpointError(f"the config of {os.fspath(base)} cannot be used: {first_line(error)}") from None
    kind = captioner_of(config.text_config)
    if kind is EncoderDecoder and config.text_config.model_type != "t5":
        raise CheckpointError(
            f"the language model of {os.fspath(base)} is a {config.text_config.model_type!r}; DynRefer needs a T5, "
            "such as that of Salesforce/blip2-flan-t5-xl, or a decoder-only model such as Vicuna."
        )
    return _read_weights(folder, config, lambda key: _renamed(key, _NAMES[kind].from_blip2))


def _read_language_model(language: str | os.PathLike[str], expected: Any, base: str | os.PathLike[str]) -> _Source:
    """A language model's own checkpoint, of the kind that the base has."""
    folder = find_checkpoint(language)
    config = load_config(folder)
    if not hasattr(config, "vocab_size") or captioner_of(config) is not captioner_of(expected):
        raise CheckpointError(
            f"{os.fspath(language)} is a {config.model_type!r}, but the language model of {os.fspath(base)} a "
            f"{expected.model_type!r}; give a language model of the same kind."
        )
    return _read_weights(folder, config, lambda key: _LANGUAGE + key)


def _read_weights(folder: Path, config: Any, rename: Callable[[str], str | None]) -> _Source:
    """The safetensors of a folder under our keys; what `rename` has no key for is not used."""
    source = _Source({}, {}, config=config)
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    # Older versions of transformers saved the frequencies of rotary positions.
                    renamed = None if key.endswith("rotary_emb.inv_freq") else rename(key)
                    if renamed is None:
                        source.unused.append(key)
                    else:
                        source.tensors[renamed], source.names[renamed] = opened.get_tensor(key), key
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} is damaged or truncated ({first_line(error)}); copy or download it again."
            ) from None
    return source


def _is_text_file(text: str | os.PathLike[str]) -> bool:
    path = Path(text).expanduser()
    return path.is_file() or path.suffix in (".pt", ".pth")


def _read_text(text: str | os.PathLike[str], heads: int) -> _Source:
    """The text encoder of an EVA-CLIP file or of a CLIP checkpoint folder."""
    if not _is_text_file(text):
        model = load_text_encoder(find_checkpoint(text))
        tensors = {f"text_encoder.{key}": value for key, value in model.state_dict().items()}
        return _Source(tensors, {key: key.removeprefix("text_encoder.") for key in tensors}, config=model.config)
    content = read_tensors(text)
    mine = {key: value for key, value in content.items() if key.startswith("text.")}
    source = _Source(*_translate(mine, EncoderDecoder))
    source.unused = [key for key in content if key not in mine or key in DERIVED]
    blocks = "text_encoder.text_model.encoder.layers."
    vocabulary, width = _shape(
        source.tensors, "text_encoder.text_model.embeddings.token_embedding.weight", (49408, 768)
    )
    if width % heads:
        raise CheckpointError(
            f"the text encoder of {os.fspath(text)} is {width} wide, which {heads} heads do not divide."
        )
    source.config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=_shape(source.tensors, f"{blocks}0.mlp.fc1.weight", (4 * width, width))[0],
        num_hidden_layers=_depth(source.tensors, blocks),
        num_attention_heads=heads,
        max_position_embeddings=_shape(
            source.tensors, "text_encoder.text_model.embeddings.position_embedding.weight", (77, width)
        )[0],
        projection_dim=_shape(source.tensors, _TEXT_PROJECTION[1], (1024, width))[0],
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        # The official code pools at the highest token id of a text, which in CLIP's vocabulary is the end.
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=0,
    )
    return source


# ---------------------------------------------------------------- sizes


def _shape(tensors: Mapping[str, Tensor], key: str, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Shape of a matrix; where it is missing or none, the released model's, and the comparison will name it."""
    shape = tuple(tensors[key].shape) if key in tensors else ()
    return shape if len(shape) == 2 and all(shape) else otherwise


def _depth(tensors: Iterable[str], *prefixes: str) -> int:
    """Number of layers, by the highest number after the prefixes."""
    numbers = [
        key.removeprefix(prefix).split(".")[0] for key in tensors for prefix in prefixes if key.startswith(prefix)
    ]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)


def _configuration(blip2: Any, language: Any, text: Any, tensors: Mapping[str, Tensor]) -> DynReferConfig:
    """What shapes show is read from them, the rest from the base's configuration.

    The heads' number of attention heads is in neither and stays the released model's.
    """
    width = blip2.vision_config.hidden_size
    views = round(_shape(tensors, "cvem_mlp.0.weight", (width, 3 * width))[1] / width)
    # One misshapen tensor must not make all others look misshapen: the majority tells the size.
    head_sizes = Counter(
        tensors[key].shape[0]
        for head in ("tag", "attr")
        for key in (
            f"{head}_vision_proj.bias",
            f"{head}_text_proj.bias",
            f"{head}_head.encoder.layer.0.output.dense.bias",
        )
        if key in tensors and tensors[key].ndim
    )
    offsets = {
        tensors[key].shape[0]
        for key in ("cvem_align.offset_mask.bias", "cvem_align.offset_mask.weight")
        if key in tensors and tensors[key].ndim
    }
    groups = [  # the inverse of what `AlignModule` makes of its groups
        count
        for count in range(1, width + 1)
        if width % count == 0 and math.ceil(3 * count * AlignModule.taps / 8) * 8 in offsets
    ]
    queries = tensors.get("query_tokens")
    try:
        config = DynReferConfig(
            architectures=[DynReferModel.__name__],
            vision_config=_plain(blip2.vision_config),
            text_config=_plain(text),
            qformer_config={**_plain(blip2.qformer_config), "use_qformer_text_input": False},
            # BLIP-2 runs FLAN-T5 with the exact GELU (spec 2.10).
            language_config=_plain(language) | ({"dense_act_fn": "gelu"} if language.is_encoder_decoder else {}),
            num_views=max(views, 1),
            image_size=blip2.vision_config.image_size,
            num_query_tokens=queries.shape[1] if queries is not None and queries.ndim == 3 else blip2.num_query_tokens,
            align_groups=groups[0] if groups else DynReferConfig.align_groups,
            head_size=head_sizes.most_common(1)[0][0] if head_sizes else DynReferConfig.head_size,
            head_layers=_depth(tensors, "tag_head.encoder.layer.", "attr_head.encoder.layer."),
        )
    except Exception as error:  # ours, and transformers' own for each part
        raise CheckpointError(f"the sizes in these files do not make a DynRefer: {first_line(error)}") from None
    # transformers says of every T5 that its output layer is the embedding; that it scales its outputs tells the truth.
    language = config.language_config
    tied = language.scale_decoder_outputs if language.is_encoder_decoder else language.tie_word_embeddings
    language.tie_word_embeddings = tied and "language_model.lm_head.weight" not in tensors
    return config


def _plain(config: Any) -> dict[str, Any]:
    """A part's configuration without what belongs to the checkpoint that it was in."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version")
    }


def _source_key(key: str, kind: type[Captioner]) -> str:
    """What our key is called in the file that it should be in."""
    if key.startswith(_FROZEN):
        return _renamed(key, _NAMES[kind].to_blip2) or key
    if projection := re.fullmatch(
        r"text_encoder\.text_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(\w+)", key
    ):
        return f"text.transformer.resblocks.{projection[1]}.attn.in_proj_{projection[2]}"
    return _TEXT_PROJECTION[0] if key == _TEXT_PROJECTION[1] else _renamed(key, _NAMES[kind].to_official) or key


def _refuse_misfits(
    config: DynReferConfig, tensors: Mapping[str, Tensor], names: Mapping[str, str], unknown: Sequence[str]
) -> None:
    """One error with all that is missing, unknown, of another shape or no float, under the names of the files."""
    with torch.device("meta"):
        expected = {key: value.shape for key, value in DynReferModel(config).state_dict().items()}
    for key in config.captioner.repeated:
        del expected[_LANGUAGE + key]
    if config.language_config.tie_word_embeddings:
        expected.pop("language_model.lm_head.weight")
    problems = {
        "missing": [_source_key(key, config.captioner) for key in expected if key not in tensors],
        "unknown": [*unknown, *(names[key] for key in tensors if key not in expected)],
        "of another shape": [
            f"{names[key]} {tuple(value.shape)} for {tuple(expected[key])}"
            for key, value in tensors.items()
            if key in expected and value.shape != expected[key]
        ],
        "not dense float16, bfloat16 or float32": [
            f"{names[key]} {value.dtype}"
            for key, value in tensors.items()
            if value.dtype not in _DTYPES or value.layout is not torch.strided
        ],
    }
    refuse("the files do not make a DynRefer", problems, "check that they belong together and are whole")


def _table(tensors: Mapping[str, Tensor], origin: Mapping[str, str]) -> Iterable[ConvertedPart]:
    for name, prefixes in _PARTS.items():
        keys = [key for key in tensors if key.startswith(prefixes)]
        yield ConvertedPart(
            name,
            ", ".join(sorted({origin[key] for key in keys})),
            len(keys),
            sum(math.prod(tensors[key].shape) for key in keys),
            ", ".join(sorted({str(tensors[key].dtype).removeprefix("torch.") for key in keys})),
        )


# ---------------------------------------------------------------- words


def _processor(
    plan: _Plan,
    vocabulary: Vocabulary,
    language: str | os.PathLike[str],
    text: str | os.PathLike[str],
    text_tokenizer: str | os.PathLike[str] | None,
) -> DynReferProcessor:
    """The vocabulary with the two tokenizers, each checked against the embedding that reads its ids."""
    config: Any = plan.conversion.config
    own = CLIP_TOKENIZER if _is_text_file(text) else text
    # A hub name is not resolved to a folder of it here: the tokenizer's few files are all that is downloaded.
    tokenizers = {
        "text": (load_tokenizer(text_tokenizer or own), config.text_config.vocab_size),
        "language": (load_tokenizer(find_checkpoint(language)), config.language_config.vocab_size),
    }
    for part, (tokenizer, size) in tokenizers.items():
        if len(tokenizer) > size:
            raise InputError(
                f"the {part} tokenizer knows {len(tokenizer)} tokens and the {part} model {size}; give the tokenizer "
                "that belongs to it."
            )
    tokenizer = tokenizers["text"][0]
    if _is_text_file(text) and tokenizer.eos_token_id != config.text_config.eos_token_id:
        raise InputError(
            f"the text tokenizer ends a text with token {tokenizer.eos_token_id} and the text encoder with "
            f"{config.text_config.eos_token_id}; give a CLIP tokenizer as the text tokenizer."
        )
    return DynReferProcessor(
        vocabulary,
        tokenizer,
        tokenizers["language"][0],
        max_text_tokens=config.max_text_tokens,
        decoder_only=config.captioner is DecoderOnly,
    )


# ---------------------------------------------------------------- writing


class _Steps:
    """Counts what is done for a caller's `progress`."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def advance(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _refuse_non_finite(plan: _Plan, dtype: torch.dtype | None, steps: _Steps) -> None:
    broken, too_large = [], []
    for key, value in plan.tensors.items():
        if not value.isfinite().all():
            broken.append(plan.names[key])
        elif dtype is not None and not value.to(dtype).isfinite().all():
            too_large.append(plan.names[key])
        steps.advance()
    refuse("the weights are broken", {"with values that are not finite": broken}, "download the file again")
    refuse("the weights do not convert", {f"with values too large for {dtype}": too_large}, "use bfloat16 or float32")


def _write_manifest(folder: Path, plan: _Plan, sources: Mapping[str, Sequence[Path]]) -> None:
    # Names only: where the files lay on the machine that converted is nobody's business.
    write_json(
        folder / MANIFEST_FILE,
        {
            "foveate": __version__,
            "method": "dynrefer",
            "sources": {name: {path.name: sha256(path) for path in paths} for name, paths in sources.items()},
            "files": {
                str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
            },
            "parts": [asdict(part) for part in plan.conversion.parts],
            "unused": plan.conversion.unused,
        },
    )
