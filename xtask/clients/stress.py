"""1,000 requests of 50 clients: images, mistakes, too much, and clients that leave.

Then the server's throughput beside that of `diffuse sweep`, with the built-in model.
"""

import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx

from common import program, server

REQUESTS = int(os.environ.get("DIFFUSE_STRESS_REQUESTS", 1000))
CLIENTS = 50
PATH = "/v1/images/generations"


def request(url, kind, seed):
    """Sends a request of a kind; what became of it."""
    body = {"prompt": f"boat {seed}", "size": "64x64", "steps": 2, "seed": seed}
    host, port = url.removeprefix("http://").split(":")
    if kind in ("leaves", "leaves a stream"):
        text = json.dumps({**body, "steps": 500, "stream": kind != "leaves"})
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(text)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as stream:
            stream.sendall((head + text).encode())
            time.sleep(random.Random(seed).random() / 10)
        return "left"
    with httpx.Client(base_url=url, timeout=120) as http:
        if kind == "malformed":
            headers = {"Content-Type": "application/json"}
            text = ["{", '{"prompt": NaN}', '{"prompt": 1}', "null", '"\\ud800"'][seed % 5]
            answer = http.post(PATH, content=text, headers=headers)
        elif kind == "too large":
            answer = http.post(PATH, json={**body, "prompt": "a" * (33 << 20)})
        elif kind == "too many pixels":
            answer = http.post(PATH, json={**body, "size": "99999x99999"})
        elif kind == "webui":
            answer = http.post("/sdapi/v1/txt2img", json={**body, "width": 64, "height": 64})
        elif kind == "stream":
            answer = http.post(PATH, json={**body, "stream": True})
            assert "image_generation.completed" in answer.text or answer.status_code == 429
        else:
            answer = http.post(PATH, json=body)
        return answer.status_code


EXPECTED = {
    "image": {200, 429}, "webui": {200, 429}, "stream": {200, 429}, "malformed": {400},
    "too large": {413}, "too many pixels": {400}, "leaves": {"left"}, "leaves a stream": {"left"},
}
KINDS = ["image"] * 8 + ["webui"] * 4 + ["stream"] * 3 + ["malformed", "too many pixels"]
KINDS += ["leaves", "leaves a stream"] * 2 + ["too large"]


def storm(running, requests):
    outcomes = Counter()

    def one(index):
        kind = KINDS[index % len(KINDS)]
        outcome = request(running.url, kind, index)
        assert outcome in EXPECTED[kind], (kind, outcome)
        outcomes[kind, outcome] += 1

    with ThreadPoolExecutor(CLIENTS) as pool:
        for done in [pool.submit(one, index) for index in range(requests)]:
            done.result()
    return outcomes


def many():
    with server("--max-steps", "1000") as running:
        storm(running, 200)
        memory = [running.rss()]
        start = time.monotonic()
        outcomes = Counter()
        for _ in range(5):
            outcomes += storm(running, REQUESTS // 5)
            memory.append(running.rss())
        seconds = time.monotonic() - start
        # All are over: the next one starts at once, and nothing waits.
        assert request(running.url, "image", 1) == 200
        numbers = running.metrics()
        assert numbers["diffuse_queue_length"] == 0, numbers
        for (kind, outcome), count in sorted(outcomes.items(), key=str):
            print(f"  {kind}: {outcome}, {count} times")
        names = ("diffuse_jobs_total", "diffuse_rejected_total")
        jobs = {name: int(numbers[name]) for name in numbers if name.startswith(names)}
        # Each that was taken has ended in one way, and each that was not was told.
        answered = sum(count for (_, outcome), count in outcomes.items() if outcome == 200)
        assert numbers['diffuse_jobs_total{outcome="ok"}'] >= answered, jobs
        assert numbers['diffuse_jobs_total{outcome="failed"}'] == 0, jobs
        print(f"{REQUESTS} requests in {seconds:.1f} s, {jobs}")
        print("memory in MiB, before and after each fifth:", [round(rss) for rss in memory])
        assert memory[-1] < memory[0] * 1.1 + 16, "the server keeps memory"


def throughput():
    """Images a second of the server beside `diffuse sweep`, which makes one after the other."""
    images, rounds = 12, 3

    def sweep(count):
        seeds = ",".join(map(str, range(count)))
        with tempfile.TemporaryDirectory() as folder:
            start = time.monotonic()
            command = [program(), "sweep", "a boat at sunset", "--quiet", "--seed", seeds]
            subprocess.run([*command, "--grid", f"{folder}/sheet.png"], check=True)
            return time.monotonic() - start

    with server(model=None) as running, httpx.Client(base_url=running.url, timeout=600) as http:
        def one(seed):
            body = {"prompt": "a boat at sunset", "seed": seed}
            http.post(PATH, json=body).raise_for_status()

        def serve():
            start = time.monotonic()
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(one, range(images)))
            return time.monotonic() - start

        serve()
        before = running.metrics()["diffuse_job_seconds_sum"]
        start = time.monotonic()
        serve()
        busy = running.metrics()["diffuse_job_seconds_sum"] - before
        busy /= time.monotonic() - start
        print(f"  the server computes {busy:.3f} of the time")
        # In turns, since others may use the machine. The start of the program does not count.
        times = [(serve(), sweep(images + 1) - sweep(1)) for _ in range(rounds)]
        for served, bare in times:
            print(f"  {images / served:.2f} images/s, bare {images / bare:.2f}")
        ratio = min(bare for _, bare in times) / min(served for served, _ in times)
    print(f"the server has {ratio:.2f} of the throughput of the bare loop")
    assert min(busy, ratio) >= 0.95


def main():
    if "throughput" not in sys.argv[2:]:
        many()
    throughput()


main()
