//! The part of AUTOMATIC1111's API (`/sdapi/v1`) that its clients use.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use diffuse_pipelines::schedulers::{Overrides, scheduler_catalog};
use diffuse_pipelines::{
    PromptSyntax, StableDiffusionImg2ImgOptions, StableDiffusionInpaintOptions,
    StableDiffusionOptions,
};
use image::RgbImage;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::App;
use crate::engine::{Failure, Output, Request, Task};
use crate::images::{Format, encode, enlarge, from_base64, read, to_base64};
use crate::request::{Refusal, fields, read_json, seed, seeds, unblock};

/// An error in AUTOMATIC1111's form.
pub fn error(status: StatusCode, message: &str) -> Response {
    let kind = status.canonical_reason().unwrap_or_default();
    let body = json!({"error": kind, "detail": message, "body": "", "errors": message});
    (status, Json(body)).into_response()
}

/// A value that makes no sense, in FastAPI's form.
fn invalid(field: &str, message: &str) -> Response {
    let detail = json!([{"loc": ["body", field], "msg": message, "type": "value_error"}]);
    let body = Json(json!({ "detail": detail }));
    (StatusCode::UNPROCESSABLE_ENTITY, body).into_response()
}

fn refused(refusal: &Refusal) -> Response {
    match refusal.status {
        StatusCode::BAD_REQUEST => invalid(&refusal.field, &refusal.message),
        status => error(status, &refusal.message),
    }
}

/// The answer to a request that failed.
pub fn failed(failure: &Failure) -> Response {
    let message = failure.to_string();
    match failure {
        Failure::Invalid(_) | Failure::Cancelled => invalid("", &message),
        Failure::Busy { retry_after } => {
            let mut response = error(StatusCode::TOO_MANY_REQUESTS, &message);
            let seconds = retry_after.as_secs().into();
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
            response
        }
        Failure::ShuttingDown => error(StatusCode::SERVICE_UNAVAILABLE, &message),
    }
}

/// The fields that count; clients send many more.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Fields {
    prompt: Option<String>,
    negative_prompt: Option<String>,
    #[serde(deserialize_with = "seed")]
    seed: Option<u64>,
    steps: Option<usize>,
    cfg_scale: Option<f64>,
    width: Option<usize>,
    height: Option<usize>,
    batch_size: Option<usize>,
    n_iter: Option<usize>,
    sampler_name: Option<String>,
    sampler_index: Option<String>,
    scheduler: Option<String>,
    eta: Option<f64>,
    clip_skip: Option<usize>,
    denoising_strength: Option<f64>,
    init_images: Option<Vec<String>>,
    mask: Option<String>,
    inpainting_mask_invert: Option<Value>,
    inpaint_full_res: Option<Value>,
    inpaint_full_res_padding: Option<u32>,
    override_settings: Option<Map<String, Value>>,
    send_images: Option<bool>,
}

/// Whether a flag is set; clients send numbers and booleans.
fn is_set(flag: Option<&Value>) -> bool {
    flag.is_some_and(|flag| {
        flag.as_bool()
            .unwrap_or(flag.as_f64().is_some_and(|n| n != 0.0))
    })
}

impl Fields {
    /// The scheduler of a sampler's name and a schedule's, by the names of the web UI.
    fn scheduler(&self) -> Result<(Option<String>, Overrides), Refusal> {
        let name = self.sampler_name.as_ref().or(self.sampler_index.as_ref());
        let name = name.filter(|name| !name.is_empty()).cloned();
        if let Some(name) = &name
            && !samplers_by_name().any(|known| known.eq_ignore_ascii_case(name))
        {
            return Err(Refusal::new(StatusCode::NOT_FOUND, "Sampler not found"));
        }
        let mut overrides = Overrides::new();
        let schedule = self.scheduler.as_deref().unwrap_or_default().to_lowercase();
        let key = match schedule.replace(' ', "_").as_str() {
            "" | "automatic" | "normal" | "uniform" | "simple" => None,
            "karras" => Some("use_karras_sigmas"),
            "exponential" => Some("use_exponential_sigmas"),
            "beta" => Some("use_beta_sigmas"),
            "sgm_uniform" => {
                overrides.insert("timestep_spacing".into(), "trailing".into());
                None
            }
            _ => return Err(Refusal::new(StatusCode::NOT_FOUND, "Scheduler not found")),
        };
        if let Some(key) = key {
            overrides.insert(key.into(), true.into());
        }
        Ok((name, overrides))
    }

