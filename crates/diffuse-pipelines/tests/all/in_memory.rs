//! A pipeline's folder in memory is read as one on disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use burn_flex::Flex;
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, LoadOptions, ModelPath, PipelineError, StableDiffusionOptions,
    StableDiffusionPipeline,
};
use diffuse_testing::reference;
use image::RgbImage;

type Files = BTreeMap<PathBuf, Vec<u8>>;

/// All files below a folder, by their paths from it.
fn read(folder: &Path) -> Files {
    let mut files = Files::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let bytes = fs::read(&path).unwrap();
                files.insert(path.strip_prefix(folder).unwrap().to_path_buf(), bytes);
            }
        }
    }
    files
}

fn write(folder: &Path, files: &Files) {
    for (path, bytes) in files {
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }
}

fn memory(files: &Files) -> ModelPath {
    ModelPath::in_memory("model", files.clone())
}

fn stable_diffusion(
    folder: impl Into<ModelPath>,
    variant: Option<&str>,
) -> Result<RgbImage, PipelineError> {
    let load = LoadOptions {
        variant: variant.map(String::from),
        ..LoadOptions::default()
    };
    let device = Default::default();
    let pipeline = StableDiffusionPipeline::<Flex>::from_pretrained_with(folder, &load, &device)?;
    let options = StableDiffusionOptions {
        num_inference_steps: 2,
        seeds: vec![1],
        ..StableDiffusionOptions::from("a lighthouse")
    };
    Ok(pipeline.generate(&options)?.images.remove(0))
}

fn ddpm(folder: impl Into<ModelPath>) -> Result<RgbImage, PipelineError> {
    let pipeline = DDPMPipeline::<Flex>::from_pretrained(folder, &Default::default())?;
    let options = DDPMOptions {
        num_inference_steps: 2,
        seeds: vec![1],
        ..DDPMOptions::default()
    };
    Ok(pipeline.generate(&options)?.images.remove(0))
}

#[test]
fn images_are_those_of_the_folder_on_disk() {
    let folder = reference().join("sd/base");
    let files = read(&folder);
    for variant in [None, Some("fp16")] {
        let expected = stable_diffusion(&folder, variant).unwrap();
        let image = stable_diffusion(memory(&files), variant).unwrap();
        assert!(image == expected, "{variant:?}");
    }
    let folder = reference().join("ddpm/cat");
    let image = ddpm(memory(&read(&folder))).unwrap();
    assert!(image == ddpm(&folder).unwrap());
}

/// The errors of a folder on disk and in memory, in which the folder is `model`.
fn check_same_error(files: &Files, load: impl Fn(ModelPath) -> Result<RgbImage, PipelineError>) {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), files);
    let on_disk = load(folder.path().into()).map_err(|error| error.to_string());
    let in_memory = load(memory(files)).map_err(|error| error.to_string());
    let on_disk = on_disk.map_err(|text| text.replace(folder.path().to_str().unwrap(), "model"));
    assert!(in_memory == on_disk, "{in_memory:?} {on_disk:?}");
}

#[test]
fn errors_are_those_of_the_folder_on_disk() {
    let files = read(&reference().join("sd/base"));
    for path in files.keys() {
        let load = |folder| stable_diffusion(folder, None);
        let mut changed = files.clone();
        changed.remove(path);
        check_same_error(&changed, load);
        changed.insert(path.clone(), b"<html>".to_vec());
        check_same_error(&changed, load);
    }
    let files = read(&reference().join("ddpm/cat"));
    for path in files.keys() {
        let mut changed = files.clone();
        changed.remove(path);
        check_same_error(&changed, ddpm);
    }
    check_same_error(&Files::from([("notes.txt".into(), Vec::new())]), ddpm);
}
