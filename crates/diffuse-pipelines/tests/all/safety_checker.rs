//! The safety checker: its stages, whole runs, and where it is loaded from.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_pipelines::convert::{ConvertOptions, convert};
use diffuse_pipelines::inspect::Inspection;
use diffuse_pipelines::{
    CLIPImageProcessor, LoadOptions, PipelineError, Pretrained, SafetyChecker, SafetyScores,
    StableDiffusionInpaintOptions, StableDiffusionPipeline, StableDiffusionSafetyChecker,
    load_image,
};
use diffuse_testing::{Values, assert_close, assert_stage, read_json, reference};
use image::RgbImage;
use serde_json::{Value, json};

use crate::common::Case;

type B = Flex;

fn folder() -> PathBuf {
    reference().join("safety_checker")
}

fn open(path: &str) -> RgbImage {
    load_image(&fs::read(folder().join(path)).unwrap()).unwrap()
}

fn checker<B: Backend>() -> SafetyChecker<B> {
    let device = Default::default();
    SafetyChecker::from_pretrained(folder(), &LoadOptions::default(), &device).unwrap()
}

fn check_stages<B: Backend>() {
    let device = B::Device::default();
    let path = folder().join("feature_extractor");
    let processor = CLIPImageProcessor::from_pretrained(path).unwrap();
    let path = folder().join("safety_checker");
    let model = StableDiffusionSafetyChecker::<B>::from_pretrained(path, &device).unwrap();
    let values = Values::open(folder().join("stages.safetensors"));
    let inputs = read_json(folder().join("stages.json"));

    let mut pixels = Vec::new();
    for path in inputs["inputs"].as_array().unwrap() {
        let path = Path::new(path.as_str().unwrap());
        let image = open(path.to_str().unwrap());
        let pixel_values = processor.preprocess::<B>(&image, &device);
        let name = path.file_stem().unwrap().to_str().unwrap();
        let expected = values.data(&format!("pixel_values.{name}"));
        assert_eq!(pixel_values.to_data(), expected, "{name}");
        pixels.push(pixel_values);
    }
    let pixels: Tensor<B, 4> = Tensor::cat(pixels, 0);
    let output = model.vision_model.forward(pixels.clone());
    let expected = values.data("last_hidden_state");
    assert_stage("last_hidden_state", output.last_hidden_state, &expected);
    let expected = values.data("pooler_output");
    assert_stage("pooler_output", output.pooler_output, &expected);
    let embeds = model.image_embeds(pixels);
    assert_stage("image_embeds", embeds.clone(), &values.data("image_embeds"));

    let scores = model.scores(embeds).unwrap();
    let flagged: Vec<bool> = scores.iter().map(SafetyScores::is_flagged).collect();
    assert_eq!(json!(flagged), inputs["flagged"]);
    // Both are rounded to three digits.
    let check = |name: &str, scores: Vec<f32>| {
        let expected = values.data(name);
        let scores = Tensor::<B, 1>::from_floats(&scores[..], &device);
        let scores: Tensor<B, 2> = scores.reshape([expected.shape[0], expected.shape[1]]);
        assert_close(name, scores, &expected, 1e-6, 0.0);
    };
    let all = |part: fn(&SafetyScores) -> &[f32]| scores.iter().flat_map(part).copied().collect();
    check("special_care", all(|scores| &scores.special_care));
    check("concepts", all(|scores| &scores.concepts));
}

#[test]
fn stages_are_those_of_diffusers() {
    check_stages::<Flex>();
    check_stages::<NdArray>();
}

#[test]
fn flagged_images_are_black() {
    let folder = folder();
    let device = Default::default();
    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(reference().join("sd/base"), &device)
            .unwrap();
    pipeline.safety_checker = Some(checker());
    for values in read_json(folder.join("cases.json")).as_array().unwrap() {
        let case = Case {
            folder: &folder,
            values,
        };
        let options = case.text_to_image_options();
        let run = || match values["pipeline"].as_str().unwrap() {
            "StableDiffusionInpaintPipeline" => {
                let images = |key| case.texts(key).iter().map(|path| open(path)).collect();
                let options = StableDiffusionInpaintOptions {
                    options: options.clone(),
                    image: images("image"),
                    mask_image: images("mask_image"),
                    strength: case.number("strength").unwrap(),
                    padding_mask_crop: case.count("padding_mask_crop").map(|crop| crop as u32),
                    ..StableDiffusionInpaintOptions::default()
                };
                pipeline.inpaint(&options).unwrap()
            }
            _ => pipeline.generate(&options).unwrap(),
        };
        let generated = run();
        let expected = &values["expected"];
        let flags = generated.nsfw_content_detected.unwrap();
        assert_eq!(json!(flags), expected["nsfw_content_detected"]);
        let images: Vec<RgbImage> = case.values["expected"]["images"]
            .as_array()
            .unwrap()
            .iter()
            .map(|path| open(path.as_str().unwrap()))
            .collect();
        case.check_images(&generated.images, &images);
        // The first of the text-to-image run is all black.
        if values["name"] == "txt2img" {
            assert!(generated.images[0].iter().all(|level| *level == 0));
        }
    }
    let case = &read_json(folder.join("cases.json"))[0];
    let case = Case {
        folder: &folder,
        values: case,
    };
    pipeline.safety_checker = None;
    let generated = pipeline.generate(&case.text_to_image_options()).unwrap();
    assert_eq!(generated.nsfw_content_detected, None);
    assert!(generated.images[0].iter().any(|level| *level > 0));
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let from = entry.unwrap().path();
        let to = to.join(from.file_name().unwrap());
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}

