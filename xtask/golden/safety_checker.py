"""`safety_checker/`: a tiny safety checker, its stages, and runs of pipelines that have it.

    python safety_checker.py OUTPUT_FOLDER

OUTPUT_FOLDER is `crates/diffuse-pipelines/tests/reference` and has `sd/base` and `image_to_image/inputs`.
`safety_checker/README.md` describes the files.
"""

import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL
import torch
import transformers
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from diffusers.utils import load_image
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import checkpoints
from compare import generators
from golden import quiet
from stable_diffusion import LIGHTHOUSE, OWL
from weights import fill, save_json

INPUTS = ["image", "other", "odd", "grey"]
CLIP = {
    "architectures": ["StableDiffusionSafetyChecker"],
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 12,
    "text_config": {"model_type": "clip_text_model"},
    "vision_config": {
        "attention_dropout": 0.0,
        "hidden_act": "quick_gelu",
        "hidden_size": 16,
        "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
        "image_size": 32,
        "intermediate_size": 24,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 3,
        "patch_size": 8,
        "prefix": None,
    },
    "vision_config_dict": None,
}
# As it is published; recent files have objects in place of the two sizes.
PREPROCESSOR = {
    "crop_size": 32,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 33,
}
TXT2IMG = {"name": "txt2img", "prompt": [LIGHTHOUSE, OWL], "steps": 4, "guidance_scale": 7.5, "seed": [301, 302]}
INPAINT = {
    "name": "inpaint_crop", "prompt": LIGHTHOUSE, "steps": 4, "guidance_scale": 7.5, "seed": 303,
    "image": "../image_to_image/inputs/odd.png", "mask_image": "../image_to_image/inputs/odd_mask_tall.png",
    "padding_mask_crop": 4, "width": 64, "height": 64, "strength": 1.0,
}


def pixel_values(processor, images):
    return processor(images, return_tensors="pt").pixel_values


def embeds(checker, pixels):
    return checker.visual_projection(checker.vision_model(pixels)[1])


def run(folder, pipeline, case):
    """The images, and which of them are flagged."""
    named = {"name", "steps", "seed"}
    call = {key: value for key, value in case.items() if key not in named}
    for key in ("image", "mask_image"):
        if key in call:
            call[key] = load_image(str(folder / call[key]))
    result = pipeline(num_inference_steps=case["steps"], generator=generators(case["seed"]), **call)
    return result.images, result.nsfw_content_detected


def checked_part(folder, pipeline, case):
    """What the checker of an inpainting run sees: the decoded part, before it is put into the image."""
    seen = []

    def remember(image, device, dtype):
        seen.append(image)
        return image, None

    pipeline.run_safety_checker = remember
    run(folder, pipeline, case)
    del pipeline.run_safety_checker
    return pipeline.image_processor.postprocess(seen[0], output_type="pil")


def set_thresholds(checker, inputs, first, part):
    """Thresholds by the cosines of the inputs and of the images of the runs, so that every rule decides one image.
    `inputs` are the embeddings of INPUTS, `first` those of the text-to-image run, `part` that of the inpainting."""
    everything = torch.cat([inputs, first, part])
    # Directions of which the cosine of one image is large, and of the others small; the rest stay pseudo-random.
    directions = torch.linalg.pinv(torch.nn.functional.normalize(everything)).T

    def towards(image, noise):
        return directions[image] + 0.05 * directions[image].norm() * noise / noise.norm()

    for concept, image in {3: 0, 7: 1, 11: 2, 14: 4, 5: 6}.items():
        checker.concept_embeds[concept] = towards(image, checker.concept_embeds[concept])
    for concept in range(2):
        checker.special_care_embeds[concept] = towards(0, checker.special_care_embeds[concept])
    cosines = cosine_distance(everything, checker.concept_embeds)
    special = cosine_distance(everything, checker.special_care_embeds)
    checker.special_care_embeds_weights[0] = special[0, 0] - 0.0502
    checker.special_care_embeds_weights[1] = special[0, 1] + 0.0052
    checker.special_care_embeds_weights[2] = special[:, 2].max() + 0.0202
    wanted = {
        3: cosines[0, 3] + 0.0062,   # Flagged by the adjustment alone.
        7: cosines[1, 7] - 0.0004,   # Above zero, but not when rounded.
        11: cosines[2, 11] - 0.0013,
        14: cosines[4, 14] - 0.0302,
        5: cosines[6, 5] - 0.0302,
    }
    for concept in range(17):
        checker.concept_embeds_weights[concept] = wanted.get(concept, cosines[:, concept].max() + 0.03)
    # Scores of float32 are rounded alike here and there, unless they are halves of the last digit.
    for thresholds, values in (
        (checker.concept_embeds_weights, cosines),
        (checker.special_care_embeds_weights, special),
    ):
        for index in range(len(thresholds)):
            for _ in range(14):
                digits = (values[:, index] - thresholds[index]) * 1000
                if ((digits - digits.floor() - 0.5).abs() > 0.05).all():
                    break
                thresholds[index] += 0.000022
            else:
                raise SystemExit(f"no threshold for {index}: {digits}")


