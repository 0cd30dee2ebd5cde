"""HiRED against the official code's arrays; the tolerances are those of the data's own description."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from foveate.errors import FoveateError
from foveate.methods.hired.dropping import LlavaDropping, drop_visual_tokens
from foveate.methods.hired.hosts import LlavaHost, Look
from foveate.methods.hired.strategies import Strategy, make_strategy
from foveate.methods.hired.strategies.prumerge import merge, outlier_ratio, outliers
from foveate.vision.attention_taps import tap_attention
from golden import GoldenFolder, Report, Tracked, consume

ROWS, FEATURES, MERGED = 2e-6, 2e-5, 5e-5
VARIANTS = {"v1": "legacy_2024", "v2": "official_4_42", "v2fix": "official", "mass": "paper"}
"""Suffix of a key -> preset that gives the same."""
HOSTS: dict[str, Any] = {"llava_next": LlavaNextForConditionalGeneration, "llava15": LlavaForConditionalGeneration}


def check(golden: GoldenFolder, report: Report) -> None:
    """A row for every array of `golden` that our code can produce; inputs and weights are read."""
    parts = {"llava_next": check_llava_next, "llava15": check_llava}
    for name, part in parts.items():
        if f"{name}_cases.npz" not in golden:
            report.notes.append(f"not in this folder, so not checked: {name}_cases.npz")
            continue
        try:
            with host_model(golden, name) as model, torch.no_grad():
                part(golden, model, report)
        except (FoveateError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            report.fail(name, f"{type(error).__name__}: {' '.join(str(error).split())}")


@contextmanager
def host_model(golden: GoldenFolder, name: str) -> Iterator[Any]:
    """The tiny checkpoint of a set, by transformers' own `from_pretrained`."""
    config, weights = golden[f"{name}_tiny.config.json"], golden[f"{name}_tiny.safetensors"]
    weights.items()  # which transformers reads from the file
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(consume(config)), encoding="utf-8")
        shutil.copy(golden.folder / f"{name}_tiny.safetensors", Path(folder, "model.safetensors"))
        yield HOSTS[name].from_pretrained(folder, dtype=torch.float32).eval()


def pixels(stored: Any) -> Tensor:
    return (torch.from_numpy(stored).float() / 255 - 0.5) / 0.25


