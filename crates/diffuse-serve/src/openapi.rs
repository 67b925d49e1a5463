//! The description of both APIs: `GET /openapi.json`, in the form of OpenAPI 3.1.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Map, Value, json};

use crate::{App, Limits};

/// `GET /openapi.json`
pub async fn openapi(State(app): State<Arc<App>>) -> Json<Value> {
    Json(document(&app.limits, app.access.key.is_some()))
}

/// The document of a server with these limits.
pub fn document(limits: &Limits, has_key: bool) -> Value {
    let mut paths = Map::new();
    let mut add = |path: &str, operations: Value| paths.insert(path.into(), operations);
    add_openai(&mut add);
    add_a1111(&mut add);
    add_server(&mut add);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "diffuse",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Images of Stable Diffusion, by OpenAI's images API and by the part of \
                AUTOMATIC1111's API that its clients use. Fields that are not listed are ignored.",
            "license": {"name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": schemas(limits),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "basic": {
                    "type": "http",
                    "scheme": "basic",
                    "description": "the key as the password of any user",
                },
            },
        },
        "security": match has_key {
            true => json!([{"bearer": []}, {"basic": []}]),
            false => json!([]),
        },
    })
}

fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

fn content(kind: &str, schema: Value) -> Value {
    let mut content = Map::new();
    content.insert(kind.into(), json!({ "schema": schema }));
    content.into()
}

fn json_body(schema: &str) -> Value {
    json!({"required": true, "content": content("application/json", reference(schema))})
}

/// Responses with this success, and all errors in the form of an API.
fn responses(success: Value, error: &str) -> Value {
    let failure = |description: &str| {
        json!({
            "description": description,
            "content": content("application/json", reference(error)),
        })
    };
    let mut busy = failure("The queue is full.");
    busy["headers"] = json!({"Retry-After": {
        "description": "Seconds.",
        "schema": {"type": "integer", "minimum": 1},
    }});
    json!({
        "200": success,
        "400": failure("The request makes no sense."),
        "401": failure("The key is missing or wrong."),
        "403": failure("The `Host` or the `Origin` is not the server's."),
        "404": failure("There is no such thing."),
        "408": failure("The body took too long."),
        "413": failure("The body is too large."),
        "415": failure("The body has another type."),
        "422": failure("The request makes no sense."),
        "429": busy,
        "503": failure("The server shuts down."),
    })
}

/// An operation without a body.
fn plain(summary: &str, success: Value, error: &str) -> Value {
    json!({"summary": summary, "responses": responses(success, error)})
}

fn returns(schema: Value) -> Value {
    json!({"description": "Done.", "content": content("application/json", schema)})
}

fn parameter(name: &str, place: &str, schema: Value) -> Value {
    json!({"name": name, "in": place, "required": place == "path", "schema": schema})
}

fn add_openai(add: &mut impl FnMut(&str, Value) -> Option<Value>) {
    let images = json!({
        "description": "Images, or with `stream` events of the type `*.partial_image`, \
            `*.completed` or `error`.",
        "content": {
            "application/json": {"schema": reference("Images")},
            "text/event-stream": {"schema": {
                "type": "object",
                "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
            }},
        },
    });
    add(
        "/v1/images/generations",
        json!({"post": {
            "summary": "Make images of a text",
            "requestBody": json_body("Generation"),
            "responses": responses(images.clone(), "OpenAIError"),
        }}),
    );
    add(
        "/v1/images/edits",
        json!({"post": {
            "summary": "Make variants of an image, or repaint the transparent part of a mask",
            "requestBody": {
                "required": true,
                "content": content("multipart/form-data", reference("Edit")),
            },
            "responses": responses(images, "OpenAIError"),
        }}),
    );
    let models = returns(reference("Models"));
    add(
        "/v1/models",
        json!({"get": plain("List the model", models, "OpenAIError")}),
    );
    let mut model = plain(
        "Describe a model",
        returns(reference("Model")),
        "OpenAIError",
    );
    model["parameters"] = json!([parameter("id", "path", json!({"type": "string"}))]);
    add("/v1/models/{id}", json!({ "get": model }));
    let mut image = plain(
        "An image that a response named by its URL, for an hour",
        json!({"description": "The file.", "content": {
            "image/png": {"schema": {}}, "image/jpeg": {"schema": {}}, "image/webp": {"schema": {}},
        }}),
        "OpenAIError",
    );
    image["parameters"] = json!([parameter("name", "path", json!({"type": "string"}))]);
    image["security"] = json!([]);
    add("/images/{name}", json!({ "get": image }));
}

