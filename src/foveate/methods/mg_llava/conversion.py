"""Official MG-LLaVA weights -> a folder of ours (spec 6, 2.7). Nothing is silently dropped and nothing may be missing.

A released file holds what was trained: fusion, projectors and the language model. The towers come from where the
authors took them: CLIP from its Hugging Face checkpoint, ConvNeXt from a file in open_clip's or timm's layout; the
configuration and the tokenizer of the language model from its own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.convnext.configuration_convnext import ConvNextConfig

from foveate import __version__
from foveate.checkpoints import find_checkpoint, read_config
from foveate.errors import CheckpointError, InputError
from foveate.files import atomic_folder
from foveate.language.lm import check_tokenizer, load_config, load_tokenizer
from foveate.language.official import (
    files_of,
    read_safetensors,
    read_tensors,
    refuse,
    sha256,
    write_json,
    write_safetensors,
)
from foveate.language.pretrained import first_line, load_complete
from foveate.language.templates import find_template
from foveate.methods import find_dtype
from foveate.vision.towers import load_tower

from .configuration import MGLlavaConfig
from .modeling import MGLlavaModel
from .processing import MGLlavaProcessor

MANIFEST_FILE = "manifest.json"
CLIP = "openai/clip-vit-large-patch14-336"
CONVNEXT = "timm/convnext_large_mlp.clip_laion2b_ft_soup_320"
"""Of the two sources of the trunk, the one without the text tower (spec 2.7)."""


@dataclass(frozen=True)
class Release:
    """A folder of the authors' repository: the language model it was trained from, and its prompt template."""

    language_model: str
    template: str


RELEASES: dict[str, Release] = {
    "Vicuna-7B": Release("lmsys/vicuna-7b-v1.5", "vicuna"),
    "Vicuna-13B": Release("lmsys/vicuna-13b-v1.5", "vicuna"),
    "Phi3-3.8B": Release("microsoft/Phi-3-mini-4k-instruct", "phi3_chat"),
    "llama3-8B": Release("meta-llama/Meta-Llama-3-8B-Instruct", "llama3_chat"),
    "Yi1.5-34B": Release("01-ai/Yi-1.5-34B-Chat", "qwen_chat"),
}
"""By name of the folder (spec 6)."""

WRAPPER = "_checkpoint_wrapped_module."
"""What gradient checkpointing leaves inside names."""

TRUNK = "visual.trunk."

# Key prefixes, theirs and ours; # is a number. The first that fits counts.
_OFFICIAL = (
    ("visual_encoder.vision_model.", "vision_tower.model."),
    ("visual_encoder.", "vision_tower.model."),
    ("projector.model.", "image_projector."),
    ("bbox_projector.model.", "box_projector."),
    ("fuse_module.vlm_uni_query_projector.", "fusion.query."),
    ("fuse_module.vlm_uni_aux_projector.", "fusion.key."),
    ("fuse_module.vlm_uni_key_projector.", "fusion.key."),
    ("fuse_module.vlm_uni_val_projector.", "fusion.value."),
    ("fuse_module.", "fusion."),
    ("llm.", "language_model."),
)
_CONVNEXT = (
    ("stem.0.", "embeddings.patch_embeddings."),
    ("stem.1.", "embeddings.layernorm."),
    ("stages.#.downsample.", "encoder.stages.#.downsampling_layer."),
    ("stages.#.blocks.#.conv_dw.", "encoder.stages.#.layers.#.dwconv."),
    ("stages.#.blocks.#.norm.", "encoder.stages.#.layers.#.layernorm."),
    ("stages.#.blocks.#.mlp.fc1.", "encoder.stages.#.layers.#.pwconv1."),
    ("stages.#.blocks.#.mlp.fc2.", "encoder.stages.#.layers.#.pwconv2."),
    ("stages.#.blocks.#.gamma", "encoder.stages.#.layers.#.layer_scale_parameter"),
)
_CONSTANTS = re.compile(r"^visual_encoder\.(vision_model\.)?embeddings\.position_ids$|\.rotary_emb\.inv_freq$")
"""What older files of CLIP and of language models repeat."""
_HEADS = re.compile(r"^(visual\.trunk\.(head|norm)\.|visual\.head\.|head\.|norm\.|norm_pre\.)")
"""What comes after the last stage: the norm and head of a classifier or of CLIP's embedding."""
_TEXT = re.compile(
    r"^(transformer|token_embedding|ln_final|text)\.|^(positional_embedding|text_projection|logit_scale)$"
)
"""The text tower of a whole open_clip model."""


