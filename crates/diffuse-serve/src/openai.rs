//! OpenAI's images API.
//!
//! Beside its fields there are `seed`, `steps`, `guidance_scale`, `negative_prompt`, `scheduler`
//! and `strength`. Names of models are accepted as they are: the server has one.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Bytes;
use axum::extract::multipart::MultipartError;
use axum::extract::{FromRequest, Multipart, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use diffuse_pipelines::schedulers::Overrides;
use diffuse_pipelines::{
    StableDiffusionImg2ImgOptions, StableDiffusionInpaintOptions, StableDiffusionOptions,
};
use futures_util::stream;
use image::RgbImage;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::App;
use crate::engine::{Event, Failure, Output, Request, Running, Task};
use crate::images::{Format, encode, enlarge, read, read_transparency, to_base64};
use crate::request::{Refusal, fields, in_time, read_json, seed, seeds, unblock};

/// An error in OpenAI's form.
pub fn error(status: StatusCode, message: &str, param: Option<&str>) -> Response {
    let kind = match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_server_error() => "server_error",
        _ => "invalid_request_error",
    };
    let error = json!({"message": message, "type": kind, "param": param, "code": null});
    (status, Json(json!({ "error": error }))).into_response()
}

fn refused(refusal: &Refusal) -> Response {
    let field = Some(refusal.field.as_str()).filter(|field| !field.is_empty());
    error(refusal.status, &refusal.message, field)
}

fn failed(failure: &Failure) -> Response {
    let message = failure.to_string();
    match failure {
        // If it was cancelled, the client is not there any more.
        Failure::Invalid(_) | Failure::Cancelled => error(StatusCode::BAD_REQUEST, &message, None),
        Failure::Busy { retry_after } => {
            let mut response = error(StatusCode::TOO_MANY_REQUESTS, &message, None);
            let seconds = retry_after.as_secs().into();
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
            response
        }
        Failure::ShuttingDown => error(StatusCode::SERVICE_UNAVAILABLE, &message, None),
    }
}

/// The fields of a request for images; of edits, too.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Fields {
    prompt: Option<String>,
    n: Option<usize>,
    size: Option<String>,
    response_format: Option<String>,
    output_format: Option<String>,
    output_compression: Option<u8>,
    stream: Option<bool>,
    partial_images: Option<usize>,
    #[serde(deserialize_with = "seed")]
    seed: Option<u64>,
    steps: Option<usize>,
    guidance_scale: Option<f64>,
    negative_prompt: Option<String>,
    scheduler: Option<String>,
    strength: Option<f64>,
}

/// How a client wants its images.
#[derive(Debug, Clone)]
struct Answer {
    format: Format,
    url: bool,
    stream: bool,
    partial_images: usize,
    /// `image_generation` or `image_edit`.
    event: &'static str,
    /// What URLs begin with.
    base: String,
}

impl Fields {
    fn options(&self, app: &App) -> Result<StableDiffusionOptions, Refusal> {
        let Some(prompt) = self.prompt.clone() else {
            return Err(Refusal::field("prompt", "`prompt` is missing"));
        };
        let images = self.n.unwrap_or(1);
        if images == 0 {
            return Err(Refusal::field("n", "`n` is 0"));
        }
        app.limits
            .check_images(images)
            .map_err(|message| Refusal::field("n", message))?;
        let [width, height] = self.size()?.map_or([None; 2], |size| size.map(Some));
        Ok(StableDiffusionOptions {
            prompt: vec![prompt],
            negative_prompt: self.negative_prompt.clone().into_iter().collect(),
            width,
            height,
            num_inference_steps: self.steps.unwrap_or(app.defaults.num_inference_steps),
            guidance_scale: self.guidance_scale.unwrap_or(app.defaults.guidance_scale),
            num_images_per_prompt: images,
            seeds: seeds(self.seed, images),
            ..app.defaults.clone()
        })
    }

    /// `512x512`; `auto` is the model's own size.
    fn size(&self) -> Result<Option<[usize; 2]>, Refusal> {
        let Some(size) = self.size.as_deref().filter(|size| *size != "auto") else {
            return Ok(None);
        };
        let sides = size.split_once('x').and_then(|(width, height)| {
            let parse = |text: &str| text.parse().ok();
            Some([parse(width)?, parse(height)?])
        });
        match sides {
            Some(sides) => Ok(Some(sides)),
            None => Err(Refusal::field(
                "size",
                format!("`size` is `{size}`, not `auto` or as `512x512`"),
            )),
        }
    }

