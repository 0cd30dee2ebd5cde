"""A server's life: its worker is killed, stands still, and the server is told to end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from foveate.serving.process import WorkerGone, WorkerProcess


@pytest.fixture
def served(tmp_path: Path, start: Any) -> Iterator[Any]:
    arguments = ["--request-timeout", "10", "--batch-size", "1", "--model", "ask=llava-next-world"]
    own = start(arguments, tmp_path / "log.txt")
    try:
        own.wait_until_ready()
        yield own
    finally:
        own.process.kill()


def test_from_a_killed_worker_to_the_end(served: Any, scenes: list[dict[str, Any]]) -> None:
    box = scenes[0]["objects"][0]["box"]

    def describe(count: int = 1, stream: bool = False) -> httpx.Response:
        body = {"image": scenes[0]["image"], "boxes": [box] * count, "tasks": ["category"], "stream": stream}
        return served.client.post("/v1/regions", json=body)

    # A shipped model without tokens of objects has no need of a proposer.
    parts = [
        {"type": "text", "text": "what colour is the sign?"},
        {"type": "image_url", "image_url": {"url": scenes[0]["image"]}},
    ]
    chat = {"model": "llava-next-world", "messages": [{"role": "user", "content": parts}], "keep": 0.4}
    answer = served.client.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"]

    # Without tokens it trusts who can reach it, so it answers to no name that others can give it.
    for host in ("evil.example", "127.0.0.1.evil.example", "[::1", ""):
        assert served.client.get("/v1/models", headers={"Host": host}).status_code == 403
    assert served.client.get("/v1/models", headers={"Host": "localhost:1"}).status_code == 200

    # Pictures of clients that went away while they wait to be read are not heaped up.
    memory = served.metric("process_resident_memory_bytes")
    body = b'{"image": "' + b"A" * (6 * 2**20) + b'"}'
    head = "POST /v1/regions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with served.paused():
        for _ in range(40):
            with socket.create_connection((httpx.URL(served.url).host, httpx.URL(served.url).port or 0)) as raw:
                raw.sendall(head.encode() + body)
                served.until(lambda: served.metric("foveate_jobs") == 1)
            served.until(lambda: served.metric("foveate_jobs") == 0)
        assert served.metric("process_resident_memory_bytes") - memory < 120 * 2**20
    assert describe().status_code == 200

    with ThreadPoolExecutor(2) as pool:
        killed = served.worker
        killed.suspend()  # so that the request is with it when it is killed
        lost = pool.submit(describe)
        served.until(lambda: served.metric("foveate_jobs") == 1)
        killed.kill()
        answer = lost.result()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "worker_lost"
        assert int(answer.headers["retry-after"]) >= 1
        served.wait_until_ready()
        assert served.worker.pid != killed.pid
        assert served.metric('foveate_worker_restarts_total{device="default"}') == 1
        assert describe().json()["regions"][0]["category"] == scenes[0]["objects"][0]["category"]

        # It stands still in the middle of an answer, and before one: both clients are told, and it goes on afterwards.
        with served.client.stream(
            "POST", "/v1/regions", json={"image": scenes[0]["image"], "boxes": [box] * 500, "stream": True}
        ) as response:
            lines = response.iter_lines()
            while next(lines) != "event: region":
                pass
            with served.paused():
                late = describe()
                rest = "".join(lines)
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"
        assert '"code":"timeout"' in rest
        assert "event: done" not in rest

        # What was accepted is finished, nothing more is accepted, nothing is left behind.
        with served.paused():
            taken = [pool.submit(describe, 2), pool.submit(describe, 2, stream=True)]
            served.until(lambda: served.metric("foveate_jobs") == 2)
            last = served.worker
            served.process.terminate()
            served.until(lambda: not _is_listening(served.url))
        plain, streamed = (answer.result() for answer in taken)
    assert plain.status_code == streamed.status_code == 200
    assert len(plain.json()["regions"]) == streamed.text.count("event: region") == 2
    assert "event: done" in streamed.text
    assert served.process.wait(60) == 0
    assert not last.is_running()
    log = served.log.read_text()
    assert "Unknown child process" not in log
    assert "Traceback" not in log


def _is_listening(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_a_worker_that_does_not_answer_is_killed() -> None:
    async def call() -> None:
        setup = {"names": {}, "proposers": {}, "max_pixels": 1}
        worker = await WorkerProcess.start(setup, lambda message: None)
        with pytest.raises(WorkerGone):  # it is still importing
            await worker.call({"do": "load", "verb": "ask"}, 0.05)
        await worker.gone.wait()
        with pytest.raises(WorkerGone):
            await worker.ready
        with pytest.raises(WorkerGone):
            await worker.call({"do": "load", "verb": "ask"}, 100)

    asyncio.run(call())
