//! The thread that owns the pipeline, and the queue in front of it.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::backend::Backend;
use diffuse_pipelines::schedulers::{Overrides, SchedulerConfig, scheduler_from_config};
use diffuse_pipelines::{
    Adapter, Generated, LatentPreview, PipelineError, StableDiffusionImg2ImgOptions,
    StableDiffusionInpaintOptions, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent,
};
use image::RgbImage;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::metrics::Metrics;

/// In place of the checkpoint's scheduler: a name, and options.
pub type SchedulerChoice = (Option<String>, Overrides);

/// Whether a scheduler can be made, before its request waits.
pub type CheckScheduler = dyn Fn(&SchedulerChoice) -> Result<(), String> + Send + Sync;

/// The check of schedulers made from a checkpoint's.
pub fn check_scheduler<B: Backend>(config: SchedulerConfig) -> Box<CheckScheduler> {
    Box::new(move |(name, overrides)| {
        let scheduler = scheduler_from_config::<B>(&config, name.as_deref(), overrides);
        scheduler.map(|_| ()).map_err(|error| chain(&error))
    })
}

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    pub task: Task,
    pub scheduler: SchedulerChoice,
    /// LoRAs of the server's folder.
    pub loras: Vec<Lora>,
    /// Whether steps are sent with previews.
    pub previews: bool,
}

/// The three kinds of runs.
#[derive(Debug, Clone)]
pub enum Task {
    TextToImage(StableDiffusionOptions),
    ImageToImage(StableDiffusionImg2ImgOptions),
    Inpaint(StableDiffusionInpaintOptions),
}

impl Task {
    /// The options that all have.
    pub fn options(&self) -> &StableDiffusionOptions {
        match self {
            Self::TextToImage(options) => options,
            Self::ImageToImage(task) => &task.options,
            Self::Inpaint(task) => &task.options,
        }
    }

    /// [`options`](Self::options), to change.
    pub fn options_mut(&mut self) -> &mut StableDiffusionOptions {
        match self {
            Self::TextToImage(options) => options,
            Self::ImageToImage(task) => &mut task.options,
            Self::Inpaint(task) => &mut task.options,
        }
    }

    /// Number of images.
    pub fn images(&self) -> usize {
        self.options().prompt.len() * self.options().num_images_per_prompt
    }
}

/// A LoRA by its name in the server's folder.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    pub path: PathBuf,
    pub unet: f64,
    pub text_encoder: f64,
}

/// What happens to a request.
#[derive(Debug)]
pub enum Event {
    /// A step has ended.
    Step {
        step: usize,
        steps: usize,
        preview: Option<Preview>,
    },
    /// The end.
    Finished(Result<Output, Failure>),
}

/// What a run made.
#[derive(Debug)]
pub struct Output {
    pub images: Vec<RgbImage>,
    /// The class of the scheduler.
    pub scheduler: String,
    /// Whether it was interrupted, and its images are unfinished.
    pub interrupted: bool,
}

/// Why a run made nothing.
#[derive(Debug, Clone, Error)]
pub enum Failure {
    /// The request makes no sense; it would fail again.
    #[error("{0}")]
    Invalid(String),
    /// The queue is full.
    #[error("the queue is full; try again in {} s", retry_after.as_secs())]
    Busy { retry_after: Duration },
    /// The server ends.
    #[error("the server shuts down")]
    ShuttingDown,
    /// The client has left.
    #[error("the request was cancelled")]
    Cancelled,
}

#[derive(Debug)]
struct Job {
    request: Request,
    events: mpsc::UnboundedSender<Event>,
    cancel: CancellationToken,
}

/// What the run that computes now has come to.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub started: Option<Instant>,
    pub step: usize,
    pub steps: usize,
    pub preview: Option<Arc<Preview>>,
    /// Ends the run early; its images are decoded as they are.
    interrupt: CancellationToken,
}

/// What both sides of the queue see.
#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// A request was put into the queue, or the queue was closed.
    changed: Condvar,
    metrics: Metrics,
}

#[derive(Debug)]
struct State {
    waiting: VecDeque<Job>,
    progress: Progress,
    /// Time of the last run.
    last_run: Duration,
    closed: bool,
}

impl Shared {
    fn new() -> Self {
        Self {
            state: Mutex::new(State {
                waiting: VecDeque::new(),
                progress: Progress::default(),
                last_run: Duration::from_secs(1),
                closed: false,
            }),
            changed: Condvar::new(),
            metrics: Metrics::new(),
        }
    }

