//! What the tests of whole runs share: cases of a manifest, and comparisons.

use std::path::Path;

use diffuse_pipelines::StableDiffusionOptions;
use diffuse_pipelines::unet::FreeU;
use image::RgbImage;
use serde_json::Value;

/// A case of a manifest, with the folder that its paths are relative to.
pub struct Case<'a> {
    pub folder: &'a Path,
    pub values: &'a Value,
}

impl Case<'_> {
    pub fn name(&self) -> &str {
        self.values["name"].as_str().unwrap()
    }

    pub fn get<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Option<T> {
        let value = self.values.get(key).filter(|value| !value.is_null())?;
        Some(read(value).unwrap_or_else(|| panic!("{}: {key}", self.name())))
    }

    pub fn number(&self, key: &str) -> Option<f64> {
        self.get(key, Value::as_f64)
    }

    pub fn count(&self, key: &str) -> Option<usize> {
        self.get(key, |value| value.as_u64().map(|count| count as usize))
    }

    /// One text or number, or a list of them.
    pub fn list<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Vec<T> {
        match self.values.get(key) {
            None | Some(Value::Null) => Vec::new(),
            Some(Value::Array(values)) => values.iter().map(|value| read(value).unwrap()).collect(),
            Some(value) => vec![read(value).unwrap()],
        }
    }

    pub fn texts(&self, key: &str) -> Vec<String> {
        self.list(key, |value| value.as_str().map(String::from))
    }

    /// The options that all runs of Stable Diffusion have.
    pub fn text_to_image_options(&self) -> StableDiffusionOptions {
        let numbers = |key| {
            let numbers = self.list(key, Value::as_f64);
            (!numbers.is_empty()).then_some(numbers)
        };
        let defaults = StableDiffusionOptions::default();
        StableDiffusionOptions {
            prompt: self.texts("prompt"),
            negative_prompt: self.texts("negative_prompt"),
            height: self.count("height"),
            width: self.count("width"),
            num_inference_steps: self.steps().unwrap_or(defaults.num_inference_steps),
            timesteps: numbers("timesteps"),
            sigmas: numbers("sigmas"),
            guidance_scale: self
                .number("guidance_scale")
                .unwrap_or(defaults.guidance_scale),
            guidance_rescale: self.number("guidance_rescale").unwrap_or(0.0),
            num_images_per_prompt: self.count("num_images_per_prompt").unwrap_or(1),
            eta: self.number("eta").unwrap_or(0.0),
            clip_skip: self.count("clip_skip"),
            guess_mode: self.get("guess_mode", Value::as_bool).unwrap_or(false),
            freeu: match self.list("freeu", Value::as_f64)[..] {
                [s1, s2, b1, b2] => Some(FreeU { s1, s2, b1, b2 }),
                _ => None,
            },
            cache_interval: self.count("cache_interval").unwrap_or(1),
            cache_branch_id: self.count("cache_branch_id").unwrap_or(0),
            seeds: self.list("seed", Value::as_u64),
            ..defaults
        }
    }

    /// `steps`, or Diffusers' longer name.
    pub fn steps(&self) -> Option<usize> {
        self.count("steps")
            .or_else(|| self.count("num_inference_steps"))
    }

    pub fn tolerance(&self, key: &str) -> f64 {
        self.values["tolerance"][key].as_f64().unwrap()
    }

    /// Compares images with the expected ones, at the tolerance of the case.
    #[track_caller]
    pub fn check_images(&self, got: &[RgbImage], expected: &[RgbImage]) {
        let name = self.name();
        assert_eq!(got.len(), expected.len(), "{name}");
        for (got, expected) in got.iter().zip(expected) {
            let (max, mean) = compare(got, expected);
            let allowed = (self.tolerance("image_max"), self.tolerance("image_mean"));
            assert!(
                max <= allowed.0 && mean <= allowed.1,
                "{name}: levels differ by {max} at most, {mean} on average"
            );
        }
    }
}

/// The largest and the mean difference of levels.
fn compare(got: &RgbImage, expected: &RgbImage) -> (f64, f64) {
    assert_eq!(got.dimensions(), expected.dimensions());
    let differences: Vec<f64> = got
        .as_raw()
        .iter()
        .zip(expected.as_raw())
        .map(|(got, expected)| f64::from(got.abs_diff(*expected)))
        .collect();
    let max = differences.iter().copied().fold(0.0, f64::max);
    (
        max,
        differences.iter().sum::<f64>() / differences.len() as f64,
    )
}
