"""SEC-33: to whom the prefix cache tells what it has seen; and that `usage` tells the truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEYS = ("first-key", "second-key")
PROMPT = "The quick brown fox jumps over the lazy dog. " * 6


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys"
    path.write_text("\n".join(KEYS))
    return str(path)


@pytest.fixture(scope="module")
def real_url(start_module_real: Callable[..., Any]) -> str:
    url: str = start_module_real().url
    return url


def ask(url: str, path: str = TEXT, key: str = KEYS[0], **fields: Any) -> list[dict[str, Any]]:
    """The objects of an answer: one, or those of a stream."""
    prompt = {"prompt": PROMPT} if path == TEXT else {"messages": [message(PROMPT)]}
    body = {**prompt, "max_tokens": 3, "temperature": 0, "ignore_eos": True, **fields}
    headers = {"authorization": f"Bearer {key}"}
    response = httpx.post(f"{url}{path}", json=body, headers=headers, timeout=30)
    assert response.status_code == 200, response.text
    if not fields.get("stream"):
        return [response.json()]
    events = [e.removeprefix("data: ") for e in response.text.split("\n\n") if "{" in e]
    return [json.loads(event) for event in events]


def message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def cached(answers: list[dict[str, Any]]) -> int:
    """What the last object with usage says."""
    usage = [answer["usage"] for answer in answers if answer.get("usage")][-1]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_two_keys_never_share_a_prefix(start_real: Callable[..., Any], keys_file: str) -> None:
    url = start_real("--api-key-file", keys_file).url
    for path in (TEXT, CHAT):
        seen = [ask(url, path, key) for key in (*KEYS, *KEYS)]
        assert [cached(answer) > 0 for answer in seen] == [False, False, True, True], path
        texts = [answer[0]["choices"][0] for answer in seen]
        assert all(text == texts[0] for text in texts), "isolation changes no answer"


def test_keys_that_trust_each_other_share(start_real: Callable[..., Any], keys_file: str) -> None:
    url = start_real("--api-key-file", keys_file, "--cache-scope", "global").url
    assert [cached(ask(url, key=key)) > 0 for key in KEYS] == [False, True]


def test_salts_keep_apart_what_one_key_sends(start_real: Callable[..., Any]) -> None:
    url = start_real().url
    for path in (TEXT, CHAT):
        salts = ["a", None, "b", "a", "b", None]
        found = [cached(ask(url, path, cache_salt=salt)) > 0 for salt in salts]
        assert found == [False] * 3 + [True] * 3, path


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [TEXT, CHAT])
@pytest.mark.parametrize("n", [1, 3])
def test_usage_tells_what_was_cached_on_every_path(
    real_url: str, path: str, n: int, stream: bool
) -> None:
    fields: dict[str, Any] = {"n": n, "cache_salt": f"{path} {n} {stream}", "seed": 1}
    if stream:
        options = {"include_usage": True, "continuous_usage_stats": True}
        fields |= {"stream": True, "stream_options": options}
    cold, warm = ask(real_url, path, **fields), ask(real_url, path, **fields)
    num_prompt = warm[-1]["usage"]["prompt_tokens"]
    assert cached(cold) == 0
    assert cached(warm) == (num_prompt - 1) // 16 * 16 > 100
    assert all("prompt_tokens_details" in answer["usage"] for answer in (*cold, *warm))
    details = [answer["usage"]["prompt_tokens_details"] for answer in warm]
    assert details == [details[-1]] * len(details), "it is known with the first token"


@pytest.mark.parametrize("stream", [False, True])
def test_usage_of_several_prompts_is_their_sum(real_url: str, stream: bool) -> None:
    fields: dict[str, Any] = {"prompt": [PROMPT, PROMPT[:100], "short"], "n": 2}
    fields["cache_salt"] = f"several {stream}"
    if stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    ask(real_url, **fields)
    usage = ask(real_url, **fields)[-1]["usage"]
    alone = [
        cached(ask(real_url, prompt=prompt, cache_salt=fields["cache_salt"]))
        for prompt in fields["prompt"]
    ]
    assert usage["prompt_tokens_details"]["cached_tokens"] == sum(alone) > 100
    assert alone[2] == 0


def test_a_pin_holds_against_a_flood(start_real: Callable[..., Any]) -> None:
    url = start_real("--memory", "256KiB").url

    def gauge() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return float(next(x for x in lines if x.startswith("octavo_kv_cache_blocks_pinned{"))[-3:])

    ask(url, cache_pin_s=600)
    ask(url, cache_salt="not pinned")
    assert gauge() > 6
    for number in range(20):
        ask(url, prompt=f"{number} " * 100)
    assert cached(ask(url)) > 100
    assert cached(ask(url, cache_salt="not pinned")) == 0
    body = {"prompt": [7] * 510, "max_tokens": 1, "cache_pin_s": 5}
    refused = httpx.post(f"{url}{TEXT}", json=body)
    assert refused.status_code == 503, refused.text
    assert refused.json()["error"]["code"] == "cache_pins_full"
    assert 500 < int(refused.headers["retry-after"]) <= 601


def test_the_debug_log_says_why_a_prefix_was_missed(start_real: Callable[..., Any]) -> None:
    running = start_real(OCTAVO_DEBUG="1")
    headers = {"x-request-id": "my-request"}
    body = {"prompt": PROMPT, "max_tokens": 1, "cache_salt": "hush"}
    httpx.post(f"{running.url}{TEXT}", json=body, headers=headers)
    running.process.terminate()
    _, log = running.process.communicate(timeout=20)
    assert "request my-request/1 is 0 in the engine" in log
    assert "request 0, sequence 0: 0 of" in log and "block 0 missed: never seen" in log
    assert "quick" not in log and "hush" not in log, "prompts and salts are nobody's business"