    fn options(&self, app: &App) -> Result<StableDiffusionOptions, Refusal> {
        let images = self
            .batch_size
            .unwrap_or(1)
            .saturating_mul(self.n_iter.unwrap_or(1));
        if images == 0 {
            return Err(Refusal::field(
                "batch_size",
                "`batch_size` or `n_iter` is 0",
            ));
        }
        app.limits
            .check_images(images)
            .map_err(|message| Refusal::field("batch_size", message))?;
        let settings = self.override_settings.as_ref();
        let skip = settings.and_then(|settings| settings.get("CLIP_stop_at_last_layers"));
        let skip = skip.and_then(Value::as_u64).map(|skip| skip as usize);
        // It counts from the last layer, which is 1.
        let skip = skip.or(self.clip_skip).and_then(|skip| skip.checked_sub(1));
        Ok(StableDiffusionOptions {
            prompt: vec![self.prompt.clone().unwrap_or_default()],
            negative_prompt: self.negative_prompt.clone().into_iter().collect(),
            prompt_syntax: PromptSyntax::A1111,
            width: self.width,
            height: self.height,
            num_inference_steps: self.steps.unwrap_or(app.defaults.num_inference_steps),
            guidance_scale: self.cfg_scale.unwrap_or(app.defaults.guidance_scale),
            num_images_per_prompt: images,
            eta: self.eta.unwrap_or(0.0),
            clip_skip: skip.filter(|skip| *skip > 0),
            seeds: seeds(self.seed, images),
            ..app.defaults.clone()
        })
    }

    /// Text to image, or from an image if there is one.
    pub fn task(&self, app: &App) -> Result<Task, Refusal> {
        match self.init_images {
            Some(_) => self.image_task(app),
            None => Ok(Task::TextToImage(self.options(app)?)),
        }
    }

    fn image(&self) -> Result<RgbImage, Refusal> {
        let images = self.init_images.as_deref().unwrap_or_default();
        let [image] = images else {
            let message = format!("{} images: one is expected", images.len());
            return Err(Refusal::field("init_images", message));
        };
        decode(image).map_err(|message| Refusal::field("init_images", message))
    }

    /// Variants of an image, or with a mask its white part repainted.
    fn image_task(&self, app: &App) -> Result<Task, Refusal> {
        let mut options = self.options(app)?;
        let image = self.image()?;
        let strength = self.denoising_strength.unwrap_or(0.75);
        let size = [
            options.width.unwrap_or(image.width() as usize),
            options.height.unwrap_or(image.height() as usize),
        ];
        let size = app.limits.check_size(size);
        let size = size.map_err(|message| Refusal::field("width", message))?;
        let Some(mask) = &self.mask else {
            (options.width, options.height) = (None, None);
            return Ok(Task::ImageToImage(StableDiffusionImg2ImgOptions {
                options,
                image: vec![enlarge(&image, size)],
                strength,
            }));
        };
        let mut mask = decode(mask).map_err(|message| Refusal::field("mask", message))?;
        if is_set(self.inpainting_mask_invert.as_ref()) {
            image::imageops::invert(&mut mask);
        }
        let [width, height] = size.map(|side| Some((side as usize).max(8) / 8 * 8));
        (options.width, options.height) = (width, height);
        let crops = is_set(self.inpaint_full_res.as_ref());
        Ok(Task::Inpaint(StableDiffusionInpaintOptions {
            options,
            image: vec![image],
            mask_image: vec![mask],
            strength,
            padding_mask_crop: crops.then(|| self.inpaint_full_res_padding.unwrap_or(32)),
            keep_unmasked: true,
        }))
    }
}

fn decode(text: &str) -> Result<RgbImage, String> {
    read(&from_base64(text)?)
}

/// `POST /sdapi/v1/txt2img`
pub async fn txt2img(State(app): State<Arc<App>>, request: axum::extract::Request) -> Response {
    respond(app, request, |fields, app| {
        Ok(Task::TextToImage(fields.options(app)?))
    })
    .await
}

/// `POST /sdapi/v1/img2img`
pub async fn img2img(State(app): State<Arc<App>>, request: axum::extract::Request) -> Response {
    respond(app, request, Fields::image_task).await
}

async fn respond(
    app: Arc<App>,
    request: axum::extract::Request,
    task: fn(&Fields, &App) -> Result<Task, Refusal>,
) -> Response {
    let (request, send, values) = match read_request(&app, request, task).await {
        Ok(request) => request,
        Err(response) => return response,
    };
    let task = request.task.clone();
    let running = match app.queue.submit(request) {
        Ok(running) => running,
        Err(failure) => return failed(&failure),
    };
    match running.finish().await {
        Ok(output) => Json(answer(&app, &task, output, values, send).await).into_response(),
        Err(failure) => failed(&failure),
    }
}

