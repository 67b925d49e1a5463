//! Weights files in every form that people have: each loads to the tensors that Diffusers loads.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn_flex::Flex;
use diffuse_nn::checkpoint::Checkpoint;
use diffuse_nn::pretrained::{PretrainedError, find_weights};
use diffuse_pipelines::clip::{CLIPTextModel, ModelConfig};
use diffuse_pipelines::convert::{ConvertOptions, convert};
use diffuse_pipelines::unet::UNet2DConditionModel;
use diffuse_pipelines::vae::Autoencoder;
use diffuse_pipelines::{
    FileKind, LoadOptions, Pretrained, SingleFileOptions, StableDiffusionPipeline, load_vae,
};
use diffuse_testing::{read_json, reference};
use serde_json::Value;

type B = Flex;

/// Values of a file's tensors by their keys today.
fn file_tensors<M: Pretrained<B>>(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(path)
        .unwrap()
        .rename(M::current_key)
        .unwrap();
    values(&checkpoint)
}

fn values(checkpoint: &Checkpoint) -> BTreeMap<String, Vec<f32>> {
    let tensors = checkpoint.tensors().keys();
    let values = tensors.map(|key| {
        (
            key.clone(),
            checkpoint.read_f32(key).unwrap().iter().collect(),
        )
    });
    values.collect()
}

/// Values of a module's parameters by their keys, as they are saved.
fn module_tensors<M: Pretrained<B>>(module: &M) -> BTreeMap<String, Vec<f32>> {
    let folder = tempfile::tempdir().unwrap();
    module.save_pretrained(folder.path()).unwrap();
    let name = format!("{}.safetensors", M::Config::WEIGHTS[0]);
    values(&Checkpoint::open(folder.path().join(name)).unwrap())
}

/// The weights file of a folder, or the file itself.
fn weights<M: Pretrained<B>>(path: PathBuf) -> PathBuf {
    if path.is_file() {
        path
    } else {
        let found = find_weights(&path.into(), M::Config::WEIGHTS, None);
        found.unwrap().path().to_path_buf()
    }
}

fn check_folder<M: Pretrained<B>>(case: &Value) {
    let reference = reference();
    let folder = reference
        .join("files")
        .join(case["folder"].as_str().unwrap());
    let name = folder.display();
    let device = Default::default();
    let module =
        M::from_pretrained(&folder, &device).unwrap_or_else(|error| panic!("{name}: {error}"));
    let expected = reference.join(case["equals"].as_str().unwrap());
    assert_eq!(
        module_tensors(&module),
        file_tensors::<M>(&weights::<M>(expected)),
        "{name}"
    );

    // What is ignored is refused by those who ask for it; buffers that are computed are not.
    let strict = LoadOptions {
        strict: true,
        ..LoadOptions::default()
    };
    let ignored = case["ignored"].as_array().into_iter().flatten();
    let ignored: Vec<&str> = ignored
        .map(|key| key.as_str().unwrap())
        .filter(|key| M::current_key(key).is_some())
        .collect();
    match M::from_pretrained_with(&folder, &strict, &device) {
        Ok(_) => assert!(ignored.is_empty(), "{name}: nothing is refused"),
        Err(PretrainedError::Checkpoint(error)) => {
            let shown = ignored.iter().take(3).map(|key| format!("`{key}`"));
            let shown: Vec<String> = shown.collect();
            let more = match ignored.len() {
                count @ 4.. => format!(" and {} more", count - 3),
                _ => String::new(),
            };
            assert_eq!(
                error.to_string(),
                format!(
                    "`{}` has {}{more} that this model does not have",
                    weights::<M>(folder.clone()).display(),
                    shown.join(", ")
                )
            );
        }
        Err(error) => panic!("{name}: {error}"),
    }
}

