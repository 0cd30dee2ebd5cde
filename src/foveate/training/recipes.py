"""Recipes: YAML files that a person edits, checked against a pydantic schema before anything is loaded.

A recipe names its `method`; the method's `recipe` module names the class (`RECIPE`) that types the `data`, `model` and
`evaluation` sections. Every mistake - an unknown key at any depth, a wrong type, broken YAML - is a `RecipeError` of
one sentence that names the key and, for a misspelt one, the nearest valid name.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import reprlib
import stat
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from foveate.errors import InputError, RecipeError
from foveate.files import atomic_write

MAX_RECIPE_BYTES = 1_000_000
LARGEST = 10**9
"""What a count in a recipe may be at most: no machine does more, and larger ones overflow where torch takes them."""


def _expand_path(path: Path) -> Path:
    try:
        expanded = os.path.expandvars(path.expanduser())
    except RuntimeError:
        raise ValueError(
            f"the path {path} starts in the home folder of a user that this system does not have"
        ) from None
    unset = re.search(r"\$\{?(\w+)\}?", expanded)
    if unset:
        raise ValueError(f"the environment variable {unset.group(1)} of the path {path} is not set")
    return Path(expanded)


RecipePath = Annotated[Path, AfterValidator(_expand_path)]
"""A path in a recipe: `~` and `$NAME` are expanded; a relative one starts at the current directory."""


class RecipeSection(BaseModel):
    """A mapping of a recipe: unknown keys, NaN and infinity are errors, and the instance does not change any more."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainingSettings(RecipeSection):
    """What the loop itself needs; the same section in the recipe of every method."""

    max_steps: int | None = Field(
        None, gt=0, le=LARGEST, description="optimiser steps; with `epochs` too, whichever ends first"
    )
    epochs: float | None = Field(None, gt=0, le=1e6, description="passes over the training set")
    batch_size: int = Field(32, gt=0, le=LARGEST, description="samples per device and forward pass")
    gradient_accumulation: int = Field(1, gt=0, le=LARGEST, description="forward passes per optimiser step")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon for linear layers, AdamW for the rest")
    matrix_learning_rate: float = Field(0.02, ge=0, description="of Muon, where `optimizer` is muon")
    learning_rate: float = Field(1e-4, ge=0, description="the highest one, before schedule and warm-up")
    weight_decay: float = Field(0.05, ge=0, description="of parameters with two or more dimensions")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    warmup_steps: int = Field(0, ge=0, le=LARGEST, description="optimiser steps of linear rise to `learning_rate`")
    true_warmup: bool = Field(
        True, description="false: `warmup_steps` stands there without effect, as in DynRefer's published training"
    )
    schedule: Literal["constant", "cosine", "cosine_per_epoch", "linear"] = "cosine"
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate / `learning_rate`")
    max_grad_norm: float = Field(0.0, ge=0, description="gradient clipping by the global L2 norm; 0 is off")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    shard_frozen: bool = Field(
        False, description="split the frozen language model between the processes, which gather it layer by layer"
    )
    log_every: int = Field(50, gt=0, le=LARGEST, description="optimiser steps between two logged losses")
    save_every: int = Field(
        500, ge=0, le=LARGEST, description="optimiser steps between two checkpoints; 0 writes none to resume from"
    )
    keep_checkpoints: int = Field(2, gt=0, le=LARGEST, description="how many of the newest checkpoints stay")
    workers: int = Field(0, ge=0, le=256, description="data-loading processes")
    progress: bool = Field(True, description="a progress bar on a terminal; log lines otherwise")

    @model_validator(mode="after")
    def _some_end(self) -> TrainingSettings:
        if self.max_steps is None and self.epochs is None:
            raise ValueError("give max_steps or epochs, or training would never end")
        return self