/// What a body asks for, whether the answer has images, and the body's values.
pub async fn read_request(
    app: &Arc<App>,
    request: axum::extract::Request,
    task: fn(&Fields, &App) -> Result<Task, Refusal>,
) -> Result<(Request, bool, Value), Response> {
    let values = read_json(request).await;
    let mut values = values.map_err(|refusal| refused(&refusal))?;
    let shared = app.clone();
    let request = unblock(move || {
        let fields: Fields = fields(&values)?;
        let task = task(&fields, &shared)?;
        let request = self::request(&fields, task, &shared)?;
        // The answer has what was asked for, but for the images.
        for field in ["init_images", "mask"] {
            if let Some(value) = values.get_mut(field) {
                *value = Value::Null;
            }
        }
        Ok((request, fields.send_images.unwrap_or(true), values))
    });
    request.await.map_err(|refusal| refused(&refusal))
}

fn request(fields: &Fields, mut task: Task, app: &App) -> Result<Request, Refusal> {
    let scheduler = fields.scheduler()?;
    (app.check_scheduler)(&scheduler).map_err(|message| Refusal::field("sampler_name", message))?;
    let mut loras = Vec::new();
    for prompt in &mut task.options_mut().prompt {
        loras = app
            .take_loras(prompt)
            .map_err(|message| Refusal::field("prompt", message))?;
    }
    app.limits
        .check(&task, app.model.size)
        .map_err(|message| Refusal::field("", message))?;
    Ok(Request {
        task,
        scheduler,
        loras,
        // Clients ask for progress meanwhile.
        previews: true,
    })
}

/// The answer of a run: images, the values that it was asked with, and how they were made.
pub async fn answer(
    app: &Arc<App>,
    task: &Task,
    output: Output,
    values: Value,
    send: bool,
) -> Value {
    let texts = (0..output.images.len()).map(|index| app.parameters(task, &output, index));
    let texts: Vec<String> = texts.collect();
    let options = task.options();
    let (width, height) = output
        .images
        .first()
        .map_or((0, 0), |image| image.dimensions());
    let info = json!({
        "prompt": options.prompt.first(),
        "all_prompts": vec![options.prompt.first(); output.images.len()],
        "negative_prompt": options.negative_prompt.first().cloned().unwrap_or_default(),
        "seed": options.seeds.first(),
        "all_seeds": options.seeds,
        "subseed": 0,
        "width": width,
        "height": height,
        "sampler_name": output.scheduler,
        "cfg_scale": options.guidance_scale,
        "steps": options.num_inference_steps,
        "batch_size": output.images.len(),
        "sd_model_name": app.model.name,
        "clip_skip": options.clip_skip.unwrap_or(0) + 1,
        "index_of_first_image": 0,
        "infotexts": texts,
        "interrupted": output.interrupted,
        "version": concat!("diffuse ", env!("CARGO_PKG_VERSION")),
    });
    let encode_all = move || -> Vec<String> {
        let files = output.images.iter().zip(&texts);
        let files = files.map(|(image, text)| to_base64(&encode(image, Format::Png, text)));
        files.collect()
    };
    let images = match send {
        true => tokio::task::spawn_blocking(encode_all)
            .await
            .unwrap_or_default(),
        false => Vec::new(),
    };
    json!({"images": images, "parameters": values, "info": info.to_string()})
}

#[derive(Debug, Default, Deserialize)]
pub struct ProgressQuery {
    skip_current_image: Option<String>,
}

/// `GET /sdapi/v1/progress`
pub async fn progress(
    State(app): State<Arc<App>>,
    query: Result<Query<ProgressQuery>, QueryRejection>,
) -> Response {
    let skip = match query.map(|Query(query)| query.skip_current_image) {
        Ok(None) => false,
        Ok(Some(text)) if text.eq_ignore_ascii_case("false") || text == "0" => false,
        Ok(Some(text)) if text.eq_ignore_ascii_case("true") || text == "1" => true,
        _ => return invalid("skip_current_image", "it has to be `true` or `false`, once"),
    };
    let (waiting, progress) = app.queue.progress();
    let running = progress.started.is_some();
    let part = match progress.steps {
        0 => 0.0,
        steps => progress.step as f64 / steps as f64,
    };
    let elapsed = progress
        .started
        .map_or(0.0, |started| started.elapsed().as_secs_f64());
    let eta = if part > 0.0 {
        elapsed / part - elapsed
    } else {
        0.0
    };
    let preview = progress.preview.filter(|_| !skip);
    let preview = match preview {
        Some(preview) => {
            let encode = move || to_base64(&encode(&preview.image, Format::Png, ""));
            tokio::task::spawn_blocking(encode).await.ok()
        }
        None => None,
    };
    // Clients take 0 for the end.
    let part = if running { part.max(0.01) } else { part };
    Json(json!({
        "progress": part,
        "eta_relative": eta,
        "state": {
            "skipped": false,
            "interrupted": false,
            "stopping_generation": false,
            "job": if running { "generating" } else { "" },
            "job_count": waiting + usize::from(running),
            "job_timestamp": "0",
            "job_no": 0,
            "sampling_step": progress.step,
            "sampling_steps": progress.steps,
        },
        "current_image": preview,
        "textinfo": null,
    }))
    .into_response()
}

/// `POST /sdapi/v1/interrupt` and `skip`
pub async fn interrupt(State(app): State<Arc<App>>) -> Json<Value> {
    app.queue.interrupt();
    Json(json!({}))
}

/// `GET /sdapi/v1/options`
pub async fn options(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({
        "sd_model_checkpoint": app.model.name,
        "sd_checkpoint_hash": "",
        "sd_vae": "Automatic",
        "CLIP_stop_at_last_layers": 1,
        "samples_format": "png",
        "live_previews_enable": true,
    }))
}

/// `POST /sdapi/v1/options`: clients send back what they got; nothing can be changed.
pub async fn set_options(State(app): State<Arc<App>>, request: axum::extract::Request) -> Response {
    let values = read_json(request).await;
    let values: Map<String, Value> = match values.and_then(|values| fields(&values)) {
        Ok(values) => values,
        Err(refusal) => return refused(&refusal),
    };
    let field = "sd_model_checkpoint";
    match values.get(field).unwrap_or(&Value::Null) {
        Value::Null => Json(Value::Null).into_response(),
        Value::String(name) if name.is_empty() || *name == app.model.name => {
            Json(Value::Null).into_response()
        }
        Value::String(name) => {
            let message = format!("there is no model `{name}`; there is `{}`", app.model.name);
            invalid(field, &message)
        }
        _ => invalid(field, "it is not a string"),
    }
}

/// Every name of a sampler.
fn samplers_by_name() -> impl Iterator<Item = &'static str> {
    scheduler_catalog().flat_map(|info| {
        let names = info.popular.into_iter();
        names.chain([info.name, info.class])
    })
}

/// `GET /sdapi/v1/samplers`
pub async fn samplers() -> Json<Value> {
    let samplers = scheduler_catalog().flat_map(|info| {
        let mut names = info.popular.clone();
        if names.is_empty() {
            names.push(info.class);
        }
        names.into_iter().map(
            move |name| json!({"name": name, "aliases": [info.name, info.class], "options": {}}),
        )
    });
    Json(samplers.collect())
}

/// `GET /sdapi/v1/schedulers`
pub async fn schedulers() -> Json<Value> {
    let names = [
        ("automatic", "Automatic"),
        ("karras", "Karras"),
        ("exponential", "Exponential"),
        ("sgm_uniform", "SGM Uniform"),
        ("beta", "Beta"),
    ];
    let scheduler = |(name, label)| {
        json!({
            "name": name,
            "label": label,
            "aliases": null,
            "default_rho": -1,
            "need_inner_model": false,
        })
    };
    Json(names.into_iter().map(scheduler).collect())
}

/// `GET /sdapi/v1/sd-models`
pub async fn sd_models(State(app): State<Arc<App>>) -> Json<Value> {
    let name = &app.model.name;
    Json(json!([{
        "title": name,
        "model_name": name,
        "hash": null,
        "sha256": null,
        "filename": name,
        "config": null,
    }]))
}

/// `GET /sdapi/v1/loras`
pub async fn loras(State(app): State<Arc<App>>) -> Json<Value> {
    let folder = app.lora_dir.clone();
    let list = move || {
        let names = folder.map(|folder| diffuse_pipelines::adapter_names(&folder));
        names.unwrap_or_default()
    };
    let names = tokio::task::spawn_blocking(list).await.unwrap_or_default();
    let lora = |name: String| json!({"name": name, "alias": name, "path": name, "metadata": {}});
    Json(names.into_iter().map(lora).collect())
}

/// Lists that are empty here.
pub async fn nothing() -> Json<Value> {
    Json(json!([]))
}

/// `GET /sdapi/v1/scripts`
pub async fn scripts() -> Json<Value> {
    Json(json!({"txt2img": [], "img2img": []}))
}

/// `GET /sdapi/v1/embeddings`
pub async fn embeddings() -> Json<Value> {
    Json(json!({"loaded": {}, "skipped": {}}))
}

/// `GET /sdapi/v1/cmd-flags`
pub async fn flags() -> Json<Value> {
    Json(json!({}))
}
