//! A worker: takes jobs from the queue, one at a time.

use std::sync::Arc;
use std::thread;

use async_nats::jetstream::kv::CreateErrorKind;
use async_nats::jetstream::{AckKind, Message};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{Request, StatusCode, header};
use burn::tensor::backend::Backend;
use diffuse_pipelines::{LatentPreview, StableDiffusionPipeline};
use futures_util::StreamExt;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

use super::{Answer, BODY, CONTENT_TYPE, Error, Fleet, FleetOptions, ID, PATH, retry};
use crate::engine::{Engine, check_scheduler};
use crate::{App, Model, ServeError, ServeOptions};

/// Answers the jobs of a queue until SIGINT, SIGTERM or until `stop` is cancelled; the job that it
/// works on is finished. The calling thread computes.
///
/// # Errors
/// If the queue cannot be reached at the start.
pub fn work<B: Backend>(
    pipeline: StableDiffusionPipeline<B>,
    preview: Option<LatentPreview<B>>,
    options: ServeOptions,
    fleet: FleetOptions,
    stop: &CancellationToken,
    on_ready: impl FnOnce(),
) -> Result<(), ServeError> {
    let runtime = crate::runtime()?;
    let connected = runtime.block_on(Fleet::connect(&fleet));
    let connected = connected.map_err(|source| ServeError::Queue {
        url: fleet.url.clone(),
        source,
    })?;
    let model = Model::of(&options.model, &pipeline);
    let abort = CancellationToken::new();
    let check_scheduler = check_scheduler::<B>(pipeline.scheduler.config().clone());
    let (engine, queue) = Engine::new(pipeline, preview, 1, abort.clone());
    let app = Arc::new(App::new(
        queue,
        check_scheduler,
        ([127, 0, 0, 1], 0).into(),
        model,
        ServeOptions {
            key: None,
            ..options
        },
    ));
    let stop = stop.clone();
    let server = thread::spawn(move || {
        runtime.block_on(async {
            let worker = Worker {
                router: crate::router(app.clone()),
                app,
                fleet: connected,
                options: fleet,
                name: format!(
                    "diffuse {} {} {}",
                    env!("CARGO_PKG_VERSION"),
                    std::env::consts::OS,
                    std::env::consts::ARCH
                ),
            };
            crate::stop_on_signals(&stop, &abort);
            worker.run(stop).await;
            worker.app.queue.close();
        });
        runtime.shutdown_background();
    });
    on_ready();
    engine.run();
    let _ = server.join();
    Ok(())
}

struct Worker {
    router: Router,
    app: Arc<App>,
    fleet: Fleet,
    options: FleetOptions,
    name: String,
}

impl Worker {
    async fn run(&self, stop: CancellationToken) {
        let model = self.app.model.name.clone();
        while !stop.is_cancelled() {
            let consumer = retry(async || self.fleet.consumer(&model, &self.options).await);
            let consumer = tokio::select! {
                () = stop.cancelled() => return,
                consumer = consumer => consumer,
            };
            let next = async {
                let batch = consumer.fetch().max_messages(1);
                let mut messages = batch
                    .expires(std::time::Duration::from_secs(5))
                    .messages()
                    .await?;
                messages.next().await.transpose()
            };
            let message = tokio::select! {
                () = stop.cancelled() => return,
                message = next => message,
            };
            match message {
                Ok(Some(message)) => self.handle(&message).await,
                Ok(None) => {}
                Err(error) => {
                    log::warn!("the queue does not answer: {error}");
                    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
                }
            }
        }
    }