def _compiled(pairs: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for theirs, ours in pairs:
        pieces = ours.split("#")
        numbered = "".join(f"{piece}\\{n}" for n, piece in enumerate(pieces[:-1], 1)) + pieces[-1]
        rules.append((re.compile("^" + re.escape(theirs).replace(r"\#", r"(\d+)")), numbered))
    return rules


_FROM_OFFICIAL, _FROM_CONVNEXT = _compiled(_OFFICIAL), _compiled(_CONVNEXT)


def _renamed(key: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, replacement in rules:
        renamed, count = pattern.subn(replacement, key)
        if count:
            return renamed
    return None


def translate(official: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[str], list[str]]:
    """Official tensors under our keys.

    Returns:
        Tensors; our key -> the official one; official keys that the model has no use for; and those that are not known.
    """
    converted: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    unused, unknown = [], []
    for key, value in official.items():
        plain = key.replace(WRAPPER, "")
        if plain.startswith("visual.") or plain.startswith(("stem.", "stages.")):
            if _HEADS.match(plain):
                unused.append(key)
                continue
            inner = _renamed(plain.removeprefix(TRUNK), _FROM_CONVNEXT)
            renamed = None if inner is None else f"high_res_tower.model.{inner}"
            if renamed is not None and ".pwconv" in renamed and value.ndim == 4:
                value = value.flatten(1)  # some files store the pointwise layers as 1x1 convolutions
        elif _HEADS.match(plain) or _TEXT.match(plain) or _CONSTANTS.search(plain):
            unused.append(key)
            continue
        else:
            renamed = _renamed(plain, _FROM_OFFICIAL)
        if renamed is None or renamed in converted:
            unknown.append(key)
        else:
            converted[renamed], names[renamed] = value, key
    return converted, names, unused, unknown


def convert_state_dict(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the official tensors of any part of the model.

    Args:
        official: keys as in the released files (`llm.*`, `projector.*`, `bbox_projector.*`, `fuse_module.*`), of CLIP
            (`visual_encoder.*`), of open_clip (`visual.trunk.*`) and of timm (`stem.*`, `stages.*`).
    Returns:
        The same values under the keys of `MGLlavaModel`; heads and text towers are left out.
    Raises:
        CheckpointError: keys that belong to no part of MG-LLaVA, all listed.
    """
    converted, _, _, unknown = translate(official)
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys are not MG-LLaVA's: {', '.join(sorted(unknown))}")
    return converted


# ---------------------------------------------------------------- public door

PARTS = {
    "low-resolution tower": "vision_tower.",
    "high-resolution trunk": "high_res_tower.",
    "fusion": "fusion.",
    "image projector": "image_projector.",
    "box projector": "box_projector.",
    "language model": "language_model.",
}


@dataclass(frozen=True)
class ConvertedPart:
    """A row of what was found: how many tensors and parameters a part of the model has, and from which source."""

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
        unused: source ("official", "clip", "convnext", "llm") -> its keys that the model has no use for.
        folder: what was written; None if the files were only compared.
    """

    config: MGLlavaConfig
    parts: tuple[ConvertedPart, ...]
    unused: dict[str, tuple[str, ...]]
    folder: Path | None = None


@dataclass
class _Source:
    """Tensors of one source under our keys, each a view of a file on the disk where it can be."""

    tensors: dict[str, Tensor]
    names: dict[str, str]
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def convert_checkpoint(
    official: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None,
    llm: str | os.PathLike[str] | None = None,
    clip: str | os.PathLike[str] = CLIP,
    convnext: str | os.PathLike[str] = CONVNEXT,
    template: str | None = None,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Write a folder that `foveate.load` and `transformers.AutoModel.from_pretrained` read, whole or not at all.

    The folder stands alone: towers and tokenizer are copied into it. `manifest.json` in it has the SHA-256 of every
    source file and of every written file, what each part was taken from, and the keys that were not used.

    Args:
        official: released file (`iter_21000.pth`), the folder that holds it, or a DeepSpeed folder with
            `mp_rank_00_model_states.pt`. Only tensors are read of it; code in it does not run. A file of stage 1,
            without a language model, gets that of `llm`.
        out: folder to write, new or empty; None only compares the files.
        llm: checkpoint of the language model: its configuration and tokenizer; by default that of `RELEASES`, by the
            folder's name.
        clip: checkpoint of the low-resolution tower.
        convnext: trunk in open_clip's or timm's layout: a file (.bin, .pt, .pth, .safetensors), or a folder or
            repository with a `model.safetensors`.
        template: prompt template; by default that of `RELEASES`, or what suits the language model.
        dtype: "float32", "bfloat16", "float16" or torch's own, of all weights; None keeps that of each tensor.
        max_shard_size: weights beyond it are split into several files.
        progress: called with (tensors done, tensors in all).

    Raises:
        InputError: a file is missing, `out` is not empty, or there is no such dtype or template.
        CheckpointError: a checkpoint is damaged, or keys are missing, unknown or of another shape (one error that lists
            them all), or numbers are not finite or do not fit `dtype`.
    """
    precision = find_dtype(dtype)
    path, release = _find_official(official)
    if llm is None and release is None:
        raise InputError(
            f"the folder of {os.fspath(official)} is none of {', '.join(RELEASES)}, so its language model is not "
            "known; name the checkpoint that it was trained from (--llm)."
        )
    language: str | os.PathLike[str] = llm if llm is not None else release.language_model  # pyright: ignore[reportOptionalMemberAccess]
    language_config = load_config(language)
    chosen = template or (release.template if release and llm is None else _suiting_template(language_config))
    find_template(chosen)

    sources = {"official": _translated(read_tensors(path, entries=("state_dict", "module"), skip_objects=True))}
    tower = load_tower(find_checkpoint(clip))
    sources["clip"] = _prefixed(tower.state_dict(), "vision_tower.", "")
    sources["convnext"] = _translated(_read_trunk(convnext), only="high_res_tower.")
    if not any(key.startswith("language_model.") for key in sources["official"].tensors):
        sources["llm"] = _prefixed(read_safetensors(find_checkpoint(language)), "language_model.", "")
    tensors: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name in reversed(sources):  # what is official is preferred
        tensors |= sources[name].tensors
        origin |= dict.fromkeys(sources[name].tensors, name)
    config = _configuration(tower.model.config, language_config, tensors, chosen)
    names = {key: sources[name].names[key] for key, name in origin.items()}
    _refuse_misfits(config, tensors, names, [key for source in sources.values() for key in source.unknown])
    unused = {
        name: tuple(sorted([*source.unused, *(theirs for key, theirs in source.names.items() if origin[key] != name)]))
        for name, source in sources.items()
    }
    parts = tuple(_table(tensors, origin))
    if out is None:
        return Conversion(config, parts, unused)

    tokenizer = load_tokenizer(find_checkpoint(language))
    check_tokenizer(tokenizer, config.language_config.vocab_size, f"the tokenizer of {os.fspath(language)}")
    processor = MGLlavaProcessor(tokenizer, config, image_mean=tower.mean, image_std=tower.std)
    with atomic_folder(out) as folder:
        kept = {tensor.dtype for tensor in tensors.values()}
        # A single dtype for what `AutoModel` loads by default: where they differ, the one that loses nothing.
        config.dtype = precision or (kept.pop() if len(kept) == 1 else torch.float32)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        total, done = 2 * len(tensors), 0

        def advance() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        _refuse_non_finite(tensors, names, precision, advance)
        write_safetensors(tensors, folder, precision, max_shard_size, advance)
        _write_manifest(folder, Conversion(config, parts, unused), {"official": path, "convnext": Path(convnext)})
    return Conversion(config, parts, unused, Path(out))


def _find_official(official: str | os.PathLike[str]) -> tuple[Path, Release | None]:
    """The file that holds the weights, and which release it is by the name of a folder above it."""
    path = Path(official).expanduser()
    names = {name.lower(): release for name, release in RELEASES.items()}
    release = next((names[part.lower()] for part in reversed(path.absolute().parts) if part.lower() in names), None)
    if path.is_file():
        return path, release
    if not path.is_dir():
        raise InputError(f"there is no file or folder {path}; give the downloaded iter_*.pth or its folder.")
    shards = sorted(path.rglob("mp_rank_00_model_states.pt"))
    found = shards or sorted(file for pattern in ("*.pth", "*.pt") for file in path.glob(pattern))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found[:5]) or "none"
        raise InputError(f"{path} must hold one .pth file of weights, and has {listed}; give the file itself.")
    return found[0], release


def _suiting_template(config: Any) -> str:
    """The template of the released models with this kind of language model."""
    by_type = {"phi3": "phi3_chat", "qwen2": "qwen_chat", "qwen3": "qwen_chat"}
    by_vocabulary = {32000: "vicuna", 128256: "llama3_chat", 64000: "qwen_chat"}
    found = by_type.get(config.model_type) or by_vocabulary.get(config.vocab_size)
    if found is None:
        raise InputError(
            f"no template is known for a {config.model_type!r} language model of {config.vocab_size} tokens; name one "
            "(--template)."
        )
    return found


def _translated(official: Mapping[str, Tensor], *, only: str = "") -> _Source:
    converted, names, unused, unknown = translate(official)
    others = [key for key in converted if not key.startswith(only)]
    for key in others:
        del converted[key]
        unused.append(names.pop(key))
    return _Source(converted, names, unused, unknown)


def _prefixed(state: Mapping[str, Tensor], ours: str, theirs: str) -> _Source:
    plain = {key: value for key, value in state.items() if not _CONSTANTS.search(key)}
    unused = [theirs + key for key in state if key not in plain]
    return _Source(
        {ours + key: value for key, value in plain.items()}, {ours + key: theirs + key for key in plain}, unused
    )


def _read_trunk(convnext: str | os.PathLike[str]) -> dict[str, Tensor]:
    path = Path(convnext).expanduser()
    if path.suffix in (".bin", ".pt", ".pth"):
        return read_tensors(path, entries=("state_dict", "model"))
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise InputError(f"there is no file {path}; give the downloaded weights of the ConvNeXt.")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or truncated ({first_line(error)}); copy or download it again."
            ) from None
    return read_safetensors(path if (path / "model.safetensors").is_file() else find_checkpoint(convnext))


# ---------------------------------------------------------------- sizes


def trunk_config(tensors: Mapping[str, Tensor]) -> ConvNextConfig:
    """The configuration of a ConvNeXt trunk, read off its tensors under our keys.

    Raises:
        CheckpointError: there is no trunk in them.
    """
    prefix = "high_res_tower.model."
    stem = tensors.get(f"{prefix}embeddings.patch_embeddings.weight")
    pattern = re.compile(re.escape(prefix) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.bias$")
    blocks = {tuple(map(int, found.groups())): len(tensors[key]) for key in tensors if (found := pattern.match(key))}
    if stem is None or not blocks:
        raise CheckpointError(
            "no ConvNeXt trunk was found (visual.trunk.stem.0.weight, ...); give its file in open_clip's or "
            "timm's layout."
        )
    stages = range(1 + max(stage for stage, _ in blocks))
    return ConvNextConfig(
        hidden_sizes=[
            max((width for (number, _), width in blocks.items() if number == stage), default=1) for stage in stages
        ],
        depths=[1 + max((layer for number, layer in blocks if number == stage), default=0) for stage in stages],
        num_channels=stem.shape[1],
        patch_size=stem.shape[2],
        hidden_act="gelu",
        # The released towers run in evaluation mode here; with the legacy flag their drop-path is 0.1 (spec 7.7).
        drop_path_rate=0.1,
    )


def load_trunk(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of a ConvNeXt: a checkpoint of transformers, or one in timm's or open_clip's layout.

    Returns:
        The configuration, and float32 weights under the keys of transformers' `ConvNextModel`, without its last norm.

    Raises:
        CheckpointError: it is neither.
    """
    if read_config(folder).get("model_type") == "convnext":
        from transformers import ConvNextModel

        # The pooled features' norm belongs to a classifier; some checkpoints have none, and we need none (spec 2.7).
        model = load_complete(ConvNextModel, str(folder), dtype=torch.float32, may_lack=("layernorm.",))
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith("layernorm.")}
        return model.config, weights
    converted = convert_state_dict(read_safetensors(folder))
    prefix = "high_res_tower.model."
    trunk = {key: value.float() for key, value in converted.items() if key.startswith(prefix)}
    if not trunk:
        raise CheckpointError(f"{folder} holds no ConvNeXt; give one of transformers, timm or open_clip.")
    return trunk_config(trunk), {key.removeprefix(prefix): value for key, value in trunk.items()}


def _configuration(clip: Any, language: Any, tensors: Mapping[str, Tensor], template: str) -> MGLlavaConfig:
    """What shapes show is read from them, the rest from the configurations of the parts."""
    trunk = trunk_config(tensors)
    low = clip.hidden_size

    def width(key: str, otherwise: int) -> int:
        return tensors[key].shape[-1] if key in tensors and tensors[key].ndim == 2 else otherwise

    seen = width("image_projector.0.weight", low)
    if "fusion.gate.0.weight" in tensors:
        fusion = "gate_concat" if seen == 2 * low else "conv_gate"
    elif "fusion.slow_conv.weight" in tensors:
        fusion = "conv_concat"
    elif any(key.startswith("fusion.query.") for key in tensors):
        fusion = "patch_info_mining"
    else:
        fusion = "channel_concat" if seen > low else "none"
    dims = list(trunk.hidden_sizes or ())
    pooled = width("box_projector.0.weight", sum(dims))
    has_boxes = any(key.startswith("box_projector.") for key in tensors)
    embedding = tensors.get("language_model.model.embed_tokens.weight")
    if embedding is not None and embedding.ndim == 2:
        language.vocab_size = embedding.shape[0]
    grid = clip.image_size // clip.patch_size
    try:
        return MGLlavaConfig(
            architectures=[MGLlavaModel.__name__],
            vision_config=_plain(clip),
            high_res_config=_plain(trunk),
            language_config=_plain(language),
            high_res_size=grid * trunk.patch_size * 2 ** (len(dims) - 1),
            fusion=fusion,
            objects="concat" if has_boxes else "none",
            object_levels="last" if pooled == dims[-1] else "all",
            template=template,
        )
    except Exception as error:  # ours, and transformers' own for each part
        raise CheckpointError(f"the sizes in these files do not make an MG-LLaVA: {first_line(error)}") from None


def _plain(config: Any) -> dict[str, Any]:
    """A part's configuration without what belongs to the checkpoint that it was in."""
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("dtype", "torch_dtype", "_name_or_path", "architectures", "transformers_version")
    }


def _official_name(key: str) -> str:
    """What our key is called in the file that it should be in."""
    for theirs, ours in (
        ("visual_encoder.vision_model.", "vision_tower.model."),
        ("fuse_module.", "fusion."),
        ("projector.model.", "image_projector."),
        ("bbox_projector.model.", "box_projector."),
        ("llm.", "language_model."),
    ):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    inner = _renamed(key.removeprefix("high_res_tower.model."), _compiled((ours, theirs) for theirs, ours in _CONVNEXT))
    return TRUNK + inner if inner else key


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _refuse_misfits(
    config: MGLlavaConfig, tensors: Mapping[str, Tensor], names: Mapping[str, str], unknown: Sequence[str]
) -> None:
    """One error with all that is missing, unknown, of another shape or no float, under the names of the files."""
    with torch.device("meta"):
        model = MGLlavaModel(config)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    problems = {
        "missing": [_official_name(key) for key in expected if key not in tensors and key not in tied],
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
    refuse("the files do not make an MG-LLaVA", problems, "check that they belong together and are whole")


def _refuse_non_finite(
    tensors: Mapping[str, Tensor], names: Mapping[str, str], dtype: torch.dtype | None, advance: Callable[[], None]
) -> None:
    broken, too_large = [], []
    for key, value in tensors.items():
        if not value.isfinite().all():
            broken.append(names[key])
        elif dtype is not None and not value.to(dtype).isfinite().all():
            too_large.append(names[key])
        advance()
    refuse("the weights are broken", {"with values that are not finite": broken}, "download the file again")
    refuse("the weights do not convert", {f"with values too large for {dtype}": too_large}, "use bfloat16 or float32")


def _table(tensors: Mapping[str, Tensor], origin: Mapping[str, str]) -> Iterable[ConvertedPart]:
    for name, prefix in PARTS.items():
        keys = [key for key in tensors if key.startswith(prefix)]
        if keys:
            yield ConvertedPart(
                name,
                ", ".join(sorted({origin[key] for key in keys})),
                len(keys),
                sum(math.prod(tensors[key].shape) for key in keys),
                ", ".join(sorted({str(tensors[key].dtype).removeprefix("torch.") for key in keys})),
            )


def _write_manifest(folder: Path, result: Conversion, sources: Mapping[str, Path]) -> None:
    # Names only: where the files lay on the machine that converted is nobody's business.
    files = {name: files_of(path) for name, path in sources.items() if path.exists()}
    write_json(
        folder / MANIFEST_FILE,
        {
            "foveate": __version__,
            "method": "mg_llava",
            "sources": {name: {path.name: sha256(path) for path in paths} for name, paths in files.items()},
            "files": {
                str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()
            },
            "parts": [asdict(part) for part in result.parts],
            "unused": result.unused,
        },
    )