/// A pipeline's folder with a safety checker.
fn checkpoint() -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    copy(&reference().join("sd/base"), target.path());
    for component in ["safety_checker", "feature_extractor"] {
        copy(&folder().join(component), &target.path().join(component));
    }
    change_index(target.path(), |index| {
        index["safety_checker"] = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
        index["feature_extractor"] = json!(["transformers", "CLIPFeatureExtractor"]);
    });
    target
}

fn change_index(folder: &Path, change: impl FnOnce(&mut Value)) {
    let path = folder.join("model_index.json");
    let mut index = read_json(&path);
    change(&mut index);
    fs::write(path, index.to_string()).unwrap();
}

fn load(folder: &Path) -> Result<StableDiffusionPipeline<B>, PipelineError> {
    StableDiffusionPipeline::from_pretrained(folder, &Default::default())
}

#[test]
fn it_is_loaded_where_the_index_lists_it() {
    let checkpoint = checkpoint();
    let folder = checkpoint.path();
    let scores = |checker: &SafetyChecker<B>| checker.scores(&open("expected/txt2img_1.png"));
    let loaded = load(folder).unwrap().safety_checker.unwrap();
    assert_eq!(scores(&loaded).unwrap(), scores(&checker()).unwrap());
    let without = StableDiffusionPipeline::<B>::from_pretrained_without_safety_checker(
        folder,
        &LoadOptions::default(),
        &Default::default(),
    );
    assert!(without.unwrap().safety_checker.is_none());

    // Weights that have no variant are loaded without it.
    let half = LoadOptions {
        variant: Some("fp16".into()),
        ..LoadOptions::default()
    };
    let device = Default::default();
    let pipeline = StableDiffusionPipeline::<B>::from_pretrained_with(folder, &half, &device);
    assert!(pipeline.unwrap().safety_checker.is_some());

    fs::remove_dir_all(folder.join("safety_checker")).unwrap();
    assert!(load(folder).unwrap().safety_checker.is_none());
    change_index(folder, |index| {
        index["safety_checker"] = json!([null, null])
    });
    assert!(load(folder).unwrap().safety_checker.is_none());
}

#[test]
fn what_is_wrong_with_it_is_named() {
    let check = |change: &dyn Fn(&Path), expected: &str| {
        let checkpoint = checkpoint();
        let folder = checkpoint.path();
        change(folder);
        let error = load(folder).err().unwrap().to_string();
        assert_eq!(error.replace(folder.to_str().unwrap(), "FOLDER"), expected);
    };
    let index = |key: &'static str, value: Value| {
        move |folder: &Path| change_index(folder, |index| index[key] = value.clone())
    };
    check(
        &index("safety_checker", json!(["other", "OtherChecker"])),
        "`FOLDER/model_index.json`: `safety_checker` is a OtherChecker, but this pipeline needs a \
         StableDiffusionSafetyChecker",
    );
    check(
        &index("feature_extractor", json!([null, null])),
        "`FOLDER/model_index.json`: it has a `safety_checker`, but no `feature_extractor`",
    );
    check(
        &|folder| fs::remove_file(folder.join("safety_checker/model.safetensors")).unwrap(),
        "`FOLDER/safety_checker` has none of `model.safetensors`, `pytorch_model.bin`",
    );
    let preprocessor = |key: &'static str, value: Value| {
        move |folder: &Path| {
            let path = folder.join("feature_extractor/preprocessor_config.json");
            let mut config = read_json(&path);
            config[key] = value.clone();
            fs::write(path, config.to_string()).unwrap();
        }
    };
    check(
        &preprocessor("resample", json!(2)),
        "`FOLDER/feature_extractor/preprocessor_config.json`: `resample` is 2, but \
         CLIPImageProcessor supports only 3",
    );
    check(
        &preprocessor("do_center_crop", json!(false)),
        "`FOLDER/feature_extractor/preprocessor_config.json`: `do_center_crop` is false, but \
         CLIPImageProcessor supports only true",
    );
    check(
        &preprocessor("crop_size", json!({"height": 34, "width": 20})),
        "`FOLDER/feature_extractor/preprocessor_config.json`: `crop_size` is 34, but \
         CLIPImageProcessor supports 1 to 33",
    );
    check(
        &preprocessor("crop_size", json!({"height": 31, "width": 20})),
        "these parts do not fit together: the feature extractor gives images of 20 x 31, the \
         safety checker takes 32 x 32",
    );
    check(
        &preprocessor("size", json!({"height": 33, "width": 33})),
        "`FOLDER/feature_extractor/preprocessor_config.json` is not a valid configuration: `size`: \
         expected a number, or an object with `shortest_edge`",
    );
}

