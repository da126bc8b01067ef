"""The smaller endpoints: models, tokens, health, version, OpenAPI, and paths that are none."""

from __future__ import annotations

import json
import threading
import time

import openai
import pytest

from octavo.server.fields import HARMLESS, UNSUPPORTED
from octavo.server.routes import ROUTES


def test_models(server, client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["fake"]
    model = client.models.retrieve("fake")
    assert model.object == "model" and model.owned_by == "octavo"
    assert server.http.get("/v1/models/fake").json()["max_model_len"] == 4096
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_model_may_have_several_names_with_slashes(start_server) -> None:
    server = start_server(served_name="org/model:file", aliases=["short"])
    names = [model["id"] for model in server.http.get("/v1/models").json()["data"]]
    assert names == ["org/model:file", "short"]
    for name in ("org/model:file", "org%2Fmodel%3Afile", "short"):
        response = server.http.get(f"/v1/models/{name}")
        assert response.json()["root"] == "org/model:file"
    for name in names:
        answer = server.post("/v1/completions", {"prompt": "hi", "model": name}).json()
        assert answer["model"] == name
    assert server.post("/v1/completions", {"prompt": "a", "model": "fake"}).status_code == 404


def test_a_model_without_a_template_has_no_chat(start_server) -> None:
    server = start_server(has_template=False)
    body = {"messages": [{"role": "user", "content": "hi"}]}
    response = server.post("/v1/chat/completions", body)
    assert response.status_code == 400
    assert "/v1/completions" in response.json()["error"]["message"]


def test_tokenize_and_detokenize(server) -> None:
    answer = server.post("/tokenize", {"prompt": "hi", "return_token_strs": True}).json()
    assert answer == {
        "count": 3,
        "max_model_len": 4096,
        "tokens": [1, 107, 108],
        "token_strs": ["<1>", "h", "i"],
    }
    body = {"prompt": "hi", "add_special_tokens": False}
    assert server.post("/tokenize", body).json()["tokens"] == [107, 108]
    body = {"messages": [{"role": "user", "content": "hi"}]}
    tokens = server.post("/tokenize", body).json()["tokens"]
    text = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
    assert text == "<user>hi\n<assistant>"
    for bad in ({}, {"prompt": "a", "messages": body["messages"]}, {"prompt": 5}, {"prompts": "a"}):
        assert server.post("/tokenize", bad).status_code == 400
    for bad in ({}, {"tokens": "a"}, {"tokens": [-1]}, {"tokens": [10**6]}, {"tokens": [1.5]}):
        response = server.post("/detokenize", bad)
        assert response.status_code == 400
        assert response.json()["error"]["param"].startswith("tokens")


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nowhere", "/v1/models/", "//v1/models", "/%00"])
def test_an_unknown_path_is_a_404(server, path) -> None:
    response = server.http.get(server.url + path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


def test_a_wrong_method_is_a_405_that_names_the_right_ones(server) -> None:
    for route in ROUTES:
        path = route.path.replace("{model}", "fake")
        for method in {"GET", "POST", "PUT", "DELETE", "OPTIONS"} - {route.method}:
            response = server.http.request(method, path)
            assert response.status_code == 405, path
            assert response.headers["allow"] == route.method
            assert response.json()["error"]["code"] == "method_not_allowed"


def test_head_has_no_body(server) -> None:
    response = server.http.head("/v1/models")
    assert response.status_code == 200
    assert response.content == b""
    assert server.http.get("/live").status_code == 200


def test_openapi_describes_every_route_and_field(server) -> None:
    document = server.http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    for route in ROUTES:
        assert route.method.lower() in document["paths"][route.path]
    schemas = document["components"]["schemas"]
    for name, kind in (("ChatRequest", "messages"), ("CompletionRequest", "prompt")):
        schema = schemas[name]
        assert schema["required"] == [kind]
        assert schema["additionalProperties"] is False
        fields = schema["properties"]
        assert {f.name for f in (*HARMLESS, *UNSUPPORTED)} <= set(fields)
        assert fields["n"]["anyOf"][0] == {"type": "integer", "minimum": 1, "maximum": 128}
        assert fields["n"]["default"] == 1
        assert {"type": "null"} in fields["n"]["anyOf"]
        assert {"type": "text"} in fields["response_format"]["enum"]
    references = set(json.dumps(document).split('"$ref": "')[1:])
    for reference in references:
        name = reference.partition('"')[0].removeprefix("#/components/schemas/")
        assert name in schemas


def test_version(server) -> None:
    assert list(server.http.get("/version").json()) == ["version"]


def test_health_answers_while_large_prompts_are_read(server) -> None:
    """B10 and SEC-16, at the size of a test: long work is off the event loop."""
    prompt = "a" * 16_000

    def ask() -> None:
        for _ in range(5):
            server.http.post("/v1/completions", json={"prompt": prompt})

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    slowest = 0.0
    while any(thread.is_alive() for thread in threads):
        began = time.perf_counter()
        assert server.http.get("/live").status_code == 200
        slowest = max(slowest, time.perf_counter() - began)
    for thread in threads:
        thread.join()
    assert slowest < 0.5


def test_overload_is_told_before_any_work(start_server) -> None:
    """B30: what can't be queued is refused at once, and those accepted are not disturbed."""
    server = start_server(engine={"max_num_waiting": 2, "max_num_seqs": 1})
    statuses: list[int] = []

    def ask() -> None:
        body = {"prompt": "SLOW", "max_tokens": 30}
        statuses.append(server.post("/v1/completions", body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    server.wait_metric("octavo_requests_running", 3)
    for path, body in (
        ("/v1/completions", {"prompt": "hi", "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
    ):
        response = server.post(path, body)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
    for thread in threads:
        thread.join()
    assert statuses == [200] * 3
    assert server.post("/v1/completions", {"prompt": "hi"}).status_code == 200


def test_the_official_client_honours_our_retry_after(start_server) -> None:
    """B33: asked while the model loads, it waits and succeeds."""
    server = start_server(is_ready=False, load_s=0.8)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client:
        answer = client.completions.create(model="fake", prompt="hi", max_tokens=2)
    assert answer.choices[0].text == "hi"
