"""A client of AUTOMATIC1111's API: `webuiapi` from PyPI."""

import threading
from importlib.metadata import version

import webuiapi

from common import sample, same, server, txt2img

SMALL = {"width": 64, "height": 64, "seed": 5, "steps": 3, "eta": 0.0}


def client(url, **more):
    host, port = url.removeprefix("http://").split(":")
    return webuiapi.WebUIApi(host=host, port=int(port), sampler="Euler", **more)


def generate(api):
    result = api.txt2img(prompt="a (red:1.2) boat", negative_prompt="fog", **SMALL)
    expected = txt2img(
        "a (red:1.2) boat", "--negative-prompt", "fog", "--prompt-syntax", "a1111",
        "--seed", 5, "--steps", 3, "--width", 64, "--height", 64, "--guidance-scale", 7,
        "--scheduler", "Euler",
    )
    assert same(result.image.convert("RGB"), expected[0])
    assert result.info["seed"] == 5 and result.info["all_seeds"] == [5]
    # The parameters are in the file, too.
    assert result.image.text["parameters"] == result.info["infotexts"][0]
    assert "Negative prompt: fog\nSteps: 3, " in result.image.text["parameters"]
    two = api.txt2img(prompt="a boat", batch_size=2, n_iter=2, **SMALL)
    assert len(two.images) == 4 and two.info["all_seeds"] == [5, 6, 7, 8]
    random = api.txt2img(prompt="a boat", **{**SMALL, "seed": -1})
    again = api.txt2img(prompt="a boat", **{**SMALL, "seed": random.info["seed"]})
    assert same(random.image, again.image)
    for sampler in ["Euler a", "DPM++ 2M", "DDIM", "UniPC", "LMS", "Heun"]:
        assert api.txt2img(prompt="a boat", sampler_name=sampler, **SMALL).image.size == (64, 64)
    karras = api.txt2img(prompt="a boat", scheduler="Karras", **SMALL)
    assert not same(karras.image, api.txt2img(prompt="a boat", **SMALL).image)


def variants(api):
    image, _, white = sample()
    whole = api.img2img(images=[image], prompt="a boat", denoising_strength=0.8, **SMALL)
    assert whole.image.size == (64, 64)
    # By default it cuts out the masked part, and repaints that in full resolution.
    for full in [False, True]:
        part = api.img2img(
            images=[image], mask_image=white, inpaint_full_res=full, prompt="a boat", **SMALL
        )
        result = part.image.convert("RGB")
        right = (32, 0, 64, 64)
        assert same(result.crop(right), image.crop(right))
        assert not same(result, image)
    inverted = api.img2img(
        images=[image], mask_image=white, inpainting_mask_invert=1, prompt="a boat", **SMALL
    )
    left = (0, 0, 32, 64)
    assert same(inverted.image.convert("RGB").crop(left), image.crop(left))


def lists(api):
    options = api.get_options()
    assert api.set_options(options) is None
    assert api.get_options() == options
    title = options["sd_model_checkpoint"]
    assert api.util_get_model_names() == [title]
    assert api.util_get_current_model() == title
    api.util_set_model(title)
    assert "Euler a" in api.util_get_sampler_names()
    assert "karras" in [name.lower() for name in api.util_get_scheduler_names()]
    assert api.get_loras() == [] and api.get_upscalers() == [] and api.get_sd_vae() == []
    assert api.get_latent_upscale_modes() == []
    assert api.get_embeddings()["loaded"] == {}
    api.get_scripts()
    api.get_cmd_flags()
    assert not api.has_controlnet
    api.util_wait_for_ready()


def progress(running, api):
    result = []
    long = {**SMALL, "steps": 900}
    thread = threading.Thread(
        target=lambda: result.append(client(running.url).txt2img(prompt="a boat", **long))
    )
    before = running.metrics()["diffuse_steps_total"]
    thread.start()
    running.wait_for("diffuse_steps_total", before + 1)
    first = api.get_progress()
    assert 0 < first["progress"] < 1 and first["state"]["job_count"] == 1, first
    assert first["state"]["sampling_steps"] == 900
    running.wait_for("diffuse_steps_total", before + 50)
    assert api.get_progress()["state"]["sampling_step"] > first["state"]["sampling_step"]
    api.interrupt()
    thread.join(30)
    assert result[0].image.size == (64, 64) and result[0].info["interrupted"]
    assert running.metrics()["diffuse_steps_total"] < before + 900
    end = api.get_progress()
    assert end["progress"] == 0 and end["state"]["job_count"] == 0


def errors(api):
    for arguments, status in [
        ({"sampler_name": "none"}, 404),
        ({"scheduler": "none"}, 404),
        ({"width": 60}, 422),
        ({"steps": 10**6}, 422),
        ({"cfg_scale": "much"}, 422),
    ]:
        try:
            api.txt2img(prompt="a boat", **{**SMALL, **arguments})
            raise AssertionError(f"{arguments} is accepted")
        except RuntimeError as error:
            assert error.args[0] == status, error


def main():
    with server("--max-steps", "1000") as running:
        api = client(running.url)
        lists(api)
        generate(api)
        variants(api)
        errors(api)
        progress(running, api)
    with server("--key", "secret") as running:
        api = client(running.url, username="anyone", password="secret")
        api.txt2img(prompt="a boat", **SMALL)
    print(f"webuiapi {version('webuiapi')}: ok")


main()