#[test]
fn every_form_of_a_weights_file_loads() {
    let cases = read_json(reference().join("files/files.json"));
    let mut counts = [0, 0];
    for case in cases.as_array().unwrap() {
        match case["component"].as_str().unwrap() {
            "text_encoder" => {
                check_folder::<CLIPTextModel<B>>(case);
                counts[0] += 1;
            }
            "unet" => {
                check_folder::<UNet2DConditionModel<B>>(case);
                counts[1] += 1;
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(counts, [9, 4]);
}

#[test]
fn every_number_of_every_type() {
    let folder = reference().join("files");
    let found = values(&Checkpoint::open(folder.join("values.safetensors")).unwrap());
    let expected = values(&Checkpoint::open(folder.join("expected/values.safetensors")).unwrap());
    assert!(expected.len() >= 4);
    assert_eq!(found.len(), expected.len());
    for (key, expected) in expected {
        let bits = |values: &[f32]| -> Vec<u32> {
            let value = |value: &f32| {
                if value.is_nan() {
                    u32::MAX
                } else {
                    value.to_bits()
                }
            };
            values.iter().map(value).collect()
        };
        assert_eq!(bits(&found[&key]), bits(&expected), "{key}");
    }
}

/// A folder with the configurations, the tokenizer and the scheduler for a single file.
fn configurations(case: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: PathBuf, component: &str| {
        let target = folder.path().join(component);
        fs::create_dir_all(&target).unwrap();
        for file in fs::read_dir(from).unwrap() {
            let file = file.unwrap().path();
            let is_weights = ["safetensors", "bin"]
                .iter()
                .any(|end| file.extension() == Some(end.as_ref()));
            if file.is_file() && !is_weights {
                fs::copy(&file, target.join(file.file_name().unwrap())).unwrap();
            }
        }
    };
    for (component, file) in case["equals"].as_object().unwrap() {
        let file = reference().join(file.as_str().unwrap());
        copy(file.parent().unwrap().to_path_buf(), component);
    }
    copy(reference().join("sd/base/tokenizer"), "tokenizer");
    copy(reference().join("sd/base/scheduler"), "scheduler");
    folder
}

#[test]
fn single_files_equal_their_folders() {
    let folder = reference().join("single_file");
    let cases = read_json(folder.join("files.json"));
    let (mut checked, mut vaes) = (0, 0);
    for case in cases.as_array().unwrap() {
        let path = folder.join(case["file"].as_str().unwrap());
        let name = path.display();
        let equals =
            |component: &str| reference().join(case["equals"][component].as_str().unwrap());
        if case["kind"] == "VAE" {
            let config = equals("vae").with_file_name("config.json");
            let config = diffuse_pipelines::vae::AutoencoderKLConfig::from_file(config).unwrap();
            let vae = load_vae::<B>(
                &path,
                Some(&config),
                &LoadOptions::default(),
                &Default::default(),
            );
            let Autoencoder::KL(vae) = vae.unwrap() else {
                panic!("{name}")
            };
            let found = module_tensors(&vae);
            assert_eq!(
                found,
                file_tensors::<diffuse_pipelines::vae::AutoencoderKL<B>>(&equals("vae")),
                "{name}"
            );
            vaes += 1;
            continue;
        }
        // Converted, so that inpainting networks are compared as well.
        let configurations = configurations(case);
        let options = ConvertOptions {
            config: Some(configurations.path().to_path_buf()),
            ..ConvertOptions::default()
        };
        let result = configurations.path().join("result");
        convert::<B>(&path, &result, &options, |_| {})
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let compare = |component: &str, stem: &str, expected: &BTreeMap<String, Vec<f32>>| {
            let file = result.join(format!("{component}/{stem}.safetensors"));
            let found = values(&Checkpoint::open(file).unwrap());
            let keys = |tensors: &BTreeMap<String, Vec<f32>>| -> Vec<String> {
                tensors.keys().cloned().collect()
            };
            assert_eq!(keys(&found), keys(expected), "{name}");
            for (key, expected) in expected {
                assert!(found[key] == *expected, "{name}: {key}");
            }
        };
        let mut unet = file_tensors::<UNet2DConditionModel<B>>(&equals("unet"));
        for (key, changed) in case["unet_except"].as_object().into_iter().flatten() {
            let changed = changed.as_array().unwrap().iter();
            unet.insert(
                key.clone(),
                changed
                    .map(|value| value.as_f64().unwrap() as f32)
                    .collect(),
            );
        }
        compare("unet", "diffusion_pytorch_model", &unet);
        compare(
            "vae",
            "diffusion_pytorch_model",
            &file_tensors::<diffuse_pipelines::vae::AutoencoderKL<B>>(&equals("vae")),
        );
        compare(
            "text_encoder",
            "model",
            &file_tensors::<CLIPTextModel<B>>(&equals("text_encoder")),
        );
        checked += 1;

        if case.get("ema").is_some() {
            let result = configurations.path().join("averaged");
            let options = ConvertOptions {
                ema: true,
                ..options
            };
            convert::<B>(&path, &result, &options, |_| {}).unwrap();
            let file = result.join("unet/diffusion_pytorch_model.safetensors");
            let averaged = values(&Checkpoint::open(file).unwrap());
            for (key, values) in unet {
                assert_eq!(averaged[&key].len(), values.len());
                let pairs = averaged[&key].iter().zip(&values);
                // The halves of the smallest numbers were rounded to `f16`.
                let differs = pairs.filter(|(half, value)| (*half - *value / 2.0).abs() > 6e-8);
                assert_eq!(differs.count(), 0, "{key}");
            }
        }
    }
    assert_eq!((checked, vaes), (6, 2));
}

#[test]
fn single_files_load_and_are_written_again() {
    let file = reference().join("single_file/v1.ckpt");
    let options = SingleFileOptions {
        config: Some(reference().join("sd/base")),
        ..SingleFileOptions::default()
    };
    let load = |path: &Path| {
        StableDiffusionPipeline::<B>::from_single_file_with(path, &options, &Default::default())
            .unwrap()
    };
    let pipeline = load(&file);
    let half = LoadOptions {
        variant: Some("fp16".into()),
        ..LoadOptions::default()
    };
    let base = reference().join("sd/base");
    let folder =
        StableDiffusionPipeline::<B>::from_pretrained_with(&base, &half, &Default::default())
            .unwrap();
    assert_eq!(module_tensors(&pipeline.unet), module_tensors(&folder.unet));

    // Velocity or noise is told by trying the network; these have names of version 2.
    let sd2 = reference().join("family/sd2");
    for folder in [base, sd2] {
        let written = tempfile::tempdir().unwrap();
        let path = written.path().join("file.safetensors");
        convert::<B>(&folder, &path, &ConvertOptions::default(), |_| {}).unwrap();
        let again = written.path().join("folder");
        let options = ConvertOptions {
            config: Some(folder.clone()),
            ..ConvertOptions::default()
        };
        convert::<B>(&path, &again, &options, |_| {}).unwrap();
        for component in ["unet", "vae"] {
            let file = |folder: &Path| {
                folder
                    .join(component)
                    .join("diffusion_pytorch_model.safetensors")
            };
            let original = if file(&folder).is_file() {
                file(&folder)
            } else {
                panic!("{component}")
            };
            let expected = match component {
                "unet" => file_tensors::<UNet2DConditionModel<B>>(&original),
                _ => file_tensors::<diffuse_pipelines::vae::AutoencoderKL<B>>(&original),
            };
            assert_eq!(values(&Checkpoint::open(file(&again)).unwrap()), expected);
        }
        let text = |folder: &Path| folder.join("text_encoder/model.safetensors");
        let expected = file_tensors::<CLIPTextModel<B>>(&text(&folder));
        assert_eq!(values(&Checkpoint::open(text(&again)).unwrap()), expected);
    }
}

#[test]
fn files_of_other_kinds_are_named() {
    let folder = reference().join("single_file");
    let cases = read_json(folder.join("kinds.json"));
    let mut wrong = Vec::new();
    for case in cases.as_array().unwrap() {
        let path = folder.join(case["file"].as_str().unwrap());
        let kind = FileKind::of(&Checkpoint::open(&path).unwrap()).to_string();
        let expected = match case["kind"].as_str() {
            None => "nothing known",
            Some("Stable Diffusion XL") => "Stable Diffusion XL",
            Some("Stable Diffusion XL refiner") => "the refiner of Stable Diffusion XL",
            Some("Stable Diffusion x4 upscaler") => "a Stable Diffusion upscaler",
            Some("ControlNet") => "a ControlNet",
            Some("LoRA") => "a LoRA or another adapter",
            Some("VAE") => "a VAE",
            Some("TAESD") => "a TAESD",
            Some("textual inversion") => "a textual inversion",
            Some("UNet") => "a UNet without text encoder and VAE",
            Some("CLIP text encoder") => "a text encoder",
            Some("upscaler") => "an upscaler of images",
            Some("hypernetwork") => "a hypernetwork",
            Some("AnimateDiff") => "a motion module of AnimateDiff",
            Some("IP-Adapter") => "an IP-Adapter",
            Some("T2I-Adapter") => "a T2I-Adapter",
            Some(other) => other,
        };
        if kind != expected {
            wrong.push(format!("{}: {kind}, not {expected}", path.display()));
        }
    }
    assert_eq!(cases.as_array().unwrap().len(), 31);
    assert!(wrong.is_empty(), "{wrong:#?}");
    let path = folder.join("kinds/sdxl.safetensors");
    let error = StableDiffusionPipeline::<B>::from_single_file(&path, &Default::default());
    let expected = format!(
        "`{}` is Stable Diffusion XL, which cannot be used here",
        path.display()
    );
    assert_eq!(error.err().unwrap().to_string(), expected);
}