    fn answer(&self, headers: &HeaderMap, event: &'static str) -> Result<Answer, Refusal> {
        let url = match self.response_format.as_deref() {
            None | Some("b64_json") => false,
            Some("url") => true,
            Some(other) => {
                let message = format!("`response_format` is `{other}`, not `b64_json` or `url`");
                return Err(Refusal::field("response_format", message));
            }
        };
        let quality = self.output_compression.unwrap_or(100);
        if quality > 100 {
            let message = "`output_compression` has to be in 0..=100";
            return Err(Refusal::field("output_compression", message));
        }
        let format = match self.output_format.as_deref() {
            None | Some("png") => Format::Png,
            Some("jpeg") => Format::Jpeg {
                quality: quality.max(1),
            },
            Some("webp") => Format::Webp,
            Some(other) => {
                let message = format!("`output_format` is `{other}`, not `png`, `jpeg` or `webp`");
                return Err(Refusal::field("output_format", message));
            }
        };
        let partial_images = self.partial_images.unwrap_or(0);
        if partial_images > 3 {
            let message = "`partial_images` has to be in 0..=3";
            return Err(Refusal::field("partial_images", message));
        }
        let host = headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok());
        Ok(Answer {
            format,
            url,
            stream: self.stream.unwrap_or(false),
            partial_images,
            event,
            base: format!("http://{}/images/", host.unwrap_or("localhost")),
        })
    }

    fn request(&self, mut task: Task, app: &App, answer: &Answer) -> Result<Request, Refusal> {
        let mut loras = Vec::new();
        for prompt in &mut task.options_mut().prompt {
            loras = app
                .take_loras(prompt)
                .map_err(|message| Refusal::field("prompt", message))?;
        }
        let size = app.limits.check(&task, app.model.size);
        if let Some(size) = size.map_err(|message| Refusal::field("", message))? {
            let check = answer.format.check_size(size);
            check.map_err(|message| Refusal::field("output_format", message))?;
        }
        let name = self.scheduler.clone().filter(|name| !name.is_empty());
        let scheduler = (name, Overrides::new());
        (app.check_scheduler)(&scheduler)
            .map_err(|message| Refusal::field("scheduler", message))?;
        Ok(Request {
            task,
            scheduler,
            loras,
            previews: answer.stream && answer.partial_images > 0,
        })
    }
}

/// `POST /v1/images/generations`
pub async fn generations(State(app): State<Arc<App>>, request: axum::extract::Request) -> Response {
    let headers = request.headers().clone();
    let request = read_json(request).await.and_then(|values| {
        let fields: Fields = fields(&values)?;
        let answer = fields.answer(&headers, "image_generation")?;
        let task = Task::TextToImage(fields.options(&app)?);
        Ok((fields.request(task, &app, &answer)?, answer))
    });
    match request {
        Ok((request, answer)) => run(app, request, answer).await,
        Err(refusal) => refused(&refusal),
    }
}

/// `POST /v1/images/edits`
pub async fn edits(State(app): State<Arc<App>>, request: axum::extract::Request) -> Response {
    let headers = request.headers().clone();
    let (values, files) = match in_time(read_form(request)).await {
        Ok(form) => form,
        Err(refusal) => return refused(&refusal),
    };
    let shared = app.clone();
    let request = unblock(move || {
        let fields: Fields = fields(&values)?;
        let answer = fields.answer(&headers, "image_edit")?;
        let task = edit(&fields, files, &shared)?;
        Ok((fields.request(task, &shared, &answer)?, answer))
    });
    match request.await {
        Ok((request, answer)) => run(app, request, answer).await,
        Err(refusal) => refused(&refusal),
    }
}

/// The files of a form.
#[derive(Default)]
struct Files {
    image: Option<Bytes>,
    mask: Option<Bytes>,
}

async fn read_form(request: axum::extract::Request) -> Result<(Value, Files), Refusal> {
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|error| Refusal::new(error.status(), error.body_text()))?;
    let damaged = |error: MultipartError| Refusal::new(error.status(), error.body_text());
    let mut values = serde_json::Map::new();
    let mut files = Files::default();
    while let Some(field) = form.next_field().await.map_err(damaged)? {
        let name = field.name().unwrap_or_default().to_string();
        let bytes = field.bytes().await.map_err(damaged)?;
        match name.as_str() {
            "image" | "image[]" => {
                if files.image.replace(bytes).is_some() {
                    let message = "one `image` is edited at a time";
                    return Err(Refusal::field("image", message));
                }
            }
            "mask" => files.mask = Some(bytes),
            _ => {
                let text = String::from_utf8_lossy(&bytes).into_owned();
                let is_text = matches!(
                    name.as_str(),
                    "prompt"
                        | "negative_prompt"
                        | "size"
                        | "response_format"
                        | "output_format"
                        | "scheduler"
                );
                let json = serde_json::from_str(&text).ok().filter(|_| !is_text);
                values.insert(name, json.unwrap_or(Value::String(text)));
            }
        }
    }
    Ok((Value::Object(values), files))
}

