"""What `foveate serve` says before it serves."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from foveate.cli import main
from foveate.cli import serve as serve_verb


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    return err


def test_without_the_extra_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_verb, "find_spec", lambda name: None if name == "uvicorn" else object())
    said = refusal(capsys)
    assert "uvicorn" in said
    assert "pip install foveate[serve]" in said
    assert "fastapi" not in said


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_an_address_that_others_reach_needs_tokens(capsys: pytest.CaptureFixture[str], host: str) -> None:
    assert "--token-file" in refusal(capsys, "--host", host)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "describe"], "VERB=NAME"),
        (["--model", "depth=x"], "describe or ask"),
        (["--model", "ask=a", "--model", "ask=b"], "twice"),
        (["--model", "describe=dynrefer-wrold"], "did you mean 'dynrefer-world'"),
        (["--proposer", "ask=proposer-wrold"], "proposer-world"),
        (["--max-queue", "0"], "max_queue"),
        (["--request-timeout", "nan"], "request_timeout"),
        (["--request-timeout", "inf"], "request_timeout"),
        (["--upload-timeout", "inf"], "upload_timeout"),
        (["--max-megabytes", "nan"], "--max-megabytes"),
        (["--max-megapixels", "inf"], "--max-megapixels"),
        (["--max-megapixels", "65"], "no picture of more than 64000000"),
        (["--port", "70000"], "70000"),
    ],
)
def test_what_is_wrong_with_an_option_is_said(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert said in refusal(capsys, *arguments)


def test_a_port_that_is_taken_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened on" in refusal(capsys, "--port", str(port))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no token"),
        ("# only this\n\n", "has no token"),
        ("a-long-enough-first-token\nshort\n", "token 2"),
        ("a token with spaces in it\n", "other characters"),
        (None, "cannot be read"),
    ],
)
def test_a_file_of_tokens_is_checked_and_no_token_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str | None, said: str
) -> None:
    file = tmp_path / "tokens.txt"
    if text is not None:
        file.write_text(text)
    sentence = refusal(capsys, "--token-file", str(file))
    assert said in sentence
    assert "short" not in sentence
    assert "spaces" not in sentence
