"""Load on `foveate serve` over loopback: throughput and latency with and without batching, memory over time, overload.

    python benchmarks/serve.py
    python benchmarks/serve.py --clients 32 --seconds 20 --memory-seconds 600 --out out/benchmarks/serve.json

Clients ask for one region of a rendered scene, again and again, each as soon as it has its answer. Server, worker and
share the machine, so that figures of two machines do not compare, but ratios of one run do. "CPU ms" is processor time
a request: of the worker (the model), of the server (HTTP), and of the clients. Overload is twice the throughput of the
largest number of clients, sent at fixed times whether answers come or not.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

from foveate.world.scenes import render_scene

CLIENTS = (1, 8, 32)
TARGET_CLIENTS, TARGET_RATIO = 32, 2.5
PATIENCE = 300.0


@contextmanager
def serving(batch_size: int, queue: int) -> Any:
    """A server with `dynrefer-world`; gives its address and its process."""
    command = [sys.executable, "-c", "from foveate.cli import main; main()", "serve", "--port", "0"]
    command += ["--batch-size", str(batch_size), "--max-queue", str(queue)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit("the server did not start; run `foveate serve` to see why")
        url = found.group()
        deadline = time.monotonic() + PATIENCE
        while not _ready(url):
            if time.monotonic() > deadline:
                raise SystemExit(f"the server is not ready after {PATIENCE:g} s")
            time.sleep(0.2)
        bodies()
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def _ready(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
    return False


@cache
def bodies() -> list[bytes]:
    """Requests for one region each, of scenes of 256 x 256 pixels."""
    requests = []
    for seed in range(8):
        scene = render_scene(seed, 256)
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "PNG")
        image = base64.b64encode(file.getvalue()).decode("ascii")
        for item in scene.instances:
            box = [float(value) for value in item.box]
            requests.append(json.dumps({"image": image, "boxes": [box]}).encode())
    return requests


async def send(client: httpx.AsyncClient, body: bytes) -> tuple[int, float]:
    """The status of an answer, 0 for none, and its seconds."""
    started = time.perf_counter()
    try:
        response = await client.post("/v1/regions", content=body, headers={"Content-Type": "application/json"})
        status = response.status_code
    except httpx.HTTPError:
        status = 0
    return status, time.perf_counter() - started


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False)


def _processor_seconds(server: psutil.Process) -> dict[str, float]:
    """Of the worker, the server and this process, so far."""
    workers = server.children()
    spent = {"worker": workers, "server": [server], "clients": [psutil.Process()]}
    return {name: sum(sum(own.cpu_times()[:2]) for own in processes) for name, processes in spent.items()}


async def closed_loop(url: str, server: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    """So many clients, each with one request at a time; answers of the first quarter of the time do not count."""
    requests = bodies()
    counted: list[tuple[int, float]] = []
    total = 0
    spent = _processor_seconds(server)
    async with _client(url) as client:
        begin = time.perf_counter() + seconds / 4
        end = begin + seconds

        async def ask(number: int) -> None:
            nonlocal total
            count = number
            while time.perf_counter() < end:
                answer = await send(client, requests[count % len(requests)])
                count += clients
                total += 1
                if begin <= time.perf_counter() <= end:
                    counted.append(answer)

        await asyncio.gather(*(ask(number) for number in range(clients)))
    after = _processor_seconds(server)
    costs = {f"{name}_cpu_ms": 1000 * (after[name] - spent[name]) / max(1, total) for name in spent}
    return {"clients": clients, "requests_per_second": len(counted) / seconds, **_summary(counted), **costs}


async def open_loop(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at fixed times, whether answers come or not; all of them are waited for."""
    requests = bodies()
    async with _client(url) as client:
        tasks = []
        started = time.perf_counter()
        for number in range(max(1, round(rate * seconds))):
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(send(client, requests[number % len(requests)])))
        sent = time.perf_counter() - started
        answers = await asyncio.gather(*tasks)
    summary = _summary([answer for answer in answers if answer[0] == 200])
    statuses = Counter(str(status) for status, _ in answers)
    return {
        "sent_per_second": len(answers) / sent,
        "seconds_of_sending": sent,
        "answered": statuses["200"],
        "refused": statuses["429"],
        "other": len(answers) - statuses["200"] - statuses["429"],
        **{name: value for name, value in summary.items() if name != "failed"},
    }


