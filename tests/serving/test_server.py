"""The API of a running server with both verbs: answers, streams, batches, fairness, and all that can be wrong."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.checks import not_a_server_error

from foveate.vision.images import encode_rle

Scenes = list[dict[str, Any]]


def boxes_of(scene: dict[str, Any]) -> list[list[float]]:
    return [item["box"] for item in scene["objects"]]


def events_of(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    """(event, data) of a stream."""
    event = ""
    for line in response.iter_lines():
        if line.startswith("event: "):
            event = line[7:]
        elif line.startswith("data: "):
            yield event, json.loads(line[6:])


def error_of(response: httpx.Response) -> dict[str, Any]:
    """What was wrong; every error has this form."""
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].strip()
    assert "\n" not in error["message"]
    return error


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 40)).save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Describing
# ---------------------------------------------------------------------------------------------------------------------


def test_models_say_which_verb_they_answer_and_what_they_know(server: Any) -> None:
    describe, ask = server.client.get("/v1/models").json()["data"]
    assert (describe["id"], describe["verb"], describe["world_only"]) == ("dynrefer-world", "describe", True)
    assert "rendered world only" in describe["note"]
    assert (ask["id"], ask["verb"], ask["world_only"], ask["note"]) == ("tiny-asker", "ask", False, None)


def test_regions_are_what_the_samples_say(server: Any, scenes: Scenes) -> None:
    assert server.client.get("/v1/samples").json()["data"] == scenes
    scene = scenes[0]
    wanted = {"image": scene["image"], "boxes": boxes_of(scene), "views": True, "scores": True}
    answer = server.client.post("/v1/regions", json=wanted).json()
    assert (answer["width"], answer["height"], answer["model"]) == (scene["width"], scene["height"], "dynrefer-world")
    assert [region["category"] for region in answer["regions"]] == [item["category"] for item in scene["objects"]]
    assert [region["box"] for region in answer["regions"]] == boxes_of(scene)
    for region in answer["regions"]:
        assert region["category"] in region["tags"]
        assert sum(region["category_scores"].values()) == pytest.approx(1, abs=0.01)
        assert max(region["category_scores"], key=region["category_scores"].get) == region["category"]
        assert set(region["tags"].items()) <= set(region["tag_scores"].items())
        assert set(region["attributes"].items()) <= set(region["attribute_scores"].items())
    picture = Image.open(io.BytesIO(base64.b64decode(scene["image"].split(",")[1])))
    nearest = answer["regions"][0]["views"][0]
    shown = Image.open(io.BytesIO(base64.b64decode(nearest["png"].removeprefix("data:image/png;base64,"))))
    assert nearest["t"] == 0
    assert np.array_equal(np.asarray(shown), np.asarray(picture.crop(nearest["box"])))
    assert all(max(view["box"][2:]) <= scene["width"] for region in answer["regions"] for view in region["views"])


def test_attention_comes_as_maps_of_the_views_and_changes_nothing_else(server: Any, scenes: Scenes) -> None:
    wanted = {"image": scenes[2]["image"], "boxes": boxes_of(scenes[2])[:2]}
    plain = server.client.post("/v1/regions", json=wanted).json()["regions"]
    regions = server.client.post("/v1/regions", json={**wanted, "attention": True}).json()["regions"]
    for region, expected in zip(regions, plain, strict=True):
        attention = region.pop("attention")
        assert region == expected
        assert {own["query"]: own.get("word") for own in attention} == {
            "region": None,
            "category": region["category"],
            "tag": next(iter(region["tags"])),
        }
        for own in attention:
            assert 0 < own["whole"] < 1
            assert {(view["t"], *view["box"]) for view in own["views"]} <= {
                (view["t"], *view["box"]) for view in region["views"]
            }
            for view in own["views"]:
                heat = Image.open(io.BytesIO(base64.b64decode(view["png"].removeprefix("data:image/png;base64,"))))
                assert (heat.mode, heat.size) == ("RGBA", (6, 6))
                alpha = np.asarray(heat)[..., 3]
                assert alpha.max() == 255
                # In proportion, so that the shares can be read off and add up.
                assert view["most"] * alpha.sum() / 255 == pytest.approx(1 - own["whole"], abs=0.02)


def test_a_form_and_masks_say_the_same_as_json_and_boxes(server: Any, scenes: Scenes) -> None:
    scene = scenes[1]
    box = [int(value) for value in boxes_of(scene)[0]]
    plain = {"tasks": ["caption", "category"], "view_policy": [0, 0.4, 1], "num_beams": 1}
    in_json = server.client.post("/v1/regions", json={"image": scene["image"], "boxes": [box], **plain}).json()
    mask = np.zeros((scene["height"], scene["width"]), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    picture = base64.b64decode(scene["image"].split(",")[1])
    fields = {name: json.dumps(value) for name, value in {**plain, "masks": [encode_rle(mask)]}.items()}
    for name in ("picture.png", "../../../etc/passwd", "/etc/shadow\0.png"):
        response = server.client.post("/v1/regions", files={"image": (name, picture)}, data=fields)
        assert response.status_code == 200, response.text
        assert response.json()["regions"] == in_json["regions"]
    region = in_json["regions"][0]
    assert [view["t"] for view in region["views"]] == [0, 0.4, 1]
    assert "tags" not in region
    assert "attributes" not in region


def test_a_stream_gives_the_regions_of_the_plain_answer_one_by_one(server: Any, scenes: Scenes) -> None:
    scene = scenes[2]
    wanted = {"image": scene["image"], "boxes": boxes_of(scene), "tasks": ["category"]}
    plain = server.client.post("/v1/regions", json=wanted).json()
    with server.client.stream("POST", "/v1/regions", json={**wanted, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    assert [event for event, _ in events] == ["start", *["region"] * len(boxes_of(scene)), "done"]
    assert [data for event, data in events if event == "region"] == plain["regions"]
    assert events[0][1]["total"] == events[-1][1]["regions"] == len(boxes_of(scene))
    assert events[0][1]["model"] == "dynrefer-world"
    times = events[-1][1]["milliseconds"]
    assert times["total"] == pytest.approx(times["queue"] + times["work"], abs=0.2)


def test_everything_finds_what_is_there(server: Any, scenes: Scenes) -> None:
    scene = scenes[0]
    wanted = {"image": scene["image"], "max_regions": 8, "tasks": ["caption", "category"], "num_beams": 1}
    plain = server.client.post("/v1/everything", json=wanted).json()
    scores = [region["score"] for region in plain["regions"]]
    assert scores == sorted(scores, reverse=True)
    there, found = ({own["category"] for own in listed} for listed in (scene["objects"], plain["regions"]))
    assert len(there & found) >= 0.7 * len(there)
    with server.client.stream("POST", "/v1/everything", json={**wanted, "stream": True}) as response:
        events = list(events_of(response))
    assert [data for event, data in events if event == "region"] == plain["regions"]
    # Of one caption at one place, one stays: what the predictor itself leaves out.
    both = server.client.post("/v1/everything", json={**wanted, "box_iou": None, "caption_iou": None}).json()["regions"]
    fewer = server.client.post("/v1/everything", json={**wanted, "box_iou": None, "caption_iou": 0.0}).json()["regions"]
    assert len(fewer) <= len(both)
    said = [(region["caption"], region["box"]) for region in fewer]
    for number, (caption, box) in enumerate(said):
        assert not any(other == caption and _overlap(box, own) > 0 for other, own in said[:number])


def _overlap(a: list[float], b: list[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: Any) -> Iterator[openai.OpenAI]:
    token = server.client.headers["authorization"].split()[1]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=token, timeout=240, max_retries=0) as client:
        yield client


def question(scene: dict[str, Any], text: str) -> list[Any]:
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": scene["image"]}}],
        }
    ]


def test_openais_client_asks_and_streams(client: openai.OpenAI, scenes: Scenes, asker: Any) -> None:
    import foveate

    messages = question(scenes[0], "what is it?")
    plain: Any = client.chat.completions.create(model="tiny-asker", messages=messages)
    predictor = foveate.load(asker, device="cpu")
    picture = base64.b64decode(scenes[0]["image"].split(",")[1])
    expected = predictor.ask(picture, "what is it?")
    assert plain.choices[0].message.content == expected.text
    assert plain.choices[0].finish_reason == expected.finish
    assert plain.usage.completion_tokens == expected.tokens
    assert plain.foveate["kept"] is None
    chunks: list[Any] = list(
        client.chat.completions.create(
            model="tiny-asker", messages=messages, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text.strip() == expected.text
    assert chunks[-1].usage == plain.usage
    last = chunks[-2]
    assert last.choices[0].finish_reason == expected.finish
    assert last.foveate["width"] == scenes[0]["width"]
    assert {"towers", "answer", "queue", "total"} <= set(last.foveate["milliseconds"])


def test_the_share_of_tokens_and_the_boxes_are_those_that_were_asked_for(
    client: openai.OpenAI, scenes: Scenes, asker: Any
) -> None:
    import foveate

    boxes = boxes_of(scenes[0])[:2]
    messages = question(scenes[0], "what is it?")
    dropped: Any = client.chat.completions.create(
        model="tiny-asker", messages=messages, max_tokens=5, extra_body={"keep": 0.5, "boxes": boxes}
    )
    predictor = foveate.load(asker, device="cpu", keep_tokens=0.5)
    picture = base64.b64decode(scenes[0]["image"].split(",")[1])
    expected = predictor.ask(picture, "what is it?", boxes=boxes, max_new_tokens=5)
    assert dropped.choices[0].message.content == expected.text
    assert dropped.foveate["boxes"] == boxes
    assert dropped.foveate["kept"] == expected.kept[0].to_dict()
    assert dropped.foveate["kept"]["kept"] * 2 == dropped.foveate["kept"]["of"]
    # The next request has all tokens again.
    whole: Any = client.chat.completions.create(model="tiny-asker", messages=messages, extra_body={"boxes": boxes})
    kept = dropped.foveate["kept"]
    assert whole.foveate["kept"] is None
    assert whole.usage.prompt_tokens - dropped.usage.prompt_tokens == kept["of"] - kept["kept"]


def test_what_openais_clients_send_besides_is_taken(client: openai.OpenAI, scenes: Scenes) -> None:
    assert [model.id for model in client.models.list()] == ["dynrefer-world", "tiny-asker"]
    assert client.models.retrieve("tiny-asker").id == "tiny-asker"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o'"):
        client.models.retrieve("gpt-4o")
    messages = question(scenes[0], "what is it?")
    plain = client.chat.completions.create(model="tiny-asker", messages=messages, max_tokens=4)
    defaults: Any = {
        "frequency_penalty": 0,
        "function_call": "none",
        "functions": [],
        "logit_bias": {},
        "logprobs": False,
        "modalities": ["text"],
        "n": 1,
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "prompt_cache_key": "a",
        "response_format": {"type": "text"},
        "safety_identifier": "b",
        "stop": None,
        "temperature": 0,
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1,
        "user": "c",
    }
    same = client.chat.completions.create(model="tiny-asker", messages=messages, max_completion_tokens=4, **defaults)
    assert same.choices[0].message.content == plain.choices[0].message.content
    assert same.usage == plain.usage
    # An answer goes back whole, as clients keep it.
    said = plain.choices[0].message.model_dump()
    more: Any = [*messages, said, {"role": "user", "content": "what colour?"}]
    assert client.chat.completions.create(model="tiny-asker", messages=more, max_tokens=2).choices


def test_what_comes_before_the_questions_is_read_with_the_first(
    client: openai.OpenAI, scenes: Scenes, asker: Any
) -> None:
    import foveate

    before: Any = [{"role": "system", "content": "be kind"}, {"role": "developer", "content": "be short"}]
    messages = [*before, *question(scenes[0], "what is it?")]
    answer: Any = client.chat.completions.create(model="tiny-asker", messages=messages, max_tokens=6)
    picture = base64.b64decode(scenes[0]["image"].split(",")[1])
    expected = foveate.load(asker, device="cpu").ask(picture, "be kind\nbe short\nwhat is it?", max_new_tokens=6)
    assert answer.choices[0].message.content == expected.text
    alone = client.chat.completions.create(
        model="tiny-asker", messages=question(scenes[0], "be kind\nbe short\nwhat is it?"), max_tokens=6
    )
    assert answer.usage == alone.usage


def test_questions_that_wait_are_answered_together_and_each_as_by_itself(
    server: Any, client: openai.OpenAI, scenes: Scenes
) -> None:
    asked = [(scene, text) for scene in scenes[:2] for text in ("what is it?", "what is to the left of the dog?")]

    def ask(one: tuple[dict[str, Any], str]) -> str | None:
        answer = client.chat.completions.create(model="tiny-asker", messages=question(*one), max_tokens=6)
        return answer.choices[0].message.content

    alone = [ask(one) for one in asked]
    before = server.metric('foveate_batch_requests_bucket{le="2.0",verb="ask"}')
    count = server.metric('foveate_batch_requests_count{verb="ask"}')
    with ThreadPoolExecutor(len(asked)) as pool:
        with server.paused():
            answers = [pool.submit(ask, one) for one in asked]
            server.until(lambda: server.metric("foveate_jobs") == len(asked))
        together = [answer.result() for answer in answers]
    assert together == alone
    assert len(set(alone)) > 1
    # They were opened while the worker stood still, and at most the first ran by itself.
    few = server.metric('foveate_batch_requests_bucket{le="2.0",verb="ask"}') - before
    assert few < server.metric('foveate_batch_requests_count{verb="ask"}') - count


def test_a_conversation_goes_on_and_a_seed_gives_the_same_draws(client: openai.OpenAI, scenes: Scenes) -> None:
    messages = question(scenes[0], "what is it?")
    drawn = {"temperature": 1.5, "seed": 7, "max_tokens": 12}
    first, again = (
        client.chat.completions.create(model="tiny-asker", messages=messages, **drawn).choices[0].message.content
        for _ in range(2)
    )
    other = client.chat.completions.create(model="tiny-asker", messages=messages, **{**drawn, "seed": 8})
    assert first == again != other.choices[0].message.content
    more: Any = [*messages, {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "what colour?"}]
    second = client.chat.completions.create(model="tiny-asker", messages=more, max_tokens=4)
    alone = client.chat.completions.create(model="tiny-asker", messages=messages, max_tokens=4)
    assert second.usage is not None
    assert alone.usage is not None
    assert second.usage.prompt_tokens > alone.usage.prompt_tokens + len("a dog")
    without: Any = [{"role": "user", "content": '<b onload=alert(1)>what</b> & "why"?'}]
    text = client.chat.completions.with_raw_response.create(model="tiny-asker", messages=without, max_tokens=2)
    assert text.headers["content-type"] == "application/json"
    assert text.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": [{"role": "user", "content": "   "}]}, "has no question"),
        ({"messages": [{"role": "assistant", "content": "a dog"}]}, "the user first"),
        ({"messages": [{"role": "system", "content": "be kind"}]}, "the user's question"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}]},
            "a system message",
        ),
        ({"messages": [{"role": "tool", "content": "3", "tool_call_id": "a"}]}, "tool"),
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"n": 2}, "n:"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 4, "max_completion_tokens": 4}, "old name"),
        ({"max_tokens": 100_000}, "100000 new tokens"),
        ({"boxes": [[0, 0, 5000, 5]]}, "5000"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"best_of": 1}, "best_of"),
        ({"stop": ""}, "stop: string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "0.image_url.url: field",
        ),
        ({"model": "gpt-4o"}, "no model 'gpt-4o'"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, "30000 characters"),
        ({"messages": [{"role": "user", "content": "<image> where?"}]}, "<image>"),
    ],
)
def test_a_chat_that_cannot_be_answered_says_why(server: Any, scenes: Scenes, change: Any, said: str) -> None:
    body = {"messages": question(scenes[0], "what?"), **change}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == (404 if "model" in change else 400)
    assert said in error_of(response)["message"]


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "https://example.org/a.png", "file:///etc/passwd", "/etc/passwd", "data:text/html,<b>"],
)
def test_nothing_is_fetched_and_no_path_is_read(server: Any, url: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": url}}
    messages = [{"role": "user", "content": [picture, {"type": "text", "text": "what?"}]}]
    response = server.client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert "nothing is fetched" in error_of(response)["message"]
    response = server.client.post("/v1/regions", json={"image": url})
    assert response.status_code == 400
    assert error_of(response)["param"] == "image"


# ---------------------------------------------------------------------------------------------------------------------
# Many at once
# ---------------------------------------------------------------------------------------------------------------------


def test_requests_that_wait_run_together_and_each_gets_its_own(server: Any, scenes: Scenes) -> None:
    wanted = [
        {"image": scene["image"], "boxes": boxes_of(scene)[:1], "tasks": ["category"]}
        for scene in (scenes[0], scenes[1], scenes[2], scenes[3])
    ]
    before = server.metric('foveate_batch_requests_bucket{le="2.0",verb="describe"}')
    count = server.metric('foveate_batch_requests_count{verb="describe"}')
    with ThreadPoolExecutor(len(wanted)) as pool:
        with server.paused():
            answers = [pool.submit(server.client.post, "/v1/regions", json=body) for body in wanted]
            server.until(lambda: server.metric("foveate_jobs") == len(wanted))
        regions = [answer.result().json()["regions"] for answer in answers]
    assert [own[0]["category"] for own in regions] == [scene["objects"][0]["category"] for scene in scenes[:4]]
    few = server.metric('foveate_batch_requests_bucket{le="2.0",verb="describe"}') - before
    assert few < server.metric('foveate_batch_requests_count{verb="describe"}') - count


def test_small_requests_overtake_a_large_one(server: Any, scenes: Scenes) -> None:
    scene = scenes[0]
    plain = {"image": scene["image"], "tasks": ["category"], "view_policy": [0.0, 0.2, 0.2]}
    many = boxes_of(scene)[:1] * 60
    done: list[str] = []

    def send(name: str, boxes: list[list[float]]) -> None:
        assert server.client.post("/v1/regions", json={**plain, "boxes": boxes}).status_code == 200
        done.append(name)

    with server.paused():
        threads = [threading.Thread(target=send, args=("large", many))]
        threads[0].start()
        server.until(lambda: server.metric("foveate_waiting_regions") == len(many))
        for _ in range(4):
            threads.append(threading.Thread(target=send, args=("small", many[:1])))
            threads[-1].start()
        server.until(lambda: server.metric("foveate_jobs") == 5)
    for thread in threads:
        thread.join()
    assert done[-1] == "large"
    assert server.metric("foveate_waiting_regions") == 0


def test_a_full_queue_says_when_to_come_back_and_answers_all_that_it_took(server: Any, scenes: Scenes) -> None:
    body = {"image": scenes[0]["image"], "boxes": boxes_of(scenes[0])[:1], "tasks": ["category"]}
    with ThreadPoolExecutor(8) as pool:
        with server.paused():
            taken = [pool.submit(server.client.post, "/v1/regions", json=body) for _ in range(8)]
            server.until(lambda: server.metric("foveate_jobs") == 8)
            assert server.client.get("/readyz").status_code == 503
            refused = server.client.post("/v1/regions", json=body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert error_of(refused)["code"] == "queue_full"
        assert [answer.result().status_code for answer in taken] == [200] * 8
    assert server.client.get("/readyz").status_code == 200


def test_a_client_that_goes_away_ends_its_work(server: Any, scenes: Scenes) -> None:
    many = {"image": scenes[0]["image"], "boxes": boxes_of(scenes[0])[:1] * 2000}
    gone = server.metric('foveate_cancelled_total{why="client"}')
    described = server.metric("foveate_regions_total")
    with server.paused():
        for body in (many, {**many, "stream": True}):
            raw = socket.create_connection((httpx.URL(server.url).host, httpx.URL(server.url).port or 0))
            text = json.dumps(body).encode()
            authorization = server.client.headers["authorization"]
            head = f"POST /v1/regions HTTP/1.1\r\nHost: localhost\r\nAuthorization: {authorization}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
            raw.sendall(head.encode() + text)
            server.until(lambda: server.metric("foveate_jobs") == 1)
            raw.close()
            server.until(lambda: server.metric("foveate_jobs") == 0)
    with server.client.stream("POST", "/v1/regions", json={**many, "stream": True}) as response:
        assert next(events_of(response))[0] == "start"
    server.until(lambda: server.metric("foveate_jobs") == 0)
    assert server.metric('foveate_cancelled_total{why="client"}') == gone + 3
    assert server.metric("foveate_regions_total") - described < 2000


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong with a request
# ---------------------------------------------------------------------------------------------------------------------

ROUTES = ["/v1/models", "/v1/samples", "/v1/regions", "/v1/everything", "/v1/chat/completions", "/metrics", "/v1/none"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer wrong", "Basic first-token-of-the-tests", "Bearer first-token-of-the-test\xe9"]
)
def test_without_a_token_nothing_is_answered(server: Any, route: str, header: str | None) -> None:
    headers = {} if header is None else {b"Authorization": header.encode("latin-1")}
    method = "POST" if route.startswith(("/v1/r", "/v1/e", "/v1/c")) else "GET"
    response = httpx.request(method, server.url + route, headers=headers, trust_env=False, timeout=60)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "token" in error_of(response)["message"]


def test_the_page_its_description_and_its_health_need_no_token(server: Any) -> None:
    for path in ("/", "/docs", "/docs.js", "/openapi.json", "/healthz", "/readyz"):
        response = httpx.get(server.url + path, trust_env=False, timeout=60)
        assert response.status_code == 200, path
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers
    text = httpx.get(server.url + "/docs", trust_env=False).text
    assert "<script>" not in text
    assert "http" not in text  # nothing of another host
    assert server.client.get("/v1/models").headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1"},
        {"Origin": "null"},
        {"Origin": "http://[not-an-address"},
        {"Host": "evil.example", "Origin": "http://localhost"},
    ],
)
def test_pages_of_other_sites_are_not_answered(server: Any, headers: dict[str, str]) -> None:
    response = server.client.get("/v1/models", headers=headers)
    assert response.status_code == 403
    error_of(response)


@pytest.mark.parametrize(
    "path", ["/../../../etc/passwd", "/%2e%2e/%2e%2e/app.py", "/..%2f..%2fapp.py", "/page/../app.py", "//etc/passwd"]
)
def test_no_file_beside_the_page_is_read(server: Any, path: str) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 0)) as raw:
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b"")).decode()
    assert " 404 " in answer.splitlines()[0]
    assert '"not_found"' in answer


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"image": "aGk=", "boxes": [[0, 0, NaN, 1]]}', "not JSON"),
        (b'{"image": "aGk=", "boxes": [[0, 0, Infinity, 1]]}', "not JSON"),
        (b'{"image": "aGk=", "boxes": [[0, 0, 1e999, 1]]}', "boxes.0.2"),
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"[" * 5000 + b"]" * 5000, "not JSON"),
        (b'{"image": "\xff"}', "not JSON"),
        (b'{"image": "\\ud800"}', "not JSON"),
        (b"[]", "an object"),
        (b'{"image": "aGk=", "boxes": [' + b"0," * 1_000_000 + b"0]}", "1000003 values"),
        (b'{"image": 3}', "an object"),
        (b'{"image": "a b"}', "base64"),
        (b'{"image": "aGk="}', "not an image"),
        (b'{"image": "aGk=", "boxen": []}', "boxen"),
        (b'{"image": "aGk=", "tasks": ["sing"]}', "tasks.0"),
        (b'{"image": "aGk=", "boxes": [[0, 0, 1]]}', "boxes.0"),
        (b'{"image": "aGk=", "boxes": [["0", "0", "1", "1"]]}', "boxes.0.0"),
    ],
)
def test_a_body_that_cannot_be_read_says_why(server: Any, body: bytes, said: str) -> None:
    response = server.client.post("/v1/regions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert said in error_of(response)["message"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"boxes": [[0, 0, 5, 5]] * 10_000}, "10000 boxes"),
        ({"boxes": [[10, 10, 5, 5]]}, "box"),
        ({"boxes": [[0, 0, 5, 500]]}, "500"),
        ({"masks": [{"size": [4, 4], "counts": "0" * 40}]}, "RLE"),
        ({"masks": [{"size": [30, 40], "counts": [1200]}]}, "no True pixel"),
        ({"masks": [{"size": [30, 40], "counts": [10**4299] * 20}]}, "2^40"),
        ({"masks": [{"size": [30, 40], "counts": "1" * 600_000}] * 2}, "1200000 values"),
        ({"classes": [f"w{number}" for number in range(2001)]}, "classes"),
        ({"classes": ["x" * 400] * 60}, "characters"),
        ({"classes": ["dog", "dog"]}, "twice"),
        ({"classes": ["word " * 90]}, "tokens"),
        ({"view_policy": [0.5, 2]}, "view_policy"),
        ({"view_policy": [0.5]}, "views"),
        ({"views": True, "boxes": [[0, 0, 5, 5]] * 101}, "101"),
        ({"attention": True, "boxes": [[0, 0, 5, 5]] * 101}, "attention is given for at most 100 regions"),
        ({"model": "dynrefer-large"}, "dynrefer-large"),
    ],
)
def test_what_is_asked_of_a_picture_is_checked(server: Any, fields: dict[str, Any], said: str) -> None:
    image = base64.b64encode(png(40, 30)).decode()
    for stream in (False, True):
        response = server.client.post("/v1/regions", json={"image": image, **fields, "stream": stream})
        assert response.status_code == (404 if "model" in fields else 400), response.text
        assert said in error_of(response)["message"]


def test_pictures_are_bounded(server: Any) -> None:
    large = base64.b64encode(png(1200, 900)).decode()
    response = server.client.post("/v1/regions", json={"image": large})
    assert response.status_code == 400
    assert "1080000 pixels" in error_of(response)["message"]
    response = server.client.post("/v1/regions", files={"image": ("a.png", png(40, 30)[:60])})
    assert response.status_code == 400
    assert "truncated or corrupt" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("multipart/form-data", b"--x\r\n\r\n--x--", "boundary"),
        ("multipart/form-data; boundary=x", b"--y\r\nnonsense", "cannot be read"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=image\r\n", "image"),
        ("multipart/form-data; boundary=x", b"", "image"),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nhi\r\n--x--\r\n',
            "a file 'file'",
        ),
        (
            "multipart/form-data; boundary=x",
            b"--x\r\nContent-Disposition: form-data\r\n\r\nhi\r\n--x--\r\n",
            "cannot be read",
        ),
        (
            "multipart/form-data; boundary=x",
            b"".join(
                b'--x\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n[' + b"0," * 500_000 + b"0]\r\n"
                for name in (b"boxes", b"masks")
            )
            + b"--x--\r\n",
            "1000002 values",
        ),
    ],
)
def test_a_form_that_cannot_be_read_says_why(server: Any, kind: str, body: bytes, said: str) -> None:
    response = server.client.post("/v1/regions", content=body, headers={"Content-Type": kind})
    assert response.status_code == 400, response.text
    assert said in error_of(response)["message"]


def test_another_content_type_is_refused(server: Any) -> None:
    for route in ("/v1/regions", "/v1/chat/completions"):
        response = server.client.post(route, content=b"hi", headers={"Content-Type": "text/plain"})
        assert response.status_code == 415
        assert "text/plain" in error_of(response)["message"]
    assert error_of(server.client.get("/v1/regions"))["code"] == "method"


def test_an_upload_of_200_megabytes_is_not_taken(server: Any) -> None:
    memory = server.metric("process_resident_memory_bytes")
    headers = {"Content-Type": "application/json", "Content-Length": str(200 * 2**20)}
    said = server.client.build_request("POST", "/v1/regions", headers=headers)
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 0)) as raw:  # that sends nothing but what it would send
        lines = "".join(f"{name}: {value}\r\n" for name, value in said.headers.items())
        raw.sendall(f"POST /v1/regions HTTP/1.1\r\n{lines}\r\n".encode())
        assert b" 413 " in raw.recv(65536).splitlines()[0]
    chunks = (bytes(2**20) for _ in range(200))
    response = server.client.post("/v1/regions", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "too_large"
    assert server.metric("process_resident_memory_bytes") - memory < 50 * 2**20
    assert server.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("part", ["nothing", "head", "body"])
def test_who_sends_too_slowly_is_cut_off(server: Any, part: str) -> None:
    url = httpx.URL(server.url)
    head = "POST /v1/regions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 500\r\n"
    head += f"Authorization: {server.client.headers['authorization']}\r\n"
    with socket.create_connection((url.host, url.port or 0), timeout=120) as raw:
        raw.sendall({"nothing": "", "head": head, "body": head + '\r\n{"image": '}[part].encode())
        answer = b"".join(iter(lambda: raw.recv(65536), b""))  # until it is closed from there
        if part != "nothing":
            assert b" 408 " in answer.splitlines()[0]
            assert b'"slow"' in answer


def test_who_goes_away_while_sending_is_no_fault_of_the_server(server: Any) -> None:
    url = httpx.URL(server.url)
    counted = 'foveate_requests_total{route="/v1/regions",status="499"}'
    before = server.metric(counted)
    head = "POST /v1/regions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n"
    head += f"Authorization: {server.client.headers['authorization']}\r\n"
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        with socket.create_connection((url.host, url.port or 0)) as raw:
            raw.sendall(f"{head}Content-Type: {kind}\r\n\r\n--x".encode())
    server.until(lambda: server.metric(counted) == before + 2)
    assert "Traceback" not in server.log.read_text()


def test_who_does_not_read_the_answers_is_cut_off(server: Any) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 0)) as raw:
        token = server.client.headers["authorization"]
        request = f"GET /v1/samples HTTP/1.1\r\nHost: localhost\r\nAuthorization: {token}\r\n\r\n"
        raw.sendall(request.encode() * 20)  # 20 MB of answers, more than fits into buffers on the way
        own = raw.getsockname()[1]
        connections = psutil.Process(server.process.pid).net_connections
        server.until(lambda: any(one.raddr and one.raddr.port == own for one in connections("tcp")))
        server.until(lambda: not any(one.raddr and one.raddr.port == own for one in connections("tcp")))


def test_what_is_no_http_gets_an_error_in_json(server: Any) -> None:
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port or 0)) as raw:
        raw.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65536), b""))
    assert b" 400 " in answer.splitlines()[0]
    assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["code"] == "invalid_http"


# ---------------------------------------------------------------------------------------------------------------------
# The whole description
# ---------------------------------------------------------------------------------------------------------------------


def test_no_request_of_the_description_breaks_the_server(server: Any) -> None:
    # Not through the plugin of pytest, which wants the description before there is a server.
    api = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    headers = {"Authorization": server.client.headers["authorization"]}
    tried: dict[str, int] = {}
    found: list[Any] = list(api.get_all_operations())
    every_check: Any = list(HealthCheck)
    for operation in (result.ok() for result in found):

        @settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=every_check)
        @given(case=operation.as_strategy())
        def send(case: Any) -> None:
            response = case.call(headers=headers, timeout=240)
            case.validate_response(response, checks=[not_a_server_error])
            if response.status_code >= 400:
                assert response.json()["error"]["message"]
            tried[case.path] = tried.get(case.path, 0) + 1

        send()
    assert tried["/v1/regions"] >= 5
    assert set(tried) > {"/v1/everything", "/v1/chat/completions", "/v1/models", "/metrics", "/readyz"}


def test_no_token_is_in_the_log(server: Any) -> None:
    text = server.log.read_text()
    assert "POST /v1/regions" in text
    assert "-token-of-the-tests" not in text
    assert "Traceback" not in text
