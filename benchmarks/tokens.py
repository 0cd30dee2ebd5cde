"""What dropping visual tokens saves, and what it costs in accuracy.

    python benchmarks/tokens.py speed
    python benchmarks/tokens.py speed --device cuda --size 7b --out out/benchmarks/tokens_7b.json
    python benchmarks/tokens.py accuracy mg-llava-world --out out/benchmarks/tokens_mg_llava
    python benchmarks/tokens.py accuracy out/llava-next-world/checkpoint --strategies hired random spatial fastv

`speed` builds a LLaVA-NeXT of transformers with random weights and answers about one picture of 2 x 2 sub-images, 2,928
visual tokens, at each budget: preprocessing, tower, selection, projector, prefill, decoding, time to first token (from
pixel values on), tokens per second, key-value bytes, arithmetic of the prefill, peak memory. The last way, "maps",
reads the attention maps of all tower layers, for which attention is eager; it chooses the same tokens, and the rest is
equal.
Each way has a process of its own. Times are medians of processor time on a CPU, which other work on the machine hardly
lengthens, and of wall time behind a synchronisation on a GPU. `--protocol paper` takes the definitions of the official
script: wall time without synchronisation or warm-up, the clock begins before preprocessing.

`accuracy` asks a model about rendered scenes with each strategy at each budget; questions for the words on signs are
also reported by themselves. OUT gets accuracy.json, accuracy.md, charts and a picture of the tokens that were kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

import foveate
from foveate.errors import FoveateError
from foveate.files import atomic_folder, atomic_write
from foveate.methods.hired.hosts import LlavaHost, Look, VisualSequence
from foveate.methods.hired.strategies import STRATEGIES, LanguageStrategy, make_strategy
from foveate.methods.mg_llava.recipe import boxes_of
from foveate.metrics.vqa import normalise_answer
from foveate.training.conversations import AskedQuestion, ConversationData, accuracies, open_questions
from foveate.vision.kept_tokens import plot_kept_tokens
from foveate.vision.plots import line_chart
from foveate.world.scenes import render_scenes

BUDGETS = (1.0, 0.4, 0.2, 0.1)
BATCHES = (1, 4)
MAPS = "maps"
TEXT_TOKENS = 60
TILE, PATCH = 336, 14
STAGES = ("preprocess", "tower", "select", "project", "prefill", "decode")
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@dataclass(frozen=True)
class Size:
    """Widths, layers, heads and feed-forward widths of tower and language model; groups of keys and vocabulary."""

    tower: tuple[int, int, int, int]
    language: tuple[int, int, int, int]
    groups: int
    vocabulary: int = 32064


VIT_L = (1024, 24, 16, 4096)
SIZES = {
    "small": Size((128, 6, 4, 256), (256, 4, 8, 688), 8, 1000),
    "medium": Size((512, 12, 8, 2048), (1024, 12, 16, 2752), 16, 8000),
    "7b": Size(VIT_L, (4096, 32, 32, 11008), 32),
    "mistral-7b": Size(VIT_L, (4096, 32, 32, 14336), 8),
    "13b": Size(VIT_L, (5120, 40, 40, 13824), 40),
}
"""The last three are those of LLaVA-1.6."""


# -------------------------------------------------------------------- speed


def make_model(size: Size, device: str) -> Any:
    """A LLaVA-NeXT with random weights, the same ones at every run; in bfloat16 on a GPU."""
    width, layers, heads, inner = size.tower
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=TILE,
        patch_size=PATCH,
    )
    width, layers, heads, inner = size.language
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=size.groups,
        vocab_size=size.vocabulary,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = LlavaNextConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=size.vocabulary - 1,
        image_grid_pinpoints=GRID,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.startswith("cuda") else torch.float32)
    try:
        with torch.device(device):
            model: Any = LlavaNextForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


class Clock:
    """Seconds of stages. `lap` ends one; what a stage inside another took is taken off the outer one."""

    def __init__(self, device: str, *, wall: bool) -> None:
        self.synchronises = device.startswith("cuda") and not wall
        self.read = time.perf_counter if wall or device.startswith("cuda") else time.process_time
        self.seconds: dict[str, float] = {}
        self._last = self.now()

    def now(self) -> float:
        if self.synchronises:
            torch.cuda.synchronize()
        return self.read()

    def lap(self, stage: str) -> None:
        now = self.now()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now

    @contextmanager
    def inside(self, module: torch.nn.Module, stage: str, outer: str) -> Iterator[None]:
        """Whatever `module` does in the body is `stage`, the rest so far `outer`."""
        hooks = [
            module.register_forward_pre_hook(lambda *_: self.lap(outer)),
            module.register_forward_hook(lambda *_: self.lap(stage)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class MapRow:
    """Rows that were read from whole maps, where a strategy expects a tap."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, pictures: slice) -> MapRow:
        return MapRow(self.rows[pictures])

    def head_sum(self) -> Tensor:
        return self.rows


