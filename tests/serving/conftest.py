"""Servers as `foveate serve` starts them, in a process of their own, on a free port of this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

PATIENCE = 240.0
"""Seconds that anything may take before a test gives up; on a busy machine imports alone take minutes."""
TOKENS = ("first-token-of-the-tests", "second-token-of-the-tests")


class Served:
    """A running `foveate serve`.

    Attributes:
        url: where it answers.
        client: with a token of the server's, where it has some.
    """

    def __init__(self, arguments: list[str], log: Path, token: str | None = None) -> None:
        self.log = log
        command = [sys.executable, "-c", "from foveate.cli import main; main()", "serve", "--port", "0", *arguments]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, log.read_text()
        self.url = found.group()
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False)

    def until(self, what: Callable[[], Any]) -> Any:
        """Waits until something holds, and gives it."""
        deadline = time.monotonic() + PATIENCE
        while not (value := what()):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)
        return value

    def wait_until_ready(self) -> None:
        self.until(lambda: self.client.get("/readyz").status_code == 200)

    @property
    def worker(self) -> psutil.Process:
        """The process that has the models."""
        return psutil.Process(self.process.pid).children()[0]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block the worker stands still, so that requests wait in a known order."""
        worker = self.worker
        worker.suspend()
        try:
            yield
        finally:
            worker.resume()

    def metric(self, name: str) -> float:
        """The value of a metric, with its labels in the name."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        return 0.0

    def stop(self) -> int:
        """Asks it to end; its exit code."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Starts a server with arguments and a token; it ends with the block."""

    @contextlib.contextmanager
    def start(arguments: list[str], token: str | None = None) -> Iterator[Served]:
        served = Served(arguments, tmp_path_factory.mktemp("server") / "log.txt", token)
        try:
            served.wait_until_ready()
            yield served
        finally:
            assert served.stop() == 0, served.log.read_text()

    return start


@pytest.fixture(scope="session")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole MG-LLaVA with random weights."""
    from foveate.methods.mg_llava.processing import MGLlavaProcessor

    path = Path(__file__).parents[1] / "methods/mg_llava/parts.py"
    spec = importlib.util.spec_from_file_location("mg_llava_parts_of_serving", path)
    assert spec is not None
    assert spec.loader is not None
    parts: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    folder = tmp_path_factory.mktemp("asker") / "tiny-asker"
    model = parts.make_model()
    model.save_pretrained(folder)
    MGLlavaProcessor(parts.make_tokenizer(), model.config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def start() -> type[Served]:
    """Starts a server with arguments of `foveate serve`; it is to be stopped by who starts it."""
    return Served


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, asker: Path) -> Iterator[Served]:
    """With both verbs, two tokens and narrow limits. Leave it as it was."""
    folder = tmp_path_factory.mktemp("server")
    tokens = folder / "tokens.txt"
    tokens.write_text("# of the tests\n" + "\n".join(TOKENS) + "\n")
    options = {
        "--model": f"ask={asker}",
        "--token-file": str(tokens),
        "--max-queue": "8",
        "--batch-size": "8",
        "--batch-delay": "100",
        "--max-megabytes": "2",
        "--max-megapixels": "1",
        "--upload-timeout": "4",
        "--request-timeout": str(PATIENCE),
    }
    served = Served([part for option in options.items() for part in option], folder / "log.txt", TOKENS[0])
    try:
        served.wait_until_ready()
        yield served
    finally:
        assert served.stop() == 0, served.log.read_text()


@pytest.fixture(scope="session")
def scenes() -> list[dict[str, Any]]:
    """The sample pictures, made here."""
    from foveate.serving.samples import samples

    return samples()


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