/// With a mask its transparent part is repainted, without one the whole image.
fn edit(fields: &Fields, files: Files, app: &App) -> Result<Task, Refusal> {
    let Some(bytes) = files.image else {
        return Err(Refusal::field("image", "`image` is missing"));
    };
    let image = read(&bytes).map_err(|message| Refusal::field("image", message))?;
    let mut options = fields.options(app)?;
    let Some(mask) = files.mask else {
        let image = match fields.size()? {
            Some(size) => {
                let size = app.limits.check_size(size);
                enlarge(
                    &image,
                    size.map_err(|message| Refusal::field("size", message))?,
                )
            }
            None => image,
        };
        (options.width, options.height) = (None, None);
        let defaults = StableDiffusionImg2ImgOptions::default();
        return Ok(Task::ImageToImage(StableDiffusionImg2ImgOptions {
            options,
            image: vec![image],
            strength: fields.strength.unwrap_or(defaults.strength),
        }));
    };
    let mask = read_transparency(&mask).map_err(|message| Refusal::field("mask", message))?;
    if options.width.is_none() {
        let round = |side: u32| Some((side as usize).max(8) / 8 * 8);
        (options.width, options.height) = (round(image.width()), round(image.height()));
    }
    let defaults = StableDiffusionInpaintOptions::default();
    Ok(Task::Inpaint(StableDiffusionInpaintOptions {
        options,
        image: vec![image],
        mask_image: vec![mask],
        strength: fields.strength.unwrap_or(defaults.strength),
        ..defaults
    }))
}

async fn run(app: Arc<App>, request: Request, answer: Answer) -> Response {
    let task = request.task.clone();
    let running = match app.queue.submit(request) {
        Ok(running) => running,
        Err(failure) => return failed(&failure),
    };
    if answer.stream {
        return stream_events(app, task, running, answer);
    }
    match running.finish().await {
        Ok(output) => Json(response(&app, &task, &output, &answer).await).into_response(),
        Err(failure) => failed(&failure),
    }
}

/// Encodes images away from the threads that answer.
async fn encode_all(app: &Arc<App>, task: &Task, output: &Output, format: Format) -> Vec<Vec<u8>> {
    let parameters = (0..output.images.len()).map(|index| app.parameters(task, output, index));
    let images: Vec<(RgbImage, String)> = output.images.iter().cloned().zip(parameters).collect();
    let encode = move || {
        let files = images
            .iter()
            .map(|(image, text)| encode(image, format, text));
        files.collect::<Vec<_>>()
    };
    tokio::task::spawn_blocking(encode)
        .await
        .unwrap_or_default()
}

async fn response(app: &Arc<App>, task: &Task, output: &Output, answer: &Answer) -> Value {
    let files = encode_all(app, task, output, answer.format).await;
    let data: Vec<Value> = files
        .into_iter()
        .map(|bytes| {
            if answer.url {
                let name = app.store.keep(bytes, answer.format);
                json!({"url": format!("{}{name}", answer.base)})
            } else {
                json!({"b64_json": to_base64(&bytes)})
            }
        })
        .collect();
    json!({
        "created": now(),
        "data": data,
        "output_format": answer.format.name(),
        "size": size(output.images.first()),
        "background": "opaque",
        "quality": "auto",
    })
}

fn size(image: Option<&RgbImage>) -> String {
    let (width, height) = image.map_or((0, 0), |image| image.dimensions());
    format!("{width}x{height}")
}

fn now() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.unwrap_or_default().as_secs()
}

/// What a stream goes on with.
struct Stream {
    app: Arc<App>,
    task: Task,
    running: Option<Running>,
    answer: Answer,
    /// Partial images that were sent.
    sent: usize,
    waiting: VecDeque<sse::Event>,
}

fn stream_events(app: Arc<App>, task: Task, running: Running, answer: Answer) -> Response {
    let state = Stream {
        app,
        task,
        running: Some(running),
        answer,
        sent: 0,
        waiting: VecDeque::new(),
    };
    let events = stream::unfold(state, |mut state| async move {
        loop {
            if let Some(event) = state.waiting.pop_front() {
                return Some((Ok::<_, Infallible>(event), state));
            }
            let event = state.running.as_mut()?.next().await;
            state.take(event).await;
        }
    });
    let keep_alive = KeepAlive::new().interval(Duration::from_secs(15));
    Sse::new(events).keep_alive(keep_alive).into_response()
}

