"""Dropping visual tokens between layers of a language model of transformers, by hooks on its layers (spec 2.8, 4.4).

The layers up to a pruning layer read the whole prompt, those behind it what is left: fewer states, keys and values. So
the key-value cache has another length in each part, and the causal mask and the rotary angles of a layer are those of
its own tokens. Rows of a batch that keep different numbers are padded on the left again.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.language.templates import VIDEO_ID

from .allocation import token_budget
from .dropping import Dropping
from .hosts import LlavaHost, VisualSequence
from .partitions import Partitions
from .strategies.language import LanguageStrategy, LanguageTokens


@dataclass(frozen=True)
class _Stage:
    """The tokens that are left behind a layer.

    Attributes:
        alive: (B, n) bool, False where padded.
        visual: (B, n) bool.
        raters: (B, n) bool.
        angles: cosines and sines (B, n, d) of the tokens' positions, while the prompt is read.
    """

    alive: Tensor
    visual: Tensor
    raters: Tensor
    angles: tuple[Tensor, Tensor] | None = None


@dataclass
class _Read:
    """What has been read into a cache: the length of the prompt, and the stages behind the pruning layers."""

    length: int
    stages: dict[int, _Stage] = field(default_factory=dict)


@dataclass
class _Pass:
    """One call of the decoder.

    Attributes:
        read: of the prompt, which is being read if `prefill`.
        mask: (B, tokens so far) 1 and 0, as the caller gave it; None for no padding.
        past: tokens in the cache of the first layer before the call.
        new: tokens of the call.
        masks: of the stages, made once for all layers behind one.
    """

    read: _Read
    prefill: bool
    mask: Tensor | None
    past: int
    new: int
    first: _Stage
    budgets: Sequence[int] = ()
    totals: Sequence[int] = ()
    query: Tensor | None = None
    keys: Tensor | None = None
    masks: dict[int, Tensor | None] = field(default_factory=dict)

    def stage(self, layer: int) -> tuple[int, _Stage] | None:
        """The last stage that begins before this layer."""
        below = [number for number in self.read.stages if number < layer]
        return (max(below), self.read.stages[max(below)]) if below else None


class DecoderPruning:
    """Hooks on the layers of a decoder (`LlamaModel`, `MistralModel`, `Qwen2Model`, ...).

    Whoever reads a prompt says before where its visual tokens are, with `expect`, in the same thread.

    Args:
        decoder: has `layers`, whose `self_attn` has `q_proj` and `k_proj` and rotates both.
        strategy: what is dropped, and after which layers.

    Raises:
        InputError: a decoder of another kind, or with too few layers.
    """

    def __init__(self, decoder: Any, strategy: LanguageStrategy) -> None:
        self.decoder = decoder
        self.strategy = strategy
        self.layers: list[Any] = list(_layers(decoder))
        self.pruned = strategy.prune_layers(len(self.layers))
        self._rotate = {layer: _rotation(self.layers[layer].self_attn) for layer in self.pruned}
        self._local = threading.local()
        self._caches: WeakKeyDictionary[Any, _Read] = WeakKeyDictionary()
        self._handles = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
        ]
        for number in range(min(self.pruned) + 1, len(self.layers)):
            hook = self.layers[number].register_forward_pre_hook(self._before(number), with_kwargs=True)
            self._handles.append(hook)
        for number in self.pruned:
            attention = self.layers[number].self_attn
            self._handles += [
                attention.q_proj.register_forward_hook(self._tap("query")),
                attention.k_proj.register_forward_hook(self._tap("keys")),
                self.layers[number].register_forward_hook(self._after(number), with_kwargs=True),
            ]

    def remove(self) -> None:
        """Takes the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    def expect(self, visual: Tensor | None, budgets: Sequence[int] = ()) -> None:
        """Where the visual tokens of the next prompt are that this thread reads.

        Args:
            visual: (B, n) bool; None for no prompt with a picture.
            budgets: of each row, how many may stay.
        """
        self._local.expected = None if visual is None or not visual.any() else (visual, list(budgets))

    # ---------------------------------------------------------------- the decoder

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        expected = getattr(self._local, "expected", None)
        self._local.expected = self._local.run = None
        cache = kwargs.get("past_key_values")
        known = None if cache is None else self._caches.get(cache)
        if expected is None and known is None:
            return
        embeds: Any = kwargs.get("inputs_embeds")
        if embeds is None and expected is not None:
            raise InputError("a prompt with a picture must reach the language model as inputs_embeds.")
        tokens: Any = kwargs.get("input_ids", args[0] if args else None) if embeds is None else embeds
        past = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise InputError("tokens are dropped in the language model under a mask (B, n) of 1 and 0 only.")
        if expected is None:
            assert known is not None
            if past < known.length:
                del self._caches[cache]  # emptied, and used for another text
                return
            self._local.run = _Pass(known, False, mask, past, tokens.shape[1], _nothing(mask))
            return
        if past:
            raise InputError(
                "a picture in a text that goes on from a cache is not pruned in the language model; begin anew."
            )
        if module.training:
            raise InputError("tokens are dropped in the language model for inference only; call eval() first.")
        _check_cache(cache)
        assert embeds is not None
        self._local.run = self._prefill(embeds, mask, *expected)

    def _prefill(self, embeds: Tensor, mask: Tensor | None, visual: Tensor, budgets: Sequence[int]) -> _Pass:
        visual = visual.to(embeds.device)
        if len(embeds) != len(visual) and len(embeds) % len(visual) == 0:  # beams, or several answers of a prompt
            times = len(embeds) // len(visual)
            visual = visual.repeat_interleave(times, dim=0)
            budgets = [budget for budget in budgets for _ in range(times)]
        if visual.shape != embeds.shape[:2]:
            raise InputError(
                f"the prompt is {tuple(embeds.shape[:2])}, and its visual tokens were said to be among "
                f"{tuple(visual.shape)}; give the whole prompt at once."
            )
        alive = torch.ones_like(visual) if mask is None else mask.bool()
        raters = torch.zeros_like(visual)
        for row, (own, seen) in enumerate(zip(alive, visual, strict=True)):
            places = own.nonzero()[:, 0]
            if seen.any():
                raters[row, places[self.strategy.raters(embeds[row, places], seen[places])]] = True
        totals = visual.sum(dim=1).tolist()
        first = _Stage(alive, visual, raters)
        return _Pass(_Read(embeds.shape[1]), True, mask, 0, embeds.shape[1], first, budgets, totals)

    def _end(self, *_: Any) -> None:
        self._local.run = None

    # ---------------------------------------------------------------- its layers

    def _tap(self, part: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> None:
            run = getattr(self._local, "run", None)
            if run is None or not run.prefill:
                return
            if part == "keys":
                run.keys = output
            else:
                # Of all queries only those that are asked: (raters of all rows, H * d).
                run.query = output[self._newest(run).raters]

        return hook

    @staticmethod
    def _newest(run: _Pass) -> _Stage:
        return run.read.stages[max(run.read.stages)] if run.read.stages else run.first

    def _before(self, number: int) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run: _Pass | None = getattr(self._local, "run", None)
            found = None if run is None else run.stage(number)
            if run is None or found is None:
                return None
            layer, stage = found
            changed = {**kwargs}
            if run.prefill:
                changed["position_embeddings"] = stage.angles
                changed["position_ids"] = None  # whose numbers are in the angles; shapes must not disagree
            else:
                cache = kwargs.get("past_key_values")
                expected = stage.alive.shape[1] + run.past - run.read.length
                if cache is None or int(cache.get_seq_length(number)) != expected:
                    raise InputError(
                        "the cache was shortened after visual tokens had been dropped in the language model, so its "
                        "layers do not agree; generate without assisted decoding, or begin anew."
                    )
            if layer not in run.masks:
                run.masks[layer] = self._mask(run, stage, kwargs["hidden_states"] if not args else args[0])
            changed["attention_mask"] = run.masks[layer]
            return args, changed

        return hook

    def _mask(self, run: _Pass, stage: _Stage, states: Tensor) -> Tensor | None:
        """The causal mask of a stage's tokens, in the form that the attention wants."""
        alive = stage.alive
        if not run.prefill:
            later = run.past - run.read.length + run.new
            said = alive.new_ones(len(alive), later) if run.mask is None else run.mask[:, run.read.length :].bool()
            alive = torch.cat([alive, said], dim=1)
        implementation = self.decoder.config._attn_implementation
        if "flash" in implementation:
            return None if alive.all() else alive.long()
        queries = states.shape[1]
        whole = bool(alive.all()) and (run.prefill or queries == 1)
        if whole and implementation == "sdpa":
            return None
        total = alive.shape[1]
        places = torch.arange(total, device=alive.device)
        own = places[total - queries :, None]
        # A padded row looks at itself, lest its softmax be over nothing.
        mask = ((places <= own) & alive[:, None, :]) | (places == own)
        mask = mask[:, None]
        if implementation == "sdpa":
            return mask
        return torch.zeros_like(mask, dtype=states.dtype).masked_fill_(~mask, torch.finfo(states.dtype).min)

    def _after(self, number: int) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            run: _Pass | None = getattr(self._local, "run", None)
            if run is None or not run.prefill:
                return None
            cache = kwargs.get("past_key_values")
            if not run.read.stages and cache is not None:
                _check_cache(cache)
                self._caches[cache] = run.read
            states = output[0] if isinstance(output, tuple) else output
            states = self._prune(number, run, states, kwargs["position_embeddings"])
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    def _prune(self, number: int, run: _Pass, states: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """The states of what stays behind a layer; notes the stage."""
        stage = self._newest(run)
        attention = self.layers[number].self_attn
        batch, length = stage.alive.shape
        cosines, sines = (part.expand(batch, -1, -1) for part in angles)
        rotate, width = self._rotate[number], attention.head_dim
        assert run.keys is not None
        assert run.query is not None
        keys = rotate(run.keys.unflatten(-1, (-1, width)).transpose(1, 2), cosines, sines)
        queries = run.query.unflatten(-1, (-1, width)).split(stage.raters.sum(dim=1).tolist())
        run.keys = run.query = None
        rows: list[Tensor] = []
        merged: list[Tensor] = []
        origins: list[Tensor] = []
        for row in range(batch):
            alive = stage.alive[row].nonzero()[:, 0]
            if not stage.visual[row].any():
                rows.append(alive)
                merged.append(states[row, :0])
                origins.append(alive[:0])
                continue
            asking = stage.raters[row].nonzero()[:, 0]
            query = rotate(queries[row].transpose(0, 1)[None], cosines[row : row + 1, asking], sines[row, asking][None])
            tokens = LanguageTokens(
                number,
                len(self.layers),
                states[row, alive],
                stage.visual[row, alive],
                self.strategy.score(
                    number,
                    query[0].transpose(0, 1),
                    keys[row][:, alive],
                    alive <= asking[:, None],
                    attention.scaling,
                ),
                run.totals[row],
                run.budgets[row],
            )
            chosen = self.strategy.select(tokens)
            kept = alive[chosen.keep | ~tokens.visual]
            extra = states[row, :0] if chosen.merged is None else chosen.merged
            last = int(tokens.visual.nonzero()[-1]) if len(extra) else 0
            behind = kept > alive[last] if len(extra) else torch.zeros_like(kept, dtype=torch.bool)
            numbers = length + torch.arange(len(extra), device=kept.device)
            rows.append(torch.cat([kept[~behind], numbers, kept[behind]]) if len(extra) else kept)
            merged.append(extra)
            origins.append(alive[:0] if chosen.places is None else alive[chosen.places])
        return self._pack(number, run, states, (cosines, sines), rows, merged, origins)

    def _pack(
        self,
        number: int,
        run: _Pass,
        states: Tensor,
        angles: tuple[Tensor, Tensor],
        rows: Sequence[Tensor],
        merged: Sequence[Tensor],
        origins: Sequence[Tensor],
    ) -> Tensor:
        """Rows of places, those from n on of merged tokens, as one batch, padded on the left."""
        stage = self._newest(run)
        batch, length = stage.alive.shape
        longest = max(map(len, rows))
        extras = max(map(len, merged))
        taken = torch.zeros(batch, longest, dtype=torch.long, device=states.device)
        alive = torch.zeros(batch, longest, dtype=torch.bool, device=states.device)
        source = torch.arange(length + extras, device=states.device).repeat(batch, 1)
        pool = torch.cat([states, states.new_zeros(batch, extras, states.shape[-1])], dim=1) if extras else states
        for row, places in enumerate(rows):
            taken[row, longest - len(places) :] = places
            alive[row, longest - len(places) :] = True
            if len(merged[row]):
                pool[row, length : length + len(merged[row])] = merged[row]
                source[row, length : length + len(merged[row])] = origins[row]
        # Position, and whether it is visual, come with the place: a merged token has them of another one.
        place = source.gather(1, taken)
        run.read.stages[number] = _Stage(
            alive,
            stage.visual.gather(1, place) & alive,
            stage.raters.gather(1, place) & alive,
            tuple(_taken(part, place) for part in angles),  # pyright: ignore[reportArgumentType] - of two
        )
        return _taken(pool, taken)


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """(B, n, C) and (B, m) -> (B, m, C)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


def _nothing(mask: Tensor | None) -> _Stage:
    empty = torch.zeros(0, 0, dtype=torch.bool, device=None if mask is None else mask.device)
    return _Stage(empty, empty, empty)


def _layers(decoder: Any) -> nn.ModuleList:
    layers = getattr(decoder, "layers", None)
    name = type(decoder).__name__
    if not isinstance(layers, nn.ModuleList) or not all(hasattr(layer, "self_attn") for layer in layers):
        raise InputError(f"tokens cannot be dropped between the layers of a {name}: its layers are not known here.")
    for layer in layers:
        attention = layer.self_attn
        lacks = [part for part in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(attention, part)]
        if lacks or hasattr(attention, "q_norm") or getattr(attention, "sliding_window", None) is not None:
            raise InputError(
                f"tokens cannot be dropped between the layers of a {name}: its attention projects or limits queries "
                "and keys in a way that is not known here; use a strategy that drops them before it, such as 'hired'."
            )
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in (decoder, *layers)):
        raise InputError(
            f"this {name} is compiled, and tokens dropped between its layers change their shapes; load it anew and do "
            "not compile it."
        )
    if "flex" in decoder.config._attn_implementation:
        raise InputError("tokens cannot be dropped between layers under flex attention; use sdpa.")
    return layers


def _rotation(attention: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """How this attention turns (B, H, n, d) to positions: by the function of its own module, which knows its form."""
    function = getattr(importlib.import_module(type(attention).__module__), "apply_rotary_pos_emb", None)
    if function is None:
        raise InputError(
            f"tokens cannot be dropped between layers here: how {type(attention).__name__} rotates is not known."
        )
    return lambda states, cosines, sines: function(states, states, cosines, sines)[0]


def _check_cache(cache: Any) -> None:
    layers = getattr(cache, "layers", None) or []
    if getattr(cache, "is_compileable", False) or any(getattr(layer, "is_sliding", False) for layer in layers):
        raise InputError(
            f"a {type(cache).__name__} has one length for all layers, and with tokens dropped between layers each has "
            "its own; generate with the dynamic cache."
        )


# -------------------------------------------------------------------- hosts


class LanguageDropping(Dropping):
    """A model that drops visual tokens inside its language model, as `drop_visual_tokens` returns it.

    Args:
        model: LLaVA-1.5 or LLaVA-NeXT of transformers, or a model with `assemble` and `language_model` as MG-LLaVA has.
    """

    def __init__(self, model: nn.Module, strategy: LanguageStrategy) -> None:
        super().__init__(model, strategy)
        self._bridge = hasattr(model, "project_image")
        self._host = None if self._bridge else LlavaHost(model)
        if strategy.off:
            return
        decoder = self.model.language_model if self._bridge else self.model.model.language_model
        if self._bridge:
            decoder = decoder.get_decoder()
        self._pruning = DecoderPruning(decoder, strategy)
        self._undo.append(self._pruning.remove)
        if self._bridge:
            if not self.model.projects_tokens:
                raise InputError("this fusion does not give a fixed number of image tokens; nothing can be dropped.")
            self._assemble = self.model.assemble
            self._replace("assemble", self._assemble_known)
            return
        self._local = threading.local()
        self._undo.append(self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True).remove)
        self._generate = self.model.generate
        self._replace("generate", self._generate_known)

    def _generate_known(self, inputs: Tensor | None = None, *args: Any, **settings: Any) -> Any:
        """As `generate`. Since transformers 5.20 it encodes pictures itself, and `forward` is not told their sizes."""
        ids = settings.get("input_ids") if inputs is None else inputs
        if ids is not None and settings.get("pixel_values") is not None:
            layouts = self._layouts(settings["pixel_values"], settings.get("image_sizes"))
            self._local.budgets = self._budgets(ids, layouts)
        try:
            return self._generate(inputs, *args, **settings)
        finally:
            self._local.budgets = None

    def _before_forward(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._host is not None
        call = self._host.named(args, kwargs)
        encoded = (call.get("mm_encoder_outputs") or {}).get("image")
        ids = call.get("input_ids")
        if call.get("pixel_values") is None and encoded is None:
            if ids is not None:
                self._pruning.expect(None)
            return
        if ids is None:
            raise InputError("a picture needs a text with its placeholders: input_ids as the processor gives them.")
        if encoded is None:
            budgets = self._budgets(ids, self._layouts(call["pixel_values"], call.get("image_sizes")))
        else:
            budgets = getattr(self._local, "budgets", None)
            if budgets is None:
                raise InputError("pictures that are encoded already do not tell their size; give pixel_values.")
            budgets = [budget for budget in budgets for _ in range(len(ids) // len(budgets))]  # of beams
        self._pruning.expect(ids == self._host.config.image_token_id, budgets)

    def expect(self, input_ids: Tensor, visuals: Sequence[VisualSequence]) -> None:
        """Announces a prompt that this thread reads next as `inputs_embeds`; others of that kind are read whole.

        Args:
            input_ids: (B, T) with all placeholders of the pictures, of a LLaVA of transformers.
            visuals: the pictures, nothing of which is dropped yet.
        """
        assert self._host is not None
        layouts = [visual.layout for visual in visuals]
        self._pruning.expect(input_ids == self._host.config.image_token_id, self._budgets(input_ids, layouts))

    def _layouts(self, pixel_values: Tensor, image_sizes: Any) -> list[Partitions]:
        assert self._host is not None
        if pixel_values.ndim == 5 or image_sizes is None:
            return self._host.layouts(image_sizes, len(pixel_values))
        return self._host.layouts(image_sizes, len(image_sizes))

    def _budgets(self, ids: Tensor, layouts: Sequence[Partitions]) -> list[int]:
        """T of each row: of all its pictures."""
        assert self._host is not None
        counts = (ids == self._host.config.image_token_id).sum(dim=1).tolist()
        total = sum(layout.full_length for layout in layouts)
        if sum(counts) != total:
            raise InputError(
                f"the text has {sum(counts)} placeholders of pictures, and {len(layouts)} pictures of {total} tokens "
                "are given; let the processor write the text."
            )
        budgets = []
        rest = iter(layouts)
        for count in counts:
            own = 0
            while count > 0:
                layout = next(rest)
                count -= layout.full_length
                own += token_budget(layout.candidates, self.strategy.budget)
            budgets.append(own)
        return budgets

    def _assemble_known(
        self, input_ids: Tensor, attention_mask: Tensor | None, visuals: Sequence[Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        """As `assemble`; the image tokens of each picture are its first."""
        if (input_ids == VIDEO_ID).any():
            raise InputError("tokens of videos are not dropped in the language model; give pictures.")
        inputs = self._assemble(input_ids, attention_mask, visuals, *args, **kwargs)
        each = self.model.config.grid_size**2
        self._pruning.expect(None)
        if not visuals:
            return inputs
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        visual = torch.zeros(inputs.attention_mask.shape, dtype=torch.bool)
        budgets = []
        taken = 0
        for row, (ids, own) in enumerate(zip(input_ids.cpu(), real.bool().cpu(), strict=True)):
            place = int(inputs.attention_mask[row].argmax())
            found = 0
            for token in ids[own].tolist():
                if token >= 0:
                    place += 1
                    continue
                visual[row, place : place + each] = True
                place += len(visuals[taken])
                taken += 1
                found += 1
            budgets.append(found * token_budget(each, self.strategy.budget))
        self._pruning.expect(visual, budgets)
        return inputs
