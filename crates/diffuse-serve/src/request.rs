//! What both APIs share: from a client's values to a request, and its limits.

use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderMap, StatusCode, header};
use diffuse_pipelines::clip::prompt_syntax::take_lora_tags;
use diffuse_pipelines::random_seed;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use serde_json::{Number, Value};

use crate::engine::{Lora, Output, Task};
use crate::{App, Limits};

/// How long a client may take to send a body.
const BODY_TIME: Duration = Duration::from_secs(60);

/// Why a request is not taken. Each API has its own form of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub status: StatusCode,
    /// The field that it is about, or nothing.
    pub field: String,
    pub message: String,
}

impl Refusal {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            field: String::new(),
            message: message.into(),
        }
    }

    /// A value that makes no sense.
    pub fn field(field: &str, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            ..Self::new(StatusCode::BAD_REQUEST, message)
        }
    }
}

/// Waits for a body, but not for ever.
///
/// # Errors
/// If it takes too long, or cannot be read.
pub async fn in_time<T>(read: impl Future<Output = Result<T, Refusal>>) -> Result<T, Refusal> {
    let late = |_| Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body takes too long");
    tokio::time::timeout(BODY_TIME, read).await.map_err(late)?
}

/// Reads a JSON body. Other types are refused: a page of another site may send them without asking.
///
/// # Errors
/// If it is too large, or not JSON.
pub async fn read_json(request: Request) -> Result<Value, Refusal> {
    check_json(request.headers())?;
    let read = async {
        let body = Bytes::from_request(request, &()).await;
        body.map_err(|error| Refusal::new(error.status(), error.body_text()))
    };
    let body = in_time(read).await?;
    let invalid =
        |error: serde_json::Error| Refusal::new(StatusCode::BAD_REQUEST, error.to_string());
    serde_json::from_slice(&body).map_err(invalid)
}

fn check_json(headers: &HeaderMap) -> Result<(), Refusal> {
    let kind = headers.get(header::CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if kind.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = "the `Content-Type` has to be `application/json`";
    Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}

/// The fields of a body.
///
/// # Errors
/// If one has another type.
pub fn fields<T: DeserializeOwned>(values: &Value) -> Result<T, Refusal> {
    serde_path_to_error::deserialize(values).map_err(|error| {
        let message = error.inner().to_string();
        match error.path().to_string().as_str() {
            "." => Refusal::new(StatusCode::BAD_REQUEST, message),
            field => Refusal::field(field, format!("`{field}`: {message}")),
        }
    })
}

/// A seed; a negative one is a random one.
///
/// # Errors
/// If it is not a whole number below 2⁶⁴.
pub fn seed<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let Some(number) = Option::<Number>::deserialize(deserializer)? else {
        return Ok(None);
    };
    match (number.as_u64(), number.as_i64()) {
        (Some(seed), _) => Ok(Some(seed)),
        (None, Some(_)) => Ok(None),
        (None, None) => Err(D::Error::custom(format_args!(
            "{number} is not a whole number below 2^64"
        ))),
    }
}

/// Does what takes a while, as decoding an image, away from the threads that answer.
///
/// # Errors
/// Those of `work`.
pub async fn unblock<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| {
        let message = "the request cannot be read";
        Err(Refusal::new(StatusCode::BAD_REQUEST, message))
    })
}

impl Limits {
    /// Checks the sizes of a run; the result is that of its images, as far as it is known.
    /// `default` is the size of images for which it names none.
    ///
    /// # Errors
    /// If one exceeds its limit.
    pub fn check(
        &self,
        task: &Task,
        default: Option<[usize; 2]>,
    ) -> Result<Option<[u32; 2]>, String> {
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
            _ => {
                let [width, height] = default.map_or([None; 2], |size| size.map(Some));
                let (width, height) = (options.width.or(width), options.height.or(height));
                width.zip(height).map(|(width, height)| [width, height])
            }
        };
        size.map(|size| self.check_size(size)).transpose()
    }

    /// Checks the size of an image before it is made.
    ///
    /// # Errors
    /// If it has no pixels, or too many.
    pub fn check_size(&self, [width, height]: [usize; 2]) -> Result<[u32; 2], String> {
        let pixels = width.saturating_mul(height);
        if pixels == 0 {
            return Err(format!("an image of {width} x {height} has no pixels"));
        }
        let sides = [width, height].map(|side| u32::try_from(side).ok());
        match sides {
            [Some(width), Some(height)] if pixels <= self.pixels => Ok([width, height]),
            _ => Err(format!(
                "the number of pixels is {pixels}, but at most {} here",
                self.pixels
            )),
        }
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