class Recipe(RecipeSection):
    """What every recipe has; a method subclasses it with typed `data`, `model` and `evaluation` sections."""

    method: str
    seed: int = Field(0, ge=0, lt=2**32)
    output: RecipePath = Path("out")
    training: TrainingSettings

    def save(self, folder: str | Path) -> Path:
        """Write the resolved recipe as `recipe.yaml` into `folder`; `load_recipe` reads it back to an equal recipe."""
        path = Path(folder) / "recipe.yaml"
        with atomic_write(path) as file:
            yaml.safe_dump(self.model_dump(mode="json"), file, sort_keys=False, allow_unicode=True)
        return path


def load_recipe(path: str | Path, overrides: Sequence[str] = (), schema: type[Recipe] | None = None) -> Recipe:
    """Read and check a recipe.

    Args:
        path: YAML file.
        overrides: `section.key=value` each; the value is YAML, so `null`, `[0, 0.3]` and `1e-4` mean what they say.
        schema: the class to check against; by default the `RECIPE` of the method that the file names.

    Raises:
        RecipeError: the file is missing, empty, not YAML or not a mapping; an override is malformed; a key is unknown;
            a value has the wrong type or is out of range.
    """
    path = Path(path)
    data = _read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    if schema is None:
        schema = _schema_of(data.get("method"), path)
    try:
        # Through JSON, pydantic's strict mode takes lists for tuples and strings for paths, yet no "3" or true for 3.
        return schema.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_sentence(error, schema)}") from None
    except RecursionError:
        raise RecipeError(f"{path}: its keys are nested too deeply; a recipe has a few levels.") from None
    except ValueError as error:  # Python writes no whole number of more than some thousand digits
        raise RecipeError(f"{path}: a value cannot be used ({error}); give a smaller one.") from None


def recipe_module(method: str) -> types.ModuleType:
    """The `recipe` module of a method, from the registry in `foveate.methods`."""
    from foveate.methods import method_module

    return method_module(method, "recipe")


def _schema_of(method: Any, path: Path) -> type[Recipe]:
    if not isinstance(method, str) or not method:
        found = "is missing" if method is None else f"is {method!r}"
        raise RecipeError(f"{path}: the key 'method' {found}; name the method to train, such as 'method: dynrefer'.")
    try:
        return recipe_module(method).RECIPE
    except InputError as error:
        raise RecipeError(f"{path}: {error}") from None


