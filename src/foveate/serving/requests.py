"""Requests as they come over the wire -> checked schemas and the picture's bytes."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request

from .errors import ApiError, bad_request
from .schemas import Body, ChatRequest, DescribeBody, EverythingBody, ImagePart, RegionsBody, SystemMessage
from .settings import Settings

B = TypeVar("B", bound=Body)

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.IGNORECASE)
_FIELDS_OF_A_FORM = 64


async def read_json(request: Request, schema: type[B], settings: Settings) -> B:
    """The body of a JSON request.

    Raises:
        ApiError: 400 for what is no JSON or does not fit the schema, 415 for another content type.
    """
    kind = content_type(request)
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind[:80]!r}; send application/json.", "content_type")
    return _validated(schema, _parsed(await request.body(), settings))


async def read_picture_request(request: Request, schema: type[B], settings: Settings) -> tuple[B, bytes]:
    """The body of a request with a picture, and the picture's bytes: JSON with base64, or multipart/form-data with the
    part `image` and the other fields as JSON texts.

    Raises:
        ApiError: 400 for what cannot be read or does not fit the schema, 415 for another content type.
    """
    kind = content_type(request)
    if kind == "application/json":
        fields = _parsed(await request.body(), settings)
        if not isinstance(fields, dict) or not isinstance(fields.get("image"), str):
            raise bad_request("the body must be an object with image, a base64 text or data: URL.", "image")
        picture = decode_picture(fields.pop("image"), "image")
        return _validated(schema, fields), picture
    if kind != "multipart/form-data":
        raise ApiError(
            415, f"the content type is {kind[:80]!r}; send application/json or multipart/form-data.", "content_type"
        )
    fields, picture = {}, None
    try:
        form = await request.form(max_files=1, max_fields=_FIELDS_OF_A_FORM, max_part_size=2**23)
    except (ApiError, ClientDisconnect):
        raise
    except Exception as error:  # the parser raises many types, and starlette an HTTPException of some
        reason = _first_line(getattr(error, "detail", error))
        raise bad_request(f"the multipart body cannot be read ({reason}); send it anew.") from None
    try:
        _check_values([value for _, value in form.multi_items() if isinstance(value, str)], settings)
        for name, value in form.multi_items():
            if name in fields or (name == "image" and picture is not None):
                raise bad_request(f"the form has {name[:80]!r} twice; send each field once.", name[:80])
            if isinstance(value, UploadFile):
                if name != "image":
                    raise bad_request(f"the form has a file {name[:80]!r}; the picture's field is image.", name[:80])
                picture = await value.read()  # whatever it is called: its name is not looked at
            elif name == "image":
                picture = decode_picture(value, "image")
            else:
                fields[name] = _form_value(value)
    finally:
        await form.close()
    if picture is None:
        raise bad_request("the form has no image; send the picture as the part image.", "image")
    if not picture:
        raise bad_request("the image is empty (0 bytes); give a complete image file.", "image")
    return _validated(schema, fields), picture


def content_type(request: Request) -> str:
    """The media type of a request's body, without parameters."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def decode_picture(text: str, param: str) -> bytes:
    """The bytes of a picture that is base64 or a data: URL.

    Raises:
        ApiError: 400: it is a URL of another kind, or no base64.
    """
    match = _DATA_URL.match(text)
    if match:
        text = text[match.end() :]
    elif re.match(r"[a-z][a-z0-9+.-]*:", text[:40], re.IGNORECASE):
        raise bad_request(
            f"{param} is a URL ({text[:60]!r}), and nothing is fetched; give data:image/png;base64,...",
            param,
        )
    try:
        picture = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{param} is not base64 ({text[:40]!r}); encode the picture's file.", param) from None
    if not picture:
        raise bad_request(f"{param} is empty; give a complete image file.", param)
    return picture


def describe_spec(body: DescribeBody, settings: Settings) -> dict[str, Any]:
    """What the worker is told of a request for regions.

    Raises:
        ApiError: 400: more boxes or text than the server takes.
    """
    texts = [*(body.classes or ()), *body.controls]
    _check_text(texts, settings)
    spec = body.model_dump(exclude={"model", "stream"})
    if isinstance(body, RegionsBody):
        count = len(body.boxes or ()) + len(body.masks or ())
        if count > settings.max_boxes:
            raise bad_request(
                f"{count} boxes and masks are more than the {settings.max_boxes} that this server takes at a time; "
                "split them over several requests.",
                "boxes",
                "too_many_boxes",
            )
        runs = sum(len(mask.counts) for mask in body.masks or ())
        if runs > settings.max_values:
            raise _too_many(runs, settings)
        if body.boxes is None and body.masks is None:
            count = 1
        spec["kind"] = "regions"
    else:
        assert isinstance(body, EverythingBody)
        count = body.max_regions
        if count > settings.max_boxes:
            raise bad_request(
                f"max_regions is {count}, more than the {settings.max_boxes} that this server takes.",
                "max_regions",
                "too_many_boxes",
            )
        spec["kind"] = "everything"
    for pictures in ("views", "attention"):
        if getattr(body, pictures) and count > settings.max_view_regions:
            raise bad_request(
                f"{pictures} {'are' if pictures == 'views' else 'is'} given for at most {settings.max_view_regions} "
                f"regions a request, not {count}; ask for fewer, or without {pictures}.",
                pictures,
                "too_many_views",
            )
    return spec