def _summary(answers: list[tuple[int, float]]) -> dict[str, Any]:
    times = sorted(1000 * seconds for _, seconds in answers)
    if not times:
        return {"p50_ms": None, "p95_ms": None, "p99_ms": None, "failed": 0}
    at = {f"p{share}_ms": times[min(len(times) - 1, int(share / 100 * len(times)))] for share in (50, 95, 99)}
    return {**at, "failed": sum(status != 200 for status, _ in answers)}


async def memory_over_time(url: str, process: psutil.Process, clients: int, seconds: float) -> dict[str, Any]:
    """Resident memory of server and worker under load, once a second; growth is between the medians of the second and
    the last quarter, for in the first caches fill."""
    samples_mib: list[float] = []

    async def watch() -> None:
        while True:
            family = [process, *process.children(recursive=True)]
            samples_mib.append(sum(own.memory_info().rss for own in family) / 2**20)
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watch())
    load = await closed_loop(url, process, clients, seconds)
    watcher.cancel()
    quarter = max(1, len(samples_mib) // 4)
    before = statistics.median(samples_mib[quarter : 2 * quarter] or samples_mib)
    after = statistics.median(samples_mib[-quarter:])
    return {
        "seconds": seconds,
        "clients": clients,
        "requests_per_second": load["requests_per_second"],
        "before_mib": before,
        "after_mib": after,
        "growth_mib": after - before,
        "most_mib": max(samples_mib),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Load on foveate serve over loopback.")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--memory-seconds", type=float, default=60.0, help="of the measurement of memory; 0 for none")
    parser.add_argument("--batch-size", type=int, default=64, help="regions that run together")
    parser.add_argument("--queue", type=int, default=64, help="requests that wait or run; 429 beyond")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    if min(arguments.clients) < 1 or arguments.seconds <= 0:
        parser.error("give clients of 1 or more and seconds above 0")
    most = max(arguments.clients)
    rows: list[dict[str, Any]] = []
    more: dict[str, Any] = {}
    heads = ("p50 ms", "p95 ms", "p99 ms", "failed", "CPU ms: worker", "server", "clients")
    columns = ("p50_ms", "p95_ms", "p99_ms", "failed", "worker_cpu_ms", "server_cpu_ms", "clients_cpu_ms")
    print(f"{'batching':>9} {'clients':>8} {'requests/s':>11} {' '.join(f'{head:>8}' for head in heads)}")
    for batch_size in (1, arguments.batch_size):
        with serving(batch_size, max(arguments.queue, most)) as (url, process):
            asyncio.run(closed_loop(url, process, 2, 1))  # loads the model
            for clients in arguments.clients:
                row = {"batch_size": batch_size, **asyncio.run(closed_loop(url, process, clients, arguments.seconds))}
                rows.append(row)
                cells = (f"{row[name] or 0:>{max(8, len(head))}.0f}" for name, head in zip(columns, heads, strict=True))
                print(
                    f"{'no' if batch_size == 1 else 'yes':>9} {clients:>8} {row['requests_per_second']:>11.1f} "
                    f"{' '.join(cells)}",
                    flush=True,
                )
            if batch_size > 1:
                if arguments.memory_seconds:
                    more["memory"] = asyncio.run(memory_over_time(url, process, 8, arguments.memory_seconds))
                rate = 2 * rows[-1]["requests_per_second"]
                more["overload"] = asyncio.run(open_loop(url, rate, arguments.seconds))
                more["after_overload"] = asyncio.run(closed_loop(url, process, 1, 2))
    by_size = {(row["batch_size"], row["clients"]): row["requests_per_second"] for row in rows}
    ratios = {str(n): by_size[arguments.batch_size, n] / (by_size[1, n] or 1e-9) for n in arguments.clients}
    for clients, ratio in ratios.items():
        target = f" (target {TARGET_RATIO})" if int(clients) == TARGET_CLIENTS else ""
        print(f"{clients} clients: batching gives {ratio:.2f} times the throughput{target}")
    if "memory" in more:
        own = more["memory"]
        print(
            f"memory over {own['seconds']:g} s at {own['clients']} clients: {own['before_mib']:.0f} MiB, then "
            f"{own['after_mib']:.0f} MiB ({own['growth_mib']:+.1f}), at most {own['most_mib']:.0f} MiB"
        )
    own = more["overload"]
    print(
        f"overload of {own['sent_per_second']:.0f} requests/s: {own['answered']} answered "
        f"(p99 {own['p99_ms'] or 0:.0f} ms), "
        f"{own['refused']} refused with 429, {own['other']} otherwise"
    )
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        arguments.out.write_text(json.dumps({"machine": machine, "rows": rows, "ratios": ratios, **more}, indent=2))
        print(f"written: {arguments.out}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