class _RecipeLoader(yaml.SafeLoader):
    """YAML as people expect it: 1e-4 is a number, dates stay text, no key twice, no aliases, no tags."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"line {event.start_mark.line + 1} uses an alias; write the value out")
        if getattr(event, "tag", None) is not None:
            # Tags make bytes, sets and dates, which no recipe has, and fail in many ways on what they do not fit.
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1} has the tag {event.tag!r}; write the value without it"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1} has the key {key!r}, which is not a word")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1} gives the key {key!r} a second time")
            seen.add(key)
        return super().construct_mapping(node, deep)


_RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse_yaml(text: str) -> Any:
    try:
        # A subclass of SafeLoader: it builds plain values only.
        return yaml.load(text, Loader=_RecipeLoader)
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise RecipeError(f"{where}{error.problem or error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(" ".join(str(error).split())) from None
    except RecursionError:
        raise RecipeError("it is nested too deeply") from None
    except ValueError as error:
        raise RecipeError(str(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if "\0" in str(path):
        raise RecipeError(f"{str(path)!r} is not the name of a file; give the YAML file of a recipe.")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise RecipeError(f"{path} is {kind}; give the YAML file of a recipe.")
        if status.st_size > MAX_RECIPE_BYTES:
            raise RecipeError(
                f"{path} has {status.st_size:,} bytes, more than any recipe ({MAX_RECIPE_BYTES:,}); is it another file?"
            )
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}{_nearby_recipe(path)}.") from None
    except UnicodeError:
        raise RecipeError(f"{path} is not a text file in UTF-8; give the YAML file of a recipe.") from None
    except OSError as error:
        raise RecipeError(f"The recipe {reprlib.repr(str(path))} cannot be read: {error.strerror}.") from None
    try:
        data = _parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}.") from None
    if data is None:
        raise RecipeError(f"{path} is empty; a recipe has at least the keys 'method' and 'training'.")
    if not isinstance(data, dict):
        raise RecipeError(f"{path} holds a {_kind(data)}, not a mapping of keys to values as a recipe is.")
    return data


def _nearby_recipe(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor a folder {path.parent})"
    nearest = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
    return f"; did you mean {path.parent / nearest[0]}" if nearest else ""


def _apply_override(data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"The override {reprlib.repr(override)} is not of the form section.key=value, as in training.max_steps=200."
        )
    try:
        value = _parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"The value of the override {override!r} is not valid YAML: {error}.") from None
    section = data
    for depth, key in enumerate(keys[:-1], 1):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            inner = ".".join(keys[:depth])
            raise RecipeError(f"The override {override!r} sets a key inside {inner}, which is a {_kind(section)}.")
    section[keys[-1]] = value


def _kind(value: Any) -> str:
    names = {bool: "true/false value", int: "number", float: "number", str: "text", list: "list", dict: "mapping"}
    return names.get(type(value), type(value).__name__)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models that a field may hold, through Optional, Union, Annotated, list and dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _dotted_names(schema: type[BaseModel], prefix: str = "", depth: int = 0) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        if depth < 6:
            for model in _models_in(field.annotation):
                yield from _dotted_names(model, f"{prefix}{name}.", depth + 1)


def _suggestion(location: tuple[int | str, ...], schema: type[BaseModel]) -> str:
    """The nearest valid name for an unknown key: a sibling first, else the key of that name in another section."""
    models: list[type[BaseModel]] = [schema]
    for part in location[:-1]:
        fields = [model.model_fields[str(part)] for model in models if str(part) in model.model_fields]
        if fields:
            models = [inner for field in fields for inner in _models_in(field.annotation)]
    siblings = sorted({name for model in models for name in model.model_fields})
    name = str(location[-1])
    nearest = difflib.get_close_matches(name, siblings, 1, cutoff=0.6)
    if nearest:
        return f"did you mean {'.'.join([*map(str, location[:-1]), nearest[0]])!r}?"
    by_leaf: dict[str, str] = {}
    for dotted in _dotted_names(schema):
        by_leaf.setdefault(dotted.rpartition(".")[2], dotted)
    elsewhere = difflib.get_close_matches(name, by_leaf, 1, cutoff=0.8)
    if elsewhere:
        return f"did you mean {by_leaf[elsewhere[0]]!r}?"
    return f"valid keys there are {', '.join(siblings)}."


def _sentence(error: ValidationError, schema: type[BaseModel]) -> str:
    details = error.errors(include_url=False)
    # An unknown key is most often the reason why another one is missing: it comes first.
    detail = min(details, key=lambda item: item["type"] != "extra_forbidden")
    location = detail["loc"]
    dotted = ".".join(map(str, location)) or "the recipe"
    if detail["type"] == "extra_forbidden":
        return f"unknown key {dotted!r}; {_suggestion(location, schema)}"
    if detail["type"] == "missing":
        return f"the key {dotted!r} is missing; add it."
    if detail["type"] == "json_invalid":
        # json.dumps wrote it, so its form is right: pydantic stops at some depth and takes no half surrogate pair.
        if "recursion" in detail["msg"]:
            return "its keys are nested too deeply; a recipe has a few levels."
        return "a value holds text that is not Unicode (an undecodable file name, perhaps); rename what it names."
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = message.replace("a valid array", "a list").replace("an object", "a mapping")
    if detail["type"] == "value_error":
        return f"{dotted}: {message}."
    return f"{dotted} {message}, but it is {_shown(detail['input'])}."


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