impl Stream {
    async fn take(&mut self, event: Event) {
        match event {
            Event::Step {
                step,
                steps,
                preview,
            } => {
                // Spread over the run.
                let due = (self.sent + 1) * steps <= step * (self.answer.partial_images + 1);
                if let Some(preview) = preview
                    && self.sent < self.answer.partial_images
                    && due
                    && step < steps
                {
                    let index = self.sent;
                    self.sent += 1;
                    let image = enlarge(&preview.image, preview.size);
                    let fields = json!({"partial_image_index": index});
                    self.push("partial_image", image, "", fields).await;
                }
            }
            Event::Finished(result) => {
                self.running = None;
                match result {
                    Ok(output) => {
                        for (index, image) in output.images.iter().enumerate() {
                            let text = self.app.parameters(&self.task, &output, index);
                            let usage = json!({
                                "input_tokens": 0,
                                "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
                                "output_tokens": 0,
                                "total_tokens": 0,
                            });
                            let fields = json!({ "usage": usage });
                            self.push("completed", image.clone(), &text, fields).await;
                        }
                    }
                    Err(failure) => {
                        let error = json!({
                            "message": failure.to_string(),
                            "type": match failure {
                                Failure::ShuttingDown => "server_error",
                                _ => "invalid_request_error",
                            },
                            "param": null,
                            "code": null,
                        });
                        let event = sse::Event::default().event("error");
                        let data = json!({"type": "error", "error": error});
                        self.waiting.push_back(event.data(data.to_string()));
                    }
                }
            }
        }
    }

    async fn push(&mut self, kind: &str, image: RgbImage, text: &str, fields: Value) {
        let name = format!("{}.{kind}", self.answer.event);
        let size = size(Some(&image));
        let (format, text) = (self.answer.format, text.to_string());
        let encode = move || to_base64(&encode(&image, format, &text));
        let image = tokio::task::spawn_blocking(encode).await;
        let mut value = json!({
            "type": name,
            "b64_json": image.unwrap_or_default(),
            "created_at": now(),
            "size": size,
            "quality": "auto",
            "background": "opaque",
            "output_format": format.name(),
        });
        if let (Value::Object(value), Value::Object(fields)) = (&mut value, fields) {
            value.extend(fields);
        }
        let event = sse::Event::default().event(name).data(value.to_string());
        self.waiting.push_back(event);
    }
}

/// `GET /v1/models`
pub async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model_value(&app)]}))
}

fn model_value(app: &App) -> Value {
    json!({
        "id": app.model.name,
        "object": "model",
        "created": app.model.loaded,
        "owned_by": "diffuse",
    })
}

/// `GET /v1/models/{id}`; the name may have slashes.
pub async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
    if id == app.model.name {
        return Json(model_value(&app)).into_response();
    }
    let message = format!("there is no model `{id}`; there is `{}`", app.model.name);
    error(StatusCode::NOT_FOUND, &message, Some("model"))
}

/// Images that are fetched by their URLs, for an hour.
#[derive(Debug, Default)]
pub struct Store {
    images: Mutex<VecDeque<Stored>>,
}

#[derive(Debug)]
struct Stored {
    name: String,
    until: Instant,
    bytes: Bytes,
    mime: &'static str,
}

impl Store {
    const LIFETIME: Duration = Duration::from_secs(3600);
    /// The most images that are kept; older ones go first.
    const CAPACITY: usize = 64;

    /// Keeps an image under a name that cannot be guessed.
    fn keep(&self, bytes: Vec<u8>, format: Format) -> String {
        let words = [(); 4].map(|()| diffuse_pipelines::random_seed() as u32);
        let words = words.map(|word| format!("{word:08x}"));
        let name = format!("{}.{}", words.concat(), format.name());
        let mut images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        images.retain(|image| image.until > now);
        if images.len() >= Self::CAPACITY {
            images.pop_front();
        }
        images.push_back(Stored {
            name: name.clone(),
            until: now + Self::LIFETIME,
            bytes: bytes.into(),
            mime: format.mime(),
        });
        name
    }

    fn get(&self, name: &str) -> Option<(Bytes, &'static str)> {
        let images = self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let found = images
            .iter()
            .find(|image| image.name == name && image.until > now);
        found.map(|image| (image.bytes.clone(), image.mime))
    }
}

/// `GET /images/{name}`
pub async fn stored(State(app): State<Arc<App>>, Path(name): Path<String>) -> Response {
    match app.store.get(&name) {
        Some((bytes, mime)) => ([(header::CONTENT_TYPE, mime)], bytes).into_response(),
        None => error(
            StatusCode::NOT_FOUND,
            "there is no such image, or not any more",
            None,
        ),
    }
}