fn add_a1111(add: &mut impl FnMut(&str, Value) -> Option<Value>) {
    let error = "WebUIError";
    let run = |summary: &str, schema: &str| {
        json!({"post": {
            "summary": summary,
            "requestBody": json_body(schema),
            "responses": responses(returns(reference("WebUIImages")), error),
        }})
    };
    add("/sdapi/v1/txt2img", run("Make images of a text", "Txt2img"));
    let summary = "Make variants of an image, or repaint the white part of a mask";
    add("/sdapi/v1/img2img", run(summary, "Img2img"));
    let mut progress = plain(
        "What the run that computes now has come to",
        returns(reference("Progress")),
        error,
    );
    let name = "skip_current_image";
    progress["parameters"] = json!([parameter(name, "query", json!({"type": "boolean"}))]);
    add("/sdapi/v1/progress", json!({ "get": progress }));
    let done = || returns(json!({"type": "object"}));
    let interrupt = plain("End the run that computes now early", done(), error);
    add("/sdapi/v1/interrupt", json!({ "post": interrupt }));
    add("/sdapi/v1/skip", json!({ "post": interrupt }));
    let set = json!({
        "summary": "Accept the settings that the server has",
        "requestBody": json_body("Options"),
        "responses": responses(returns(json!({"type": "null"})), error),
    });
    let get = plain("The settings", returns(reference("Options")), error);
    add("/sdapi/v1/options", json!({"get": get, "post": set}));
    let list = |item: Value| returns(json!({"type": "array", "items": item}));
    let named = || {
        list(json!({
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        }))
    };
    let model = json!({
        "type": "object",
        "properties": {"title": {"type": "string"}, "model_name": {"type": "string"}},
        "required": ["title", "model_name"],
    });
    for (path, summary, success) in [
        ("samplers", "Names of schedulers", named()),
        ("schedulers", "Names of sigma schedules", named()),
        ("sd-models", "The model", list(model)),
        ("loras", "The LoRAs of the server's folder", named()),
        ("upscalers", "None", named()),
        ("latent-upscale-modes", "None", named()),
        ("sd-vae", "None", named()),
        ("sd-modules", "None", named()),
        ("script-info", "None", named()),
        ("scripts", "None", done()),
        ("embeddings", "None", done()),
        ("cmd-flags", "None", done()),
    ] {
        let operation = json!({"get": plain(summary, success, error)});
        add(&format!("/sdapi/v1/{path}"), operation);
    }
}

fn add_server(add: &mut impl FnMut(&str, Value) -> Option<Value>) {
    let file = |summary: &str, kind: &str| {
        let success = json!({
            "description": "Done.",
            "content": content(kind, json!({"type": "string"})),
        });
        plain(summary, success, "OpenAIError")
    };
    let open = |mut operation: Value| {
        operation["security"] = json!([]);
        json!({ "get": operation })
    };
    add("/", open(file("The page", "text/html")));
    add(
        "/page.js",
        open(file("The page's program", "text/javascript")),
    );
    add("/page.css", open(file("The page's style", "text/css")));
    let health = file("Whether the process answers", "text/plain");
    add("/healthz", open(health));
    let mut ready = file("Whether the server takes requests", "text/plain");
    ready["responses"]["503"] = json!({
        "description": "The server shuts down.",
        "content": content("text/plain", json!({"type": "string"})),
    });
    add("/readyz", open(ready));
    let metrics = file("Numbers for Prometheus", "application/openmetrics-text");
    add("/metrics", json!({ "get": metrics }));
    let this = returns(json!({"type": "object"}));
    let this = plain("This document", this, "OpenAIError");
    add("/openapi.json", open(this));
}

/// A value of a type, or null as if it were not there.
fn or_null(kind: &str, more: Value) -> Value {
    let mut schema = json!({"type": [kind, "null"]});
    if let (Value::Object(schema), Value::Object(more)) = (&mut schema, more) {
        schema.extend(more);
    }
    schema
}

fn count(most: usize) -> Value {
    or_null("integer", json!({"minimum": 1, "maximum": most}))
}

