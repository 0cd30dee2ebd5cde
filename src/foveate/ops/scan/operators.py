"""The operator `foveate::scan`, its backward, and which backend computes them."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from foveate.checkpoints import suggestion
from foveate.errors import InputError

log = logging.getLogger(__name__)

BACKENDS = ("triton", "numba", "torch", "reference", "logspace")
_REQUESTED: str | None = os.environ.get("FOVEATE_SCAN_BACKEND") or None


def available_scan_backends() -> list[str]:
    """The backends that this installation has: those whose package can be imported, `triton` only beside a GPU."""
    return [name for name in BACKENDS if name not in ("triton", "numba") or _module(name) is not None]


def requested_backend(name: str | None = None) -> str:
    """The backend that an argument, `use_scan_backend` or the environment names, or "auto".

    Raises:
        InputError: there is none of this name, or its package is not installed.
    """
    name = name or _REQUESTED or "auto"
    if name == "auto":
        return name
    if name not in BACKENDS:
        raise InputError(f"there is no scan backend {name!r}{suggestion(name, BACKENDS)}; use {', '.join(BACKENDS)}.")
    if name in ("triton", "numba") and _module(name) is None:
        needed = "a CUDA device and the package triton" if name == "triton" else "pip install 'foveate[fast]'"
        raise InputError(f"the scan backend {name!r} is not available here, it needs {needed}; leave it out.")
    return name


def scan_backend_in_use(device: str | torch.device = "cpu") -> str:
    """The name of what computes scans on this device now.

    Raises:
        InputError: the environment or `use_scan_backend` names one that is not there.
    """
    name = requested_backend()
    return _automatic(torch.device(device).type) if name == "auto" else name


@contextmanager
def use_scan_backend(name: str | None) -> Iterator[None]:
    """Scans inside the block are computed by this backend, in all threads; None chooses automatically.

    Raises:
        InputError: it is unknown or not available.
    """
    global _REQUESTED
    before = _REQUESTED
    if name is not None:
        requested_backend(name)
    _REQUESTED = name
    try:
        yield
    finally:
        _REQUESTED = before


@functools.cache
def _module(name: str) -> ModuleType | None:
    """The module of a backend, or None where its package is missing or broken."""
    if name == "triton" and not torch.cuda.is_available():
        return None
    if name in ("triton", "numba") and importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(f"foveate.ops.scan.{name}_backend")
    except Exception as error:  # a numba that does not fit numpy, a triton without a compiler: any type of error
        log.warning("the scan backend %s cannot be used: %s", name, error)
        return None


@functools.cache
def _automatic(device: str) -> str:
    fastest = {"cuda": "triton", "cpu": "numba"}.get(device, "torch")
    if fastest == "torch" or _module(fastest) is not None:
        return fastest
    advice = "; pip install 'foveate[fast]' makes it several times faster" if fastest == "numba" else ""
    log.info("scans on %s run in plain torch, %s is not available%s", device, fastest, advice)
    return "torch"


def _backend(name: str, device: torch.device) -> Any:
    if name == "auto":
        name = _automatic(device.type)
    wanted = {"triton": "cuda", "numba": "cpu"}.get(name, device.type)
    if wanted != device.type:
        raise InputError(f"the scan backend {name!r} runs on {wanted}, not on {device.type}; leave it out.")
    module = _module(name)
    assert module is not None
    return module


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """What states are kept in: float32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


# x is pq (N, L, G, 2, C) and y is None, or x is a and y is b, each (N, L, G, C). The state is (N, G, C).


@torch.library.custom_op("foveate::scan", mutates_args=())
def scan(x: Tensor, y: Tensor | None, h0: Tensor | None, reverse: list[bool], backend: str) -> tuple[Tensor, Tensor]:
    """h (N, L, G, C) in the dtype of x, and the last state (N, G, C) in `state_dtype`."""
    start = _start(x, h0)
    if not start.numel() or not x.shape[1]:
        return x.new_empty((*x.shape[:3], x.shape[-1])), start.clone()
    return _backend(backend, x.device).forward(x, y, start, reverse)


@scan.register_fake
def _(x: Tensor, y: Tensor | None, h0: Tensor | None, reverse: list[bool], backend: str) -> tuple[Tensor, Tensor]:
    last = x.new_empty((x.shape[0], x.shape[2], x.shape[-1]), dtype=state_dtype(x.dtype))
    return x.new_empty((*x.shape[:3], x.shape[-1])), last