def mask_of(packed: Any, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.unpackbits(packed)[:count].reshape(shape).astype(bool)


def strategy_of(rate: float, alpha: float, spatial: float, variant: str) -> Strategy:
    """The strategy of a configuration of the set."""
    if rate == 0:
        strategy = make_strategy("spatial", spatial, form="stride")
        # Options of HiRED's presets, which the baseline on the old transformers had as well.
        strategy.grid_swapped, strategy.unpad_rounding = (
            (True, "legacy") if variant in ("v1", "v2") else (False, "current")
        )
        return strategy
    # A budget of 1 leaves our host as it is; the official one loses its newline tokens.
    return make_strategy("hired", rate, preset=VARIANTS[variant], alpha=alpha, official_full=rate == 1)


# ---------------------------------------------------------------- LLaVA-NeXT


def check_llava_next(golden: GoldenFolder, model: Any, report: Report) -> None:
    arrays = golden["llava_next_cases.npz"]
    host = LlavaHost(model)
    confs = arrays["confs_rate_alpha_spatial"].tolist()
    names = sorted({key.split(".")[0] for key in arrays if key.startswith("case")})
    for name in names:
        values = pixels(arrays[f"{name}.pixel_u8"])
        size = torch.from_numpy(arrays[f"{name}.image_size_hw"])[None]
        ids = torch.from_numpy(arrays[f"{name}.input_ids"])[None]
        look = host.look(values, (0, 22))
        for layer in (0, 22):
            key = f"{name}.cls_attn_l{layer}_headsum"
            report.compare(key, look.taps[layer].head_sum(), arrays[key], absolute=ROWS)
        if (key := f"{name}.cls_attn_l0_full_image_perhead") in arrays:
            report.compare(key, look.taps[0].rows()[0], arrays[key], absolute=ROWS)
        if (key := f"{name}.projected_features_base") in arrays:
            projected = model.model.multi_modal_projector(look.features[0])
            report.compare(key, projected, arrays[key], absolute=FEATURES)
        for number, (rate, alpha, spatial) in enumerate(confs):
            for variant in VARIANTS:
                stem = f"{name}.conf{number}.{variant}"
                strategy = strategy_of(rate, alpha, spatial, variant)
                if f"{stem}.error" in arrays:
                    # The official code divides by zero here; ours gives the sub-images even parts.
                    visual = host.pack(look, host.layouts(size, 1, strategy), [2**20], strategy)[0]
                    report.compare(f"{stem}.error", bool(len(visual.embeds)), arrays[f"{stem}.error"])
                elif f"{stem}.mask" in arrays:
                    check_case(stem, arrays, host, strategy, (look, size, ids), report)
    check_batch(arrays, model, confs, report)
    if "prumerge_cases.npz" in golden:
        check_prumerge(golden["prumerge_cases.npz"], arrays, host, report)


def check_case(
    stem: str,
    arrays: Tracked,
    host: LlavaHost,
    strategy: Strategy,
    inputs: tuple[Look, Tensor, Tensor],
    report: Report,
) -> None:
    """One picture in one configuration: the mask as it is chosen, what reaches the language model, and its logits."""
    look, size, ids = inputs
    layouts = host.layouts(size, 1, strategy)
    mask = host.select(look, layouts, strategy)[0][1].keep
    visual = host.pack(look, layouts, [layouts[0].full_length], strategy)[0]
    report.compare(f"{stem}.mask", mask, mask_of(arrays[f"{stem}.mask"], tuple(mask.shape)))
    report.compare(f"{stem}.per_partition", mask.sum(dim=1), arrays[f"{stem}.per_partition"])
    report.compare(f"{stem}.n_visual", len(visual.embeds), arrays[f"{stem}.n_visual"])
    if f"{stem}.packed" in arrays:
        report.compare(f"{stem}.packed", visual.embeds, arrays[f"{stem}.packed"], absolute=FEATURES)
    if f"{stem}.packed_sum" in arrays:
        # A sum over up to 2880 tokens: the tolerance is a token's.
        found, wanted = visual.embeds.double().mean(dim=0), arrays[f"{stem}.packed_sum"] / len(visual.embeds)
        report.compare(f"{stem}.packed_sum", found, wanted, absolute=FEATURES)
    if f"{stem}.logits_last" in arrays:
        prompt = host.assemble(ids, None, [visual])
        del prompt["input_ids"]
        logits = host.model(**prompt, logits_to_keep=1).logits[0, -1]
        report.compare(f"{stem}.logits_last", logits, arrays[f"{stem}.logits_last"], absolute=FEATURES)


def check_batch(arrays: Tracked, model: Any, confs: list[Any], report: Report) -> None:
    """Two pictures in one batch, padded on the left."""
    if "batch01.input_ids" not in arrays:
        return
    ids = torch.from_numpy(arrays["batch01.input_ids"])
    mask = torch.from_numpy(arrays["batch01.attention_mask"])
    own = [pixels(arrays[f"case{number}.pixel_u8"]) for number in (0, 1)]
    values = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
    sizes = torch.stack([torch.from_numpy(arrays[f"case{number}.image_size_hw"]) for number in (0, 1)])
    for number, (rate, alpha, spatial) in enumerate(confs):
        for variant in VARIANTS:
            stem = f"batch01.conf{number}.{variant}"
            if f"{stem}.lens" not in arrays:
                continue
            handle = drop_visual_tokens(model, strategy=strategy_of(rate, alpha, spatial, variant))
            assert isinstance(handle, LlavaDropping)
            with handle:
                lengths = [len(visual.embeds) for visual in handle.encode(values, sizes)]
                given = handle.prepare(ids, mask, pixel_values=values, image_sizes=sizes)
                logits = model(ids, attention_mask=mask, pixel_values=values, image_sizes=sizes).logits[:, -1]
            report.compare(f"{stem}.lens", lengths, arrays[f"{stem}.lens"])
            report.compare(f"{stem}.attention_mask", given["attention_mask"], arrays[f"{stem}.attention_mask"])
            positions = arrays[f"{stem}.position_ids_last"]
            report.compare(f"{stem}.position_ids_last", given["position_ids"][:, -1].view(positions.shape), positions)
            report.compare(f"{stem}.logits_last", logits, arrays[f"{stem}.logits_last"], absolute=FEATURES)


# ---------------------------------------------------------------- PruMerge


def check_prumerge(arrays: Tracked, cases: Tracked, host: LlavaHost, report: Report) -> None:
    """Rows and merged features of single partitions; at least 95% of a set's rows must agree."""
    tiles = sorted({".".join(key.split(".")[:2]) for key in arrays})
    for tile in tiles:
        case, number = tile.split(".")[0], int(tile.split("tile")[1])
        look = host.look(pixels(cases[f"{case}.pixel_u8"][number : number + 1]), (23,))
        row, keys, features = look.taps[23].full_width_row()[0], look.taps[23].patch_keys[0], look.features[0]
        report.compare(f"{tile}.cls_attn_l23_fulldim", row, arrays[f"{tile}.cls_attn_l23_fulldim"], absolute=ROWS)
        for name, plus in (("prumerge", False), ("prumerge_plus", True)):
            stem = f"{tile}.{name}"
            if f"{stem}.ratio" not in arrays:
                continue
            report.compare(f"{stem}.ratio", outlier_ratio(row), arrays[f"{stem}.ratio"], absolute=1e-12)
            wanted = arrays[f"{stem}.features_pre_projector"]
            found = merge(features, row, keys, outliers(row, plus=plus)).numpy()
            if found.shape == wanted.shape:
                # A near tie for the last neighbour may move a single row.
                worst = np.sort(np.abs(found - wanted).max(axis=1))[: int(np.ceil(0.95 * len(wanted)))]
                report.compare(f"{stem}.features_pre_projector", worst, np.zeros_like(worst), absolute=MERGED)
            else:
                report.compare(f"{stem}.features_pre_projector", found, wanted)


# ---------------------------------------------------------------- LLaVA-1.5


def check_llava(golden: GoldenFolder, model: Any, report: Report) -> None:
    arrays = golden["llava15_cases.npz"]
    host = LlavaHost(model)
    values, rates = pixels(arrays["pixel_u8"]), arrays["rates"].tolist()
    for number, own in enumerate(values):
        picture = own[None] if own.ndim == 3 else own
        ids = torch.from_numpy(arrays[f"case{number}.input_ids"])[None]
        final = host.facts.feature_layer
        with tap_attention(host.tower, (final,)) as taps:
            host.tower(picture, layers=(final + 1,))
        key = f"case{number}.cls_attn_l{final}_headsum"
        report.compare(key, taps[final].head_sum()[0], arrays[key], absolute=ROWS)
        for place, rate in enumerate(rates):
            stem = f"case{number}.rate{place}"
            handle = drop_visual_tokens(model, budget=rate, preset="official", official_full=rate == 1)
            assert isinstance(handle, LlavaDropping)
            with handle:
                features = handle.encode(picture)[0].embeds
                logits = model(input_ids=ids, pixel_values=picture).logits[0, -1]
            report.compare(f"{stem}.features", features, arrays[f"{stem}.features"], absolute=FEATURES)
            report.compare(f"{stem}.logits_last", logits, arrays[f"{stem}.logits_last"], absolute=FEATURES)
