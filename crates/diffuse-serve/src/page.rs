//! The page of the server.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures_util::stream;
use serde_json::{Value, json};

use crate::App;
use crate::a1111::{self, Fields};
use crate::engine::Event;
use crate::images::{Format, encode, to_base64};

/// The page's files, and what only the page asks for.
pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route(
            "/",
            get(|| async { file("text/html", include_str!("page/index.html")) }),
        )
        .route(
            "/page.js",
            get(|| async { file("text/javascript", include_str!("page/page.js")) }),
        )
        .route(
            "/page.css",
            get(|| async { file("text/css", include_str!("page/page.css")) }),
        )
        .route("/internal/v1/info", get(info))
        .route("/internal/v1/generate", post(generate))
}

fn file(kind: &'static str, text: &'static str) -> Response {
    let kind = HeaderValue::from_static(kind);
    let policy = HeaderValue::from_static(
        "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    );
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, policy),
    ];
    (headers, text).into_response()
}

/// `GET /internal/v1/info`: the model, and the defaults and limits of requests.
async fn info(State(app): State<Arc<App>>) -> Json<Value> {
    let (model, limits) = (&app.model, &app.limits);
    Json(json!({
        "model": model.name,
        "scheduler": model.scheduler,
        "size": model.size,
        "steps": app.defaults.num_inference_steps,
        "guidance_scale": app.defaults.guidance_scale,
        "limits": {"pixels": limits.pixels, "steps": limits.steps, "images": limits.images},
    }))
}

/// `POST /internal/v1/generate`: AUTOMATIC1111's fields, answered by a line of JSON for each step
/// of this request, and at the end its answer, or `error`.
///
/// `/sdapi/v1/progress` would show the run that computes now, which may be another client's.
async fn generate(State(app): State<Arc<App>>, request: Request) -> Response {
    let request = match a1111::read_request(&app, request, Fields::task).await {
        Ok((request, _, _)) => request,
        Err(response) => return response,
    };
    let task = Arc::new(request.task.clone());
    let running = match app.queue.submit(request) {
        Ok(running) => running,
        Err(failure) => return a1111::failed(&failure),
    };
    // The last line ends the stream. Dropping the stream cancels the request.
    let lines = stream::unfold(Some(running), move |running| {
        let (app, task) = (app.clone(), task.clone());
        async move {
            let mut running = running?;
            let (value, running) = match running.next().await {
                Event::Step {
                    step,
                    steps,
                    preview,
                } => {
                    let encode = |image: &_| to_base64(&encode(image, Format::Png, ""));
                    let preview = preview.map(|preview| encode(&preview.image));
                    let value = json!({"step": step, "steps": steps, "preview": preview});
                    (value, Some(running))
                }
                Event::Finished(Ok(output)) => {
                    let value = a1111::answer(&app, &task, output, Value::Null, true).await;
                    (value, None)
                }
                Event::Finished(Err(failure)) => (json!({"error": failure.to_string()}), None),
            };
            Some((Ok::<_, Infallible>(format!("{value}\n")), running))
        }
    });
    let kind = HeaderValue::from_static("application/jsonl");
    ([(header::CONTENT_TYPE, kind)], Body::from_stream(lines)).into_response()
}