    /// The state, without the requests whose clients have left.
    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiting.retain(|job| {
            let cancelled = job.cancel.is_cancelled();
            if cancelled {
                self.metrics.count(&Err(Failure::Cancelled));
            }
            !cancelled
        });
        state
    }

    /// Takes no more requests, and refuses those that wait.
    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for job in state.waiting.drain(..) {
            self.finish(&job, Err(Failure::ShuttingDown));
        }
        self.changed.notify_all();
    }

    /// The next request, once there is one; none after the queue was closed.
    fn next(&self) -> Option<(Job, CancellationToken)> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                // In the same step, so that it is always seen to wait or to compute.
                state.progress = Progress {
                    started: Some(Instant::now()),
                    ..Progress::default()
                };
                let interrupt = state.progress.interrupt.clone();
                return Some((job, interrupt));
            }
            if state.closed {
                return None;
            }
            let woken = self.changed.wait(state);
            drop(woken.unwrap_or_else(PoisonError::into_inner));
            state = self.lock();
        }
    }

    fn finish(&self, job: &Job, result: Result<Output, Failure>) {
        self.metrics.count(&result);
        // Nobody listens, if the client has left.
        let _ = job.events.send(Event::Finished(result));
    }
}

/// The side of the queue that requests come from. Dropping it closes the queue.
#[derive(Debug)]
pub struct Queue {
    shared: Arc<Shared>,
    length: usize,
}

/// A request that waits or computes. Dropping it cancels it.
pub struct Running {
    events: mpsc::UnboundedReceiver<Event>,
    _cancel: DropGuard,
}

impl Running {
    /// What happens next.
    pub async fn next(&mut self) -> Event {
        let event = self.events.recv().await;
        event.unwrap_or(Event::Finished(Err(Failure::ShuttingDown)))
    }

    /// Waits for the end.
    pub async fn finish(mut self) -> Result<Output, Failure> {
        loop {
            if let Event::Finished(result) = self.next().await {
                return result;
            }
        }
    }
}

impl Queue {
    /// Puts a request into the queue.
    ///
    /// # Errors
    /// If the queue is full or closed.
    pub fn submit(&self, request: Request) -> Result<Running, Failure> {
        let mut state = self.shared.lock();
        if state.closed {
            return Err(Failure::ShuttingDown);
        }
        if state.waiting.len() >= self.length {
            self.metrics().rejected.inc();
            // A place may be free after one run.
            let seconds = state.last_run.as_secs_f64().ceil().clamp(1.0, 600.0);
            let retry_after = Duration::from_secs(seconds as u64);
            return Err(Failure::Busy { retry_after });
        }
        let (sender, events) = mpsc::unbounded_channel();
        let cancel = CancellationToken::new();
        state.waiting.push_back(Job {
            request,
            events: sender,
            cancel: cancel.clone(),
        });
        self.shared.changed.notify_one();
        Ok(Running {
            events,
            _cancel: cancel.drop_guard(),
        })
    }

    /// A queue that nobody computes for.
    #[cfg(feature = "fleet")]
    pub fn of_nothing() -> Self {
        Self {
            shared: Arc::new(Shared::new()),
            length: 0,
        }
    }

    /// Takes no more requests, and refuses those that wait.
    pub fn close(&self) {
        self.shared.close();
    }

    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Number of requests in the queue, and what the run that computes now has come to.
    pub fn progress(&self) -> (usize, Progress) {
        let state = self.shared.lock();
        (state.waiting.len(), state.progress.clone())
    }

    /// Ends the run that computes now early.
    pub fn interrupt(&self) {
        self.shared.lock().progress.interrupt.cancel();
    }

    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.close();
    }
}

/// What the first image of a run will look like.
#[derive(Debug, Clone)]
pub struct Preview {
    pub image: RgbImage,
    /// Width and height of the result, which may be larger.
    pub size: [u32; 2],
}

/// The side of the queue that computes.
pub struct Engine<B: Backend> {
    pipeline: StableDiffusionPipeline<B>,
    /// The checkpoint's scheduler.
    scheduler: SchedulerConfig,
    preview: Option<LatentPreview<B>>,
    loras: Vec<Lora>,
    shared: Arc<Shared>,
    /// Ends the run that computes now, when the server does not wait any longer.
    abort: CancellationToken,
}

