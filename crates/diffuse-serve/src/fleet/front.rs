//! A server without a model, which puts requests into the queue and waits for their answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap as NatsHeaders;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use diffuse_pipelines::random_seed;
use futures_util::StreamExt;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{Answer, BODY, CONTENT_TYPE, Error, Fleet, FleetOptions, ID, PATH, SMALL, subject};
use crate::engine::Queue;
use crate::{App, Model, ServeError, ServeOptions};

/// Answers requests through the workers of a queue, until SIGINT, SIGTERM or until `stop` is
/// cancelled. `on_ready` gets the address.
///
/// A request with the header `Idempotency-Key` is done once: if it is sent again with the same key,
/// it gets the same answer.
///
/// # Errors
/// If the address cannot be listened on, or the queue cannot be reached at the start.
pub fn serve_queue(
    options: ServeOptions,
    fleet: FleetOptions,
    stop: &CancellationToken,
    on_ready: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let runtime = crate::runtime()?;
    runtime.block_on(async {
        let connected = Fleet::connect(&fleet)
            .await
            .map_err(|source| ServeError::Queue {
                url: fleet.url.clone(),
                source,
            })?;
        let address = options.address;
        let listen = |source| ServeError::Listen { address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let grace = options.grace;
        let body = options.limits.body;
        let app = Arc::new(App::new(
            Queue::of_nothing(),
            // The workers check it.
            Box::new(|_| Ok(())),
            address,
            Model::new(&options.model),
            options,
        ));
        let front = Arc::new(Front {
            fleet: connected,
            subject: subject(&app.model.name),
        });
        let jobs = [
            "/v1/images/generations",
            "/v1/images/edits",
            "/sdapi/v1/txt2img",
            "/sdapi/v1/img2img",
            "/internal/v1/generate",
        ];
        let forwarded = jobs.iter().fold(axum::Router::new(), |router, path| {
            router.route(path, post(forward))
        });
        let forwarded = forwarded
            .layer(axum::extract::DefaultBodyLimit::max(body))
            .layer(axum::middleware::from_fn_with_state(
                app.clone(),
                crate::access::check,
            ))
            .with_state(front);
        let rest = crate::router(app.clone());
        let router = forwarded.fallback_service(rest);
        on_ready(address);
        crate::run(
            listener,
            router,
            app,
            stop.clone(),
            CancellationToken::new(),
            grace,
        )
        .await;
        Ok(())
    })
}

struct Front {
    fleet: Fleet,
    subject: String,
}

/// Marks a job as cancelled when its client leaves.
struct Cancel {
    front: Arc<Front>,
    id: Option<String>,
}

impl Drop for Cancel {
    fn drop(&mut self) {
        let Some(id) = self.id.take() else { return };
        let front = self.front.clone();
        tokio::spawn(async move {
            let _ = front.fleet.cancelled.put(&id, Bytes::new()).await;
        });
    }
}

async fn forward(
    State(front): State<Arc<Front>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let path = uri.path();
    let fail = |status: StatusCode, message: &str| {
        if path.starts_with("/v1/") {
            crate::openai::error(status, message, None)
        } else {
            crate::a1111::error(status, message)
        }
    };
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let kind = text("content-type").unwrap_or_default().to_string();
    let key = text("idempotency-key");
    let id = match key {
        Some(key) => hash(&[key.as_bytes(), path.as_bytes(), &body]),
        None => hash(
            &[random_seed().to_le_bytes(), random_seed().to_le_bytes()].map(|bytes| bytes.to_vec()),
        ),
    };
    let body = with_seed(body, &id);
    let mut cancel = Cancel {
        front: front.clone(),
        id: Some(id.clone()),
    };
    let answer = front.answer(&id, path, &kind, body).await;
    if answer.is_ok() || key.is_some() {
        cancel.id = None;
    }
    match answer {
        Ok((answer, body)) => {
            let status = StatusCode::from_u16(answer.status);
            let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            let mut response = Response::new(Body::from(body));
            *response.status_mut() = status;
            if let Ok(kind) = HeaderValue::from_str(&answer.content_type) {
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
            }
            response.into_response()
        }
        Err(Refused::Full) => {
            let message = "the queue is full; try again in 5 s";
            let mut response = fail(StatusCode::TOO_MANY_REQUESTS, message);
            response.headers_mut().insert(header::RETRY_AFTER, 5.into());
            response
        }
        Err(Refused::Failed(error)) => {
            log::warn!("a job could not be queued: {error}");
            fail(StatusCode::SERVICE_UNAVAILABLE, "the queue does not answer")
        }
    }
}

enum Refused {
    Full,
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl Front {
    async fn answer(
        &self,
        id: &str,
        path: &str,
        kind: &str,
        body: Bytes,
    ) -> Result<(Answer, Vec<u8>), Refused> {
        let known = self.fleet.results.get(id).await?;
        if known.is_none() {
            self.publish(id, path, kind, body).await?;
        }
        let answer = self.wait(id).await;
        let body = self.fleet.read_body(&answer.object).await?;
        Ok((answer, body))
    }

    async fn publish(&self, id: &str, path: &str, kind: &str, body: Bytes) -> Result<(), Refused> {
        let mut headers = NatsHeaders::new();
        // A message that is sent twice within two minutes is stored once.
        headers.insert("Nats-Msg-Id", id);
        headers.insert(ID, id);
        headers.insert(PATH, path);
        headers.insert(CONTENT_TYPE, kind);
        let payload = if body.len() <= SMALL {
            body
        } else {
            self.fleet.write_body(id, &body).await?;
            headers.insert(BODY, id);
            Bytes::new()
        };
        let subject = self.subject.clone();
        let sent = self
            .fleet
            .context
            .publish_with_headers(subject, headers, payload)
            .await?;
        match sent.await {
            Ok(_) => Ok(()),
            Err(error) if format!("{error:?}").contains("maximum messages exceeded") => {
                Err(Refused::Full)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for an answer; the server may be away meanwhile.
    async fn wait(&self, id: &str) -> Answer {
        let parse = |value: &[u8]| serde_json::from_slice::<Answer>(value).ok();
        loop {
            let watched = async {
                let mut watch = self.fleet.results.watch_with_history(id).await.ok()?;
                while let Some(entry) = watch.next().await {
                    if let Some(answer) = entry.ok().and_then(|entry| parse(&entry.value)) {
                        return Some(answer);
                    }
                }
                None
            };
            // A watch may have lost its server without a word.
            match tokio::time::timeout(Duration::from_secs(5), watched).await {
                Ok(Some(answer)) => return answer,
                Ok(None) => tokio::time::sleep(Duration::from_millis(200)).await,
                Err(_) => {}
            }
        }
    }
}

/// A JSON body with a seed: a job that is done again has to give the same images.
fn with_seed(body: Bytes, id: &str) -> Bytes {
    let Ok(Value::Object(mut values)) = serde_json::from_slice(&body) else {
        return body;
    };
    let given = values.get("seed").and_then(Value::as_i64);
    if given.is_none_or(|seed| seed < 0) && !values.get("seed").is_some_and(Value::is_u64) {
        let seed = u32::from_str_radix(&id[..8], 16).unwrap_or_default();
        values.insert("seed".into(), seed.into());
    }
    serde_json::to_vec(&values).map_or(body, Bytes::from)
}

/// A name of 128 bits.
fn hash<T: AsRef<[u8]>>(parts: &[T]) -> String {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let digest = hasher.finalize();
    digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_have_seeds() {
        let id = hash(&[b"a"]);
        let seed = u32::from_str_radix(&id[..8], 16).unwrap();
        let check = |body: &str, expected: &str| {
            let body = with_seed(Bytes::copy_from_slice(body.as_bytes()), &id);
            assert_eq!(String::from_utf8_lossy(&body), expected);
        };
        check(r#"{"seed":5}"#, r#"{"seed":5}"#);
        check(
            r#"{"seed":18446744073709551615}"#,
            r#"{"seed":18446744073709551615}"#,
        );
        for without in ["{}", r#"{"seed":-1}"#, r#"{"seed":null}"#] {
            check(without, &format!(r#"{{"seed":{seed}}}"#));
        }
        check("not json", "not json");
    }
}