def chat_spec(body: ChatRequest, settings: Settings) -> tuple[dict[str, Any], bytes]:
    """What the worker is told of a chat, and the picture's bytes (none without one).

    Raises:
        ApiError: 400: turns in another order, several pictures, a picture after the first question, too much.
    """
    picture = b""
    turns: list[tuple[str, str]] = []
    asked: str | None = None
    before: list[str] = []
    for number, message in enumerate(body.messages):
        param = f"messages[{number}]"
        if isinstance(message, SystemMessage):
            if turns or asked is not None:
                raise bad_request(f"a {message.role} message comes before the first question; move it there.", param)
            before.append(_said(message.content, param)[0])
            continue
        if (message.role == "user") != (asked is None):
            raise bad_request("user and assistant must take turns, the user first.", param)
        text, pictures = _said(message.content, param)
        if message.role == "user":
            if not text.strip():
                raise bad_request(f"{param} has no question; give it a text.", param)
            if pictures and (turns or len(pictures) > 1):
                raise bad_request(
                    "one picture is looked at, and it belongs to the first message; leave the others out.", param
                )
            if pictures:
                picture = pictures[0]
            # The models' templates have no place for what comes before.
            asked = "\n".join(part for part in (*before, text) if part.strip())
            before = []
        else:
            assert asked is not None
            turns.append((asked, text))
            asked = None
    if asked is None:
        raise bad_request("the last message must be the user's question.", "messages")
    stops = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
    _check_text([asked, *(text for turn in turns for text in turn), *stops], settings)
    if body.boxes is not None and len(body.boxes) > settings.max_boxes:
        raise bad_request(
            f"{len(body.boxes)} boxes are more than the {settings.max_boxes} that this server takes.",
            "boxes",
            "too_many_boxes",
        )
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise bad_request("max_tokens is the old name of max_completion_tokens; give one of them.", "max_tokens")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if most is not None and most > settings.max_new_tokens:
        raise bad_request(
            f"{most} new tokens are more than the {settings.max_new_tokens} that this server gives.", "max_tokens"
        )
    generation = {
        "max_new_tokens": most,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "stops": stops or None,
    }
    return {
        "kind": "chat",
        "question": asked,
        "turns": turns,
        "boxes": body.boxes,
        "keep": body.keep,
        "generation": {name: value for name, value in generation.items() if value is not None},
    }, picture


def _said(content: Any, param: str) -> tuple[str, list[bytes]]:
    """The text of a message and its pictures."""
    if isinstance(content, str):
        return content, []
    texts = [part.text for part in content if not isinstance(part, ImagePart)]
    urls = [part.image_url.url for part in content if isinstance(part, ImagePart)]
    for url in urls:
        if not _DATA_URL.match(url):
            raise bad_request(
                f"image_url of {param} is {url[:60]!r}, and nothing is fetched; give data:image/png;base64,...",
                param,
            )
    return "\n".join(texts), [decode_picture(url, f"image_url of {param}") for url in urls]


def _check_text(texts: list[str], settings: Settings) -> None:
    count = sum(map(len, texts))
    if count > settings.max_text:
        raise bad_request(
            f"{count} characters of text are more than the {settings.max_text} that this server takes; use fewer.",
            None,
            "text_too_long",
        )


def _check_values(texts: Sequence[bytes] | Sequence[str], settings: Settings) -> None:
    """What is JSON in a request is parsed on the event loop, where a body that is all small values would stop it for
    seconds. Separators are counted beforehand; a picture in base64 has none."""
    marks: Any = (b",", b"[", b"{") if texts and isinstance(texts[0], bytes) else (",", "[", "{")
    count = sum(text.count(mark) for text in texts for mark in marks)
    if count > settings.max_values:
        raise _too_many(count, settings)


def _too_many(count: int, settings: Settings) -> ApiError:
    return bad_request(
        f"the request has {count} values, more than the {settings.max_values} that this server takes; give fewer "
        "boxes or masks at a time, and masks in COCO's compressed form.",
        None,
        "too_many_values",
    )


def _parsed(body: bytes, settings: Settings) -> Any:
    _check_values([body], settings)
    try:
        return from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON ({_first_line(error)}); mend it.", None, "invalid_json") from None


def _form_value(text: str) -> Any:
    """A field of a form: JSON, or a text that needs no quotes."""
    try:
        return from_json(text, allow_inf_nan=False)
    except ValueError:
        return text


def _validated(schema: type[B], fields: Any) -> B:
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)[:100]
        # Of alternatives, the one that was meant is the one that went furthest.
        paths = [_path(own["loc"], fields, own["type"] == "missing") for own in found]
        first, path = max(zip(found, paths, strict=True), key=lambda own: len(own[1]))
        where = ".".join(path)
        given = "" if first["type"] == "missing" else f", not {first['input']!r:.80}"
        said = f"{where or 'the body'}: {_first_line(first['msg'][:1].lower() + first['msg'][1:])}{given}"
        raise bad_request(f"{said}; see /docs.", where or None) from None


def _path(location: Sequence[str | int], given: Any, missing: bool) -> list[str]:
    """The place of an error in what was given: without pydantic's names of alternatives."""
    path: list[str] = []
    for part in location:
        if isinstance(given, dict):
            if part not in given:
                continue
        elif not isinstance(given, list) or not isinstance(part, int):
            continue
        given = cast(Any, given)[part]
        path.append(str(part))
    return [*path, str(location[-1])] if missing else path


def _first_line(error: object) -> str:
    text = str(error).strip().split("\n")[0].rstrip(".")
    return (text or type(error).__name__)[:200]