impl<B: Backend> Engine<B> {
    /// A queue of `length` requests in front of a pipeline.
    pub fn new(
        pipeline: StableDiffusionPipeline<B>,
        preview: Option<LatentPreview<B>>,
        length: usize,
        abort: CancellationToken,
    ) -> (Self, Queue) {
        let shared = Arc::new(Shared::new());
        let queue = Queue {
            shared: shared.clone(),
            length: length.max(1),
        };
        let engine = Self {
            scheduler: pipeline.scheduler.config().clone(),
            pipeline,
            preview,
            loras: Vec::new(),
            shared,
            abort,
        };
        (engine, queue)
    }

    /// Computes until the queue is closed.
    pub fn run(mut self) {
        while let Some((job, interrupt)) = self.shared.next() {
            let started = Instant::now();
            let result = self.generate(&job, &interrupt);
            let elapsed = started.elapsed();
            self.shared.metrics.seconds.observe(elapsed.as_secs_f64());
            let mut state = self.shared.lock();
            state.progress = Progress::default();
            if result.is_ok() {
                state.last_run = elapsed;
            }
            drop(state);
            self.shared.finish(&job, result);
        }
    }

    fn generate(&mut self, job: &Job, interrupt: &CancellationToken) -> Result<Output, Failure> {
        let request = &job.request;
        let invalid = |error: PipelineError| Failure::Invalid(chain(&error));
        let (name, overrides) = &request.scheduler;
        let scheduler = scheduler_from_config(&self.scheduler, name.as_deref(), overrides);
        self.pipeline.scheduler = scheduler.map_err(|error| Failure::Invalid(chain(&error)))?;
        self.set_loras(&request.loras).map_err(invalid)?;

        let (shared, abort) = (&self.shared, &self.abort);
        let on_step = |event: StepEvent<'_, B>| {
            shared.metrics.steps.inc();
            let (step, steps) = (event.step + 1, event.steps);
            let preview = request.previews.then(|| self.preview(&event)).flatten();
            {
                let progress = &mut shared.lock().progress;
                (progress.step, progress.steps) = (step, steps);
                progress.preview = preview.clone().map(Arc::new);
            }
            let _ = job.events.send(Event::Step {
                step,
                steps,
                preview,
            });
            let ends = [&job.cancel, interrupt, abort];
            if ends.iter().any(|token| token.is_cancelled()) {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        };
        let pipeline = &self.pipeline;
        let mut task = request.task.clone();
        task.options_mut().predict_original = request.previews;
        let inputs = StableDiffusionInputs::default();
        let generated: Generated<B> = match &task {
            Task::TextToImage(options) => pipeline.generate_with(options, inputs, on_step),
            Task::ImageToImage(options) => pipeline.image_to_image_with(options, inputs, on_step),
            Task::Inpaint(options) => pipeline.inpaint_with(options, inputs, on_step),
        }
        .map_err(invalid)?;
        if job.cancel.is_cancelled() {
            return Err(Failure::Cancelled);
        }
        if self.abort.is_cancelled() {
            return Err(Failure::ShuttingDown);
        }
        let images = if generated.interrupted {
            pipeline.decode(generated.latents).map_err(invalid)?
        } else {
            generated.images
        };
        Ok(Output {
            images,
            scheduler: pipeline
                .scheduler
                .config()
                .class_name()
                .unwrap_or_default()
                .to_string(),
            interrupted: generated.interrupted,
        })
    }

    /// Changes the weights, if other LoRAs are asked for than the last time.
    fn preview(&self, event: &StepEvent<'_, B>) -> Option<Preview> {
        let latents = event.preview_latents().clone().narrow(0, 0, 1);
        let [_, _, height, width] = latents.dims();
        let size = [width, height].map(|side| (side * self.pipeline.vae.downscale()) as u32);
        let mut images = self.preview.as_ref()?.images(&latents).ok()?;
        let image = images.pop()?;
        Some(Preview { image, size })
    }

    fn set_loras(&mut self, loras: &[Lora]) -> Result<(), PipelineError> {
        if self.loras == loras {
            return Ok(());
        }
        let open = |lora: &Lora| {
            let adapter = Adapter::open(&lora.path)?.with_strength(lora.unet);
            Ok(adapter.with_text_encoder_strength(lora.text_encoder))
        };
        let adapters = loras.iter().map(open);
        let adapters = adapters.collect::<Result<Vec<_>, PipelineError>>()?;
        self.pipeline.set_adapters(&adapters)?;
        self.loras = loras.to_vec();
        Ok(())
    }
}

/// Also if it panics: clients are told, and do not wait for ever.
impl<B: Backend> Drop for Engine<B> {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
