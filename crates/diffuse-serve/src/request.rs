//! What both APIs share: from a client's values to a request, and its limits.

use axum::http::{HeaderMap, header};
use diffuse_pipelines::clip::prompt_syntax::take_lora_tags;
use diffuse_pipelines::random_seed;
use serde::de::DeserializeOwned;

use crate::engine::{Lora, Output, Task};
use crate::{App, Limits};

/// Reads a JSON body. Other types are refused: a page of another site may send them without asking.
///
/// # Errors
/// If it is not JSON, or does not have the fields' types.
pub fn parse_json<T: DeserializeOwned>(headers: &HeaderMap, body: &[u8]) -> Result<T, String> {
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err("the `Content-Type` has to be `application/json`".into());
    }
    serde_json::from_slice(body).map_err(|error| error.to_string())
}

impl Limits {
    /// Checks the sizes of a run.
    ///
    /// # Errors
    /// If one exceeds its limit.
    pub fn check(&self, task: &Task) -> Result<(), String> {
        let options = task.options();
        let check = |what: &str, value: usize, limit: usize| {
            if value <= limit {
                return Ok(());
            }
            Err(format!("{what} is {value}, but at most {limit} here"))
        };
        check(
            "the number of steps",
            options.num_inference_steps,
            self.steps,
        )?;
        check("the number of images", task.images(), self.images)?;
        let texts = options.prompt.iter().chain(&options.negative_prompt);
        for text in texts {
            check("the length of a prompt", text.len(), self.prompt)?;
        }
        let size = match task {
            Task::ImageToImage(task) => {
                let image = task.image.first();
                image.map(|image| [image.width() as usize, image.height() as usize])
            }
            _ => options
                .width
                .zip(options.height)
                .map(|(width, height)| [width, height]),
        };
        if let Some([width, height]) = size {
            check(
                "the number of pixels",
                width.saturating_mul(height),
                self.pixels,
            )?;
        }
        Ok(())
    }
}

/// A seed for each of some images, counting up.
pub fn seeds(first: Option<u64>, images: usize) -> Vec<u64> {
    let first = first.unwrap_or_else(random_seed);
    (0..images as u64)
        .map(|index| first.wrapping_add(index))
        .collect()
}

impl App {
    /// Takes the LoRAs that a prompt names out of it, if the server has a folder of LoRAs.
    ///
    /// # Errors
    /// If it has none of that name.
    pub fn take_loras(&self, prompt: &mut String) -> Result<Vec<Lora>, String> {
        let Some(folder) = &self.lora_dir else {
            return Ok(Vec::new());
        };
        let (text, tags) = take_lora_tags(prompt).map_err(|error| error.to_string())?;
        *prompt = text;
        let lora = |tag: &diffuse_pipelines::clip::prompt_syntax::LoraTag| {
            let path = diffuse_pipelines::find_adapter(folder, &tag.name);
            let path = path.ok_or_else(|| format!("there is no LoRA `{}`", tag.name))?;
            Ok(Lora {
                path,
                unet: tag.unet,
                text_encoder: tag.text_encoder,
            })
        };
        tags.iter().map(lora).collect()
    }

    /// How an image was made, as AUTOMATIC1111's web UI writes it.
    pub fn parameters(&self, task: &Task, output: &Output, index: usize) -> String {
        let options = task.options();
        let text = |texts: &[String]| {
            texts
                .get(index)
                .or(texts.first())
                .cloned()
                .unwrap_or_default()
        };
        let mut lines = vec![text(&options.prompt)];
        let negative = text(&options.negative_prompt);
        if !negative.is_empty() {
            lines.push(format!("Negative prompt: {negative}"));
        }
        let seeds = &options.seeds;
        let seed = seeds
            .get(index)
            .or(seeds.first())
            .copied()
            .unwrap_or_default();
        let image = output.images.get(index);
        let (width, height) = image.map_or((0, 0), |image| image.dimensions());
        let mut values = vec![
            format!("Steps: {}", options.num_inference_steps),
            format!("Sampler: {}", output.scheduler),
            format!("CFG scale: {}", options.guidance_scale),
            format!("Seed: {seed}"),
            format!("Size: {width}x{height}"),
            format!("Model: {}", self.model.name),
        ];
        let strength = match task {
            Task::TextToImage(_) => None,
            Task::ImageToImage(task) => Some(task.strength),
            Task::Inpaint(task) => Some(task.strength),
        };
        values.extend(strength.map(|strength| format!("Denoising strength: {strength}")));
        values.extend(
            options
                .clip_skip
                .map(|skip| format!("Clip skip: {}", skip + 1)),
        );
        values.push(format!("Version: diffuse {}", env!("CARGO_PKG_VERSION")));
        lines.push(values.join(", "));
        lines.join("\n")
    }
}
