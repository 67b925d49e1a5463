"""Requests as SillyTavern and Open WebUI send them, and clients that leave."""

import base64
import json
import socket
import subprocess
import sys
import threading
import time

import httpx

from common import decoded, png, sample, same, server, txt2img

SMALL = ["--seed", 5, "--steps", 3, "--width", 64, "--height", 64, "--guidance-scale", 7]


def silly_tavern(running):
    """What its server sends for `/api/sd/*`, with an empty user and password."""
    headers = {"Authorization": "Basic " + base64.b64encode(b":").decode()}
    http = httpx.Client(base_url=running.url + "/sdapi/v1", headers=headers, timeout=60)
    options = http.get("/options").json()
    assert isinstance(options["sd_model_checkpoint"], str)
    assert "Euler a" in [it["name"] for it in http.get("/samplers").json()]
    assert http.get("/schedulers").json()[0].keys() >= {"name", "label"}
    assert http.get("/sd-models").json()[0].keys() >= {"title", "model_name"}
    for path in ["/upscalers", "/latent-upscale-modes", "/sd-vae", "/sd-modules"]:
        assert http.get(path).json() == []
    http.post("/options", json={"sd_model_checkpoint": options["sd_model_checkpoint"]})
    answer = http.get("/progress").json()
    assert answer["progress"] == 0 and answer["state"]["job_count"] == 0
    answer = http.post("/txt2img", json={
        "prompt": "a boat", "negative_prompt": "fog", "sampler_name": "Euler",
        "scheduler": "automatic", "steps": 3, "cfg_scale": 7, "width": 64, "height": 64,
        "restore_faces": False, "enable_hr": False, "hr_upscaler": "Latent", "hr_scale": 1.5,
        "denoising_strength": 0.7, "hr_second_pass_steps": 0, "seed": 5, "clip_skip": 1,
        "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
        "override_settings_restore_afterwards": True, "save_images": True, "send_images": True,
        "do_not_save_grid": False, "do_not_save_samples": False,
    }).json()
    image = decoded(base64.b64decode(answer["images"][0]))
    expected = txt2img("a boat", "--negative-prompt", "fog", "--scheduler", "Euler", *SMALL)
    assert same(image, expected[0])


def open_webui(running):
    http = httpx.Client(base_url=running.url, timeout=60)
    sdapi = "/sdapi/v1"
    options = http.get(f"{sdapi}/options").json()
    options["sd_model_checkpoint"] = http.get(f"{sdapi}/sd-models").json()[0]["title"]
    assert http.post(f"{sdapi}/options", json=options).status_code == 200
    answer = http.post(f"{sdapi}/txt2img", json={
        "prompt": "a boat", "batch_size": 1, "width": 64, "height": 64, "steps": 3, "seed": 5,
        "negative_prompt": "fog", "cfg_scale": 7.0, "sampler_name": "Euler",
        "scheduler": "Normal",
    }).json()
    json.loads(answer["info"])
    first = decoded(base64.b64decode(answer["images"][0]))
    headers = {"Authorization": "Bearer sk-none"}
    more = {"seed": 5, "steps": 3, "guidance_scale": 7, "negative_prompt": "fog",
            "scheduler": "Euler"}
    body = {"model": "dall-e-2", "prompt": "a boat", "n": 1, "size": "64x64",
            "response_format": "b64_json", **more}
    answer = http.post("/v1/images/generations", headers=headers, json=body).json()
    assert same(decoded(base64.b64decode(answer["data"][0]["b64_json"])), first)
    # An edit, as a form.
    image, _, _ = sample()
    answer = http.post("/v1/images/edits", headers=headers, data={
        "model": "dall-e-2", "prompt": "a boat", "n": "1", "response_format": "b64_json",
        "steps": "3",
    }, files=[("image[]", ("image.png", png(image), "image/png"))]).json()
    assert decoded(base64.b64decode(answer["data"][0]["b64_json"])).size == (64, 64)


