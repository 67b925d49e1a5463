//! The thread that owns the pipeline, and the queue in front of it.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::tensor::{Tensor, backend::Backend};
use diffuse_pipelines::schedulers::{Overrides, SchedulerConfig, scheduler_from_config};
use diffuse_pipelines::{
    Adapter, Generated, PipelineError, StableDiffusionImg2ImgOptions,
    StableDiffusionInpaintOptions, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, StepEvent,
};
use image::RgbImage;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::metrics::Metrics;

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    pub task: Task,
    /// In place of the checkpoint's scheduler: a name, and options.
    pub scheduler: (Option<String>, Overrides),
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
        preview: Option<RgbImage>,
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
    pub preview: Option<Arc<RgbImage>>,
    /// Ends the run early; its images are decoded as they are.
    interrupt: CancellationToken,
}

/// The side of the queue that requests come from.
#[derive(Debug)]
pub struct Queue {
    jobs: mpsc::Sender<Job>,
    waiting: Arc<AtomicUsize>,
    progress: Arc<Mutex<Progress>>,
    /// Milliseconds of the last run.
    last_run: Arc<AtomicU64>,
    pub metrics: Arc<Metrics>,
    pub shutdown: CancellationToken,
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
    /// If the queue is full, or the server ends.
    pub fn submit(&self, request: Request) -> Result<Running, Failure> {
        if self.shutdown.is_cancelled() {
            return Err(Failure::ShuttingDown);
        }
        let (sender, events) = mpsc::unbounded_channel();
        let cancel = CancellationToken::new();
        let job = Job {
            request,
            events: sender,
            cancel: cancel.clone(),
        };
        self.waiting.fetch_add(1, Ordering::SeqCst);
        match self.jobs.try_send(job) {
            Ok(()) => Ok(Running {
                events,
                _cancel: cancel.drop_guard(),
            }),
            Err(error) => {
                self.waiting.fetch_sub(1, Ordering::SeqCst);
                Err(match error {
                    mpsc::error::TrySendError::Full(_) => {
                        self.metrics.rejected.inc();
                        Failure::Busy {
                            retry_after: self.retry_after(),
                        }
                    }
                    mpsc::error::TrySendError::Closed(_) => Failure::ShuttingDown,
                })
            }
        }
    }

    /// A queue that nobody computes for.
    #[cfg(feature = "fleet")]
    pub fn of_nothing(shutdown: CancellationToken) -> Self {
        let (jobs, _) = mpsc::channel(1);
        Self {
            jobs,
            waiting: Arc::default(),
            progress: Arc::default(),
            last_run: Arc::default(),
            metrics: Arc::new(Metrics::new()),
            shutdown,
        }
    }

    /// When a place in the queue may be free: after one run.
    fn retry_after(&self) -> Duration {
        let milliseconds = self.last_run.load(Ordering::Relaxed);
        Duration::from_secs(milliseconds.div_ceil(1000).clamp(1, 600))
    }

    /// Number of requests in the queue.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// What the run that computes now has come to.
    pub fn progress(&self) -> Progress {
        lock(&self.progress).clone()
    }

    /// Ends the run that computes now early.
    pub fn interrupt(&self) {
        lock(&self.progress).interrupt.cancel();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a preview of latents: `[batch, channels, height, width]`; the first image is shown.
pub type Preview<B> = Box<dyn Fn(&Tensor<B, 4>) -> Option<RgbImage>>;

/// The side of the queue that computes.
pub struct Engine<B: Backend> {
    pipeline: StableDiffusionPipeline<B>,
    /// The checkpoint's scheduler.
    scheduler: SchedulerConfig,
    preview: Option<Preview<B>>,
    loras: Vec<Lora>,
    jobs: mpsc::Receiver<Job>,
    waiting: Arc<AtomicUsize>,
    progress: Arc<Mutex<Progress>>,
    last_run: Arc<AtomicU64>,
    metrics: Arc<Metrics>,
    shutdown: CancellationToken,
    /// Ends the run that computes now, when the server does not wait any longer.
    abort: CancellationToken,
}

impl<B: Backend> Engine<B> {
    /// A queue of `length` requests in front of a pipeline.
    pub fn new(
        pipeline: StableDiffusionPipeline<B>,
        preview: Option<Preview<B>>,
        length: usize,
        shutdown: CancellationToken,
        abort: CancellationToken,
    ) -> (Self, Queue) {
        let (sender, receiver) = mpsc::channel(length.max(1));
        let waiting = Arc::new(AtomicUsize::new(0));
        let progress = Arc::new(Mutex::new(Progress::default()));
        let last_run = Arc::new(AtomicU64::new(1000));
        let metrics = Arc::new(Metrics::new());
        let queue = Queue {
            jobs: sender,
            waiting: waiting.clone(),
            progress: progress.clone(),
            last_run: last_run.clone(),
            metrics: metrics.clone(),
            shutdown: shutdown.clone(),
        };
        let engine = Self {
            scheduler: pipeline.scheduler.config().clone(),
            pipeline,
            preview,
            loras: Vec::new(),
            jobs: receiver,
            waiting,
            progress,
            last_run,
            metrics,
            shutdown,
            abort,
        };
        (engine, queue)
    }

    /// Computes until all senders are gone.
    pub fn run(mut self) {
        while let Some(job) = self.jobs.blocking_recv() {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            let result = if self.shutdown.is_cancelled() {
                Err(Failure::ShuttingDown)
            } else if job.cancel.is_cancelled() {
                Err(Failure::Cancelled)
            } else {
                self.compute(&job)
            };
            self.metrics.count(&result);
            // Nobody listens, if the client has left.
            let _ = job.events.send(Event::Finished(result));
        }
    }

    fn compute(&mut self, job: &Job) -> Result<Output, Failure> {
        let started = Instant::now();
        let interrupt = CancellationToken::new();
        *lock(&self.progress) = Progress {
            started: Some(started),
            interrupt: interrupt.clone(),
            ..Progress::default()
        };
        let result = self.generate(job, &interrupt);
        *lock(&self.progress) = Progress::default();
        let elapsed = started.elapsed();
        self.metrics.seconds.observe(elapsed.as_secs_f64());
        if result.is_ok() {
            let milliseconds = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
            self.last_run.store(milliseconds, Ordering::Relaxed);
        }
        result
    }

    fn generate(&mut self, job: &Job, interrupt: &CancellationToken) -> Result<Output, Failure> {
        let request = &job.request;
        let invalid = |error: PipelineError| Failure::Invalid(chain(&error));
        let (name, overrides) = &request.scheduler;
        let scheduler = scheduler_from_config(&self.scheduler, name.as_deref(), overrides);
        self.pipeline.scheduler = scheduler.map_err(|error| Failure::Invalid(chain(&error)))?;
        self.set_loras(&request.loras).map_err(invalid)?;

        let (preview, progress, metrics) = (&self.preview, &self.progress, &self.metrics);
        let abort = &self.abort;
        let on_step = |event: StepEvent<'_, B>| {
            metrics.steps.inc();
            let (step, steps) = (event.step + 1, event.steps);
            let latents = event.preview_latents();
            let wanted = preview.as_ref().filter(|_| request.previews);
            let preview = wanted.and_then(|preview| preview(latents));
            {
                let mut progress = lock(progress);
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
