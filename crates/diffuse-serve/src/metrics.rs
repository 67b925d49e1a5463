//! Numbers about the server, in Prometheus' text format.

use std::fmt::{Error, Write};

use prometheus_client::encoding::{
    EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text::encode,
};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::engine::{Failure, Output};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Outcome {
    Ok,
    Invalid,
    Cancelled,
    Failed,
}

impl EncodeLabelValue for Outcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), Error> {
        encoder.write_str(match self {
            Self::Ok => "ok",
            Self::Invalid => "invalid",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        })
    }
}

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    jobs: Family<Labels, Counter>,
    images: Counter,
    pub steps: Counter,
    pub rejected: Counter,
    pub seconds: Histogram,
    waiting: Gauge,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("diffuse");
        let bounds = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];
        let metrics = Self {
            jobs: Family::default(),
            images: Counter::default(),
            steps: Counter::default(),
            rejected: Counter::default(),
            seconds: Histogram::new(bounds),
            waiting: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register("jobs", "Requests that left the queue", metrics.jobs.clone());
        registry.register("images", "Images that were made", metrics.images.clone());
        registry.register("steps", "Steps that were computed", metrics.steps.clone());
        registry.register(
            "rejected",
            "Requests that found the queue full",
            metrics.rejected.clone(),
        );
        registry.register("job_seconds", "Time of a run", metrics.seconds.clone());
        registry.register(
            "queue_length",
            "Requests that wait",
            metrics.waiting.clone(),
        );
        // All are there from the beginning.
        for outcome in [
            Outcome::Ok,
            Outcome::Invalid,
            Outcome::Cancelled,
            Outcome::Failed,
        ] {
            drop(metrics.jobs.get_or_create(&Labels { outcome }));
        }
        Self {
            registry,
            ..metrics
        }
    }

    pub fn count(&self, result: &Result<Output, Failure>) {
        let outcome = match result {
            Ok(output) => {
                self.images.inc_by(output.images.len() as u64);
                Outcome::Ok
            }
            Err(Failure::Invalid(_)) => Outcome::Invalid,
            Err(Failure::Cancelled) => Outcome::Cancelled,
            Err(Failure::Busy { .. } | Failure::ShuttingDown) => Outcome::Failed,
        };
        self.jobs.get_or_create(&Labels { outcome }).inc();
    }

    pub fn text(&self, waiting: usize) -> String {
        self.waiting.set(i64::try_from(waiting).unwrap_or(i64::MAX));
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("a string can be written to");
        text
    }
}