@torch.library.custom_op("foveate::scan_backward", mutates_args=())
def scan_backward(
    x: Tensor,
    y: Tensor | None,
    h: Tensor,
    h0: Tensor | None,
    dh: Tensor,
    dlast: Tensor,
    reverse: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of y (empty if there is none) and of the state before the first element.

    With c_t = a_t (dh_t + c_{t+1}) and λ_t = dh_t + c_{t+1}, against the direction of the scan (spec 2.6): db = λ,
    da = λ h_{t-1}; for a minGRU dp = λ z g'(p), dq = λ (g(p) - h_{t-1}) z a; dh0 = c of the first element.
    """
    start = _start(x, h0)
    if not start.numel() or not x.shape[1]:
        return torch.empty_like(x), x.new_empty(0) if y is None else torch.empty_like(y), dlast.clone()
    dx, dy, dh0 = _backend(backend, x.device).backward(x, y, h, start, dh.contiguous(), dlast.contiguous(), reverse)
    return dx, x.new_empty(0) if dy is None else dy, dh0


@scan_backward.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    h: Tensor,
    h0: Tensor | None,
    dh: Tensor,
    dlast: Tensor,
    reverse: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dy = x.new_empty(0) if y is None else torch.empty_like(y, memory_format=torch.contiguous_format)
    return torch.empty_like(x, memory_format=torch.contiguous_format), dy, torch.empty_like(dlast)


def _start(x: Tensor, h0: Tensor | None) -> Tensor:
    shape, dtype = (x.shape[0], x.shape[2], x.shape[-1]), state_dtype(x.dtype)
    return x.new_zeros(shape, dtype=dtype) if h0 is None else h0.to(dtype).contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, h0, ctx.reverse, ctx.backend = inputs
    ctx.state = None if h0 is None else h0.dtype
    ctx.last = output[1].shape, output[1].dtype
    ctx.save_for_backward(x, y, h0, output[0])


def _backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None) -> tuple[Any, ...]:
    x, y, h0, h = ctx.saved_tensors
    dh = torch.zeros_like(h) if dh is None else dh
    dlast = x.new_zeros(ctx.last[0], dtype=ctx.last[1]) if dlast is None else dlast
    dx, dy, dh0 = torch.ops.foveate.scan_backward(x, y, h, h0, dh, dlast, ctx.reverse, ctx.backend)
    return dx, None if y is None else dy, None if h0 is None else dh0.to(ctx.state), None, None


scan.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------- for exporters


def _doubling(a: Tensor, b: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Inclusive scan of (a, b) pairs by doubling: log2(L) steps of plain operators, no loop over elements."""
    length, step = b.shape[dim], 1
    while step < length:
        kept = length - step
        b = torch.cat(
            [b.narrow(dim, 0, step), b.narrow(dim, step, kept) + a.narrow(dim, step, kept) * b.narrow(dim, 0, kept)],
            dim,
        )
        a = torch.cat([a.narrow(dim, 0, step), a.narrow(dim, step, kept) * a.narrow(dim, 0, kept)], dim)
        step *= 2
    return a, b


def _decomposed(
    x: Tensor, y: Tensor | None, h0: Tensor | None, reverse: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(x.dtype)
    if y is None:
        p, q = x.to(dtype).unbind(3)
        a = torch.sigmoid(-q)
        b = torch.sigmoid(q) * (torch.relu(p) + torch.sigmoid(p.clamp(max=0)))
    else:
        a, b = x.to(dtype), y.to(dtype)
    found, ends = [], []
    for group, backwards in enumerate(reverse):
        a_g, b_g = (value[:, :, group].flip(1) if backwards else value[:, :, group] for value in (a, b))
        a_g, h = _doubling(a_g, b_g)
        if h0 is not None:
            h = h + a_g * h0[:, group, None].to(dtype)
        ends.append(h[:, -1])
        found.append(h.flip(1) if backwards else h)
    return torch.stack(found, 2).to(x.dtype), torch.stack(ends, 1)


def scan_decompositions() -> dict[Any, Callable[..., Any]]:
    """For `torch.export`'s `run_decompositions`: the scan in plain operators, for runtimes that do not know it.

    Example:
        >>> program = torch.export.export(model, (images,)).run_decompositions(scan_decompositions())
    """
    return {torch.ops.foveate.scan.default: _decomposed}