def leaving(running):
    """A client that is killed while its request computes or waits, or streams."""
    body = {"prompt": "a boat", "size": "64x64", "steps": 900, "seed": 1}
    code = (
        "import sys, urllib.request as it\n"
        "request = it.Request(sys.argv[1], sys.argv[2].encode(),"
        " {'Content-Type': 'application/json'})\n"
        "print(it.urlopen(request).read())\n"
    )

    def client(body):
        command = [sys.executable, "-c", code, running.url + "/v1/images/generations"]
        return subprocess.Popen(command + [json.dumps(body)])

    for stream in [False, True]:
        before = running.metrics()
        computes = client({**body, "stream": stream})
        running.wait_for("diffuse_steps_total", before["diffuse_steps_total"] + 1)
        waits = client({**body, "stream": stream})
        running.wait_for("diffuse_queue_length", 1)
        waits.kill()
        cancelled = 'diffuse_jobs_total{outcome="cancelled"}'
        running.wait_for(cancelled, before[cancelled] + 1)
        assert running.metrics()["diffuse_queue_length"] == 0
        start = time.monotonic()
        computes.kill()
        last = {**body, "steps": 1}
        httpx.post(running.url + "/v1/images/generations", json=last).raise_for_status()
        seconds = time.monotonic() - start
        after = running.metrics()
        assert after[cancelled] == before[cancelled] + 2
        steps = after["diffuse_steps_total"] - before["diffuse_steps_total"]
        assert steps < 800, f"{steps} steps were computed"
        assert seconds < 2, f"the next request took {seconds} s"
        computes.wait()
        waits.wait()


def slow(running):
    """Half a request keeps neither others nor the end of the server."""
    host, port = running.url.removeprefix("http://").split(":")
    halves = [socket.create_connection((host, int(port))) for _ in range(50)]
    for half in halves[:25]:
        half.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: loc")
    for half in halves[25:]:
        half.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
        )
    assert httpx.get(running.url + "/healthz").text == "ok\n"
    headers = {f"x-{index}": "a" for index in range(200)}
    assert httpx.get(running.url + "/healthz", headers=headers).status_code == 431
    headers = {"x": "a" * (1 << 20)}
    try:
        assert httpx.get(running.url + "/healthz", headers=headers).status_code == 431
    except httpx.NetworkError:
        pass  # It is cut off in the middle of them.
    for half in halves:
        half.close()


def ends(running):
    """A server that is told to end answers the request that computes, and refuses others."""
    body = {"prompt": "a boat", "size": "64x64", "steps": 300}
    answers = []

    def send():
        answer = httpx.post(running.url + "/v1/images/generations", json=body, timeout=60)
        answers.append(answer.status_code)

    threads = [threading.Thread(target=send) for _ in range(3)]
    before = running.metrics()["diffuse_steps_total"]
    threads[0].start()
    running.wait_for("diffuse_steps_total", before + 1)
    for thread in threads[1:]:
        thread.start()
    running.wait_for("diffuse_queue_length", 2)
    running.process.terminate()
    for thread in threads:
        thread.join()
    assert answers == [503, 503, 200], answers
    assert running.process.wait(10) == 0


def ends_at_once(running):
    """A second signal does not wait for the run."""
    body = {"prompt": "a boat", "size": "256x256", "steps": 900}
    answers = []

    def send():
        answer = httpx.post(running.url + "/v1/images/generations", json=body, timeout=60)
        answers.append((answer.status_code, answer.json()["error"]["message"]))

    thread = threading.Thread(target=send)
    thread.start()
    running.wait_for("diffuse_steps_total", 1)
    running.process.terminate()
    time.sleep(0.2)
    assert running.process.poll() is None
    running.process.terminate()
    thread.join()
    assert answers == [(503, "the server shuts down")], answers
    assert running.process.wait(10) == 0


def main():
    with server("--max-steps", "1000") as running:
        silly_tavern(running)
        open_webui(running)
        leaving(running)
        slow(running)
        ends(running)
    with server("--max-steps", "1000") as running:
        ends_at_once(running)
    print("SillyTavern, Open WebUI, clients that leave: ok")


main()