#[test]
fn names_and_configurations_of_other_versions() {
    let checkpoint = checkpoint();
    let folder = checkpoint.path();
    // Recent versions of transformers write objects, null is the default.
    let path = folder.join("feature_extractor/preprocessor_config.json");
    let mut config = read_json(&path);
    config["size"] = json!({"shortest_edge": 33});
    config["crop_size"] = json!({"height": 32, "width": 32});
    config["rescale_factor"] = Value::Null;
    fs::write(&path, config.to_string()).unwrap();
    let new = CLIPImageProcessor::from_pretrained(folder.join("feature_extractor")).unwrap();
    let old = CLIPImageProcessor::from_pretrained(self::folder().join("feature_extractor"));
    let (image, device) = (open("../image_to_image/inputs/odd.png"), Default::default());
    let pixels = |processor: &CLIPImageProcessor| processor.preprocess::<B>(&image, &device);
    assert_eq!(pixels(&new).into_data(), pixels(&old.unwrap()).into_data());

    // Early ones write what differs from the defaults beside everything, which takes precedence.
    let path = folder.join("safety_checker/config.json");
    let mut config = read_json(&path);
    config["vision_config_dict"] = config["vision_config"].take();
    config["vision_config"] = json!({"hidden_size": 64});
    fs::write(&path, config.to_string()).unwrap();
    assert!(load(folder).unwrap().safety_checker.is_some());

    let key = |key: &str| StableDiffusionSafetyChecker::<B>::current_key(key);
    let today = Some("vision_model.vision_model.pre_layrnorm.bias".to_string());
    assert_eq!(key("vision_model.vision_model.pre_layrnorm.bias"), today);
    assert_eq!(key("vision_model.pre_layrnorm.bias"), today);
    assert_eq!(key("vision_model.embeddings.position_ids"), None);
    assert_eq!(key("concept_embeds"), Some("concept_embeds".into()));
}

#[test]
fn it_is_converted_and_described() {
    let checkpoint = checkpoint();
    let target = tempfile::tempdir().unwrap();
    let target = target.path().join("converted");
    convert::<B>(
        checkpoint.path(),
        &target,
        &ConvertOptions::default(),
        |_| {},
    )
    .unwrap();
    let index = read_json(target.join("model_index.json"));
    assert_eq!(
        index["safety_checker"],
        json!(["stable_diffusion", "StableDiffusionSafetyChecker"])
    );
    let scores = |folder: &Path| {
        let checker = load(folder).unwrap().safety_checker.unwrap();
        checker.scores(&open("expected/txt2img_1.png")).unwrap()
    };
    assert_eq!(scores(&target), scores(checkpoint.path()));

    let inspect = |folder: &Path| {
        let inspection = Inspection::read::<B>(folder).unwrap();
        assert_eq!(inspection.all_problems(), [""; 0]);
        let find = |name: &str| {
            let mut components = inspection.components.iter();
            let component = components.find(|component| component.name == name).unwrap();
            (component.parameters, component.facts.clone())
        };
        (find("safety_checker"), find("feature_extractor"))
    };
    let (checker, extractor) = inspect(&target);
    assert_eq!(checker, (Some(9_756), vec![]));
    assert_eq!(extractor, (None, vec!["32 x 32 pixels".to_string()]));

    // What is missing is switched off.
    fs::remove_dir_all(target.join("safety_checker")).unwrap();
    let (checker, _) = inspect(&target);
    assert_eq!(
        checker,
        (None, vec!["missing: images are not checked".to_string()])
    );
    let second = target.with_file_name("second");
    convert::<B>(&target, &second, &ConvertOptions::default(), |_| {}).unwrap();
    let index = read_json(second.join("model_index.json"));
    assert_eq!(index["safety_checker"], json!([null, null]));
    assert_eq!(index["requires_safety_checker"], false);
}
