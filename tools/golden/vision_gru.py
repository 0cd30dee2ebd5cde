"""VisionGRU against the official modules' arrays (spec 11); the tolerances are those of the data's own description.

Arrays named `_f64` are compared twice: with our modules in float64 (rel 1e-9) and in float32 (2e-5 for outputs, 1e-4
for gradients). Official float32 arrays carry the rounding of two computations, and so have twice these tolerances.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.errors import FoveateError
from foveate.methods.vision_gru.configuration import VARIANTS, VisionGRUConfig
from foveate.methods.vision_gru.conversion import (
    convert_state_dict,
    derive_config,
    load_converted,
    name_averages,
    parameter_order,
)
from foveate.methods.vision_gru.losses import soft_target_divergence
from foveate.methods.vision_gru.modeling import (
    Block,
    MinGRU,
    VisionGRUBackbone,
    VisionGRUForImageClassification,
    as_tokens,
)
from foveate.methods.vision_gru.schedules import classification_factor, ema_decay, segmentation_factor
from foveate.ops.scan import available_scan_backends, mingru_scan
from foveate.ops.scan.reference import candidate
from golden import GoldenFolder, Report, Tracked

OUTPUT, GRADIENT, EXACT = 2e-5, 1e-4, 1e-9
KINDS = (("float64", torch.float64), ("float32", torch.float32))
PYRAMID = ["stage1", "stage2", "stage3", "stage4"]


def check(golden: GoldenFolder, report: Report) -> None:
    """A row for every array of `golden` that our code can produce; inputs and weights are read."""
    parts: dict[str, Callable[[str, Tracked, Report], None]] = {
        "mingru": check_unit,
        "scan": check_scan,
        "block": check_block,
        "classifier": check_classifier,
        "backbone": check_backbone,
        "full_formula": check_full,
        "recipe": check_recipe,
    }
    for name in parts:
        if not any(file.startswith(name) for file in golden.files):
            report.notes.append(f"not in this folder, so not checked: {name}*.npz")
    for file, arrays in golden.files.items():
        for name, part in parts.items():
            if file.startswith(name):
                stem = file.removesuffix(".npz")
                try:
                    part(stem, arrays, report)
                except (FoveateError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    report.fail(stem, f"{type(error).__name__}: {' '.join(str(error).split())}")


def tensor(array: Any, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.asarray(array)).to(dtype)


def weights(arrays: Tracked) -> dict[str, Tensor]:
    """The official state dict of a file."""
    return {key.removeprefix("sd."): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("sd.")}


def compare(
    report: Report,
    stem: str,
    arrays: Tracked,
    kind: torch.dtype,
    found: Mapping[str, Tensor],
    tolerance: float,
    *,
    exact: float = EXACT,
) -> None:
    """Rows for each named result: against its `_f64` array in both precisions, and against the official float32."""
    for name, value in found.items():
        double = name.replace("grad.", "grad_f64.") if name.startswith("grad.") else f"{name}_f64"
        if double in arrays:
            limit = exact if kind == torch.float64 else tolerance
            label = "float64" if kind == torch.float64 else "float32"
            report.compare(f"{stem} {double} ({label})", value, arrays[double], relative=limit)
        if name in arrays and kind == torch.float32:
            report.compare(f"{stem} {name}", value, arrays[name], relative=2 * tolerance)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {f"grad.{name}": value.grad for name, value in module.named_parameters() if value.grad is not None}


def check_unit(stem: str, arrays: Tracked, report: Report) -> None:
    """One minGRU: from nothing, from a state, token by token; gradients of sum(y r)."""
    dim, expansion, state = int(arrays["dim"]), float(arrays["expansion_factor"]), weights(arrays)
    for _, kind in KINDS:
        unit = MinGRU(dim, expansion)
        load_converted(unit, state)
        unit = unit.to(kind)
        x, r, h0 = (tensor(arrays[name], kind) for name in ("x", "r", "h0"))
        x.requires_grad_()
        y, last = unit(x)
        (y * r).sum().backward()
        assert x.grad is not None
        compare(report, stem, arrays, kind, {"dx": x.grad, **gradients(unit)}, GRADIENT)
        with torch.no_grad():
            p, q = unit.to_hidden_and_gate(x).chunk(2, 2)
            from_h0, last_from_h0 = unit(x, h0)
            steps, carried = [], h0
            for t in range(x.shape[1]):
                step, carried = unit(x[:, t : t + 1], carried)
                steps.append(step)
        # The official float64 run began with a float64 h0, of which the file has the float32 rounding.
        found = {
            "y_from_h0": from_h0,
            "h_last_from_h0": last_from_h0,
            "y_step_from_h0": torch.cat(steps, 1),
        }
        compare(report, stem, arrays, kind, found, OUTPUT, exact=2**-24)
        found = {
            "y": y,
            "h_last": last,
            "hidden_pre": p,
            "gate_pre": q,
            "g_hidden": candidate(p),
            "log_g_hidden": candidate(p).log(),
        }
        compare(report, stem, arrays, kind, found, OUTPUT)


def check_scan(stem: str, arrays: Tracked, report: Report) -> None:
    """The recurrence at every length, by each backend of this machine; element-wise relative errors for h."""
    backends = [name for name in available_scan_backends() if name in ("numba", "torch", "reference")]
    for length in arrays["lengths"].tolist():
        name = f"L{length}"
        wanted = arrays[f"{name}.h_f64"]
        for label, kind in KINDS:
            p, q, r = (tensor(arrays[f"{name}.{part}"], kind) for part in ("hidden", "gate", "r"))
            for backend in backends:
                pq = torch.cat([p, q], 2).requires_grad_()
                h, _ = mingru_scan(pq, backend=backend)
                (h * r).sum().backward()
                assert pq.grad is not None
                row = f"{stem} {name}.%s ({backend}, {label})"
                double = kind == torch.float64
                ratio = h.detach().double().numpy() / wanted
                report.compare(row % "h_f64", ratio, np.ones_like(ratio), absolute=EXACT if double else 3e-6)
                for part, found in zip(("dhidden_f64", "dgate_f64"), pq.grad.chunk(2, 2), strict=True):
                    report.compare(row % part, found, arrays[f"{name}.{part}"], relative=EXACT if double else GRADIENT)
        p, q = (tensor(arrays[f"{name}.{part}"], torch.float32) for part in ("hidden", "gate"))
        h, _ = mingru_scan(torch.cat([p, q], 2), backend="logspace")
        # Its own error grows with the length (spec 2.6): 4e-4 at 3136 elements, more where gates saturate.
        limit = max(OUTPUT, 1e-6 * length)
        report.compare(f"{stem} {name}.h_official_f32 (logspace)", h, arrays[f"{name}.h_official_f32"], relative=limit)


def check_block(stem: str, arrays: Tracked, report: Report) -> None:
    size, state = (int(arrays["h"]), int(arrays["w"])), weights(arrays)
    dim = int(arrays["x"].shape[2])
    config = VisionGRUConfig(dim=dim)
    for _, kind in KINDS:
        block = Block(dim, config)
        load_converted(block, state)
        block = block.to(kind)
        x, r = tensor(arrays["x"], kind).requires_grad_(), tensor(arrays["r"], kind)
        y = block(x, size)
        (y * r).sum().backward()
        assert x.grad is not None
        compare(report, stem, arrays, kind, {"y": y}, OUTPUT)
        compare(report, stem, arrays, kind, {"dx": x.grad, **gradients(block)}, GRADIENT)
        config.stream_above, config.stream_tokens = 0, 7
        with torch.no_grad():
            streamed = block(x, size)
        config.stream_above = 16384
        limit = EXACT if kind == torch.float64 else OUTPUT
        report.compare(f"{stem} y_f64 (streamed, {kind})", streamed, arrays["y_f64"], relative=limit)


def check_classifier(stem: str, arrays: Tracked, report: Report) -> None:
    official = weights(arrays)
    config = derive_config(official)
    report.compare(f"{stem} dim", config.dim, arrays["dim"])
    report.same(f"{stem} depths", config.depths, arrays["depths"].tolist())
    report.compare(f"{stem} num_classes", config.num_labels, arrays["num_classes"])
    order = arrays["param_order"].tolist()
    report.same(f"{stem} param_order", parameter_order(config.depths, head=True), order)
    for _, kind in KINDS:
        model: Any = VisionGRUForImageClassification(config)
        # Through the nameless list of a file of averages and back: the same model.
        load_converted(model, convert_state_dict(name_averages([official[name] for name in order])))
        load_converted(model, convert_state_dict(official))
        names = [name.removeprefix("vision_gru.") for name in model.state_dict()]
        if kind == torch.float64:
            report.same(f"{stem} state_dict_order", names, arrays["state_dict_order"].tolist())
        model = model.to(kind).train()
        image, target = tensor(arrays["image"], kind).requires_grad_(), tensor(arrays["target"], kind)
        output = model(image, output_hidden_states=True)
        log_probabilities = output.logits.log_softmax(1)
        loss = nn.functional.kl_div(log_probabilities, target, reduction="batchmean")
        loss.backward()
        assert image.grad is not None
        maps = zip(("tokens", "stage1", "stage2", "stage3", "stage4"), output.hidden_states, strict=True)
        found = {name: as_tokens(value) for name, value in maps} | {"logits": output.logits, "kl_loss": loss}
        compare(report, stem, arrays, kind, found, OUTPUT)
        if kind == torch.float32:
            ours = soft_target_divergence(output.logits, target)
            report.compare(f"{stem} kl_loss_f64 (losses.py)", ours, arrays["kl_loss_f64"], relative=OUTPUT)
        parameters = {name.replace("grad.vision_gru.", "grad."): value for name, value in gradients(model).items()}
        compare(report, stem, arrays, kind, {"dimage": image.grad, **parameters}, GRADIENT)


def check_backbone(stem: str, arrays: Tracked, report: Report) -> None:
    official = weights(arrays)
    derived = derive_config(official)
    report.compare(f"{stem} dim", derived.dim, arrays["dim"])
    report.same(f"{stem} depths", derived.depths, arrays["depths"].tolist())
    config = VisionGRUConfig(dim=derived.dim, depths=derived.depths, out_features=PYRAMID)
    sizes = sorted(key.removesuffix(".image") for key in arrays if key.endswith(".image"))
    for label, kind in KINDS:
        backbone: Any = VisionGRUBackbone(config)
        load_converted(backbone, convert_state_dict(official))
        if kind == torch.float64:
            names = [name.removeprefix("vision_gru.") for name in backbone.state_dict()]
            report.same(f"{stem} state_dict_order", names, arrays["state_dict_order"].tolist())
        backbone = backbone.to(kind).eval()
        for size in sizes:
            image = tensor(arrays[f"{size}.image"], kind)
            for streamed in (False, True):
                # The blocks and the stem share the configuration.
                config.stream_above, config.stream_tokens = (0, 10) if streamed else (16384, 4096)
                with torch.no_grad():
                    maps = backbone(image).feature_maps
                found = {f"{size}.out{i}": value for i, value in enumerate(maps)}
                if not streamed:
                    compare(report, stem, arrays, kind, found, OUTPUT)
                else:
                    limit = EXACT if kind == torch.float64 else OUTPUT
                    name = f"{size}.out3_f64"
                    report.compare(f"{stem} {name} (streamed, {label})", maps[3], arrays[name], relative=limit)
        config.stream_above = 16384


# ---------------------------------------------------------------- full size, weights by formula


def hashed(count: int, rank: int, offset: int) -> np.ndarray:
    """The README's hash of the indices 0..count - 1, as numbers in [0, 1)."""
    mask = np.uint64(0xFFFFFFFF)
    x = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(rank * 40503 + 12345 + offset)
    x &= mask
    for _ in range(2):
        x ^= x >> np.uint64(16)
        x = (x * np.uint64(0x45D9F3B)) & mask
    x ^= x >> np.uint64(16)
    return x.astype(np.float64) / 2**32


