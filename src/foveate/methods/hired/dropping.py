"""`foveate.drop_visual_tokens`: a model drops visual tokens until it is told to stop.

Hooks and nothing else: no code of transformers is replaced, no weight or setting changes, and with `remove()` the model
is what it was. What depends on a call stays in the call, so that threads do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from foveate.errors import InputError
from foveate.vision.attention_taps import tap_attention
from foveate.vision.towers import VisionTower

from .hosts import LlavaHost, VisualSequence, check_size
from .partitions import Partitions
from .strategies import LanguageStrategy, PictureTokens, Strategy, TowerFacts, make_strategy

_HANDLE = "_foveate_dropping"
"""Where a model has its handle: on itself, so that both go together."""


def drop_visual_tokens(
    model: Any, budget: float = 0.2, strategy: str | Strategy | LanguageStrategy = "hired", **options: Any
) -> Dropping:
    """Lets a model drop visual tokens between vision tower and language model, in place, until it is removed; with the
    strategies "fastv" and "sparsevlm" between layers of the language model.

    Afterwards `model(...)` and `model.generate(...)` are called as before, with what the processor gives: prompts are
    shortened to what is kept, and `generate` returns the prompt as it was given, followed by the new tokens. `forward`
    returns logits of the shortened prompt. With a budget of 1 nothing is dropped and the model runs as it is.

    Args:
        model: `LlavaForConditionalGeneration` (LLaVA-1.5), `LlavaNextForConditionalGeneration` (LLaVA-NeXT), an
            MG-LLaVA, or a predictor of one of them.
        budget: share of the visual tokens that is kept, above 0 and at most 1.
        strategy: a name of `foveate.methods.hired.strategies.STRATEGIES`, or a strategy, which has its own budget.
        options: of the strategy; of "hired" `preset` ("exact", "paper", "official") and those of `HiredConfig`.

    Returns:
        A handle: `remove()` undoes it, as does leaving a `with`.

    Raises:
        InputError: a budget or option out of range, a budget below a token for each partition, a model or vision tower
            that this does not work with, or one that drops already.

    Example:
        >>> with foveate.drop_visual_tokens(model, budget=0.2):
        ...     model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    """
    chosen = make_strategy(strategy, budget, **options)
    target = _model_of(model)
    if active_dropping(target) is not None:
        raise InputError("this model drops visual tokens already; call remove() of its handle first.")
    if isinstance(chosen, LanguageStrategy):
        from .language_dropping import LanguageDropping

        handle: Dropping = LanguageDropping(target, chosen)
    else:
        handle = (BridgeDropping if hasattr(target, "project_image") else LlavaDropping)(target, chosen)
    target.__dict__[_HANDLE] = handle
    return handle


def active_dropping(model: nn.Module) -> Dropping | None:
    """The handle of a model that drops visual tokens now; None of one that drops none."""
    return model.__dict__.get(_HANDLE)


def _model_of(model: Any) -> nn.Module:
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    inner = getattr(inner, "_orig_mod", inner)  # of torch.compile
    if not isinstance(inner, nn.Module):
        raise InputError(
            f"a {type(model).__name__} is no model that visual tokens could be dropped in; give a LLaVA of "
            "transformers, an MG-LLaVA, or what foveate.load gives."
        )
    return inner


class Dropping:
    """A model that drops visual tokens; what `drop_visual_tokens` returns.

    Attributes:
        model: the model, in place.
        strategy: how tokens are chosen.
    """

    def __init__(self, model: nn.Module, strategy: Strategy | LanguageStrategy) -> None:
        self.model: Any = model
        self.strategy: Any = strategy
        self._undo: list[Callable[[], None]] = []

    def remove(self) -> None:
        """Leaves the model as it was. Calling it again does nothing."""
        while self._undo:
            self._undo.pop()()
        if active_dropping(self.model) is self:
            del self.model.__dict__[_HANDLE]

    def __enter__(self) -> Dropping:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _replace(self, name: str, value: Any) -> None:
        """Puts a function in the place of a method of this one model."""
        if name in self.model.__dict__:
            before = self.model.__dict__[name]
            self._undo.append(lambda: self.model.__dict__.__setitem__(name, before))
        else:
            self._undo.append(lambda: self.model.__dict__.pop(name, None))
        self.model.__dict__[name] = value


class LlavaDropping(Dropping):
    """Of a LLaVA of transformers: a hook before `forward`, and `generate` with shortened prompts."""

    def __init__(self, model: nn.Module, strategy: Strategy) -> None:
        super().__init__(model, strategy)
        self.host = LlavaHost(model)
        if strategy.off:
            return
        self.host.check(strategy)
        handle = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        self._undo.append(handle.remove)
        self._generate = self.model.generate
        self._replace("generate", self.generate)

    def prepare(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        left_padding: bool | None = None,
    ) -> dict[str, Tensor]:
        """A prompt as the language model reads it, for a loop of one's own around `forward`.

        Args:
            input_ids, attention_mask, pixel_values, image_sizes: as the processor gives them.
            labels: (B, T) as `input_ids`.
            left_padding: as `LlavaHost.assemble` takes it.

        Returns:
            As `LlavaHost.assemble`: input_ids, inputs_embeds, attention_mask, position_ids, labels.

        Raises:
            InputError: inputs that do not fit each other.
        """
        visuals = self.host.encode(pixel_values, image_sizes, self.strategy)
        return self.host.assemble(
            input_ids,
            attention_mask,
            visuals,
            labels=labels,
            positions=self.strategy.positions,
            left_padding=left_padding,
        )

    def encode(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> list[VisualSequence]:
        """Pictures as the language model reads them; see `LlavaHost.encode`."""
        return self.host.encode(pixel_values, image_sizes, self.strategy)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pixel_values") is None and (len(args) < 2 or args[1] is None):
            return None
        call = self.host.named(args, kwargs)
        _refuse_unusual(call)
        inputs = self.prepare(
            call.pop("input_ids"),
            call.pop("attention_mask", None),
            pixel_values=call.pop("pixel_values"),
            image_sizes=call.pop("image_sizes", None),
            labels=call.pop("labels", None),
        )
        del inputs["input_ids"]
        call.pop("position_ids", None)  # of the prompt in full length
        return (), {**call, **inputs}

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **settings: Any) -> Any:
        """`generate` of the model, with what its processor gives.

        Returns:
            As `generate`: the prompt as it was given, then the new tokens.

        Raises:
            InputError: inputs that do not fit each other, or a way to generate that does not go with pictures whose
                tokens are dropped.
        """
        if settings.get("pixel_values") is None:
            return self._generate(inputs, *args, **settings)
        call = dict(settings)
        ids = inputs if inputs is not None else call.get("input_ids")
        call.pop("input_ids", None)
        _refuse_unusual({**call, "input_ids": ids})
        assert ids is not None
        config = args[0] if args else call.get("generation_config")
        for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
            if call.get(name) is not None or getattr(config, name, None) is not None:
                raise InputError(f"{name} does not go with dropped visual tokens; generate without it.")
        mask = call.pop("attention_mask", None)
        prompt = self.prepare(
            ids,
            self._padding(ids) if mask is None else mask,
            pixel_values=call.pop("pixel_values"),
            image_sizes=call.pop("image_sizes", None),
            left_padding=True,
        )
        if self.strategy.positions == "contiguous":
            del prompt["position_ids"]  # which are what `generate` counts itself
        call.pop("position_ids", None)
        dropped = ids.shape[1] - prompt["input_ids"].shape[1]
        for name in ("max_length", "min_length"):
            if call.get(name) is not None:  # of a prompt in full length
                call[name] = max(0, call[name] - dropped)
        output = self._generate(prompt.pop("input_ids"), *args, **prompt, **call)
        return _with_prompt(output, ids, ids.shape[1] - dropped)

    def _padding(self, ids: Tensor) -> Tensor | None:
        """(B, T) mask of a prompt that came without one, as transformers guesses it: from padding tokens."""
        config = self.model.generation_config
        padding, ends = config.pad_token_id, config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if padding is None or padding in ends or not (ids == padding).any():
            return None
        return (ids != padding).long()


def _refuse_unusual(call: Mapping[str, Any]) -> None:
    """Inputs whose visual tokens this does not know."""
    for name, reason in (
        ("inputs_embeds", "the text must come as input_ids, where the placeholders of the picture are seen"),
        ("mm_encoder_outputs", "pictures that are encoded already have all their tokens; give pixel_values"),
        ("pixel_values_videos", "videos are not pruned; give pictures"),
    ):
        if call.get(name) is not None:
            raise InputError(f"{name} does not go with dropped visual tokens: {reason}.")
    for name in ("vision_feature_layer", "vision_feature_select_strategy"):
        if call.get(name) is not None:
            raise InputError(f"{name} of a call does not go with dropped visual tokens; set it in the configuration.")
    if not isinstance(call.get("input_ids"), Tensor):
        raise InputError("a picture needs a text with its placeholder; pass input_ids as the processor gives them.")


def _with_prompt(output: Any, ids: Tensor, length: int) -> Any:
    """What `generate` returned, with the prompt that the caller gave in the place of its shortened one."""
    details: Any = output if isinstance(output, ModelOutput) else None
    sequences = output if details is None else details.sequences
    new = sequences[:, length:]
    prompt = ids.to(new.device).repeat_interleave(len(new) // len(ids), dim=0)
    whole = torch.cat([prompt, new], dim=1)
    if details is None:
        return whole
    details.sequences = whole
    return details


class BridgeDropping(Dropping):
    """Of a model that hands its fused image tokens to `project_image`, as an MG-LLaVA does (spec 2.2).

    What such a model has: `encode(...)`, in which `vision_tower`, a `VisionTower`, runs up to `config.vision_layer`,
    and which gives (V, N, C) tokens before the projector to `project_image`; that returns what the language model
    reads, and (V, N) bool, which of them were kept. A picture is one partition; object tokens stay and are not counted.
    """

    def __init__(self, model: nn.Module, strategy: Strategy) -> None:
        super().__init__(model, strategy)
        tower = self.model.vision_tower
        if not isinstance(tower, VisionTower):
            raise InputError(
                f"the vision tower of a {type(model).__name__} is a {type(tower).__name__}, not known here."
            )
        self.tower = tower
        state = self.model.config.vision_layer % (tower.num_layers + 1)
        # The tower runs no deeper than its features, so these are all the layers that there are to tap.
        self.facts = TowerFacts(state, state - 1, tower.has_cls)
        self.layout = Partitions(self.model.config.grid_size)
        if strategy.off:
            return
        if not self.model.projects_tokens:
            raise InputError(
                f"the fusion {self.model.config.fusion!r} mixes image tokens in its projector, so that none stands "
                "for a patch; nothing can be dropped."
            )
        strategy.layers(self.facts)
        check_size(strategy, self.layout.cells)
        self._local = threading.local()
        self._encode = self.model.encode
        self._project = self.model.project_image
        self._replace("encode", self._encode_tapped)
        self._replace("project_image", self._project_kept)

    def _encode_tapped(self, *args: Any, **kwargs: Any) -> Any:
        with tap_attention(self.tower, self.strategy.layers(self.facts)) as taps:
            self._local.taps = taps
            try:
                return self._encode(*args, **kwargs)
            finally:
                del self._local.taps

    def _project_kept(self, fused: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """(V, N, C) -> V tensors (n, D) of what is kept, and (V, N) bool."""
        taps = getattr(self._local, "taps", None)
        if taps is None:
            raise InputError(
                "these image tokens were not encoded by this call, so there is no attention to choose by; encode the "
                "pictures with the model, not from a cache."
            )
        rows, masks = [], []
        for number, features in enumerate(fused[:, None]):
            own = {layer: tap[number : number + 1] for layer, tap in taps.items()}
            picture = PictureTokens(features, self.facts, self.layout, own, None, self.model.image_projector)
            selection = self.strategy.select(picture)
            masks.append(selection.keep)
            rows.append(features[selection.keep] if selection.features is None else selection.features)
        projected = self.model.image_projector(torch.cat(rows))
        return projected.split([len(own) for own in rows]), torch.cat(masks)