@dataclass
class Bench:
    """One way, in this process.

    Attributes:
        way: a budget, or `MAPS` for the straightforward implementation at 20 %.
    """

    options: argparse.Namespace
    way: str
    model: Any = field(init=False)
    host: LlavaHost = field(init=False)
    strategy: Any = field(init=False)

    def __post_init__(self) -> None:
        budget = 0.2 if self.way == MAPS else float(self.way)
        self.strategy = make_strategy(self.options.strategy, budget)
        self.model = make_model(SIZES[self.options.size], self.options.device)
        if self.way == MAPS:
            self.model.model.vision_tower.set_attn_implementation("eager")
        self.host = LlavaHost(self.model)
        self.processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=GRID
        )
        self.inside = isinstance(self.strategy, LanguageStrategy) and not self.strategy.off

    def whole(self, pixel_values: Tensor, sizes: Tensor, clock: Clock) -> list[VisualSequence]:
        """Pictures as the host itself encodes them."""
        base = self.model.model
        with (
            clock.inside(base.vision_tower, "tower", "select"),
            clock.inside(base.multi_modal_projector, "project", "select"),
        ):
            features = base.get_image_features(pixel_values, sizes, return_dict=True).pooler_output
        layouts = self.host.layouts(sizes, len(sizes))
        return [
            VisualSequence(own, torch.arange(len(own)), len(own), layout.valid, layout)
            for own, layout in zip(features, layouts, strict=True)
        ]

    def chosen(self, pixel_values: Tensor, sizes: Tensor, clock: Clock) -> list[VisualSequence]:
        """Pictures with what the strategy keeps; from maps of all layers if that is the way."""
        pieces, layouts = self.host.pieces(pixel_values, sizes, self.strategy)
        layers = self.strategy.layers(self.host.facts)
        if self.way == MAPS:
            out = self.model.model.vision_tower(pieces, output_attentions=True, output_hidden_states=True)
            state = out.hidden_states[self.host.states[-1]]
            rows = {layer: MapRow(out.attentions[layer].float()[:, :, 0, 1:].sum(dim=1)) for layer in layers}
            taps: Any = rows
            look = Look(state[:, 1:], state[:, 0], taps)
            del out
        else:
            look = self.host.look(pieces, layers)
        clock.lap("tower")
        lengths = [layout.full_length for layout in layouts]
        with clock.inside(self.model.model.multi_modal_projector, "project", "select"):
            return self.host.pack(look, layouts, lengths, self.strategy)

    @torch.inference_mode()
    def once(self, picture: Image.Image, batch: int, clock: Clock, new_tokens: int) -> dict[str, Any]:
        """Answers about `batch` copies of a picture; what does not depend on the clock."""
        device, dtype = self.model.device, self.model.dtype
        given = self.processor(images=[picture] * batch, return_tensors="pt")
        pixel_values, sizes = given["pixel_values"].to(device, dtype), given["image_sizes"]
        clock.lap("preprocess")
        plain = self.strategy.off or self.inside
        visuals = (self.whole if plain else self.chosen)(pixel_values, sizes, clock)
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(1, 900, (batch, TEXT_TOKENS), generator=generator)
        placeholder = torch.full((batch, 1), self.model.config.image_token_id)
        ids = torch.cat([text[:, :1], placeholder, text[:, 1:]], dim=1)
        inputs = self.host.assemble(ids, None, visuals, left_padding=True)
        clock.lap("select")
        handle: Any = foveate.drop_visual_tokens(self.model, strategy=self.strategy) if self.inside else None
        try:
            if handle is not None:
                handle.expect(inputs["input_ids"], visuals)
            cache: Any = DynamicCache(config=self.model.config.get_text_config())
            said = self.model(
                inputs_embeds=inputs["inputs_embeds"], past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = said.logits[:, -1].argmax(dim=-1, keepdim=True)
            clock.lap("prefill")
            lengths = [layer.get_seq_length() for layer in cache.layers]
            kv = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
            for _ in range(new_tokens - 1):
                said = self.model(input_ids=token, past_key_values=cache, use_cache=True)
                token = said.logits[:, -1].argmax(dim=-1, keepdim=True)
            clock.lap("decode")
        finally:
            if handle is not None:
                handle.remove()
        return {
            "visual_tokens": sum(len(visual.embeds) for visual in visuals) // batch,
            "layer_tokens": lengths,
            "kv_bytes": kv,
            "prefill_flop": batch * prefill_flop(self.model.config.text_config, lengths),
            "kept": torch.cat([visual.keep.flatten() for visual in visuals]).nonzero()[:, 0].tolist()
            if batch == 1 and not plain
            else [],
        }

    def tap_share(self, picture: Image.Image) -> float:
        """Time that reading rows from taps takes, as a share of the tower's; nothing else is added to the tower."""
        given = self.processor(images=[picture], return_tensors="pt")
        pieces = given["pixel_values"].to(self.model.device, self.model.dtype)[0]
        clock = Clock(self.options.device, wall=False)
        shares = []
        with torch.inference_mode():
            for _ in range(3):
                clock.seconds.clear()
                clock.lap("before")
                look = self.host.look(pieces, self.strategy.layers(self.host.facts))
                clock.lap("tower")
                for tap in look.taps.values():
                    tap.query.clone()
                    tap.head_sum()
                clock.lap("taps")
                shares.append(clock.seconds["taps"] / clock.seconds["tower"])
        return statistics.median(shares)

    def run(self) -> dict[str, Any]:
        """Rows of all batch sizes, and the cost of taps where there are any."""
        paper = self.options.protocol == "paper"
        rows = []
        found: dict[str, Any] = {}
        for batch in self.options.batches:
            side = (600 if batch == 1 else 1000) if paper else 672
            picture = next(iter(render_scenes(9_000_000, 1, size=side))).image
            picture = Image.fromarray(picture)
            new_tokens = (15 if batch == 1 else 100) if paper else self.options.new_tokens
            warm_ups, repeats = ((0, 3 if batch == 1 else 1)) if paper else self._repeats()
            laps: list[dict[str, float]] = []
            memory = Memory(self.options.device)
            for number in range(warm_ups + repeats):
                if number == warm_ups:
                    memory.reset()
                clock = Clock(self.options.device, wall=paper)
                facts = self.once(picture, batch, clock, new_tokens)
                if number >= warm_ups:
                    laps.append(clock.seconds)
            rows.append({"way": self.way, "batch": batch, **summary(laps, batch, new_tokens, paper), **facts})
            rows[-1] |= memory.read()
        if not self.strategy.off and not self.inside and self.way != MAPS and not paper:
            picture = Image.fromarray(next(iter(render_scenes(9_000_000, 1, size=672))).image)
            found["tap_share"] = self.tap_share(picture)
        return {"rows": rows, **found}

    def _repeats(self) -> tuple[int, int]:
        cuda = self.options.device.startswith("cuda")
        warm_ups = self.options.warm_ups if self.options.warm_ups is not None else (2 if cuda else 1)
        return warm_ups, self.options.repeats or (5 if cuda else 2)


class Memory:
    """The most memory that was taken since `reset`: of a GPU all that torch holds, else what came upon the process."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.before = 0

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident_peak()

    def read(self) -> dict[str, int]:
        if self.cuda:
            return {"peak_bytes": torch.cuda.max_memory_allocated(), "peak_reserved": torch.cuda.max_memory_reserved()}
        return {"peak_bytes": _resident_peak() - self.before}


def _resident_peak() -> int:
    """Bytes: the highest resident memory of this process since it was last cleared."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much memory a process had at most")