def fill(model: nn.Module, offset: int, prefix: str = "vision_gru.") -> list[str]:
    """Gives every parameter its value by formula; returns the official names, sorted."""
    parameters = {name.removeprefix(prefix): value for name, value in model.named_parameters()}
    with torch.no_grad():
        for rank, name in enumerate(sorted(parameters)):
            value = parameters[name]
            v = 2 * hashed(value.numel(), rank, offset) - 1
            if value.ndim == 1:
                v = 0.2 * v + (1 if "norm" in name and name.endswith("weight") else 0)
            else:
                v = v * np.sqrt(3 / value[0].numel())
            value.copy_(torch.from_numpy(v.astype(np.float32)).view(value.shape))
    return sorted(parameters)


def formula_image(height: int, width: int, offset: int) -> Tensor:
    values = 4 * hashed(3 * height * width, 999983, offset) - 2
    return torch.from_numpy(values.astype(np.float32)).view(1, 3, height, width)


def check_full(stem: str, arrays: Tracked, report: Report) -> None:
    """The real sizes: logits of both variants at 224 px, slices and statistics of the pyramid."""
    offset = int(arrays["S0"])
    image = formula_image(224, 224, offset)
    for short, variant in (("ti", "vision_gru_tiny"), ("b", "vision_gru_base")):
        if f"{short}.logits" not in arrays:
            report.notes.append(f"{stem} has no {short}.logits, so {variant} is not checked")
            continue
        labels = int(np.asarray(arrays[f"{short}.logits"]).shape[-1])
        model: Any = VisionGRUForImageClassification(VisionGRUConfig(num_labels=labels, **VARIANTS[variant])).eval()
        names = fill(model, offset)
        state = {name.removeprefix("vision_gru."): value for name, value in model.state_dict().items()}
        for key, found in ((f"{short}.names_sorted", names), (f"{short}.state_dict_order", list(state))):
            if key in arrays:
                report.same(f"{stem} {key}", found, arrays[key].tolist())
        if f"{short}.numel" in arrays:
            report.compare(
                f"{stem} {short}.numel", sum(p.numel() for p in model.parameters()), arrays[f"{short}.numel"]
            )
        if f"{short}.first_param_first8" in arrays:
            found = state[names[0]].flatten()[:8]
            report.compare(f"{stem} {short}.first_param_first8", found, arrays[f"{short}.first_param_first8"])
        with torch.no_grad():
            compare(report, stem, arrays, torch.float32, {f"{short}.logits": model(image).logits}, OUTPUT)
            if f"{short}.logits_f64" in arrays:
                exact = model.double()(image.double()).logits
                compare(report, stem, arrays, torch.float64, {f"{short}.logits": exact}, OUTPUT)
        if f"{short}_backbone.hw" in arrays:
            check_pyramid(stem, short, variant, arrays, report)
        del model


def check_pyramid(stem: str, short: str, variant: str, arrays: Tracked, report: Report) -> None:
    offset = int(arrays["S0"])
    height, width = (int(value) for value in arrays[f"{short}_backbone.hw"])
    backbone: Any = VisionGRUBackbone(VisionGRUConfig(out_features=PYRAMID, **VARIANTS[variant])).eval()
    fill(backbone, offset)
    image = formula_image(height, width, offset)
    for _, kind in KINDS[::-1]:
        with torch.no_grad():
            maps = backbone.to(kind)(image.to(kind)).feature_maps
        for level, features in enumerate(maps):
            name = f"{short}_backbone.out{level}"
            # The official float32 itself is off by 1e-4 there.
            compare(report, stem, arrays, kind, {f"{name}.slice": features[0, :16, :4, :4]}, GRADIENT)
            if f"{name}.mean_std_absmax" in arrays and kind == torch.float64:
                wanted = arrays[f"{name}.mean_std_absmax"]
                found = [features.mean(), features.std(correction=0), features.abs().max()]
                report.compare(f"{stem} {name}.mean_std_absmax", torch.stack(found), wanted, relative=GRADIENT)


def check_recipe(stem: str, arrays: Tracked, report: Report) -> None:
    warmup, total, base = int(arrays["cls_warmup"]), int(arrays["cls_total"]), float(arrays["cls_base_lr"])
    ours = [base * classification_factor(step, warmup, total) for step in range(len(arrays["cls_lr"]))]
    report.compare(f"{stem} cls_lr", ours, arrays["cls_lr"], relative=EXACT)
    every = arrays["seg_lr_every_500"]
    ours = [6e-5 * segmentation_factor(500 * k) for k in range(len(every))]
    report.compare(f"{stem} seg_lr_every_500", ours, every, relative=EXACT)
    decays = arrays["ema_decay_at_update_n"]
    ours = [ema_decay(n) for n in range(1, len(decays) + 1)]
    report.compare(f"{stem} ema_decay_at_update_n", ours, decays, relative=EXACT)