    async fn handle(&self, message: &Message) {
        let header = |name: &str| {
            let headers = message.headers.as_ref();
            headers
                .and_then(|headers| headers.get(name))
                .map(ToString::to_string)
        };
        let (Some(id), Some(path)) = (header(ID), header(PATH)) else {
            log::warn!("a job without an id or a path is thrown away");
            let _ = message.ack_with(AckKind::Term).await;
            return;
        };
        let delivered = message.info().map_or(1, |info| info.delivered);
        if self.is_known(&self.fleet.results, &id).await {
            let _ = message.double_ack().await;
            return;
        }
        let kind = header(CONTENT_TYPE).unwrap_or_default();
        let attempts = self.options.attempts as i64;
        let (status, kind, body) = if delivered > attempts {
            let text = format!("the job was given up after {attempts} attempts");
            let error = serde_json::json!({"error": {"message": text, "type": "server_error"}});
            (
                500,
                "application/json".to_string(),
                error.to_string().into_bytes(),
            )
        } else if self.is_known(&self.fleet.cancelled, &id).await {
            (499, "text/plain".into(), b"cancelled".to_vec())
        } else {
            match self.answer(message, &id, &path, &kind, header(BODY)).await {
                Some(answer) => answer,
                None => return,
            }
        };
        // Each attempt has an object of its own: the one that is named by the answer counts.
        let answer = Answer {
            status,
            content_type: kind,
            object: format!("{id}-{delivered}-{}", std::process::id()),
            worker: self.name.clone(),
        };
        retry(async || self.store(&id, &answer, &body).await).await;
        if let Err(error) = message.double_ack().await {
            // It will be leased again, and found to have its answer.
            log::warn!("job {id} could not be acknowledged: {error}");
        }
        if let Some(name) = header(BODY) {
            let _ = self.fleet.bodies.delete(&name).await;
        }
    }

    /// Runs the job. Nothing, if it is given back or was cancelled meanwhile.
    async fn answer(
        &self,
        message: &Message,
        id: &str,
        path: &str,
        kind: &str,
        object: Option<String>,
    ) -> Option<(u16, String, Vec<u8>)> {
        let body = match object {
            None => message.payload.to_vec(),
            Some(name) => match self.fleet.read_body(&name).await {
                Ok(body) => body,
                Err(error) => {
                    log::warn!("the body of job {id} cannot be read: {error}");
                    let _ = message
                        .ack_with(AckKind::Nak(Some(self.options.lease)))
                        .await;
                    return None;
                }
            },
        };
        let request = Request::post(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, kind)
            .body(Body::from(body));
        let Ok(request) = request else {
            return Some((400, "text/plain".into(), b"the path is not valid".to_vec()));
        };
        let run = async {
            let response = self.router.clone().oneshot(request).await;
            let response = response.unwrap_or_else(|never| match never {});
            let kind = response.headers().get(header::CONTENT_TYPE).cloned();
            let kind = kind.and_then(|kind| Some(kind.to_str().ok()?.to_string()));
            let status = response.status();
            let body = to_bytes(response.into_body(), usize::MAX).await;
            (
                status,
                kind.unwrap_or_default(),
                body.unwrap_or_default().to_vec(),
            )
        };
        let mut run = std::pin::pin!(run);
        let mut beat = tokio::time::interval(self.options.lease / 4);
        let mut seen = usize::MAX;
        loop {
            tokio::select! {
                (status, kind, body) = &mut run => {
                    let busy = StatusCode::TOO_MANY_REQUESTS;
                    if status == busy || status == StatusCode::SERVICE_UNAVAILABLE {
                        // Another worker can do it.
                        let _ = message.ack_with(AckKind::Nak(None)).await;
                        return None;
                    }
                    return Some((status.as_u16(), kind, body));
                }
                _ = beat.tick() => {
                    // A run that hangs loses its lease.
                    let step = self.app.queue.progress().1.step;
                    if step != seen {
                        seen = step;
                        let _ = message.ack_with(AckKind::Progress).await;
                    }
                    if self.is_known(&self.fleet.cancelled, id).await {
                        return Some((499, "text/plain".into(), b"cancelled".to_vec()));
                    }
                }
            }
        }
    }

    async fn is_known(&self, store: &async_nats::jetstream::kv::Store, id: &str) -> bool {
        matches!(store.get(id).await, Ok(Some(_)))
    }

    /// Stores an answer, if there is none yet.
    async fn store(&self, id: &str, answer: &Answer, body: &[u8]) -> Result<(), Error> {
        self.fleet.write_body(&answer.object, body).await?;
        let value = serde_json::to_vec(answer)?;
        match self.fleet.results.create(id, value.into()).await {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == CreateErrorKind::AlreadyExists => {
                // Perhaps by an attempt of this call whose answer was lost.
                let known = self.fleet.results.get(id).await?;
                let own = known.and_then(|value| serde_json::from_slice::<Answer>(&value).ok());
                if own.as_ref() != Some(answer) {
                    let _ = self.fleet.bodies.delete(&answer.object).await;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }
}
