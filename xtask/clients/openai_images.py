"""The client of OpenAI: `openai` from PyPI."""

import base64
import io
import threading
import time
import urllib.request

import httpx
import openai
from PIL import Image

from common import decoded, png, sample, same, server, txt2img

STEPS = {"seed": 5, "steps": 3}


def images(answer):
    return [decoded(base64.b64decode(image.b64_json)) for image in answer.data]


def counted(url, key="none"):
    """A client, and the status of each answer that it gets."""
    seen = []
    http = httpx.Client(event_hooks={"response": [lambda it: seen.append(it.status_code)]})
    return openai.OpenAI(base_url=url + "/v1", api_key=key, http_client=http), seen


def generate(client):
    expected = txt2img("a boat", "--seed", 5, "--steps", 3, "--width", 64, "--height", 64)
    one = client.images.generate(prompt="a boat", model="dall-e-3", size="64x64", extra_body=STEPS)
    assert same(images(one)[0], expected[0])
    assert one.size == "64x64" and one.output_format == "png" and one.created > 0

    two = client.images.generate(
        prompt="a boat", n=2, size="64x64", response_format="b64_json", extra_body=STEPS
    )
    expected_two = txt2img(
        "a boat", "--seed", "5,6", "--num-images", 2, "--steps", 3, "--width", 64, "--height", 64
    )
    assert [same(*pair) for pair in zip(images(two), expected_two)] == [True, True]

    wide = client.images.generate(
        prompt="a boat", size="128x64", quality="high", style="vivid", background="opaque",
        user="someone", moderation="low", extra_body=STEPS,
    )
    assert images(wide)[0].size == (128, 64)

    url = client.images.generate(
        prompt="a boat", size="64x64", response_format="url", extra_body=STEPS
    )
    assert same(decoded(urllib.request.urlopen(url.data[0].url).read()), expected[0])

    for name, kind in [("jpeg", "JPEG"), ("webp", "WEBP")]:
        answer = client.images.generate(
            prompt="a boat", size="64x64", output_format=name, output_compression=90,
            extra_body=STEPS,
        )
        assert Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))).format == kind


def stream(client):
    whole = client.images.generate(prompt="a boat", size="64x64", extra_body=STEPS)
    events = list(
        client.images.generate(
            prompt="a boat", size="64x64", stream=True, partial_images=2, extra_body=STEPS
        )
    )
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed", kinds
    assert set(kinds[:-1]) <= {"image_generation.partial_image"} and len(kinds) <= 3, kinds
    assert same(decoded(base64.b64decode(events[-1].b64_json)), images(whole)[0])
    assert events[-1].usage.total_tokens == 0
    for index, event in enumerate(events[:-1]):
        assert event.partial_image_index == index
        assert decoded(base64.b64decode(event.b64_json)).size == (64, 64)
    try:
        list(client.images.generate(prompt="a boat", size="60x64", stream=True))
        raise AssertionError("an error in the stream is not seen")
    except openai.APIError as error:
        assert "divisible by 8" in error.message, error


def edit(client):
    image, transparent, _ = sample()
    files = {"image": ("image.png", png(image)), "prompt": "a boat"}
    whole = images(client.images.edit(**files, extra_body={**STEPS, "strength": 0.8}))[0]
    masked = client.images.edit(**files, mask=("mask.png", png(transparent)), extra_body=STEPS)
    masked = images(masked)[0]
    assert whole.size == masked.size == (64, 64) and not same(whole, masked)
    files["image"] = [("image.png", png(image))]
    listed = images(client.images.edit(**files, extra_body={**STEPS, "strength": 0.8}))[0]
    assert same(whole, listed)
    two = client.images.edit(**files, n=2, size="128x64", extra_body=STEPS)
    assert [it.size for it in images(two)] == [(128, 64)] * 2
    events = list(client.images.edit(**files, stream=True, extra_body={**STEPS, "strength": 0.8}))
    assert events[-1].type == "image_edit.completed"
    assert same(decoded(base64.b64decode(events[-1].b64_json)), whole)


def errors(url):
    client, seen = counted(url)
    for arguments, param in [
        ({"size": "12345"}, "size"),
        ({"size": "60x64"}, None),
        ({"n": 0}, "n"),
        ({"response_format": "file"}, "response_format"),
        ({"extra_body": {"steps": 10**6}}, None),
        ({"extra_body": {"scheduler": "none"}}, "scheduler"),
        ({"extra_body": {"steps": "many"}}, "steps"),
    ]:
        seen.clear()
        try:
            client.images.generate(prompt="a boat", **arguments)
            raise AssertionError(f"{arguments} is accepted")
        except openai.BadRequestError as error:
            assert error.param == param and error.type == "invalid_request_error", error.body
            assert error.body["message"]
        assert seen == [400], seen
    try:
        client.models.retrieve("none")
        raise AssertionError("a model that is not there")
    except openai.NotFoundError as error:
        assert error.body["message"].startswith("there is no model `none`")
    seen.clear()
    try:
        image, _, _ = sample()
        client.images.edit(image=("image.png", b"\0" * (40 << 20)), prompt="a boat")
        raise AssertionError("too large a body")
    except openai.APIStatusError as error:
        assert error.status_code == 413, error
    assert seen == [413], seen


def retries():
    """A full queue is tried again, after the time that the server names."""
    with server("--queue-length", "1", "--max-steps", "1000") as running:
        long = {"steps": 900, "seed": 1}
        client, _ = counted(running.url)

        def start():
            client.images.generate(prompt="a", size="64x64", extra_body=long)

        threads = [threading.Thread(target=start)]
        threads[0].start()
        running.wait_for("diffuse_steps_total", 1)
        threads.append(threading.Thread(target=start))
        threads[1].start()
        running.wait_for("diffuse_queue_length", 1)
        other, seen = counted(running.url)
        begin = time.monotonic()
        try:
            other.with_options(max_retries=1).images.generate(
                prompt="a", size="64x64", extra_body=STEPS
            )
        except openai.RateLimitError as error:
            assert error.type == "rate_limit_error", error.body
            assert int(error.response.headers["retry-after"]) >= 1
        assert seen[0] == 429 and len(seen) == 2, seen
        assert time.monotonic() - begin >= 0.5
        for thread in threads:
            thread.join()


def main():
    with server() as running:
        client, _ = counted(running.url)
        models = list(client.models.list())
        assert len(models) == 1
        assert client.models.retrieve(models[0].id).owned_by == "diffuse"
        generate(client)
        stream(client)
        edit(client)
        errors(running.url)
    retries()
    with server("--key", "secret") as running:
        good, _ = counted(running.url, "secret")
        good.images.generate(prompt="a boat", size="64x64", extra_body=STEPS)
        bad, seen = counted(running.url, "wrong")
        try:
            bad.images.generate(prompt="a boat")
            raise AssertionError("a wrong key is accepted")
        except openai.AuthenticationError:
            assert seen == [401]
    print(f"openai {openai.__version__}: ok")


main()
