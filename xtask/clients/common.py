"""A server for the scripts beside this file, and what they compare with."""

import contextlib
import io
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request

from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ROOT / "crates/diffuse-pipelines/tests/reference/sd/base"


def program():
    """The program to test: the first argument."""
    return str(pathlib.Path(sys.argv[1]).resolve())


class Server:
    def __init__(self, process, url):
        self.process, self.url = process, url

    def metrics(self):
        """All numbers of `/metrics`, by name and labels."""
        text = urllib.request.urlopen(self.url + "/metrics").read().decode()
        lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in lines}

    def wait_for(self, name, least, seconds=60):
        start = time.monotonic()
        while self.metrics()[name] < least:
            assert time.monotonic() - start < seconds, f"{name} stays below {least}"
            time.sleep(0.01)

    def rss(self):
        """Resident memory in MiB."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) / 1024


@contextlib.contextmanager
def server(*arguments, model=TINY):
    """A running `diffuse serve`, which has to end by itself and without an error."""
    command = [program(), "serve", "--listen", "127.0.0.1:0", *arguments]
    if model:
        command += ["--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()
    assert url.startswith("http://"), "the server does not start"
    try:
        yield Server(process, url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "the server ends with an error"
    finally:
        process.kill()


def txt2img(prompt, *arguments, model=TINY):
    """The images of `diffuse txt2img`."""
    command = [program(), "txt2img", prompt, "--quiet", *map(str, arguments)]
    if model:
        command += ["--model", str(model)]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command + ["--output", f"{folder}/image.png"], check=True)
        files = sorted(pathlib.Path(folder).iterdir())
        return [Image.open(file).convert("RGB").copy() for file in files]


def decoded(data):
    return Image.open(io.BytesIO(data)).convert("RGB")


def same(first, second):
    return first.size == second.size and first.tobytes() == second.tobytes()


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def sample():
    """An image, a mask with the left half transparent, and one with it white."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    transparent = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    transparent.paste((0, 0, 0, 0), (0, 0, 32, 64))
    white = Image.new("RGB", (64, 64))
    white.paste((255, 255, 255), (0, 0, 32, 64))
    return image, transparent, white
