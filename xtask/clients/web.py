"""The page that computes in the browser.

    pip install playwright pillow
    python web.py DIFFUSE_PROGRAM PAGE_FOLDER SCREENSHOT_FOLDER [CHROMIUM]

Serves the folder, uses the page as a person would, and compares its images with those of the
program. Messages in the browser's console are failures. The screenshots are for the eye.

A page that was built with WebGPU also computes on the GPU that Chromium simulates on the CPU, and
on some that fail.
"""

import contextlib
import functools
import gzip
import http.server
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from PIL import Image, ImageChops
from playwright.sync_api import expect, sync_playwright

PROMPT = "a red house in a meadow by day"
TINY = Path(__file__).parents[2] / "crates/diffuse-pipelines/tests/reference/sd/base"
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
# The most milliseconds of an image.
TIMEOUT = 120_000
# Chromium's GPU is simulated on the CPU: 30 s for its shaders, and 8 s a step.
GPU_TIMEOUT = 600_000
GPU = ["--enable-unsafe-webgpu"]


def main():
    if len(sys.argv) not in (4, 5):
        raise SystemExit("usage: web.py DIFFUSE_PROGRAM PAGE_FOLDER SCREENSHOT_FOLDER [CHROMIUM]")
    program, folder, screenshots = sys.argv[1:4]
    chromium = sys.argv[4] if len(sys.argv) == 5 else "/usr/bin/chromium"
    Path(screenshots).mkdir(parents=True, exist_ok=True)
    check_instructions(folder)
    with sync_playwright() as playwright, served(folder) as address:
        options = {"executable_path": chromium, "args": ["--no-sandbox"]}
        browser = playwright.chromium.launch(**options)
        has_webgpu = b"generateOnGpu" in (Path(folder) / "diffuse_web.js").read_bytes()
        for check in CHECKS + has_webgpu * CHECKS_WITHOUT_A_GPU:
            run(check, browser, address, program, screenshots)
        browser.close()
        if has_webgpu:
            options["args"] += GPU
            browser = playwright.chromium.launch(**options)
            for check in CHECKS_WITH_A_GPU:
                run(check, browser, address, program, screenshots)
            browser.close()
    print("all checks of the page in the browser passed")


def run(check, browser, address, program, screenshots):
    page = browser.new_page(**(PHONE if check is on_a_phone else DESKTOP))
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    if check in FAILURES:
        replace_gpu(page, FAILURES[check])
    started = time.monotonic()
    page.goto(address)
    expect(page.locator("#generate")).to_be_enabled(timeout=TIMEOUT)
    loaded = time.monotonic() - started
    facts = check(page, program)
    page.screenshot(path=Path(screenshots) / f"web_{check.__name__}.png")
    assert not errors, f"{check.__name__}: {errors}"
    print(f"{check.__name__}: loaded in {loaded:.1f} s. {facts}")
    page.close()


@contextlib.contextmanager
def served(folder):
    """Serves a folder on loopback; the value is its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def check_instructions(folder):
    """Not every browser has `relaxed-simd`: one function with it, and none of them loads."""
    program = gzip.decompress((Path(folder) / "diffuse_web.bin").read_bytes())
    features = program[program.rindex(b"target_features"):]
    assert b"+\x07simd128" in features and b"relaxed-simd" not in features, features


def native(program, *arguments):
    """The image of the program, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        command = [program, *arguments, "--backend", "flex", "--output", path, "--quiet"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return Image.open(path).convert("RGB")


def generate(page, timeout=TIMEOUT):
    """Generates an image, and returns it and what the page says of it."""
    page.locator("#generate").click()
    expect(page.locator("#about")).to_be_visible(timeout=timeout)
    return shown(page), page.locator("#facts").inner_text()


def shown(page):
    """The pixels of the image that is shown."""
    code = """(canvas) => {
        const { width, height } = canvas;
        const options = { willReadFrequently: true };
        const copy = new OffscreenCanvas(width, height).getContext("2d", options);
        copy.drawImage(canvas, 0, 0);
        return [width, height, [...copy.getImageData(0, 0, width, height).data]];
    }"""
    width, height, pixels = page.locator("#shown").evaluate(code)
    return Image.frombytes("RGBA", (width, height), bytes(pixels)).convert("RGB")


def assert_same(image, expected):
    """Equal within one level of 255, and not of one color."""
    assert image.size == expected.size, (image.size, expected.size)
    difference = ImageChops.difference(image, expected)
    worst = max(high for _, high in difference.getextrema())
    assert worst <= 1, f"differs by {worst} levels"
    assert max(high - low for low, high in image.getextrema()) > 60, image.getextrema()


# The checks


def same_image_as_the_program(page, program):
    """While it computes, the page shows each step and reacts; the result can be downloaded."""
    page.locator("#prompt").fill(PROMPT)
    page.locator("#seed").fill("3")
    page.evaluate("""() => {
        window.frames = 0;
        window.seen = [];
        const count = () => { window.frames += 1; requestAnimationFrame(count); };
        requestAnimationFrame(count);
        const status = document.getElementById("status");
        const canvas = document.getElementById("shown");
        new MutationObserver(() => window.seen.push([status.textContent, canvas.width]))
            .observe(status, { childList: true });
    }""")
    image, facts = generate(page)
    expected = native(program, "txt2img", PROMPT, "--seed", "3")
    assert_same(image, expected)
    seconds, total = map(float, re.fullmatch(
        r"128 x 128 pixels, seed 3\. 26 steps of (.+) s, (.+) s in all\.", facts).groups())
    steps = [(text, width) for text, width in page.evaluate("window.seen") if "Step" in text]
    assert [text.split(",")[0] for text, _ in steps] == [f"Step {n} of 26" for n in range(1, 27)]
    assert all(width == 16 for _, width in steps), steps
    frames = page.evaluate("window.frames")
    assert frames > 5 * total, f"{frames} frames in {total} s"
    assert 0 < 26 * seconds <= total + 0.2, facts
    with page.expect_download() as download:
        page.locator("#download").click()
    assert download.value.suggested_filename == "diffuse-3.png"
    assert_same(Image.open(download.value.path()).convert("RGB"), image)
    return facts


def another_scheduler(page, program):
    page.locator("#prompt").fill(PROMPT)
    page.locator("#seed").fill("4")
    page.locator("#steps").fill("8")
    page.locator("#guidance").fill("3.5")
    page.locator("#scheduler").select_option("euler-a")
    image, facts = generate(page)
    options = ["--seed", "4", "--steps", "8", "--guidance-scale", "3.5", "--scheduler", "euler-a"]
    assert_same(image, native(program, "txt2img", PROMPT, *options))
    return facts


def cancel_and_again(page, program):
    page.locator("#steps").fill("500")
    page.locator("#generate").click()
    expect(page.locator("#status")).to_contain_text("of 501", timeout=TIMEOUT)
    started = time.monotonic()
    page.keyboard.press("Escape")
    expect(page.locator("#generate")).to_be_enabled(timeout=TIMEOUT)
    ready = time.monotonic() - started
    # The settings stay.
    expect(page.locator("#steps")).to_have_value("500")
    expect(page.locator("#about")).to_be_hidden()
    page.locator("#steps").fill("2")
    page.locator("#seed").fill("5")
    image, _ = generate(page)
    assert_same(image, native(program, "txt2img", PROMPT, "--seed", "5", "--steps", "2"))
    return f"Ready {ready:.1f} s after cancelling."


def without_a_prompt(page, program):
    page.locator("#model").select_option("scenes-ddpm")
    expect(page.locator("#prompt")).to_be_hidden(timeout=TIMEOUT)
    expect(page.locator("#steps")).to_have_value("100")
    page.locator("#seed").fill("1")
    image, facts = generate(page)
    assert_same(image, native(program, "ddpm", "--seed", "1"))
    return facts


def own_folder(page, program):
    page.locator("#folder").set_input_files(TINY)
    return generate_with_tiny(page, program)


def dropped_folder(page, program):
    drop(page, TINY)
    return generate_with_tiny(page, program)


def drop(page, path):
    """Drops a file or folder onto the page."""
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)
    for kind in ["dragEnter", "dragOver", "drop"]:
        event = {"type": kind, "x": 600, "y": 400, "data": data}
        devtools.send("Input.dispatchDragEvent", event)


def generate_with_tiny(page, program, timeout=TIMEOUT):
    expect(page.locator("#steps")).to_have_value("50", timeout=TIMEOUT)
    page.locator("#prompt").fill("a red fox")
    page.locator("#steps").fill("3")
    page.locator("#seed").fill("1")
    image, facts = generate(page, timeout)
    options = ["--model", TINY, "--seed", "1", "--steps", "3"]
    expected = native(program, "txt2img", "a red fox", *options)
    assert_same(image, expected)
    return facts


def a_folder_that_is_no_model(page, program):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "photos"
        folder.mkdir()
        (folder / "notes.txt").write_text("not a model")
        page.locator("#folder").set_input_files(folder)
        expect(page.locator("#error")).to_have_text(
            "`photos` has no `model_index.json`: it is not a pipeline in Diffusers' format",
            timeout=TIMEOUT)
    # The built-in model is there again.
    expect(page.locator("#generate")).to_be_enabled(timeout=TIMEOUT)
    expect(page.locator("#model")).to_have_value("scenes")
    drop(page, __file__)
    expect(page.locator("#error")).to_have_text("Drop the folder of a model, not a file.")
    return "Refused."


def wrong_settings(page, program):
    page.locator("#steps").fill("0")
    page.locator("#generate").click()
    expect(page.locator("#cancel")).to_be_hidden()
    page.locator("#steps").fill("2000")
    page.locator("#generate").click()
    expect(page.locator("#error")).to_have_text(
        "`num_inference_steps` is `2000`, `PNDMScheduler` supports 1 to 1000 "
        "(`num_train_timesteps`)", timeout=TIMEOUT)
    page.locator("#steps").fill("1")
    generate(page)
    expect(page.locator("#error")).to_be_empty()
    return "Refused."


def on_a_phone(page, program):
    page.locator("#steps").fill("3")
    page.locator("#generate").tap()
    expect(page.locator("#about")).to_be_visible(timeout=TIMEOUT)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["viewport"]["width"], width
    expect(page.locator("#shown")).to_be_in_viewport()
    return f"{width} pixels wide."


# With WebGPU


def on_the_gpu(page, program):
    """The same images, with and without loading the model; the switch is off at first."""
    page.locator("#prompt").fill(PROMPT)
    page.locator("#seed").fill("3")
    page.locator("#steps").fill("2")
    expect(page.locator("#on-gpu")).not_to_be_checked()
    page.get_by_label("Use the GPU (WebGPU)").check()
    image, facts = generate(page, GPU_TIMEOUT)
    assert facts.endswith(" s in all, on the GPU."), facts
    assert_same(image, native(program, "txt2img", PROMPT, "--seed", "3", "--steps", "2"))
    page.locator("#seed").fill("4")
    page.locator("#scheduler").select_option("euler-a")
    image, again = generate(page, GPU_TIMEOUT)
    options = ["--seed", "4", "--steps", "2", "--scheduler", "euler-a"]
    assert_same(image, native(program, "txt2img", PROMPT, *options))
    expect(page.locator("#note")).to_be_hidden()
    page.locator("#on-gpu").uncheck()
    _, last = generate(page)
    assert "GPU" not in last, last
    return f"{facts} {again}"


def without_a_prompt_on_the_gpu(page, program):
    page.locator("#model").select_option("scenes-ddpm")
    expect(page.locator("#prompt")).to_be_hidden(timeout=TIMEOUT)
    page.locator("#seed").fill("1")
    page.locator("#steps").fill("4")
    page.locator("#on-gpu").check()
    image, facts = generate(page, GPU_TIMEOUT)
    assert facts.endswith(" s in all, on the GPU."), facts
    assert_same(image, native(program, "ddpm", "--seed", "1", "--steps", "4"))
    return facts


def no_webgpu(page, program):
    return check_fallback(page, program, "the browser offers no GPU")


def no_adapter(page, program):
    return check_fallback(page, program, "the browser offers no GPU")


def wrong_results(page, program):
    return check_fallback(
        page, program,
        r"the GPU's first step differs from the CPU's by \d\.\de-?\d standard deviations")


def broken_shader(page, program):
    reason = r'\[Invalid ShaderModule "\w+"\] is invalid due to a previous error\.'
    return check_fallback(page, program, f"the GPU reports an error, {reason}")


def lost_device(page, program):
    return check_fallback(
        page, program, "the GPU failed, Failed to map buffer: BufferAsyncError")


def check_fallback(page, program, reason):
    """The image is the CPU's, and a line says why; the next run has no such line."""
    page.locator("#on-gpu").check()
    page.locator("#folder").set_input_files(TINY)
    facts = generate_with_tiny(page, program, GPU_TIMEOUT)
    assert "GPU" not in facts, facts
    note = page.locator("#note").inner_text()
    assert re.fullmatch(f"Computed on the CPU: {reason}", note), note
    page.locator("#on-gpu").uncheck()
    generate(page)
    expect(page.locator("#note")).to_be_hidden()
    return f"{facts} {note}"


def replace_gpu(page, code):
    """Runs code in the worker, before the library."""

    def answer(route):
        response = route.fetch()
        route.fulfill(response=response, body=f"{response.text()}\n{code}")

    page.route("**/worker.js", answer)


SHADERS = """
const { createShaderModule } = GPUDevice.prototype;
GPUDevice.prototype.createShaderModule = function (descriptor) {
  return createShaderModule.call(this, { ...descriptor, code: changed(descriptor.code) });
};
"""

# What is replaced in the worker.
FAILURES = {
    no_webgpu: "delete WorkerNavigator.prototype.gpu;",
    # A GPU that computes, but not what it should.
    wrong_results: SHADERS + """
        const changed = (code) => code.replaceAll(/\\bexp\\(/g, "exp(1.01 * ");
    """,
    broken_shader: SHADERS + """const changed = (code) => `${code}\n!`;""",
    lost_device: """
        const { requestDevice } = GPUAdapter.prototype;
        let device;
        GPUAdapter.prototype.requestDevice = async function (descriptor) {
          return (device = await requestDevice.call(this, descriptor));
        };
        const { mapAsync } = GPUBuffer.prototype;
        let reads = 0;
        GPUBuffer.prototype.mapAsync = function (...options) {
          reads += 1;
          if (reads === 4) device.destroy();
          return mapAsync.apply(this, options);
        };
    """,
}

CHECKS = [
    same_image_as_the_program,
    another_scheduler,
    cancel_and_again,
    without_a_prompt,
    own_folder,
    dropped_folder,
    a_folder_that_is_no_model,
    wrong_settings,
    on_a_phone,
]
CHECKS_WITHOUT_A_GPU = [no_webgpu, no_adapter]
CHECKS_WITH_A_GPU = [
    on_the_gpu,
    without_a_prompt_on_the_gpu,
    wrong_results,
    broken_shader,
    lost_device,
]

if __name__ == "__main__":
    main()