def scores(checker, pixels):
    """The scores that `forward` computes and does not return."""
    rounded = []
    numbers = {"special_care": checker.special_care_embeds, "concepts": checker.concept_embeds}
    thresholds = {
        "special_care": checker.special_care_embeds_weights,
        "concepts": checker.concept_embeds_weights,
    }
    image_embeds = embeds(checker, pixels)
    cosines = {name: cosine_distance(image_embeds, values).numpy() for name, values in numbers.items()}
    for image in range(len(pixels)):
        adjustment, row = 0.0, {"special_care": [], "concepts": []}
        for name in row:
            for cosine, threshold in zip(cosines[name][image], thresholds[name]):
                row[name].append(round(cosine - threshold.item() + adjustment, 3))
                if name == "special_care" and row[name][-1] > 0:
                    adjustment = 0.01
        rounded.append(row)
    return rounded


def make_stages(folder, checker, processor, images):
    pixels = [pixel_values(processor, image) for image in images]
    batch = torch.cat(pixels)
    vision = checker.vision_model(batch)
    rows = scores(checker, batch)
    blank = [np.ones((4, 4, 3), np.float32) for _ in images]
    _, flagged = checker(clip_input=batch, images=blank)
    assert flagged == [any(score > 0 for score in row["concepts"]) for row in rows], rows
    assert flagged == [True, False, True, False], rows
    assert rows[0]["special_care"][0] > 0 and 0 < rows[0]["special_care"][1] < 0.01 > rows[0]["concepts"][3] > 0, rows
    tensors = {f"pixel_values.{name}": values for name, values in zip(INPUTS, pixels)}
    tensors |= {
        "last_hidden_state": vision[0],
        "pooler_output": vision[1],
        "image_embeds": embeds(checker, batch),
        "special_care": torch.tensor([[float(score) for score in row["special_care"]] for row in rows]),
        "concepts": torch.tensor([[float(score) for score in row["concepts"]] for row in rows]),
    }
    checkpoints.save_tensors(folder / "stages.safetensors", tensors)
    save_json(folder / "stages.json", {"inputs": [f"../image_to_image/inputs/{name}.png" for name in INPUTS],
                                       "flagged": flagged})


def save_checker(folder, checker):
    """Under the names of the published file, which lists the positions as well."""
    names = lambda key: key.replace("vision_model.", "vision_model.vision_model.", 1)
    tensors = {names(key): tensor for key, tensor in checkpoints.state(checker).items()}
    positions = tensors["vision_model.vision_model.embeddings.position_embedding.weight"].shape[0]
    tensors["vision_model.vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
    checkpoints.save_tensors(folder / "safety_checker/model.safetensors", tensors)
    checkpoints.save_config(folder / "safety_checker/config.json", CLIP)
    checkpoints.save_config(folder / "feature_extractor/preprocessor_config.json", PREPROCESSOR)


README = """\
# A safety checker

Made by `xtask/golden/safety_checker.py`; versions in `made_with.json`.

| Path | Contents |
|---|---|
| `safety_checker`, `feature_extractor` | a tiny checker with pseudo-random weights and the published names, and its image processor |
| `stages.json`, `stages.safetensors` | of four images: pixel values by Pillow, equal to the bit; the vision model's results; embeddings; rounded scores; decisions. The first image is flagged by the adjustment alone, the second is not because its score is rounded to zero |
| `cases.json`, `expected` | runs of `sd/base` with this checker: of two images the first is flagged; a part that inpainting repaints is flagged |
"""


@torch.no_grad()
def main():
    if len(sys.argv) != 2:
        raise SystemExit("usage: safety_checker.py OUTPUT_FOLDER")
    quiet()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    folder = Path(sys.argv[1]) / "safety_checker"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "expected").mkdir(parents=True)
    base = str(folder / "../sd/base")
    images = [load_image(str(folder / f"../image_to_image/inputs/{name}.png")) for name in INPUTS]

    checker = fill(StableDiffusionSafetyChecker(CLIPConfig(**CLIP)), "safety_checker")
    processor = CLIPImageProcessorPil(**PREPROCESSOR)
    pipelines = {
        kind: kind.from_pretrained(base, dtype=torch.float32)
        for kind in (StableDiffusionPipeline, StableDiffusionInpaintPipeline)
    }
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    inputs = torch.cat([embeds(checker, pixel_values(processor, image)) for image in images])
    first, _ = run(folder, pipelines[StableDiffusionPipeline], TXT2IMG)
    part = checked_part(folder, pipelines[StableDiffusionInpaintPipeline], INPAINT)
    first, part = (embeds(checker, pixel_values(processor, images)) for images in (first, part))
    set_thresholds(checker, inputs, first, part)
    save_checker(folder, checker)
    make_stages(folder, checker, processor, images)

    manifest = []
    for (kind, pipeline), case, wanted in zip(pipelines.items(), (TXT2IMG, INPAINT), ([True, False], [True])):
        pipeline.safety_checker, pipeline.feature_extractor = checker, processor
        results, flagged = run(folder, pipeline, case)
        assert flagged == wanted, flagged
        paths = [f"expected/{case['name']}_{index}.png" for index in range(len(results))]
        for path, image in zip(paths, results):
            image.save(folder / path)
        expected = {"images": paths, "nsfw_content_detected": flagged}
        tolerance = {"image_max": 2, "image_mean": 0.2}
        manifest.append({"pipeline": kind.__name__} | case | {"expected": expected, "tolerance": tolerance})
    save_json(folder / "cases.json", manifest)
    (folder / "README.md").write_text(README)
    versions = {
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformers": transformers.__version__, "pillow": PIL.__version__,
    }
    save_json(folder / "made_with.json", versions)
    print(versions)


if __name__ == "__main__":
    main()
