#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod a1111;
mod access;
mod connections;
mod engine;
#[cfg(feature = "fleet")]
mod fleet;
mod images;
mod metrics;
mod openai;
mod openapi;
mod page;
mod request;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use burn::tensor::backend::Backend;
use diffuse_pipelines::{LatentPreview, StableDiffusionOptions, StableDiffusionPipeline};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::runtime;
use tokio_util::sync::CancellationToken;

use access::Access;
use engine::{Engine, Queue};

#[cfg(feature = "fleet")]
pub use fleet::{FleetOptions, serve_queue, work};

/// Why a server could not run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system says.
        source: std::io::Error,
    },
    /// The threads of the server cannot be started.
    #[error("cannot start the server")]
    Start(#[source] std::io::Error),
    /// The queue cannot be reached.
    #[cfg(feature = "fleet")]
    #[error("cannot use the queue at {url}")]
    Queue {
        /// The NATS server.
        url: String,
        /// What it says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// How a server runs.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Where it listens; port 0 is any free one.
    pub address: SocketAddr,
    /// Names of the server, beside `localhost` and addresses.
    pub hosts: Vec<String>,
    /// A key that requests need: `Authorization: Bearer KEY`.
    pub key: Option<String>,
    /// What clients call the model.
    pub model: String,
    /// What requests leave out.
    pub defaults: StableDiffusionOptions,
    /// Folder of the LoRAs that prompts name.
    pub lora_dir: Option<PathBuf>,
    /// Requests that may wait; more are refused with 429.
    pub queue: usize,
    /// The largest request.
    pub limits: Limits,
    /// How long the end of the server waits for the run that computes.
    pub grace: Duration,
}

/// The largest request.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes of a body.
    pub body: usize,
    /// Pixels of an image.
    pub pixels: usize,
    /// Steps of a run.
    pub steps: usize,
    /// Images of a run.
    pub images: usize,
    /// Bytes of a prompt.
    pub prompt: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body: 32 << 20,
            pixels: 1 << 20,
            steps: 150,
            images: 10,
            prompt: 16 << 10,
        }
    }
}

impl Limits {
    fn check_images(&self, images: usize) -> Result<(), String> {
        if images <= self.images {
            return Ok(());
        }
        let limit = self.images;
        Err(format!(
            "the number of images is {images}, but at most {limit} here"
        ))
    }
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            address: ([127, 0, 0, 1], 7860).into(),
            hosts: Vec::new(),
            key: None,
            model: "diffuse".into(),
            defaults: StableDiffusionOptions::default(),
            lora_dir: None,
            queue: 32,
            limits: Limits::default(),
            grace: Duration::from_secs(30),
        }
    }
}

/// The model as clients see it.
#[derive(Debug)]
struct Model {
    name: String,
    /// Seconds since 1970.
    loaded: u64,
    /// The class of the checkpoint's scheduler.
    scheduler: String,
    /// Width and height by default, if the UNet says them.
    size: Option<[usize; 2]>,
}

/// What handlers share.
struct App {
    queue: Queue,
    check_scheduler: Box<engine::CheckScheduler>,
    access: Access,
    model: Model,
    defaults: StableDiffusionOptions,
    lora_dir: Option<PathBuf>,
    limits: Limits,
    store: openai::Store,
}

impl Model {
    /// A model that is not loaded here.
    fn new(name: &str) -> Self {
        let loaded = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            name: name.into(),
            loaded: loaded.unwrap_or_default().as_secs(),
            scheduler: String::new(),
            size: None,
        }
    }

    fn of<B: Backend>(name: &str, pipeline: &StableDiffusionPipeline<B>) -> Self {
        let scheduler = pipeline.scheduler.config().class_name();
        Self {
            scheduler: scheduler.unwrap_or_default().to_string(),
            size: pipeline.default_size(),
            ..Self::new(name)
        }
    }
}

impl App {
    fn new(
        queue: Queue,
        check_scheduler: Box<engine::CheckScheduler>,
        address: SocketAddr,
        model: Model,
        options: ServeOptions,
    ) -> Self {
        Self {
            queue,
            check_scheduler,
            access: Access {
                address,
                hosts: options.hosts,
                key: options.key,
            },
            model,
            defaults: options.defaults,
            lora_dir: options.lora_dir,
            limits: options.limits,
            store: openai::Store::default(),
        }
    }
}

/// The threads that answer.
fn runtime() -> Result<runtime::Runtime, ServeError> {
    let mut builder = runtime::Builder::new_multi_thread();
    // The blocking ones decode and encode images, each with the memory that one needs.
    let builder = builder.worker_threads(2).max_blocking_threads(4);
    builder.enable_all().build().map_err(ServeError::Start)
}

/// Answers requests until SIGINT, SIGTERM or until `stop` is cancelled. The calling thread
/// computes. `on_ready` gets the address.
///
/// # Errors
/// If the address cannot be listened on.
pub fn serve<B: Backend>(
    pipeline: StableDiffusionPipeline<B>,
    preview: Option<LatentPreview<B>>,
    options: ServeOptions,
    stop: &CancellationToken,
    on_ready: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let runtime = runtime()?;
    let address = options.address;
    let listen = |source| ServeError::Listen { address, source };
    let listener = runtime
        .block_on(TcpListener::bind(address))
        .map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let model = Model::of(&options.model, &pipeline);
    let abort = CancellationToken::new();
    let check_scheduler = engine::check_scheduler::<B>(pipeline.scheduler.config().clone());
    let (engine, queue) = Engine::new(pipeline, preview, options.queue, abort.clone());
    let grace = options.grace;
    let app = Arc::new(App::new(queue, check_scheduler, address, model, options));
    // Also if the pipeline panics.
    let stop = stop.child_token();
    let _end = stop.clone().drop_guard();
    let server = thread::spawn(move || {
        let router = router(app.clone());
        runtime.block_on(run(listener, router, app, stop, abort, grace));
        // Connections that are left are cut off.
        runtime.shutdown_background();
    });
    on_ready(address);
    engine.run();
    let _ = server.join();
    Ok(())
}

/// Answers until the end, and waits for the answers that are due.
async fn run(
    listener: TcpListener,
    router: Router,
    app: Arc<App>,
    stop: CancellationToken,
    abort: CancellationToken,
    grace: Duration,
) {
    stop_on_signals(&stop, &abort);
    let connections = connections::accept(listener, router, &stop).await;
    app.queue.close();
    let mut ended = std::pin::pin!(connections.shutdown());
    tokio::select! {
        () = &mut ended => return,
        () = tokio::time::sleep(grace) => {}
        () = abort.cancelled() => {}
    }
    abort.cancel();
    // A step may take a while; then the connection is cut off.
    let _ = tokio::time::timeout(grace, ended).await;
}

/// Cancels `stop` at the first SIGINT or SIGTERM, and `abort`, which ends also the run that
/// computes, at the second.
fn stop_on_signals(stop: &CancellationToken, abort: &CancellationToken) {
    let (stop, abort) = (stop.clone(), abort.clone());
    tokio::spawn(async move {
        signal().await;
        stop.cancel();
        signal().await;
        abort.cancel();
    });
}

/// Waits for the signal to end.
async fn signal() {
    let interrupt = async {
        // Without signals there is nothing to wait for.
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    #[cfg(unix)]
    let terminate = async {
        use tokio::signal::unix::{SignalKind, signal};
        match signal(SignalKind::terminate()) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    #[cfg(not(unix))]
    let terminate = std::future::pending::<()>();
    tokio::select! {
        () = interrupt => {}
        () = terminate => {}
    }
}

fn router(app: Arc<App>) -> Router {
    let limit = DefaultBodyLimit::max(app.limits.body);
    Router::new()
        .route("/v1/images/generations", post(openai::generations))
        .route("/v1/images/edits", post(openai::edits))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route("/images/{name}", get(openai::stored))
        .route("/sdapi/v1/txt2img", post(a1111::txt2img))
        .route("/sdapi/v1/img2img", post(a1111::img2img))
        .route("/sdapi/v1/progress", get(a1111::progress))
        .route("/sdapi/v1/interrupt", post(a1111::interrupt))
        .route("/sdapi/v1/skip", post(a1111::interrupt))
        .route(
            "/sdapi/v1/options",
            get(a1111::options).post(a1111::set_options),
        )
        .route("/sdapi/v1/samplers", get(a1111::samplers))
        .route("/sdapi/v1/schedulers", get(a1111::schedulers))
        .route("/sdapi/v1/sd-models", get(a1111::sd_models))
        .route("/sdapi/v1/loras", get(a1111::loras))
        .route("/sdapi/v1/upscalers", get(a1111::nothing))
        .route("/sdapi/v1/latent-upscale-modes", get(a1111::nothing))
        .route("/sdapi/v1/sd-vae", get(a1111::nothing))
        .route("/sdapi/v1/sd-modules", get(a1111::nothing))
        .route("/sdapi/v1/script-info", get(a1111::nothing))
        .route("/sdapi/v1/scripts", get(a1111::scripts))
        .route("/sdapi/v1/embeddings", get(a1111::embeddings))
        .route("/sdapi/v1/cmd-flags", get(a1111::flags))
        .route("/openapi.json", get(openapi::openapi))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .merge(page::routes())
        .fallback(|uri: Uri| async move {
            error(uri.path(), StatusCode::NOT_FOUND, "there is nothing here")
        })
        .method_not_allowed_fallback(|uri: Uri| async move {
            let message = "this path does not take this method";
            error(uri.path(), StatusCode::METHOD_NOT_ALLOWED, message)
        })
        .layer(axum::middleware::from_fn_with_state(
            app.clone(),
            access::check,
        ))
        .layer(limit)
        .with_state(app)
}

/// An error in the form of the path's API.
fn error(path: &str, status: StatusCode, message: &str) -> Response {
    match path.starts_with("/sdapi/") {
        true => a1111::error(status, message),
        false => openai::error(status, message, None),
    }
}

/// `GET /readyz`: the model is loaded before the server listens.
async fn ready(State(app): State<Arc<App>>) -> Response {
    if app.queue.is_closed() {
        return (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n").into_response();
    }
    "ready\n".into_response()
}

/// `GET /metrics`
async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.queue.metrics().text(app.queue.progress().0);
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let kind = HeaderValue::from_static(kind);
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
