"""`create_app(settings)`: the routes of the API and the page."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from foveate import __version__

from .engine import Engine, Ticket
from .errors import ApiError, bad_request
from .guards import Guard
from .metrics import CONTENT_TYPE, Metrics
from .requests import chat_spec, describe_spec, read_json, read_picture_request
from .samples import samples
from .schemas import (
    ChatRequest,
    ChatResponse,
    ErrorResponse,
    EverythingBody,
    EverythingRequest,
    ModelList,
    ModelOut,
    RegionsBody,
    RegionsRequest,
    RegionsResponse,
    SampleList,
)
from .settings import Settings

ROUTES = {"describe": ["/v1/regions", "/v1/everything"], "ask": ["/v1/chat/completions"]}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": what}
    for status, what in {
        400: "The picture, a box, a text or an option is wrong.",
        401: "The bearer token is missing or wrong.",
        403: "The request comes from another site.",
        404: "There is no such model.",
        408: "The body did not arrive in time.",
        413: "The body is too large.",
        415: "The content type is another.",
        429: "Too much waits already; Retry-After says when to come back.",
        503: "The model is not there just now; send it again.",
        504: "The model took too long.",
    }.items()
}


def create_app(settings: Settings) -> FastAPI:
    """The application of a server.

    Raises:
        InputError: a model does not exist.
        CheckpointError: its folder holds none.
    """
    metrics = Metrics()
    engine = Engine(settings, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            await engine.stop()

    app = FastAPI(
        title="foveate",
        version=__version__,
        description="Describe regions of pictures and answer questions about them.",
        lifespan=lifespan,
        docs_url=None,  # whose page loads scripts from other hosts
        redoc_url=None,
    )
    _add_routes(app, engine, settings)
    _add_error_handlers(app)
    page = resources.files("foveate.serving").joinpath("page")
    app.mount("/", StaticFiles(directory=str(page), html=True), name="page")
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(Guard, settings=settings, metrics=metrics, routes=routes)
    return app


def _add_routes(app: FastAPI, engine: Engine, settings: Settings) -> None:
    async def describe(request: Request, body: Any, picture: bytes, name: str) -> Response:
        model = engine.model("describe", body.model)
        ticket = engine.submit("describe", describe_spec(body, settings), picture, client_of(request))
        number = f"{name}-{uuid.uuid4().hex}"
        if body.stream:
            first = await _first(request, ticket)
            return _event_stream(_region_events(ticket, first[1], number, model))
        out: dict[str, Any] = {"id": number, "object": "regions", "model": model}
        async with _cancelled_on_disconnect(request, ticket):
            regions = []
            async for event, data in ticket.events():
                if event == "region":
                    regions.append(data)
                else:
                    out |= {key: value for key, value in data.items() if key in ("width", "height", "milliseconds")}
        return JSONResponse({**out, "regions": regions})

    @app.post(
        "/v1/regions",
        response_model=RegionsResponse,
        responses=_ERRORS,
        openapi_extra=_picture_body(RegionsRequest, RegionsBody),
        tags=["describe"],
    )
    async def regions(request: Request) -> Response:
        """Describe regions of a picture: caption, tags, attributes, category, each with its probability."""
        body, picture = await read_picture_request(request, RegionsBody, settings)
        return await describe(request, body, picture, "regions")

    @app.post(
        "/v1/everything",
        response_model=RegionsResponse,
        responses=_ERRORS,
        openapi_extra=_picture_body(EverythingRequest, EverythingBody),
        tags=["describe"],
    )
    async def everything(request: Request) -> Response:
        """Find the regions of a picture and describe them, the surest first."""
        body, picture = await read_picture_request(request, EverythingBody, settings)
        return await describe(request, body, picture, "everything")

    @app.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses=_ERRORS,
        openapi_extra=_json_body(ChatRequest),
        tags=["ask"],
    )
    async def chat(request: Request) -> Response:
        """Answer a question about a picture, in the form of OpenAI's API."""
        body = await read_json(request, ChatRequest, settings)
        if body.stream_options is not None and not body.stream:
            raise bad_request("stream_options belong to stream: true; give both or neither.", "stream_options")
        model = engine.model("ask", body.model)
        spec, picture = chat_spec(body, settings)
        ticket = engine.submit("ask", spec, picture, client_of(request))
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            await _first(request, ticket)
            return _event_stream(_chat_events(ticket, head, usage))
        async with _cancelled_on_disconnect(request, ticket):
            async for event, data in ticket.events():
                if event == "done":
                    return JSONResponse(_completion(head, data))
        raise AssertionError("the last event is done")

    def listed_models() -> list[dict[str, Any]]:
        return [
            {
                "id": own.name,
                "object": "model",
                "created": 0,
                "owned_by": "foveate",
                "verb": verb,
                "routes": ROUTES[verb],
                "world_only": own.world_only,
                "note": own.note,
                "loaded": engine.is_loaded(verb),
            }
            for verb, own in engine.models.items()
        ]

    @app.get("/v1/models", response_model=ModelList, responses=_ERRORS, tags=["server"])
    async def models() -> Response:
        """Which model answers which verb, and what it knows."""
        limits = {
            name: getattr(settings, name)
            for name in (
                "max_request_bytes",
                "max_pixels",
                "max_boxes",
                "max_text",
                "max_values",
                "max_new_tokens",
                "max_view_regions",
                "request_timeout",
            )
        }
        return JSONResponse({"object": "list", "data": listed_models(), "limits": limits})

    @app.get("/v1/models/{name}", response_model=ModelOut, responses=_ERRORS, tags=["server"])
    async def model(name: str) -> Response:
        """One of the models."""
        for own in listed_models():
            if own["id"] == name:
                return JSONResponse(own)
        raise ApiError(404, f"this server has no model {name[:80]!r}; see /v1/models.", "model_not_found")

    @app.get("/v1/samples", response_model=SampleList, responses=_ERRORS, tags=["server"])
    async def sample_pictures() -> Response:
        """A few rendered pictures to try."""
        return JSONResponse({"object": "list", "data": await asyncio.to_thread(samples)})

    @app.get("/healthz", tags=["server"])
    async def healthz() -> dict[str, str]:
        """Whether the server runs."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: _ERRORS[503]}, tags=["server"])
    async def readyz() -> dict[str, str]:
        """Whether it would take work now."""
        engine.check_ready()
        return {"status": "ready"}

    @app.get("/metrics", response_class=Response, responses={401: _ERRORS[401]}, tags=["server"])
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(engine.metrics.render(), media_type=CONTENT_TYPE)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        page = resources.files("foveate.serving").joinpath("page", "docs.html")
        return Response(page.read_bytes(), media_type="text/html")

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            known = schema["components"]["schemas"]
            for body in (RegionsRequest, EverythingRequest, ChatRequest):
                own = _own_schema(body)
                known |= own.pop("$defs", {})
                known[body.__name__] = own
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def client_of(request: Request) -> str:
    """Who shares the model's time: the owner of a token, else an address."""
    return request.scope.get("foveate.client") or (request.client.host if request.client else "")


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------


async def _first(request: Request, ticket: Ticket) -> tuple[str, Any]:
    """The first event of a stream, so that what is wrong with the request is still an answer with a status."""
    watcher = asyncio.create_task(_watch(request, ticket))
    try:
        return await ticket.next()
    except BaseException:
        ticket.cancel()
        raise
    finally:
        watcher.cancel()


async def _watch(request: Request, ticket: Ticket) -> None:
    """Gives a job up when its client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    ticket.cancel()


@asynccontextmanager
async def _cancelled_on_disconnect(request: Request, ticket: Ticket) -> AsyncIterator[None]:
    """Within the block, a client that goes away ends its work."""
    watcher = asyncio.create_task(_watch(request, ticket))
    try:
        yield
    finally:
        watcher.cancel()
        ticket.cancel()


def _event_stream(events: AsyncIterator[str]) -> Response:
    return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


def _event(name: str | None, data: Any) -> str:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


async def _region_events(ticket: Ticket, start: dict[str, Any], number: str, model: str) -> AsyncIterator[str]:
    try:
        yield _event("start", {"id": number, "model": model, **start})
        async for event, data in ticket.events():
            yield _event(event, data)
    except ApiError as error:
        yield _event("error", error.to_dict())
    finally:
        ticket.cancel()


async def _chat_events(ticket: Ticket, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event(None, {**head, "choices": [choice], **({"usage": None} if usage else {}), **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for event, data in ticket.events():
            if event == "piece":
                yield chunk({"content": data["text"]})
            else:
                yield chunk({}, data["finish"], foveate=data["foveate"])
                if usage:
                    yield _event(None, {**head, "choices": [], "usage": _usage(data)})
        yield _event(None, "[DONE]")
    except ApiError as error:
        yield _event(None, error.to_dict())
    finally:
        ticket.cancel()


def _completion(head: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    message = {"role": "assistant", "content": data["text"], "refusal": None}
    return {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": data["finish"], "logprobs": None}],
        "usage": _usage(data),
        "foveate": data["foveate"],
    }


def _usage(data: dict[str, Any]) -> dict[str, int]:
    read, said = data["prompt_tokens"], data["completion_tokens"]
    return {"prompt_tokens": read, "completion_tokens": said, "total_tokens": read + said}


# ---------------------------------------------------------------------------------------------------------------------
# Errors and the schema
# ---------------------------------------------------------------------------------------------------------------------


def error_response(error: ApiError) -> Response:
    """The answer that an error is."""
    return JSONResponse(error.to_dict(), status_code=error.status, headers=error.headers)


def _add_error_handlers(app: FastAPI) -> None:
    methods = {
        route.path: ", ".join(sorted(route.methods or ())) for route in app.routes if isinstance(route, APIRoute)
    }

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status, allowed = error.status_code, methods.get(request.url.path)
        if status == 404 and allowed:  # what a route does not take, the page was looked through for
            status = 405
            error.headers = {"Allow": allowed}
        said = {
            404: ApiError(404, f"there is nothing at {request.url.path[:200]!r}; see /docs.", "not_found"),
            405: ApiError(
                405, f"{request.method[:20]} does not go with {request.url.path[:200]!r}; see /docs.", "method"
            ),
        }
        known = said.get(status, ApiError(status, str(error.detail)))
        known.headers |= dict(error.headers or {})
        return error_response(known)

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)


def _ref(schema: type[Any]) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}


def _json_body(schema: type[Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": _ref(schema)}}}


def _picture_body(in_json: type[Any], form: type[Any]) -> dict[str, Any]:
    content = {"application/json": _ref(in_json), "multipart/form-data": {"schema": _form(form)}}
    return {"requestBody": {"required": True, "content": content}}


def _form(body: type[Any]) -> dict[str, Any]:
    """A body as a form, whose picture is a file and whose other fields are JSON texts."""
    schema = _own_schema(body)
    schema.pop("$defs", None)
    image = {"type": "string", "format": "binary", "description": "the picture's file"}
    properties = {"image": image, **schema["properties"]}
    return {**schema, "properties": properties, "required": ["image", *schema.get("required", ())]}


def _own_schema(body: type[Any]) -> dict[str, Any]:
    return body.model_json_schema(ref_template="#/components/schemas/{model}")
