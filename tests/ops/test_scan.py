"""The linear recurrence: every backend against the loop in float64, gradients, directions, chunks, lengths 0 and 1."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import InputError
from foveate.ops import linear_scan, mingru_scan, scan_backend_in_use
from foveate.ops.scan import available_scan_backends, scan_decompositions, use_scan_backend

GOLDEN = Path(__file__).parents[1] / "golden" / "vision_gru"
COMPUTING = [name for name in available_scan_backends() if name in ("numba", "torch")]
needs_numba = pytest.mark.skipif("numba" not in COMPUTING, reason="numba is not installed (extra `fast`)")


def operands(length: int, channels: int = 3, batch: int = 2, groups: int = 1, seed: int = 0, **kind: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, groups * 2 * channels, generator=generator).mul(2).to(**kind)  # type: ignore


def test_by_hand() -> None:
    a, b = torch.tensor([[0.5, 0.25, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    # h = 1; 0.25 * 1 + 2; 2 * 2.25 + 3
    assert linear_scan(a, b, dim=1).tolist() == [[1.0, 2.25, 7.5]]
    # from the end: 3; 0.25 * 3 + 2; 0.5 * 2.75 + 1
    assert linear_scan(a, b, dim=-1, reverse=True).tolist() == [[2.375, 2.75, 3.0]]
    assert linear_scan(a, b, torch.tensor([4.0]), dim=1).tolist() == [[3.0, 2.75, 8.5]]
    # z = 1/2; g(1) = 1.5 and g(-ln 3) = 1/4, so h = 0.75 and then 0.375 + 0.125
    pq = torch.tensor([[[1.0, 0.0], [-float(np.log(3)), 0.0]]])
    h, last = mingru_scan(pq)
    assert h.flatten().tolist() == pytest.approx([0.75, 0.5], abs=1e-7)
    assert last.item() == pytest.approx(0.5, abs=1e-7)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130, 1000])
@pytest.mark.parametrize("given_state", [False, True])
def test_equals_the_loop_forward_and_backward(backend: str, length: int, given_state: bool) -> None:
    reverse = [False, True]
    for channels in (3, 70):
        results = []
        for name, kind in ((backend, torch.float32), ("reference", torch.float64)):
            pq = operands(length, channels, groups=2, dtype=kind).requires_grad_()
            state = operands(1, channels, seed=1, dtype=kind).abs().requires_grad_() if given_state else None
            weights = operands(length, channels, seed=2, dtype=kind)
            h, last = mingru_scan(pq, state, reverse, backend=name)
            total = (h * weights).sum() + (last * weights[:, :1].cos()).sum()
            leaves = [pq] if state is None else [pq, state]
            results.append([h, last, *torch.autograd.grad(total, leaves)])
        for found, wanted in zip(*results, strict=True):
            torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=3e-6 * wanted.abs().max().item())


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 130])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend: str, length: int, reverse: bool) -> None:
    pq = operands(length, 2, 1, dtype=torch.float64).requires_grad_()
    state = torch.rand(1, 1, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(-1, 1, length * 2, dtype=torch.float64).view(1, length, 2)

    def total(pq: Tensor, state: Tensor) -> Tensor:
        h, last = mingru_scan(pq, state, reverse, backend=backend)
        return (h * weights).sum(1) + last[:, 0].sin()

    torch.autograd.gradcheck(total, (pq, state), fast_mode=length > 2)
    a = torch.rand(length, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(length, 3, dtype=torch.float64, requires_grad=True)
    start = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda a, b, start: linear_scan(a, b, start, dim=0, reverse=reverse, backend=backend),
        (a, b, start),
        fast_mode=length > 2,
    )


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
    reverse=st.booleans(),
    backend=st.sampled_from(COMPUTING),
)
def test_any_axis_and_direction(shape: list[int], data: st.DataObject, reverse: bool, backend: str) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if data.draw(st.booleans()):  # strides that are not those of a fresh tensor
        order = list(range(len(shape)))[::-1]
        a, b = (value.permute(order).contiguous().permute(order) for value in (a, b))
    h = linear_scan(a, b, dim=dim, reverse=reverse, backend=backend)
    torch.testing.assert_close(h, linear_scan(a, b, dim=dim, reverse=reverse, backend="reference"))
    flipped = linear_scan(a.flip(dim), b.flip(dim), dim=dim, reverse=not reverse, backend=backend).flip(dim)
    torch.testing.assert_close(h, flipped)


@pytest.mark.parametrize("backend", [*COMPUTING, "reference", "logspace"])
def test_continues_where_it_stopped(backend: str) -> None:
    """A sequence in pieces, each from the state of the one before, is the whole sequence: also the log-space form,
    where an initial state once gave other results than stepping."""
    pq = operands(300, 5)
    state = torch.full((2, 1, 5), 0.7)
    whole, end = mingru_scan(pq, state, backend=backend)
    pieces = []
    for piece in pq.split([1, 64, 100, 135], 1):
        h, state = mingru_scan(piece, state.float(), backend=backend)
        pieces.append(h)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", [*COMPUTING, "reference", "logspace"])
def test_no_element(backend: str) -> None:
    pq = torch.zeros(2, 0, 6, requires_grad=True)
    state = torch.rand(2, 1, 3, requires_grad=True)
    h, last = mingru_scan(pq, state, backend=backend)
    assert h.shape == (2, 0, 3)
    if backend != "logspace":  # exp(log(h0)) is not h0 to the last bit
        assert torch.equal(last.float(), state)
        (gradient,) = torch.autograd.grad(last.sum(), state)
        assert torch.equal(gradient, torch.ones_like(state))
    if backend != "logspace":
        assert linear_scan(torch.zeros(4, 0), torch.zeros(4, 0), dim=1, backend=backend).shape == (4, 0)
        assert linear_scan(torch.zeros(0, 4), torch.zeros(0, 4), dim=1, backend=backend).shape == (0, 4)


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_a_float32_state(backend: str, kind: torch.dtype) -> None:
    pq = operands(2000, 16).to(kind)
    wanted, _ = mingru_scan(pq.double(), backend="reference")
    h, last = mingru_scan(pq.requires_grad_(), backend=backend)
    assert (h.dtype, last.dtype) == (kind, torch.float32)
    # One rounding of the result, and no more at the end of the sequence than at its start.
    assert ((h.double() - wanted) / wanted).abs().max() < 2 ** (-8 if kind == torch.bfloat16 else -11)
    assert ((last[:, 0].double() - wanted[:, -1]) / wanted[:, -1]).abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(h.float().sum(), pq)
    assert gradient.dtype == kind
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", COMPUTING)
@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (0.0, 3.0), (3.0, 1.0), (-6.0, 1.0), (0.0, 60.0)])
def test_long_sequences_lose_no_digits(backend: str, mean: float, spread: float) -> None:
    length = 16384
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(1, length, 4, generator=generator), torch.randn(1, length, 4, generator=generator)
    pq = torch.cat([p, q * spread + mean], 2)
    wanted, _ = mingru_scan(pq.double(), backend="reference")
    h, _ = mingru_scan(pq, backend=backend)
    assert h.isfinite().all()
    assert ((h.double() - wanted).abs() / wanted).max() < 5e-6
    if (mean, spread) == (0.0, 1.0):
        official, _ = mingru_scan(pq, backend="logspace")
        assert ((official.double() - wanted).abs() / wanted).max() > 1e-4  # why that form is for comparison only


@pytest.mark.parametrize("backend", COMPUTING)
def test_extremes(backend: str) -> None:
    """Gates that saturate give neither overflow nor NaN, and NaN is not hidden."""
    p = torch.tensor([1e30, -1e30, 200.0, -200.0, 0.0, -0.0])
    for q in (-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30):
        pq = torch.cat([p, torch.full_like(p, q)]).view(1, 1, -1).repeat(1, 3, 1).requires_grad_()
        h, _ = mingru_scan(pq, backend=backend)
        assert h.isfinite().all()
        assert (h >= 0).all()
        (gradient,) = torch.autograd.grad(h.sum(), pq)
        assert gradient.isfinite().all()
    for broken in (0, 1):
        pq = torch.zeros(1, 4, 2)
        pq[0, 1, broken] = float("nan")
        h, _ = mingru_scan(pq, backend=backend)
        assert h.isnan().flatten().tolist() == [False, True, True, True]


def test_golden() -> None:
    with np.load(GOLDEN / "scan.npz") as arrays:
        for length in arrays["lengths"]:
            p, q = (torch.from_numpy(arrays[f"L{length}.{name}"]) for name in ("hidden", "gate"))
            wanted = torch.from_numpy(arrays[f"L{length}.h_f64"])
            for backend in COMPUTING:
                h, _ = mingru_scan(torch.cat([p, q], 2), backend=backend)
                assert ((h.double() - wanted).abs() / wanted).max() < 3e-6, (backend, length)


@needs_numba
def test_the_fast_backend_is_used_where_it_can_be() -> None:
    with use_scan_backend(None):
        assert scan_backend_in_use("cpu") == "numba"
        assert scan_backend_in_use("meta") == "torch"
    with use_scan_backend("torch"):
        assert scan_backend_in_use("cpu") == "torch"


@needs_numba
def test_threads_share_the_work_and_callers_may_come_together() -> None:
    pq = operands(500, 130, batch=3, groups=2)
    alone, _ = mingru_scan(pq, reverse=[False, True], backend="numba")
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        torch.set_num_threads(4)
        callers = [
            threading.Thread(target=lambda: found.append(mingru_scan(pq, reverse=[False, True], backend="numba")[0]))
            for _ in range(6)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 6
    assert all(torch.equal(h, alone) for h in found)


def test_only_operands_and_result_are_kept_for_the_backward_pass() -> None:
    pq = operands(256, 64).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        h, _ = mingru_scan(pq)
    saved = {value.data_ptr(): value.numel() * value.element_size() for value in kept}
    assert sum(saved.values()) / h.numel() <= 12  # bytes: p, q and h (spec 2.6)


def test_compile_and_export_see_one_node() -> None:
    class Scan(torch.nn.Module):
        def forward(self, pq: Tensor) -> Tensor:
            return mingru_scan(pq * 2, reverse=[False, True])[0]

    pq = operands(20, 3, groups=2)
    wanted = Scan()(pq)
    program = torch.export.export(Scan(), (pq,))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("foveate.scan.default") == 1
    torch.testing.assert_close(program.module()(pq), wanted)
    plain = program.run_decompositions(scan_decompositions())
    assert not any("foveate" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(pq), wanted)

    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Scan(), backend=keep, fullgraph=True)  # type: ignore[arg-type]
    torch.testing.assert_close(compiled(pq), wanted)
    calls = [node for graph in graphs for node in graph.graph.nodes if "scan" in str(node.target)]
    assert len(calls) == 1


def test_operator_is_registered_as_torch_wants_it() -> None:
    x = operands(5, 3).view(2, 5, 1, 2, 3).requires_grad_()
    state = torch.rand(2, 1, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.foveate.scan.default, (x, None, state, [True], "torch"))
    a, b = (torch.rand(2, 5, 1, 3, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.foveate.scan.default, (a, b, None, [False], "auto"))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: linear_scan(torch.ones(2, 3), torch.ones(3, 2)), r"one shape .* \(2, 3\)"),
        (lambda: linear_scan(torch.ones(2), torch.ones(2).double(), dim=0), "one shape and floating dtype"),
        (lambda: linear_scan(torch.ones(2, 3), torch.ones(2, 3), dim=5), "no dimension 5"),
        (lambda: linear_scan(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)), r"state of shape \(3,\)"),
        (lambda: linear_scan(torch.ones(2, 3), torch.ones(2, 3), backend="logspace"), "minGRU gates only"),
        (lambda: mingru_scan(torch.ones(2, 3, 5)), r"pq \(N, L, 2 \* C\)"),
        (lambda: mingru_scan(torch.ones(2, 3, 4), torch.ones(2, 2)), r"state of shape \(2, 1, 2\)"),
        (lambda: mingru_scan(torch.ones(1, 1, 2), backend="numbra"), "did you mean 'numba'"),
    ],
)
def test_bad_input(call: object, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        call()  # type: ignore[operator]


def test_environment_names_the_backend() -> None:
    code = "from foveate.ops import scan_backend_in_use; print(scan_backend_in_use())"
    for name, wanted in (("torch", "torch"), ("reference", "reference")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"FOVEATE_SCAN_BACKEND": name, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 2, 65, 1000, 4097])
@pytest.mark.parametrize("batch", [1, 300])
def test_triton(length: int, batch: int) -> None:
    pytest.importorskip("triton")
    results = []
    for device, name, kind in (("cuda", "triton", torch.float32), ("cpu", "reference", torch.float64)):
        pq = operands(length, 70, batch, groups=2, dtype=kind, device=device).requires_grad_()
        state = operands(1, 70, batch, seed=1, dtype=kind, device=device).abs().requires_grad_()
        h, last = mingru_scan(pq, state, [False, True], backend=name)
        total = (h.cos() * h).sum() + last.sin().sum()
        results.append([value.cpu() for value in (h, last, *torch.autograd.grad(total, [pq, state]))])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=1e-5 * wanted.abs().max().item())
    a, b = torch.rand(2, length, 40, device="cuda"), torch.randn(2, length, 40, device="cuda")
    assert scan_backend_in_use("cuda") == "triton"
    torch.testing.assert_close(
        linear_scan(a, b).cpu().double(), linear_scan(a.cpu().double(), b.cpu().double(), backend="reference")
    )


INTERPRETED = """
import torch
from foveate.ops.scan import torch_backend, triton_backend

torch.manual_seed(0)
for chunk in (None, 16):
    for fused, groups in ((True, 2), (False, 1)):
        whole = triton_backend._chunks
        triton_backend._chunks = lambda h: (h.shape[1], 1) if chunk is None else (chunk, -(-h.shape[1] // chunk))
        x = torch.randn(2, 35, groups, 2, 70) if fused else torch.rand(2, 35, groups, 70)
        y = None if fused else torch.randn(2, 35, groups, 70)
        h0, dh, dlast = torch.rand(2, groups, 70), torch.randn(2, 35, groups, 70), torch.randn(2, groups, 70)
        reverse = [True, False][:groups]
        h, last = torch_backend.forward(x, y, h0, reverse)
        wanted = (h, last, *torch_backend.backward(x, y, h, h0, dh, dlast, reverse))
        found = triton_backend.forward(x, y, h0, reverse)
        found += triton_backend.backward(x, y, h, h0, dh, dlast, reverse)
        for ours, theirs in zip(found, wanted, strict=True):
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        triton_backend._chunks = whole
print("equal")
"""


def test_triton_kernels_in_its_interpreter() -> None:
    """The kernels' arithmetic without a GPU: chunks, ragged ends, both directions, forward and backward."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path), "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr
