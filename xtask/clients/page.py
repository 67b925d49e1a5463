"""The server's page in a browser.

    pip install playwright pillow
    python page.py DIFFUSE_PROGRAM SCREENSHOT_FOLDER [CHROMIUM]

Starts `diffuse serve` with the built-in model, uses the page as a person would, with the mouse,
with the keyboard alone and on a phone, and checks what it shows. Messages in the browser's console
are failures. The screenshots are for the eye.
"""

import base64
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from PIL import Image, ImageChops, PngImagePlugin
from playwright.sync_api import expect, sync_playwright

PROMPT = "a red house in a meadow by day"
PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
SKY, GRASS = (110, 170, 235), (110, 180, 80)
# The least height of what a finger touches, in CSS pixels.
TOUCH = 44
# The most bytes of the page's files together.
BYTES = 40 * 1024


def main():
    if len(sys.argv) not in (3, 4):
        raise SystemExit("usage: page.py DIFFUSE_PROGRAM SCREENSHOT_FOLDER [CHROMIUM]")
    program, folder = sys.argv[1], Path(sys.argv[2])
    chromium = sys.argv[3] if len(sys.argv) == 4 else "/usr/bin/chromium"
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as loras:
        (Path(loras) / "a.b-style.safetensors").write_bytes(b"not read until it is used")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with server(program, "--lora-dir", loras, "--max-pixels", "65536") as address:
            check_files(address)
            run_all(browser, address, folder, DESKTOP_CHECKS, DESKTOP)
            run_all(browser, address, folder, PHONE_CHECKS, PHONE)
        with server(program, "--key", "secret") as address:
            run_all(browser, address, folder, [check_key], DESKTOP)
        browser.close()
    print("all checks of the page passed")


@contextlib.contextmanager
def server(program, *arguments):
    """Runs the server; the value is its address."""
    command = [program, "serve", "--listen", "127.0.0.1:0", "--backend", "flex", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(timeout=60)


def run_all(browser, address, folder, checks, options):
    """Runs each check with a page of its own."""
    for check in checks:
        context = browser.new_context(**options)
        page = context.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: note(message, errors))
        page.goto(address)
        started = time.monotonic()
        check(page, address, lambda name: page.screenshot(path=folder / f"{name}.png"))
        assert not errors, f"{check.__name__}: {errors}"
        print(f"{check.__name__}: {time.monotonic() - started:.1f} s")
        context.close()


def note(message, errors):
    # The browser reports answers such as 401 by itself.
    if message.type == "error" and "Failed to load resource" not in message.text:
        errors.append(message.text)


def check_files(address):
    """The files are small, and may load nothing from elsewhere."""
    total = 0
    for name in ["", "page.js", "page.css"]:
        with urllib.request.urlopen(f"{address}/{name}") as response:
            total += len(response.read())
            policy = response.headers["Content-Security-Policy"]
            assert policy.startswith("default-src 'self';"), policy
    assert total < BYTES, total


def server_info(address):
    with urllib.request.urlopen(f"{address}/internal/v1/info") as response:
        return json.load(response)


def metric(address, name):
    with urllib.request.urlopen(f"{address}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def ready(page):
    """Waits for the lists of the server."""
    expect(page.locator("#model")).not_to_be_empty()


def wait_for_end(page):
    expect(page.locator("#running")).to_be_hidden(timeout=60_000)


def thumbs(page):
    return page.locator("#thumbs img")


def shown_image(page):
    """The pixels of the image that is shown."""
    code = """async (image) => {
        await image.decode();
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
        const context = canvas.getContext('2d');
        context.drawImage(image, 0, 0);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
        return [canvas.width, canvas.height, [...pixels.data]];
    }"""
    width, height, pixels = page.locator("#shown").evaluate(code)
    return Image.frombytes("RGBA", (width, height), bytes(pixels)).convert("RGB")


# The checks


def check_defaults(page, address, screenshot):
    """The form starts with what the server says."""
    ready(page)
    info = server_info(address)
    width, height = info["size"]
    values = {
        "#steps": info["steps"],
        "#guidance": info["guidance_scale"],
        "#width": width,
        "#height": height,
        "#images": 1,
    }
    for field, value in values.items():
        assert float(page.input_value(field)) == value, field
    assert page.input_value("#seed") == ""
    assert page.get_attribute("#steps", "max") == str(info["limits"]["steps"])
    options = page.locator("#scheduler option").all_inner_texts()
    assert options[0] == "PNDM (default)" and "Euler a" in options, options
    screenshot("desktop-empty")


def check_generate(page, address, screenshot):
    """Two images of a seed; their settings come back; they are kept as files."""
    ready(page)
    page.fill("#prompt", PROMPT)
    page.fill("#negative", "a boat")
    page.fill("#seed", "7")
    page.fill("#images", "2")
    page.select_option("#scheduler", "Euler")
    page.click("#generate")
    expect(page.locator("#progress")).to_be_visible()
    expect(page.locator("#generate")).to_be_disabled()
    expect(page.locator("#status")).to_contain_text("Step ")
    value = page.get_attribute("#progress", "value")
    assert value is not None and 0 < float(value) <= 1, value
    screenshot("desktop-progress")
    wait_for_end(page)
    expect(thumbs(page)).to_have_count(2)
    expect(page.locator("#facts")).to_contain_text("seed 7 ·")
    expect(page.locator("#announce")).to_have_text("2 images are finished.")
    screenshot("desktop-result")

    # The other one has the next seed. All settings come back.
    page.locator("#thumbs button").first.click()
    expect(page.locator("#facts")).to_contain_text("seed 8 · ")
    expect(page.locator("#facts")).to_contain_text("Euler")
    page.fill("#prompt", "")
    page.fill("#negative", "")
    page.fill("#steps", "1")
    page.select_option("#scheduler", "")
    page.click("#reuse")
    fields = ["prompt", "negative", "steps", "seed", "images", "scheduler"]
    expected = [PROMPT, "a boat", str(server_info(address)["steps"]), "8", "1", "Euler"]
    assert [page.input_value(f"#{name}") for name in fields] == expected

    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "diffuse-8.png"
    file = Image.open(download.value.path())
    assert isinstance(file, PngImagePlugin.PngImageFile)
    assert f"{PROMPT}\nNegative prompt: a boat\n" in file.text["parameters"]
    assert "Seed: 8" in file.text["parameters"]

    # The same settings are the same image, but for the rounding of a batch.
    page.click("#generate")
    wait_for_end(page)
    expect(thumbs(page)).to_have_count(3)
    difference = ImageChops.difference(shown_image(page), file.convert("RGB"))
    assert max(high for _, high in difference.getextrema()) <= 4, difference.getextrema()

    page.click("#frame")
    expect(page.locator("#large")).to_be_visible()
    page.wait_for_timeout(100)
    screenshot("desktop-large")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#facts")).to_contain_text("seed 8 ·")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#facts")).to_contain_text("seed 7 ·")
    page.keyboard.press("Escape")
    expect(page.locator("#large")).to_be_hidden()
    expect(page.locator("#frame")).to_be_focused()


def check_cancel(page, address, screenshot):
    """A long run is cancelled on the server, too; the next one is not held up."""
    ready(page)
    before = metric(address, "diffuse_steps_total")
    page.fill("#prompt", PROMPT)
    page.fill("#steps", "150")
    page.fill("#images", "4")
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text("Step", timeout=30_000)
    page.click("#cancel")
    wait_for_end(page)
    expect(page.locator("#announce")).to_have_text("Cancelled.")
    expect(page.locator("#error")).to_be_empty()
    expect(thumbs(page)).to_have_count(0)
    page.fill("#steps", "2")
    page.fill("#images", "1")
    page.click("#generate")
    wait_for_end(page)
    expect(thumbs(page)).to_have_count(1)
    steps = metric(address, "diffuse_steps_total") - before
    assert 3 <= steps < 100, steps


def check_errors(page, address, screenshot):
    """The server's messages are shown as they are; the browser checks ranges."""
    ready(page)
    page.fill("#prompt", PROMPT)
    page.fill("#width", "512")
    page.fill("#height", "512")
    page.click("#generate")
    message = "the number of pixels is 262144, but at most 65536 here"
    expect(page.locator("#error")).to_have_text(message)
    screenshot("desktop-error")
    page.fill("#width", "64")
    page.fill("#height", "64")
    page.fill("#prompt", f"{PROMPT} <lora:missing:1>")
    page.click("#generate")
    expect(page.locator("#error")).to_have_text("there is no LoRA `missing`")
    page.fill("#prompt", PROMPT)
    page.fill("#steps", "151")
    page.click("summary")
    page.click("#generate")
    expect(page.locator("#options")).to_have_attribute("open", "")
    assert page.evaluate("document.querySelector('#steps:invalid') !== null")
    expect(page.locator("#running")).to_be_hidden()
    page.fill("#steps", "1")
    page.click("#generate")
    wait_for_end(page)
    expect(page.locator("#error")).to_be_empty()
    expect(thumbs(page)).to_have_count(1)


def check_loras(page, address, screenshot):
    """A click puts a LoRA into the prompt, another one takes it out."""
    ready(page)
    page.fill("#prompt", PROMPT)
    button = page.get_by_role("button", name="a.b-style")
    button.click()
    assert page.input_value("#prompt") == f"{PROMPT} <lora:a.b-style:1>"
    expect(button).to_have_attribute("aria-pressed", "true")
    page.fill("#prompt", f"{PROMPT} <lora:a.b-style:0.5>, at night")
    button.click()
    assert page.input_value("#prompt") == f"{PROMPT}, at night"
    expect(button).to_have_attribute("aria-pressed", "false")


def meadow_file(size):
    """A file of an image whose upper half is sky and whose lower half is a meadow."""
    image = Image.new("RGB", size, GRASS)
    image.paste(SKY, (0, 0, size[0], size[1] // 2))
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": "start.png", "mimeType": "image/png", "buffer": file.getvalue()}


def check_start(page, address, screenshot):
    """A file as the start: its proportions, what is sent, and what becomes of it."""
    ready(page)
    width, height = server_info(address)["size"]
    page.set_input_files("#file", meadow_file((400, 200)))
    expect(page.locator("#editor")).to_be_visible()
    sides = [int(page.input_value(name)) for name in ("#width", "#height")]
    assert all(side % 8 == 0 for side in sides), sides
    assert 1.6 < sides[0] / sides[1] < 2.5 and sides[0] > width, sides
    page.fill("#prompt", "the sea at night")
    page.fill("#steps", "4")
    # At the lowest strength, no step is left of so few.
    page.locator("#strength").fill("0.05")
    page.click("#swap")
    assert [int(page.input_value(name)) for name in ("#height", "#width")] == sides
    with page.expect_request("**/internal/v1/generate") as sent:
        page.click("#generate")
    body = sent.value.post_data_json
    assert body["denoising_strength"] == 0.05 and "mask" not in body
    image = decode(body["init_images"][0])
    assert list(image.size) == sides[::-1], image.size
    middle = image.width // 2
    assert image.getpixel((middle, 8)) == SKY and image.getpixel((middle, 160)) == GRASS
    wait_for_end(page)
    expect(page.locator("#error")).not_to_be_empty()
    page.locator("#strength").fill("0.2")
    page.fill("#steps", "10")
    page.click("#generate")
    wait_for_end(page)
    expect(page.locator("#error")).to_be_empty()
    expect(page.locator("#facts")).to_contain_text("strength 0.2")
    assert list(shown_image(page).size) == sides[::-1]
    screenshot("desktop-start")

    # A photograph is made smaller before it is sent.
    page.click("#remove")
    page.set_input_files("#file", meadow_file((4000, 3000)))
    expect(page.locator("#editor")).to_be_visible()
    sides = [int(page.input_value(name)) for name in ("#width", "#height")]
    with page.expect_request("**/internal/v1/generate") as sent:
        page.click("#generate")
    assert list(decode(sent.value.post_data_json["init_images"][0]).size) == sides
    assert abs(sides[0] * sides[1] / (width * height) - 1) < 0.1, sides
    wait_for_end(page)

    # A text file is no image. The start image stays.
    page.click("#remove")
    expect(page.locator("#file")).to_be_focused()
    text = {"name": "a.png", "mimeType": "image/png", "buffer": b"no image"}
    page.set_input_files("#file", text)
    expect(page.locator("#error")).to_have_text("The browser cannot read this file as an image.")
    expect(page.locator("#editor")).to_be_hidden()


def check_drop_and_paste(page, address, screenshot):
    """Images come by drag and drop and from the clipboard."""
    ready(page)
    event = """async (type) => {
        const canvas = new OffscreenCanvas(40, 20);
        canvas.getContext('2d').fillRect(0, 0, 40, 20);
        const data = new DataTransfer();
        data.items.add(new File([await canvas.convertToBlob()], 'a.png', {type: 'image/png'}));
        const options = {bubbles: true, cancelable: true};
        document.querySelector('#prompt').dispatchEvent(type === 'drop'
            ? new DragEvent('drop', {...options, dataTransfer: data})
            : new ClipboardEvent('paste', {...options, clipboardData: data}));
    }"""
    for kind in ["drop", "paste"]:
        page.evaluate(event, kind)
        expect(page.locator("#editor")).to_be_visible()
        page.click("#remove")
        expect(page.locator("#editor")).to_be_hidden()


def check_inpainting(page, address, screenshot):
    """A gallery image is the start, and only its painted part changes."""
    ready(page)
    page.fill("#prompt", "a meadow by day")
    page.fill("#seed", "2")
    page.click("#generate")
    wait_for_end(page)
    before = shown_image(page)
    page.click("#as-start")
    expect(page.locator("#editor")).to_be_visible()
    page.check("#masked")
    page.locator("#brush-size").fill("30")
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    at = lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])
    stroke(page, at(0.3, 0.6), at(0.6, 0.6))
    stroke(page, at(0.9, 0.1), at(0.9, 0.2))
    page.click("#undo")
    page.click("#erase")
    stroke(page, at(0.3, 0.6), at(0.3, 0.6))
    page.locator("#canvas").scroll_into_view_if_needed()
    screenshot("desktop-mask")
    page.fill("#prompt", "a red house in a meadow by day")
    page.fill("#seed", "0")
    page.locator("#strength").fill("1")
    with page.expect_request("**/internal/v1/generate") as sent:
        page.click("#generate")
    mask = mask_of(sent)
    assert mask.size == before.size
    width, height = mask.size
    pixel = lambda x, y: mask.getpixel((int(x * width), int(y * height)))
    assert pixel(0.6, 0.6) == 255 and pixel(0.55, 0.5) == 255
    assert [pixel(*at) for at in [(0.3, 0.6), (0.1, 0.1), (0.9, 0.15), (0.6, 0.9)]] == [0] * 4
    wait_for_end(page)
    screenshot("desktop-inpainted")
    after = shown_image(page)
    changed = lambda x, y: before.getpixel((x, y)) != after.getpixel((x, y))
    positions = [(x, y) for x in range(width) for y in range(height)]
    inside = [changed(*at) for at in positions if mask.getpixel(at) == 255]
    outside = [changed(*at) for at in positions if mask.getpixel(at) == 0]
    assert sum(inside) > len(inside) / 2 and not any(outside), (sum(inside), sum(outside))

    # Its settings bring the image and the mask back.
    page.click("#remove")
    page.click("#reuse")
    expect(page.locator("#masked")).to_be_checked()
    with page.expect_request("**/internal/v1/generate") as sent:
        page.click("#generate")
    assert mask_of(sent).tobytes() == mask.tobytes()
    wait_for_end(page)
    assert shown_image(page).tobytes() == after.tobytes()
    page.click("#clear")
    with page.expect_request("**/internal/v1/generate") as sent:
        page.click("#generate")
    assert "mask" not in sent.value.post_data_json
    wait_for_end(page)


def stroke(page, begin, end):
    page.mouse.move(*begin)
    page.mouse.down()
    page.mouse.move(*end, steps=8)
    page.mouse.up()


def decode(url):
    """An image of a request."""
    return Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")


def mask_of(sent):
    """The mask of a request."""
    return decode(sent.value.post_data_json["mask"]).convert("L")


def tab_to(page, field):
    """Presses the tabulator until a field has the focus, which can be seen."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement?.id") == field:
            style = "getComputedStyle(document.activeElement)"
            if field != "file":
                assert page.evaluate(f"{style}.outlineStyle") == "solid", field
            return
    raise AssertionError(f"the tabulator does not reach {field}")


def check_keyboard(page, address, screenshot):
    """Everything without a mouse: a run, a cancelled run, a mask."""
    ready(page)
    keyboard = page.keyboard
    expect(page.locator("#prompt")).to_be_focused()
    keyboard.type("a meadow by day")
    tab_to(page, "steps")
    keyboard.press("Control+a")
    keyboard.type("150")
    keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Step", timeout=30_000)
    keyboard.press("Escape")
    wait_for_end(page)
    expect(page.locator("#announce")).to_have_text("Cancelled.")
    expect(page.locator("#steps")).to_be_focused()
    keyboard.press("Control+a")
    keyboard.type("4")
    tab_to(page, "generate")
    keyboard.press("Space")
    expect(page.locator("#cancel")).to_be_focused()
    wait_for_end(page)
    expect(page.locator("#generate")).to_be_focused()
    expect(thumbs(page)).to_have_count(1)
    tab_to(page, "as-start")
    keyboard.press("Enter")
    expect(page.locator("#editor")).to_be_visible()
    page.evaluate("document.querySelector('#prompt').focus()")
    tab_to(page, "masked")
    keyboard.press("Space")
    page.evaluate("document.querySelector('#prompt').focus()")
    tab_to(page, "canvas")
    keyboard.press("Space")
    for _ in range(6):
        keyboard.press("ArrowRight")
    screenshot("desktop-keyboard-mask")
    keyboard.press("Space")
    with page.expect_request("**/internal/v1/generate") as sent:
        keyboard.press("Control+Enter")
    mask = mask_of(sent)
    left, top, right, bottom = mask.getbbox()
    assert right - left > bottom - top > 0 and right < mask.width, mask.getbbox()
    wait_for_end(page)
    expect(page.locator("#error")).to_be_empty()
    expect(thumbs(page)).to_have_count(2)


def check_dark(page, address, screenshot):
    page.emulate_media(color_scheme="dark")
    ready(page)
    page.fill("#prompt", PROMPT)
    page.fill("#images", "4")
    page.click("#generate")
    wait_for_end(page)
    page.click("#as-start")
    page.check("#masked")
    screenshot("dark")
    color = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(color) == "rgb(21, 25, 26)"


def check_contrast(page, address, screenshot):
    """Text has a contrast of 4.5 at least, in both color schemes."""
    names = ["text", "quiet", "accent", "error"]
    code = """(name) => getComputedStyle(document.documentElement).getPropertyValue('--' + name)"""
    for scheme in ["light", "dark"]:
        page.emulate_media(color_scheme=scheme)
        color = lambda name: page.evaluate(code, name)
        grounds = [("ground", names), ("card", names), ("sunken", names[:3]), ("accent", [])]
        for ground, texts in grounds:
            for text in texts or ["on-accent"]:
                ratio = contrast(color(ground), color(text))
                assert ratio >= 4.5, f"{scheme}: {text} on {ground}: {ratio:.2f}"


def contrast(*colors):
    """The contrast ratio of the Web Content Accessibility Guidelines 2.2."""

    def luminance(color):
        digits = color.strip().lstrip("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        values = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear))

    low, high = sorted(map(luminance, colors))
    return (high + 0.05) / (low + 0.05)


def check_phone(page, address, screenshot):
    """One column, nothing wider than the screen, and large enough for fingers."""
    ready(page)
    screenshot("phone-empty")
    page.fill("#prompt", PROMPT + " " + "x" * 80)
    page.tap("#generate")
    expect(page.locator("#cancel")).to_be_in_viewport()
    wait_for_end(page)
    expect(page.locator("#shown")).to_be_in_viewport()
    page.wait_for_timeout(500)
    screenshot("phone-result")
    page.tap("#as-start")
    page.locator("#masked").tap()
    page.locator("#canvas").scroll_into_view_if_needed()
    touch_stroke(page)
    screenshot("phone-mask")
    page.tap("summary")
    page.locator("#options").scroll_into_view_if_needed()
    screenshot("phone-options")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    wide = page.evaluate("""() => [...document.querySelectorAll('body *')]
        .filter((element) => element.getBoundingClientRect().right > innerWidth)
        .map((element) => element.id || element.tagName)""")
    assert not wide, wide
    columns = page.evaluate("""() => ['#form', '#results'].map(
        (name) => document.querySelector(name).getBoundingClientRect().left)""")
    assert columns[0] == columns[1], columns
    controls = "button, input:not(.unseen, [type=checkbox]), select, textarea, a, summary"
    low = page.evaluate(
        """([controls, least]) => [...document.querySelectorAll(controls + ', .check, #drop')]
            .filter((element) => element.getClientRects().length)
            .filter((element) => element.getBoundingClientRect().height < least)
            .map((element) => element.id || element.className || element.tagName)""",
        [controls, TOUCH - 0.5],
    )
    assert not low, low
    with page.expect_request("**/internal/v1/generate") as sent:
        page.tap("#generate")
    mask = mask_of(sent)
    assert mask.getbbox() is not None
    wait_for_end(page)


def touch_stroke(page):
    """A finger that moves over the canvas."""
    box = page.locator("#canvas").bounding_box()
    session = page.context.new_cdp_session(page)

    def send(kind, x=None):
        points = [] if x is None else [{"x": box["x"] + x, "y": box["y"] + box["height"] / 2}]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    send("touchStart", 80)
    for x in range(90, 200, 10):
        send("touchMove", x)
    send("touchEnd")


def check_key(page, address, screenshot):
    """The key is asked for when the server asks for it, and kept."""
    expect(page.locator("#key-form")).to_be_visible()
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#form")).to_be_hidden()
    screenshot("desktop-key")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("the key is missing or wrong")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#key-form")).to_be_hidden()
    ready(page)
    page.reload()
    ready(page)
    expect(page.locator("#key-form")).to_be_hidden()
    page.fill("#steps", "1")
    page.click("#generate")
    wait_for_end(page)
    expect(thumbs(page)).to_have_count(1)


DESKTOP_CHECKS = [
    check_defaults,
    check_contrast,
    check_generate,
    check_cancel,
    check_errors,
    check_loras,
    check_start,
    check_drop_and_paste,
    check_inpainting,
    check_keyboard,
    check_dark,
]
PHONE_CHECKS = [check_phone]


if __name__ == "__main__":
    main()
