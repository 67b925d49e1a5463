//! The page of the server.

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::App;

/// The page's files.
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