fn schemas(limits: &Limits) -> Value {
    let text = || or_null("string", json!({}));
    let prompt = json!({"type": "string", "maxLength": limits.prompt});
    let seed = or_null(
        "integer",
        json!({
            "minimum": i64::MIN,
            "maximum": u64::MAX,
            "description": "That of the first image; negative is random.",
        }),
    );
    let ratio = || or_null("number", json!({"minimum": 0, "maximum": 1}));
    let side = || {
        let description = "A multiple of 8.";
        or_null(
            "integer",
            json!({"minimum": 8, "maximum": limits.pixels / 8, "description": description}),
        )
    };
    let one_of = |names: &[&str]| {
        let mut names: Vec<Value> = names.iter().map(|name| json!(name)).collect();
        names.push(Value::Null);
        json!({ "enum": names })
    };
    let generation = json!({
        "prompt": prompt,
        "n": count(limits.images),
        "size": or_null("string", json!({
            "pattern": "^(auto|\\+?[0-9]+x\\+?[0-9]+)$",
            "description": "`auto`, or as `512x512`: multiples of 8.",
        })),
        "response_format": one_of(&["b64_json", "url"]),
        "output_format": one_of(&["png", "jpeg", "webp"]),
        "output_compression": or_null("integer", json!({"minimum": 0, "maximum": 100})),
        "stream": or_null("boolean", json!({})),
        "partial_images": or_null("integer", json!({"minimum": 0, "maximum": 3})),
        "seed": seed,
        "steps": count(limits.steps),
        "guidance_scale": or_null("number", json!({})),
        "negative_prompt": text(),
        "scheduler": text(),
    });
    let mut edit = generation.clone();
    edit["image"] = json!({"type": "string", "format": "binary"});
    edit["mask"] = json!({"type": "string", "format": "binary"});
    edit["strength"] = ratio();
    let txt2img = json!({
        "prompt": text(),
        "negative_prompt": text(),
        "seed": seed,
        "steps": count(limits.steps),
        "cfg_scale": or_null("number", json!({})),
        "width": side(),
        "height": side(),
        "batch_size": count(limits.images),
        "n_iter": count(limits.images),
        "sampler_name": text(),
        "sampler_index": text(),
        "scheduler": text(),
        "eta": ratio(),
        "clip_skip": or_null("integer", json!({"minimum": 0})),
        "override_settings": or_null("object", json!({})),
        "send_images": or_null("boolean", json!({})),
    });
    let mut img2img = txt2img.clone();
    for (name, schema) in [
        ("denoising_strength", ratio()),
        (
            "init_images",
            json!({"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 1}),
        ),
        ("mask", text()),
        ("inpainting_mask_invert", json!({})),
        ("inpaint_full_res", json!({})),
        (
            "inpaint_full_res_padding",
            or_null("integer", json!({"minimum": 0, "maximum": u32::MAX})),
        ),
    ] {
        img2img[name] = schema;
    }
    let object = |properties: Value, required: &[&str]| json!({"type": "object", "properties": properties, "required": required});
    let string = || json!({"type": "string"});
    let number = || json!({"type": "number"});
    let image = json!({"b64_json": string(), "url": string()});
    let error = json!({
        "message": string(),
        "type": string(),
        "param": text(),
        "code": {"type": "null"},
    });
    let error = object(error, &["message", "type", "param", "code"]);
    let model = json!({
        "id": string(),
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": string(),
    });
    json!({
        "Generation": object(generation, &["prompt"]),
        "Edit": object(edit, &["prompt", "image"]),
        "Images": object(
            json!({
                "created": {"type": "integer"},
                "data": {"type": "array", "items": object(image, &[])},
                "output_format": string(),
                "size": string(),
            }),
            &["created", "data"],
        ),
        "Model": object(model, &["id", "object", "created", "owned_by"]),
        "Models": object(
            json!({
                "object": {"const": "list"},
                "data": {"type": "array", "items": reference("Model")},
            }),
            &["object", "data"],
        ),
        "OpenAIError": object(json!({ "error": error }), &["error"]),
        "Txt2img": object(txt2img, &[]),
        "Img2img": object(img2img, &["init_images"]),
        "WebUIImages": object(
            json!({
                "images": {"type": "array", "items": string()},
                "parameters": {"type": "object"},
                "info": {"type": "string", "description": "An object as JSON."},
            }),
            &["images", "parameters", "info"],
        ),
        "Progress": object(
            json!({
                "progress": number(),
                "eta_relative": number(),
                "state": {"type": "object"},
                "current_image": text(),
                "textinfo": text(),
            }),
            &["progress", "eta_relative", "state"],
        ),
        "Options": object(json!({"sd_model_checkpoint": text()}), &[]),
        "WebUIError": object(json!({"detail": {}}), &["detail"]),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The paths that a source file routes.
    fn routed(source: &'static str) -> impl Iterator<Item = String> {
        let parts = source.split(".route(").skip(1);
        parts.map(|part| {
            let path = part.split('"').nth(1).unwrap();
            path.replace("{*", "{")
        })
    }

    #[test]
    fn every_route_is_described() {
        let routes = routed(include_str!("lib.rs")).chain(routed(include_str!("page.rs")));
        // What only the page asks for may change at any time.
        let public = routes.filter(|path| !path.starts_with("/internal/"));
        let routes: BTreeSet<String> = public.collect();
        assert!(routes.len() > 20);
        let document = document(&Limits::default(), true);
        let paths = document["paths"].as_object().unwrap();
        assert_eq!(routes, paths.keys().cloned().collect());
    }

    /// Each `$ref` has its schema.
    #[test]
    fn references() {
        let document = document(&Limits::default(), false);
        let text = document.to_string();
        let names = text.split("#/components/schemas/").skip(1);
        for name in names.map(|rest| rest.split('"').next().unwrap()) {
            assert!(
                document["components"]["schemas"].get(name).is_some(),
                "{name}"
            );
        }
    }
}
