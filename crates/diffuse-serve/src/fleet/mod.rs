//! Many workers behind one queue, on NATS JetStream
//! (<https://docs.nats.io/nats-concepts/jetstream>).
//!
//! A front server puts requests into a stream as they came; workers answer them with the same
//! handlers as a single server, and store the answers.
//!
//! - The stream is a work queue: a job is leased to one worker, which extends the lease while steps
//!   go on. A job of a worker that is gone is leased to another.
//! - A worker stores the answer first, and acknowledges the job then. If it is gone in between, the
//!   job is done again: answers are created only if there is none, and the seed is part of the job,
//!   so that the answer is the same.
//! - A job that was leased too often (it ends its workers) gets an answer that says so.

mod front;
mod worker;

use std::time::Duration;

use async_nats::jetstream::consumer::{self, PullConsumer};
use async_nats::jetstream::object_store::{self, ObjectStore};
use async_nats::jetstream::stream::{self, DiscardPolicy, RetentionPolicy};
use async_nats::jetstream::{self, Context, kv};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;

pub use front::serve_queue;
pub use worker::work;

/// Where the queue is.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    /// The NATS server: `nats://host:4222`.
    pub url: String,
    /// Jobs that may wait; more are refused with 429.
    pub length: usize,
    /// How long a worker may be silent before its job goes to another.
    pub lease: Duration,
    /// How often a job is tried before it is given up.
    pub attempts: usize,
    /// How long answers are kept.
    pub keep: Duration,
}

impl FleetOptions {
    /// A queue on a NATS server: 1000 jobs, leases of 30 s, 5 attempts, answers kept for a day.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            length: 1000,
            lease: Duration::from_secs(30),
            attempts: 5,
            keep: Duration::from_secs(24 * 3600),
        }
    }
}

const JOBS: &str = "DIFFUSE_JOBS";
const RESULTS: &str = "DIFFUSE_RESULTS";
const CANCELLED: &str = "DIFFUSE_CANCELLED";
const BODIES: &str = "DIFFUSE_BODIES";

/// Headers of a job.
const ID: &str = "Diffuse-Id";
const PATH: &str = "Diffuse-Path";
const CONTENT_TYPE: &str = "Content-Type";
/// The name of the object that the body is in, if it is large.
const BODY: &str = "Diffuse-Body";

/// Bodies up to this size are part of the message; NATS's own limit is 1 MB by default.
const SMALL: usize = 512 << 10;

/// An answer, without its body.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Answer {
    status: u16,
    content_type: String,
    /// The object that the body is in.
    object: String,
    /// What answered: version, operating system and processor of the worker, on which the bits of
    /// an image may depend.
    worker: String,
}

/// The stream and the stores.
struct Fleet {
    context: Context,
    jobs: stream::Stream,
    results: kv::Store,
    cancelled: kv::Store,
    bodies: ObjectStore,
}

type Error = Box<dyn std::error::Error + Send + Sync>;

impl Fleet {
    /// Connects, and makes what is not there yet.
    async fn connect(options: &FleetOptions) -> Result<Self, Error> {
        let client = async_nats::ConnectOptions::new()
            .connect(&options.url)
            .await?;
        let context = jetstream::new(client);
        let jobs = context
            .get_or_create_stream(stream::Config {
                name: JOBS.into(),
                subjects: vec!["diffuse.jobs.>".into()],
                retention: RetentionPolicy::WorkQueue,
                discard: DiscardPolicy::New,
                max_messages: options.length as i64,
                ..stream::Config::default()
            })
            .await?;
        let store = async |bucket: &str| match context.get_key_value(bucket).await {
            Ok(store) => Ok::<_, Error>(store),
            Err(_) => {
                let config = kv::Config {
                    bucket: bucket.into(),
                    max_age: options.keep,
                    ..kv::Config::default()
                };
                Ok(context.create_key_value(config).await?)
            }
        };
        let bodies = match context.get_object_store(BODIES).await {
            Ok(store) => store,
            Err(_) => {
                let config = object_store::Config {
                    bucket: BODIES.into(),
                    max_age: options.keep,
                    ..object_store::Config::default()
                };
                context.create_object_store(config).await?
            }
        };
        Ok(Self {
            results: store(RESULTS).await?,
            cancelled: store(CANCELLED).await?,
            context,
            jobs,
            bodies,
        })
    }

    /// The jobs of a model.
    async fn consumer(&self, model: &str, options: &FleetOptions) -> Result<PullConsumer, Error> {
        let name = format!("workers-{}", token(model));
        let config = consumer::pull::Config {
            durable_name: Some(name.clone()),
            filter_subject: subject(model),
            ack_wait: options.lease,
            ..consumer::pull::Config::default()
        };
        Ok(self.jobs.get_or_create_consumer(&name, config).await?)
    }

    async fn read_body(&self, name: &str) -> Result<Vec<u8>, Error> {
        let mut object = self.bodies.get(name).await?;
        let mut bytes = Vec::new();
        object.read_to_end(&mut bytes).await?;
        Ok(bytes)
    }

    async fn write_body(&self, name: &str, mut bytes: &[u8]) -> Result<(), Error> {
        self.bodies.put(name, &mut bytes).await?;
        Ok(())
    }
}

/// The subject of a model's jobs.
fn subject(model: &str) -> String {
    format!("diffuse.jobs.{}", token(model))
}

/// A name as a part of a subject.
fn token(name: &str) -> String {
    let part = |c: char| {
        if c.is_ascii_alphanumeric() || c == '-' {
            c
        } else {
            '_'
        }
    };
    name.chars().map(part).collect()
}

/// Runs an operation until it succeeds: the server may be away for a while.
async fn retry<T>(mut operation: impl AsyncFnMut() -> Result<T, Error>) -> T {
    let mut pause = Duration::from_millis(100);
    loop {
        match operation().await {
            Ok(result) => return result,
            Err(error) => log::warn!("the queue does not answer: {error}"),
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(Duration::from_secs(5));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_models_are_parts_of_subjects() {
        assert_eq!(
            subject("CompVis/stable-diffusion-v1.4"),
            "diffuse.jobs.CompVis_stable-diffusion-v1_4"
        );
    }
}
