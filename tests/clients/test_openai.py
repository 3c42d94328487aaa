"""The openai package against /v1: what a program written for OpenAI expects."""

import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import MODEL

QUESTION = [{"role": "user", "content": "347+586="}]


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"http://{address}/v1", api_key="unused", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def test_models(client, model):
    assert model == "tiny-r1"
    assert client.models.retrieve(model).id == model


def test_the_issue_question_is_reasoned_and_right(client, model):
    answer = client.chat.completions.create(
        model=model, temperature=0, messages=[{"role": "user", "content": "What is 347 + 586?"}]
    )
    message = answer.choices[0].message
    assert message.content.strip() == "933"
    assert "carry" in message.reasoning_content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_all_problems_are_answered_as_well_as_by_the_reference(client, model):
    problems = [json.loads(line) for line in open(MODEL / "problems.jsonl")]

    def right(problem):
        answer = client.chat.completions.create(
            model=model, temperature=0, max_tokens=512, messages=[{"role": "user", "content": problem["question"]}]
        )
        return answer.choices[0].message.content.strip() == problem["answer"]

    with ThreadPoolExecutor(16) as pool:
        ours = sum(pool.map(right, problems))
    reference = sum(p["reference_answer"] == p["answer"] for p in problems)
    print(f"{ours} of {len(problems)} right; the reference: {reference}")
    assert len(problems) == 200
    assert ours >= reference


def test_streaming_gives_the_same_text_and_the_usage(client, model):
    whole = client.chat.completions.create(model=model, temperature=0, messages=QUESTION)
    chunks = list(
        client.chat.completions.create(
            model=model, temperature=0, messages=QUESTION, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas) == whole.choices[0].message.content
    reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert reasoning == whole.choices[0].message.reasoning_content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_logprobs(client, model):
    answer = client.chat.completions.create(
        model=model, temperature=0, messages=QUESTION, logprobs=True, top_logprobs=3, max_tokens=8
    )
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 8 and answer.choices[0].finish_reason == "length"
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0, "greedy takes the likeliest"
        assert bytes(entry.bytes).decode() == entry.token


def test_completions_with_echo_and_token_ids(client, model):
    text = client.completions.create(model=model, prompt="12+34=", max_tokens=4, temperature=0, echo=True, logprobs=2)
    choice = text.choices[0]
    assert choice.text.startswith("12+34=")
    assert len(choice.logprobs.tokens) == 6 + 4 and choice.logprobs.token_logprobs[0] is None
    assert all(lp <= 0 for lp in choice.logprobs.token_logprobs[1:])
    ids = tokenize(client, "12+34=")
    by_id = client.completions.create(model=model, prompt=ids, max_tokens=4, temperature=0)
    assert choice.text == "12+34=" + by_id.choices[0].text


def tokenize(client, text):
    url = str(client.base_url).replace("/v1/", "/tokenize")
    request = urllib.request.Request(
        url, data=json.dumps({"prompt": text}).encode(), headers={"content-type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request, timeout=10))["tokens"]


def test_two_choices_differ_by_their_seeds_and_repeat(client, model):
    def draw():
        answer = client.completions.create(
            model=model, prompt="Why", n=2, temperature=1.5, seed=7, max_tokens=24, extra_body={"ignore_eos": True}
        )
        return [c.text for c in sorted(answer.choices, key=lambda c: c.index)]

    first = draw()
    assert len(first) == 2 and first[0] != first[1]
    assert draw() == first


def test_stop_strings_across_token_borders(client, model):
    free = client.completions.create(model=model, prompt="12+34=", max_tokens=40, temperature=0).choices[0].text
    stop = free[5:8]
    cut = client.completions.create(model=model, prompt="12+34=", max_tokens=40, temperature=0, stop=[stop, "never"])
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    "change, error, param",
    [
        ({"model": "gpt-none"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "user", "content": "1" * 5000}]}, openai.BadRequestError, "messages"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"stop": ["x"] * 17}, openai.BadRequestError, "stop"),
        ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "logit_bias"),
        ({"presence_penalty": 9}, openai.BadRequestError, "presence_penalty"),
        ({"top_logprobs": 50, "logprobs": True}, openai.BadRequestError, "top_logprobs"),
    ],
)
def test_bad_requests_name_the_field(client, model, change, error, param):
    request = {"model": model, "messages": QUESTION, "max_tokens": 4, **change}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**request)
    assert caught.value.body["param"] == param


def test_an_over_long_prompt_is_refused_with_both_numbers(client, model):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "1" * 5000}])
    assert caught.value.body["code"] == "context_length_exceeded"
    assert "4096" in caught.value.body["message"] and "500" in caught.value.body["message"]


def test_a_dropped_stream_leaves_the_others_alone(client, model):
    stream = client.chat.completions.create(model=model, messages=QUESTION, stream=True, temperature=0)
    next(iter(stream))
    stream.close()
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content.strip() == "933"