def prefill_flop(config: Any, lengths: Sequence[int]) -> float:
    """Floating-point operations of reading a prompt, without the head: per layer twice the multiply-adds
    (2d^2 + 2dg + 3dm)n + 2n^2 d of n tokens, width d, keys of width g and feed-forward m (HiRED spec 4.2)."""
    width, inner = config.hidden_size, config.intermediate_size
    keys = width * config.num_key_value_heads // config.num_attention_heads
    each = 2 * width**2 + 2 * width * keys + 3 * width * inner
    return float(sum(2 * (each * n + 2 * n**2 * width) for n in lengths))


def summary(laps: Sequence[dict[str, float]], batch: int, new_tokens: int, paper: bool) -> dict[str, Any]:
    """Medians and 90th percentiles of the stages, and what follows from each run."""

    def of(values: Sequence[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "p90": float(np.quantile(values, 0.9))}

    first = [
        sum(seconds.get(stage, 0.0) for stage in STAGES[:-1] if paper or stage != "preprocess") for seconds in laps
    ]
    whole = [ttft + seconds["decode"] for ttft, seconds in zip(first, laps, strict=True)]
    return {
        "seconds": {stage: of([seconds.get(stage, 0.0) for seconds in laps]) for stage in STAGES},
        "ttft": of(first),
        "tokens_per_second": batch * new_tokens / statistics.median(whole),
        "decode_tokens_per_second": batch * (new_tokens - 1) / statistics.median(run["decode"] for run in laps),
    }


def speed(options: argparse.Namespace) -> int:
    if options.way:
        print(json.dumps(Bench(options, options.way).run()))
        return 0
    inside = isinstance(make_strategy(options.strategy, 0.2), LanguageStrategy)
    ways = [str(budget) for budget in options.budgets]
    if not options.no_maps and not inside and options.strategy == "hired" and 0.2 in options.budgets:
        ways.append(MAPS)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"settings": {**_plain(options), "threads": torch.get_num_threads()}}
    for way in ways:
        done = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--way", way],
            capture_output=True,
            text=True,
            env=os.environ,
            check=False,
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return done.returncode
        found = json.loads(done.stdout.splitlines()[-1])
        rows += found["rows"]
        result |= {"tap_share": found["tap_share"]} if "tap_share" in found else {}
        print(f"{way}: {found['rows'][0]['ttft']['median']:.3f} s to the first token", file=sys.stderr)
    kept = {row["way"]: row.pop("kept") for row in rows if row["batch"] == 1}
    for row in rows:
        row.pop("kept", None)
    if MAPS in kept:
        same = len(set(kept[MAPS]) & set(kept["0.2"])) / len(kept["0.2"])
        assert options.device.startswith("cuda") or same == 1, f"taps and maps agree on {same} of the tokens"
        result["maps_agree"] = same
    result |= {"rows": rows, "ratios": ratios(rows)}
    print(speed_table(result))
    if options.out:
        with atomic_write(options.out) as file:
            json.dump(result, file, indent=1)
    return 0


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What 20 % takes of what 100 % takes, and what maps take of what taps do, for each batch size."""
    by = {(row["way"], row["batch"]): row for row in rows}
    found: dict[str, dict[str, float]] = {}
    for batch in sorted({row["batch"] for row in rows}):
        for name, over, under in (("0.2 / 1.0", "0.2", "1.0"), ("maps / taps", MAPS, "0.2")):
            a, b = by.get((over, batch)), by.get((under, batch))
            if a is None or b is None:
                continue
            found[f"{name}, batch {batch}"] = {
                "ttft": a["ttft"]["median"] / b["ttft"]["median"],
                "tower": a["seconds"]["tower"]["median"] / b["seconds"]["tower"]["median"],
                "prefill": a["seconds"]["prefill"]["median"] / b["seconds"]["prefill"]["median"],
                "tokens_per_second": a["tokens_per_second"] / b["tokens_per_second"],
                "decode_tokens_per_second": a["decode_tokens_per_second"] / b["decode_tokens_per_second"],
                "kv_bytes": a["kv_bytes"] / b["kv_bytes"],
                "prefill_flop": a["prefill_flop"] / b["prefill_flop"],
                "peak_bytes": a["peak_bytes"] / max(b["peak_bytes"], 1),
            }
    return found


def speed_table(result: dict[str, Any]) -> str:
    """Markdown."""
    head = ["kept", "batch", "visual tokens", *(f"{stage}, ms" for stage in STAGES), "first token, ms"]
    head += ["tokens/s", "decode tokens/s", "prefill, GFLOP", "KV, MiB", "peak, MiB"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in result["rows"]:
        cells = [row["way"] if row["way"] == MAPS else f"{100 * float(row['way']):g} %", str(row["batch"])]
        cells += [str(row["visual_tokens"]), *(f"{1000 * row['seconds'][stage]['median']:.1f}" for stage in STAGES)]
        cells += [f"{1000 * row['ttft']['median']:.1f}", f"{row['tokens_per_second']:.2f}"]
        cells += [f"{row['decode_tokens_per_second']:.2f}", f"{row['prefill_flop'] / 1e9:.1f}"]
        cells += [f"{row['kv_bytes'] / 2**20:.1f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        lines.append(cells)
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for name, ratio in result["ratios"].items():
        text += f"\n{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in ratio.items())
    if "tap_share" in result:
        text += f"\n\nrows of the taps take {100 * result['tap_share']:.2f} % of the tower's time"
    return text


# -------------------------------------------------------------------- accuracy


class TokenCounter:
    """Counts the tokens that each layer of a language model reads of prompts, padding and text among them."""

    def __init__(self, predictor: Any) -> None:
        language = predictor.model.language_model if hasattr(predictor.model, "language_model") else predictor.model
        decoder = language.get_decoder()
        self.layers = list(decoder.layers)
        self.tokens = 0

    def __enter__(self) -> TokenCounter:
        def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = kwargs.get("hidden_states", args[0] if args else None)
            if states is not None and states.shape[1] > 1:
                self.tokens += states.shape[0] * states.shape[1]

        self._hooks = [layer.register_forward_pre_hook(count, with_kwargs=True) for layer in self.layers]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()


def answer_all(predictor: Any, questions: Sequence[AskedQuestion], boxes: Any, options: argparse.Namespace) -> Any:
    """Answers, and what they took."""
    counter = TokenCounter(predictor)
    start, wall = time.process_time(), time.perf_counter()
    with counter:
        said = predictor.ask(
            [question.sample.image for question in questions],
            [question.question for question in questions],
            boxes=boxes,
            batch_size=options.batch_size,
            temperature=0.0,
            max_new_tokens=options.max_new_tokens,
        )
    cuda = predictor.model.device.type == "cuda"
    seconds = time.perf_counter() - wall if cuda else time.process_time() - start
    rows = [
        {
            "kind": question.kind,
            "size": question.size,
            "right": normalise_answer(answer.text) == normalise_answer(question.answer),
        }
        for question, answer in zip(questions, said, strict=True)
    ]
    found = accuracies(rows)
    return said, {
        "accuracy": found["accuracy"],
        "by_kind": found["by_kind"],
        "by_size": found["by_size"],
        "layer_tokens": counter.tokens / len(counter.layers) / len(questions),
        "tokens_per_second": sum(answer.tokens for answer in said) / seconds,
        "seconds": seconds,
    }


def candidates_of(predictor: Any, image: Any) -> int:
    """Visual tokens of a picture that a share of them is taken of: those of all partitions, padding among them."""
    host = getattr(predictor, "host", None)
    if host is None:
        return predictor.model.config.grid_size**2
    given = predictor.image_processor(images=[Image.open(image).convert("RGB")], return_tensors="pt")
    return host.layouts(given.get("image_sizes"), 1)[0].candidates


def accuracy(options: argparse.Namespace) -> int:
    predictor = foveate.load(options.model, device=options.device)
    data: dict[str, Any] = {"root": options.data, "annotations": ["train.json"], "boxes": ["train_only_box.json"]}
    if not options.data.exists():
        data["world"] = {"first_seed": 9_000_000, "count": options.scenes, "size": 256}
    questions = open_questions(ConversationData.model_validate({**data, "samples": options.pictures}))
    questions = [question for question in questions if question.sample.image is not None]
    if options.kinds:
        questions = [question for question in questions if question.kind in options.kinds]
    if not questions:
        raise SystemExit(f"{options.data} has no questions of the kinds {', '.join(options.kinds)}")
    sees_boxes = getattr(predictor, "host", None) is None
    boxes = boxes_of(questions, "given") if sees_boxes else None
    total = candidates_of(predictor, questions[0].sample.image)
    few = slice(options.batch_size)
    answer_all(predictor, questions[few], None if boxes is None else boxes[few], options)  # warm-up
    _, full = answer_all(predictor, questions, boxes, options)
    rows = [{"strategy": "all tokens", "budget": 1.0, "tokens": total, **full}]
    shown: dict[str, Any] = {}
    for strategy in options.strategies:
        for budget in sorted(options.budgets, reverse=True):
            if budget >= 1:
                continue
            row: dict[str, Any] = {"strategy": strategy, "budget": budget, "tokens": int(total * budget)}
            try:
                with foveate.drop_visual_tokens(predictor, budget, strategy):
                    said, found = answer_all(predictor, questions, boxes, options)
                row |= found
                if said[0].kept and (strategy not in shown or abs(budget - 0.2) < 1e-9):
                    shown[strategy] = said[0].kept[0]
                print(f"{strategy} {budget:g}: {100 * row['accuracy']:.1f} %", file=sys.stderr)
            except FoveateError as error:
                row["refused"] = str(error)
                print(f"{strategy} {budget:g}: {error}", file=sys.stderr)
            rows.append(row)
    table = accuracy_table(rows)
    print(table)
    if options.out:
        with atomic_folder(options.out, overwrite=True) as folder:
            content = {"settings": _plain(options), "questions": len(questions), "rows": rows}
            (folder / "accuracy.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
            (folder / "accuracy.md").write_text(table, encoding="utf-8")
            for name, chart in charts(rows).items():
                chart.save(folder / f"{name}.png")
            if shown:
                picture = Image.open(str(questions[0].sample.image))
                contact_sheet(picture, shown).save(folder / "kept_tokens.png")
    return 0


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a strategy and budget; "text" are questions for words in the picture."""
    kinds = sorted(rows[0]["by_kind"])
    head = ["strategy", "kept", "tokens", "tokens a layer", "accuracy", *kinds, "tokens/s"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        cells = [row["strategy"], f"{100 * row['budget']:g} %", str(row["tokens"])]
        if "refused" in row:
            cells += ["refused", *["-"] * (len(kinds) + 2)]
        else:
            shares = [row["accuracy"], *(row["by_kind"][kind] for kind in kinds)]
            cells += [f"{row['layer_tokens']:.0f}", *(f"{100 * share:.1f} %" for share in shares)]
            cells += [f"{row['tokens_per_second']:.1f}"]
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def charts(rows: Sequence[dict[str, Any]]) -> dict[str, Image.Image]:
    """Accuracy against tokens and against tokens per second, of all questions and of those for text; a line a
    strategy, which ends at all tokens."""
    full, found = rows[0], {}
    names = list(dict.fromkeys(row["strategy"] for row in rows[1:] if "refused" not in row))
    if not names:
        return {}
    measures = {"all questions": lambda row: row["accuracy"]}
    if "text" in full["by_kind"]:
        measures["text in the picture"] = lambda row: row["by_kind"]["text"]
    for about, measure in measures.items():
        for axis, label, x in (
            ("tokens", "visual tokens kept", lambda row: row["tokens"]),
            ("speed", "tokens per second", lambda row: row["tokens_per_second"]),
        ):
            series = {}
            for name in names:
                own = [row for row in rows if row["strategy"] == name and "refused" not in row] + [full]
                own.sort(key=lambda row: row["tokens"])
                series[name] = ([float(x(row)) for row in own], [100 * measure(row) for row in own])
            found[f"{about.partition(' ')[0]}_by_{axis}"] = line_chart(
                series, title=f"Accuracy, {about}", x_label=label, y_label="right answers, %", size=(900, 560)
            )
    return found


def contact_sheet(picture: Image.Image, shown: dict[str, Any]) -> Image.Image:
    """What each strategy kept of a picture, three in a row."""
    overlays = {name: plot_kept_tokens(picture, kept) for name, kept in shown.items()}
    for overlay in overlays.values():
        overlay.thumbnail((480, 480))
    width = max(overlay.width for overlay in overlays.values()) + 12
    height = max(overlay.height for overlay in overlays.values()) + 34
    columns = min(3, len(overlays))
    sheet = Image.new("RGB", (columns * width, -(-len(overlays) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, overlay) in enumerate(overlays.items()):
        x, y = number % columns * width + 6, number // columns * height + 28
        share = f"{name}: {shown[name].count} of {shown[name].total}"
        draw.text((x, y - 8), share, fill="black", font=ImageFont.load_default(15), anchor="ls")
        sheet.paste(overlay, (x, y))
    return sheet


# -------------------------------------------------------------------- command line


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    left_out = ("run", "way", "out")
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in left_out
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What dropping visual tokens saves, and what it costs.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed", help="a LLaVA-NeXT with random weights at several budgets")
    one.add_argument("--size", choices=SIZES, default="small")
    one.add_argument("--device", default="cpu")
    one.add_argument("--strategy", choices=STRATEGIES, default="hired")
    one.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    one.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    one.add_argument("--new-tokens", type=int, default=16)
    one.add_argument("--warm-ups", type=int, help="default 1, on a GPU 2")
    one.add_argument("--repeats", type=int, help="default 2, on a GPU 5")
    one.add_argument("--protocol", choices=["ours", "paper"], default="ours")
    one.add_argument("--no-maps", action="store_true", help="leave out the way with whole attention maps")
    one.add_argument("--out", type=Path, help="JSON file to write")
    one.add_argument("--way", help=argparse.SUPPRESS)
    one.set_defaults(run=speed)
    two = commands.add_parser("accuracy", help="a model's answers about rendered scenes")
    two.add_argument("model", help="an MG-LLaVA, or a LLaVA of transformers: a shipped model or a folder")
    two.add_argument("--data", type=Path, default=Path("out/world/llava_evaluation"), help="of `world scenes`, LLaVA")
    two.add_argument("--scenes", type=int, default=200, help="rendered where there is no data yet")
    two.add_argument("--pictures", type=int, help="ask about so many of them; default all")
    two.add_argument("--kinds", nargs="+", default=[], help="ask only these: what, colour, count, where, text")
    two.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    two.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS))
    two.add_argument("--batch-size", type=int, default=16)
    two.add_argument("--max-new-tokens", type=int, default=24)
    two.add_argument("--device", help="default a GPU if there is one")
    two.add_argument("--out", type=Path, help="folder to write")
    two.set_defaults(run=accuracy)
    options = parser.parse_args()
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
