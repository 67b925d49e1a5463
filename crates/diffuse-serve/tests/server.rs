//! A server with a tiny model, and clients that are no better than they should be.

use std::io::{Cursor, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use burn_flex::Flex;
use diffuse_pipelines::schedulers::scheduler_from_config;
use diffuse_pipelines::{LatentRgb, StableDiffusionOptions, StableDiffusionPipeline};
use diffuse_serve::{ServeOptions, serve};
use diffuse_testing::reference;
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// The color of previews.
const PREVIEW: [u8; 3] = [1, 2, 3];
const GENERATIONS: &str = "/v1/images/generations";
const TXT2IMG: &str = "/sdapi/v1/txt2img";
const IMG2IMG: &str = "/sdapi/v1/img2img";

fn pipeline() -> StableDiffusionPipeline<Flex> {
    let folder = reference().join("sd/base");
    StableDiffusionPipeline::from_pretrained(folder, &Default::default()).unwrap()
}

/// A server that ends with the test.
struct Server {
    address: SocketAddr,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut ServeOptions)) -> Self {
        let mut options = ServeOptions {
            address: ([127, 0, 0, 1], 0).into(),
            model: "tiny".into(),
            defaults: StableDiffusionOptions {
                num_inference_steps: 2,
                ..StableDiffusionOptions::default()
            },
            ..ServeOptions::default()
        };
        options.limits.steps = 1000;
        // The model's own images have 64 x 64 pixels.
        options.limits.pixels = 512 * 512;
        change(&mut options);
        let stop = CancellationToken::new();
        let (sender, receiver) = mpsc::channel();
        let thread = thread::spawn({
            let stop = stop.clone();
            move || {
                // One color, whatever the latents are.
                let preview = LatentRgb {
                    factors: [[0.0; 3]; 4],
                    bias: PREVIEW.map(|level| f32::from(level) / 127.5 - 1.0),
                };
                let ready = |address| sender.send(address).unwrap();
                serve(pipeline(), Some(preview.into()), options, &stop, ready).unwrap();
            }
        });
        Self {
            address: receiver.recv_timeout(PATIENCE).unwrap(),
            stop,
            thread: Some(thread),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends a request, and leaves its response on the way.
    fn send(&self, head: &str, headers: &[(&str, &str)], body: &[u8]) -> TcpStream {
        let mut text = format!("{head} HTTP/1.1\r\nConnection: close\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            text.push_str("Host: localhost\r\n");
        }
        for (name, value) in headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str(&format!("Content-Length: {}\r\n\r\n", body.len()));
        let mut stream = self.connect();
        stream.write_all(text.as_bytes()).unwrap();
        // A request may be refused before all of it is sent.
        let _ = stream.write_all(body);
        stream
    }

    fn get(&self, path: &str) -> Response {
        Response::read(self.send(&format!("GET {path}"), &[], b""))
    }

    fn send_json(&self, path: &str, value: &Value) -> TcpStream {
        let kind = [("Content-Type", "application/json")];
        self.send(&format!("POST {path}"), &kind, value.to_string().as_bytes())
    }

    fn post(&self, path: &str, value: &Value) -> Response {
        Response::read(self.send_json(path, value))
    }

    fn post_text(&self, path: &str, text: &str) -> Response {
        let kind = [("Content-Type", "application/json")];
        Response::read(self.send(&format!("POST {path}"), &kind, text.as_bytes()))
    }

    fn post_form(&self, path: &str, parts: &[(&str, &[u8])]) -> Response {
        let mut body = Vec::new();
        for (name, value) in parts {
            body.extend(b"--limit\r\nContent-Disposition: form-data; name=\"");
            body.extend(name.as_bytes());
            body.extend(b"\"\r\n\r\n");
            body.extend(*value);
            body.extend(b"\r\n");
        }
        body.extend(b"--limit--\r\n");
        let kind = [("Content-Type", "multipart/form-data; boundary=limit")];
        Response::read(self.send(&format!("POST {path}"), &kind, &body))
    }

    /// A number of `/metrics`.
    fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let line = line.unwrap_or_else(|| panic!("{name} is not in\n{text}"));
        line.trim().parse().unwrap()
    }

    /// Waits until a number has grown so far.
    fn wait_for(&self, name: &str, least: u64) {
        let start = Instant::now();
        while self.metric(name) < least {
            assert!(start.elapsed() < PATIENCE, "{name} < {least}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the server, and waits for its end.
    fn end(&mut self) {
        self.stop.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

#[derive(Debug)]
struct Response {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Response {
    fn read(mut stream: TcpStream) -> Self {
        let mut bytes = Vec::new();
        match stream.read_to_end(&mut bytes) {
            Ok(_) => {}
            // The rest of a refused body was not read.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            Err(error) => panic!("{error}"),
        }
        let end = bytes.windows(4).position(|part| part == b"\r\n\r\n");
        let end = end.unwrap_or_else(|| panic!("{:?}", String::from_utf8_lossy(&bytes)));
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut body = bytes[end + 4..].to_vec();
        if head.contains("transfer-encoding: chunked") {
            body = unchunk(&body);
        }
        Self {
            status: head.split(' ').nth(1).unwrap().parse().unwrap(),
            head,
            body,
        }
    }

    fn header(&self, name: &str) -> Option<&str> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        let found = lines.find(|(other, _)| other.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value)
    }

    fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", self.text()))
    }

    #[track_caller]
    fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text());
        self.json()
    }
}

fn unchunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(end) = bytes.windows(2).position(|part| part == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16);
        let length = length.unwrap();
        body.extend(&bytes[end + 2..end + 2 + length]);
        bytes = &bytes[end + 4 + length..];
    }
    body
}

fn png(image: impl Into<DynamicImage>) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, ImageFormat::Png).unwrap();
    bytes.into_inner()
}

fn decoded(value: &Value) -> RgbImage {
    let bytes = STANDARD.decode(value.as_str().unwrap()).unwrap();
    image::load_from_memory(&bytes).unwrap().into_rgb8()
}

/// A request of one small image.
fn small() -> Value {
    json!({"prompt": "a boat", "size": "64x64", "seed": 3, "steps": 2})
}

/// A request that takes a while.
fn long() -> Value {
    json!({"prompt": "a boat", "size": "64x64", "seed": 3, "steps": 900})
}

fn unknown_scheduler(name: &str) -> String {
    let config = pipeline().scheduler.config().clone();
    let made = scheduler_from_config::<Flex>(&config, Some(name), &Default::default());
    made.err().unwrap().to_string()
}

fn openai_error(message: &str, param: Option<&str>) -> Value {
    let kind = "invalid_request_error";
    json!({"error": {"message": message, "type": kind, "param": param, "code": null}})
}

fn invalid(field: &str, message: &str) -> Value {
    json!({"detail": [{"loc": ["body", field], "msg": message, "type": "value_error"}]})
}

fn webui_error(error: &str, message: &str) -> Value {
    json!({"error": error, "detail": message, "body": "", "errors": message})
}

#[test]
fn images_are_those_of_the_pipeline() {
    let server = Server::start();
    let options = StableDiffusionOptions {
        prompt: vec!["a boat".into()],
        width: Some(64),
        height: Some(64),
        num_inference_steps: 2,
        num_images_per_prompt: 2,
        seeds: vec![3, 4],
        ..StableDiffusionOptions::default()
    };
    let expected = pipeline().generate(&options).unwrap().images;
    assert_ne!(expected[0], expected[1]);

    let mut request = small();
    request["n"] = 2.into();
    let answer = server.post(GENERATIONS, &request).ok();
    let images: Vec<_> = answer["data"].as_array().unwrap().iter().collect();
    let images: Vec<_> = images.iter().map(|it| decoded(&it["b64_json"])).collect();
    assert_eq!(images, expected);
    assert_eq!(answer["size"], "64x64");
    assert_eq!(answer["output_format"], "png");

    let request = json!({"prompt": "a boat", "width": 64, "height": 64, "seed": 3, "steps": 2,
        "cfg_scale": 7.5, "batch_size": 2, "alwayson_scripts": {}, "styles": null, "mask": null});
    let answer = server.post(TXT2IMG, &request).ok();
    let images: Vec<_> = answer["images"].as_array().unwrap().iter().collect();
    let images: Vec<_> = images.into_iter().map(decoded).collect();
    assert_eq!(images, expected);
    assert_eq!(answer["parameters"], request);
    let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["seed"], 3);
    assert_eq!(info["all_seeds"], json!([3, 4]));
    let text = format!(
        "a boat\nSteps: 2, Sampler: PNDMScheduler, CFG scale: 7.5, Seed: 4, Size: 64x64, \
         Model: tiny, Version: diffuse {}",
        env!("CARGO_PKG_VERSION")
    );
    assert_eq!(info["infotexts"][1], text.as_str());

    assert_eq!(server.metric("diffuse_images_total"), 4);
    assert_eq!(server.metric("diffuse_jobs_total{outcome=\"ok\"}"), 2);
    // Two steps of PNDM evaluate the model three times.
    assert_eq!(server.metric("diffuse_steps_total"), 6);
    assert_eq!(server.metric("diffuse_job_seconds_count"), 2);
    assert_eq!(server.metric("diffuse_queue_length"), 0);
}

#[test]
fn urls() {
    let server = Server::start();
    let mut request = small();
    request["response_format"] = "url".into();
    request["output_format"] = "webp".into();
    let answer = server.post(GENERATIONS, &request).ok();
    let url = answer["data"][0]["url"].as_str().unwrap().to_string();
    let path = url.strip_prefix("http://localhost").unwrap();
    let file = server.get(path);
    assert_eq!(file.header("Content-Type"), Some("image/webp"));
    let expected = server.post(GENERATIONS, &small()).ok();
    let expected = decoded(&expected["data"][0]["b64_json"]);
    assert_eq!(
        image::load_from_memory(&file.body).unwrap().into_rgb8(),
        expected
    );
    let missing = server.get("/images/none.png");
    assert_eq!(missing.status, 404);
    let message = "there is no such image, or not any more";
    assert_eq!(missing.json(), openai_error(message, None));
}

#[test]
fn streams() {
    let server = Server::start();
    let mut request = small();
    request["stream"] = true.into();
    request["partial_images"] = 2.into();
    request["steps"] = 4.into();
    let answer = server.post(GENERATIONS, &request);
    assert_eq!(answer.header("Content-Type"), Some("text/event-stream"));
    let text = answer.text();
    let events: Vec<(String, Value)> = text
        .split_terminator("\n\n")
        .map(|event| {
            let (name, data) = event.split_once('\n').unwrap();
            let data = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            (name.strip_prefix("event: ").unwrap().to_string(), data)
        })
        .collect();
    let names: Vec<&str> = events.iter().map(|(name, _)| name.as_str()).collect();
    let partial = "image_generation.partial_image";
    assert_eq!(names, [partial, partial, "image_generation.completed"]);
    for (index, (name, data)) in events.iter().enumerate() {
        assert_eq!(data["type"], name.as_str());
        let image = decoded(&data["b64_json"]);
        assert_eq!(image.dimensions(), (64, 64));
        if index < 2 {
            assert_eq!(data["partial_image_index"], index);
            assert_eq!(image, RgbImage::from_pixel(64, 64, Rgb(PREVIEW)));
        }
    }
    request["stream"] = false.into();
    let whole = server.post(GENERATIONS, &request).ok();
    assert_eq!(whole["data"][0]["b64_json"], events[2].1["b64_json"]);

    // What only the pipeline finds is an event, too.
    request["stream"] = true.into();
    request["size"] = "60x64".into();
    let text = server.post(GENERATIONS, &request).text();
    let message = "`height` and `width` have to be divisible by 8 and not zero, but `width` is 60";
    let mut data = openai_error(message, None);
    let error = data["error"].take();
    let expected = format!(
        "event: error\ndata: {}\n\n",
        json!({"type": "error", "error": error})
    );
    assert_eq!(text, expected);
}

#[test]
fn edits_and_variants() {
    let server = Server::start();
    let image = RgbImage::from_fn(64, 64, |x, y| Rgb([4 * x as u8, 4 * y as u8, 99]));
    let mut transparent = RgbaImage::from_pixel(64, 64, Rgba([0, 0, 0, 255]));
    let mut white = RgbImage::new(64, 64);
    for (x, y) in (0..32).flat_map(|x| (0..64).map(move |y| (x, y))) {
        transparent.put_pixel(x, y, Rgba([0, 0, 0, 0]));
        white.put_pixel(x, y, Rgb([255; 3]));
    }
    let (file, mask) = (png(image.clone()), png(transparent));
    let edit = |parts: &[(&str, &[u8])]| {
        let fields: [(&str, &[u8]); 3] = [("prompt", b"5"), ("seed", b"3"), ("steps", b"4")];
        let answer = server.post_form("/v1/images/edits", &[&fields, parts].concat());
        decoded(&answer.ok()["data"][0]["b64_json"])
    };
    let whole = edit(&[("image", &file)]);
    let part = edit(&[("image[]", &file), ("mask", &mask)]);
    assert_ne!(whole, part);

    // Other forms of base64: no padding, and lines.
    let lines: Vec<String> = STANDARD
        .encode(&file)
        .trim_end_matches('=')
        .as_bytes()
        .chunks(76)
        .map(|line| String::from_utf8(line.to_vec()).unwrap())
        .collect();
    let lines = lines.join("\r\n");
    let variant = |more: Value| {
        let mut request = json!({"prompt": "5", "seed": 3, "steps": 4, "cfg_scale": 7.5,
            "init_images": [format!("data:image/png;base64,{}", STANDARD.encode(&file))],
            "denoising_strength": 0.8});
        for (name, value) in more.as_object().unwrap() {
            request[name] = value.clone();
        }
        let answer = server.post(IMG2IMG, &request).ok();
        // It does not send back what it was sent.
        assert_eq!(answer["parameters"]["init_images"], Value::Null);
        decoded(&answer["images"][0])
    };
    assert_eq!(variant(json!({})), whole);
    assert_eq!(variant(json!({ "init_images": [lines] })), whole);
    let white = STANDARD.encode(png(white));
    let kept = variant(json!({ "mask": white }));
    // The half that is not repainted is kept to the byte here.
    for (x, y, pixel) in kept.enumerate_pixels().filter(|(x, _, _)| *x >= 32) {
        assert_eq!(pixel, image.get_pixel(x, y));
    }
    assert_ne!(kept.get_pixel(5, 5), image.get_pixel(5, 5));
    let inverted = variant(json!({"mask": white, "inpainting_mask_invert": 1}));
    assert_eq!(inverted.get_pixel(5, 5), image.get_pixel(5, 5));
    assert_ne!(inverted.get_pixel(50, 5), image.get_pixel(50, 5));
}

#[test]
fn refused_by_openai() {
    let server = Server::start();
    let with = |name: &str, value: Value| {
        let mut request = small();
        request[name] = value;
        request
    };
    let type_error = |field: &str, message: &str| format!("`{field}`: {message}");
    let cases = [
        (json!({}), Some("prompt"), "`prompt` is missing".into()),
        (with("n", 0.into()), Some("n"), "`n` is 0".into()),
        (
            with("n", 11.into()),
            Some("n"),
            "the number of images is 11, but at most 10 here".into(),
        ),
        (
            with("n", (-1).into()),
            Some("n"),
            type_error("n", "invalid value: integer `-1`, expected usize"),
        ),
        (
            with("prompt", json!(["a"])),
            Some("prompt"),
            type_error("prompt", "invalid type: sequence, expected a string"),
        ),
        (
            with("size", "0x64".into()),
            None,
            "an image of 0 x 64 has no pixels".into(),
        ),
        (
            with("size", "99999999x99999999".into()),
            None,
            "the number of pixels is 9999999800000001, but at most 262144 here".into(),
        ),
        (
            with("size", "64 by 64".into()),
            Some("size"),
            "`size` is `64 by 64`, not `auto` or as `512x512`".into(),
        ),
        (
            with("size", "12x64".into()),
            None,
            "`height` and `width` have to be divisible by 8 and not zero, but `width` is 12".into(),
        ),
        (
            with("steps", 1001.into()),
            None,
            "the number of steps is 1001, but at most 1000 here".into(),
        ),
        (
            with("prompt", "a".repeat(16385).into()),
            None,
            "the length of a prompt is 16385, but at most 16384 here".into(),
        ),
        (
            with("seed", json!(1e20)),
            Some("seed"),
            type_error("seed", "1e+20 is not a whole number below 2^64"),
        ),
        (
            with("seed", json!(1.5)),
            Some("seed"),
            type_error("seed", "1.5 is not a whole number below 2^64"),
        ),
        (
            with("response_format", "file".into()),
            Some("response_format"),
            "`response_format` is `file`, not `b64_json` or `url`".into(),
        ),
        (
            with("output_format", "gif".into()),
            Some("output_format"),
            "`output_format` is `gif`, not `png`, `jpeg` or `webp`".into(),
        ),
        (
            json!({"prompt": "a", "size": "16384x8", "output_format": "webp"}),
            Some("output_format"),
            "an image of 16384 x 8 is too large for `webp`: 16383 on each side at most".into(),
        ),
        (
            with("output_compression", 101.into()),
            Some("output_compression"),
            "`output_compression` has to be in 0..=100".into(),
        ),
        (
            with("partial_images", 4.into()),
            Some("partial_images"),
            "`partial_images` has to be in 0..=3".into(),
        ),
        (
            with("scheduler", "none".into()),
            Some("scheduler"),
            unknown_scheduler("none"),
        ),
        (json!([]), Some("prompt"), "`prompt` is missing".into()),
        (
            json!("a boat"),
            None,
            "invalid type: string \"a boat\", expected struct Fields".into(),
        ),
    ];
    for (request, param, message) in cases {
        let answer = server.post(GENERATIONS, &request);
        assert_eq!(answer.json(), openai_error(&message, param), "{request}");
        assert_eq!(answer.status, 400);
    }
    for (text, message) in [
        ("", "EOF while parsing a value at line 1 column 0"),
        ("{\"prompt\": NaN}", "expected value at line 1 column 12"),
        (
            "{\"guidance_scale\": 1e999}",
            "number out of range at line 1 column 24",
        ),
        (
            "{\"prompt\": \"\u{1}\"}",
            "control character (\\u0000-\\u001F) found while parsing a \
            string at line 1 column 13",
        ),
    ] {
        let answer = server.post_text(GENERATIONS, text);
        assert_eq!(answer.json(), openai_error(message, None));
        assert_eq!(answer.status, 400);
    }
    let kind = [("Content-Type", "text/plain")];
    let answer = Response::read(server.send(&format!("POST {GENERATIONS}"), &kind, b"{}"));
    let message = "the `Content-Type` has to be `application/json`";
    assert_eq!(answer.json(), openai_error(message, None));
    assert_eq!(answer.status, 415);

    let image = png(RgbImage::new(64, 64));
    let pixel = png(RgbImage::new(1, 1));
    let large = png(RgbImage::new(5000, 4000));
    let damaged = "it is not a PNG, JPEG or WebP image, or it is damaged";
    type Form<'a> = (&'a [(&'a str, &'a [u8])], Option<&'a str>, &'a str);
    let forms: [Form; 8] = [
        (&[("prompt", b"a")], Some("image"), "`image` is missing"),
        (&[("image", &image)], Some("prompt"), "`prompt` is missing"),
        (
            &[("prompt", b"a"), ("image", b"PNG")],
            Some("image"),
            damaged,
        ),
        (
            &[("prompt", b"a"), ("image", &image[..200])],
            Some("image"),
            damaged,
        ),
        (
            &[("prompt", b"a"), ("image", &large)],
            Some("image"),
            "an image of 5000 x 4000 is too large: 16777216 pixels at most",
        ),
        (
            &[("prompt", b"a"), ("image", &image), ("image", &image)],
            Some("image"),
            "one `image` is edited at a time",
        ),
        (
            &[("prompt", b"a"), ("image", &image), ("mask", &image)],
            Some("mask"),
            "a mask has transparent pixels where the image is to be repainted",
        ),
        (
            &[
                ("prompt", b"a"),
                ("image", &pixel),
                ("size", b"99999999x99999999"),
            ],
            Some("size"),
            "the number of pixels is 9999999800000001, but at most 262144 here",
        ),
    ];
    for (parts, param, message) in forms {
        let answer = server.post_form("/v1/images/edits", parts);
        assert_eq!(answer.json(), openai_error(message, param));
        assert_eq!(answer.status, 400);
    }
    let edits = "POST /v1/images/edits";
    for (kind, body, status, message) in [
        (
            "application/json",
            "{}",
            400,
            "Invalid `boundary` for `multipart/form-data` request",
        ),
        (
            "multipart/form-data; boundary=limit",
            "--limit\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n",
            400,
            "field \"a\" received with incomplete data",
        ),
    ] {
        let stream = server.send(edits, &[("Content-Type", kind)], body.as_bytes());
        let answer = Response::read(stream);
        assert_eq!(answer.json(), openai_error(message, None));
        assert_eq!(answer.status, status);
    }
    assert_eq!(server.metric("diffuse_jobs_total{outcome=\"ok\"}"), 0);
    assert_eq!(server.metric("diffuse_jobs_total{outcome=\"invalid\"}"), 1);
}

#[test]
fn refused_by_a1111() {
    let server = Server::start();
    let image = STANDARD.encode(png(RgbImage::new(64, 64)));
    let not_found = |message| (404, webui_error("Not Found", message));
    let wrong = |field, message: &str| (422, invalid(field, message));
    let cases = [
        (
            TXT2IMG,
            json!({"sampler_name": "none"}),
            not_found("Sampler not found"),
        ),
        (
            TXT2IMG,
            json!({"scheduler": "none"}),
            not_found("Scheduler not found"),
        ),
        (
            TXT2IMG,
            json!({"batch_size": 0}),
            wrong("batch_size", "`batch_size` or `n_iter` is 0"),
        ),
        (
            TXT2IMG,
            json!({"batch_size": u64::MAX, "n_iter": 2}),
            wrong(
                "batch_size",
                "the number of images is 18446744073709551615, but at most 10 here",
            ),
        ),
        (
            TXT2IMG,
            json!({"steps": "many"}),
            wrong(
                "steps",
                "`steps`: invalid type: string \"many\", expected usize",
            ),
        ),
        (
            TXT2IMG,
            json!({"width": 8000}),
            wrong(
                "",
                "the number of pixels is 512000, but at most 262144 here",
            ),
        ),
        (
            TXT2IMG,
            json!({"width": 64, "height": 64, "steps": 0}),
            wrong(
                "",
                "`num_inference_steps` is `0`, `PNDMScheduler` supports 1 to 1000 (`num_train_timesteps`)",
            ),
        ),
        (
            TXT2IMG,
            json!({"width": 64, "height": 64, "eta": -1}),
            wrong("", "`eta` is -1, but has to be in [0, 1]"),
        ),
        (
            IMG2IMG,
            json!({}),
            wrong("init_images", "0 images: one is expected"),
        ),
        (
            IMG2IMG,
            json!({"init_images": ["%"]}),
            wrong(
                "init_images",
                "it is not base64: Invalid symbol 37, offset 0.",
            ),
        ),
        (
            IMG2IMG,
            json!({"init_images": ["data:image/png,0"]}),
            wrong("init_images", "a `data:` URL has to be base64"),
        ),
        (
            IMG2IMG,
            json!({"init_images": [image], "width": 0}),
            wrong("width", "an image of 0 x 64 has no pixels"),
        ),
        (
            IMG2IMG,
            json!({"init_images": [image], "width": 4294967360_u64, "height": 64}),
            wrong(
                "width",
                "the number of pixels is 274877911040, but at most 262144 here",
            ),
        ),
        (
            IMG2IMG,
            json!({"init_images": [image], "denoising_strength": 2}),
            wrong("", "`strength` is 2, but has to be in [0, 1]"),
        ),
        (
            IMG2IMG,
            json!({"init_images": [image], "mask": image, "inpaint_full_res": true,
                "inpaint_full_res_padding": u32::MAX}),
            wrong("", "the mask is black: there is nothing to repaint"),
        ),
        (
            "/sdapi/v1/options",
            json!({"sd_model_checkpoint": "another"}),
            wrong(
                "sd_model_checkpoint",
                "there is no model `another`; there is `tiny`",
            ),
        ),
        (
            "/sdapi/v1/options",
            json!([]),
            wrong("", "invalid type: sequence, expected a map"),
        ),
        (
            "/sdapi/v1/none",
            json!({}),
            not_found("there is nothing here"),
        ),
    ];
    for (path, request, (status, expected)) in cases {
        let answer = server.post(path, &request);
        assert_eq!(answer.json(), expected, "{request}");
        assert_eq!(answer.status, status);
    }
    let answer = server.get("/sdapi/v1/progress?skip_current_image=maybe");
    let message = "it has to be `true` or `false`, once";
    assert_eq!(answer.json(), invalid("skip_current_image", message));
    assert_eq!(answer.status, 422);
    let answer = server.post("/sdapi/v1/options", &json!({"sd_model_checkpoint": false}));
    assert_eq!(
        answer.json(),
        invalid("sd_model_checkpoint", "it is not a string")
    );
    // What the server says are its options can be sent back.
    let options = server.get("/sdapi/v1/options").ok();
    assert_eq!(server.post("/sdapi/v1/options", &options).ok(), Value::Null);
}

#[test]
fn values_at_the_edge() {
    let server = Server::start();
    let webui = |name: &str, value: Value| {
        let mut request = json!({"width": 64, "height": 64, "steps": 1});
        request[name] = value;
        let answer = server.post(TXT2IMG, &request).ok();
        serde_json::from_str::<Value>(answer["info"].as_str().unwrap()).unwrap()
    };
    for seed in [0, 1 << 63, u64::MAX] {
        assert_eq!(webui("seed", seed.into())["seed"], seed);
    }
    let random = || webui("seed", (-1).into())["seed"].as_u64().unwrap();
    assert_ne!(random(), random());
    let last = json!({"seed": u64::MAX, "batch_size": 2});
    assert_eq!(webui("override_settings", Value::Null)["clip_skip"], 1);
    for (name, value) in last.as_object().unwrap() {
        webui(name, value.clone());
    }
    let skip = json!({"CLIP_stop_at_last_layers": 2});
    assert_eq!(webui("override_settings", skip)["clip_skip"], 2);
    let prompt = "ein Boot, 船, \u{1f6a2} \u{0}";
    assert_eq!(webui("prompt", prompt.into())["prompt"], prompt);

    for seed in [json!(-1), json!(null), json!(u64::MAX)] {
        let request = json!({"prompt": "", "size": "64x64", "seed": seed, "n": null, "user": 1});
        server.post(GENERATIONS, &request).ok();
    }
}

#[test]
fn lists() {
    let server = Server::start();
    let model = server.get("/v1/models").ok()["data"][0].clone();
    assert_eq!(model["id"], "tiny");
    assert_eq!(server.get("/v1/models/tiny").ok(), model);
    let missing = server.get("/v1/models/a/b");
    let message = "there is no model `a/b`; there is `tiny`";
    assert_eq!(missing.json(), openai_error(message, Some("model")));
    assert_eq!(missing.status, 404);

    let names = |path: &str| -> Vec<String> {
        let list = server.get(path).ok();
        let list = list.as_array().unwrap().iter();
        list.map(|item| item["name"].as_str().unwrap().to_string())
            .collect()
    };
    let samplers = names("/sdapi/v1/samplers");
    for name in &samplers {
        let request = json!({"sampler_name": name, "width": 64, "height": 64, "steps": 3});
        server.post(TXT2IMG, &request).ok();
    }
    assert!(
        samplers.iter().any(|name| name == "DPM++ 2M"),
        "{samplers:?}"
    );
    for name in names("/sdapi/v1/schedulers") {
        let request = json!({"sampler_name": "Euler", "scheduler": name,
            "width": 64, "height": 64, "steps": 3});
        server.post(TXT2IMG, &request).ok();
    }
    let paths = server.get("/openapi.json").ok()["paths"].clone();
    for (path, operations) in paths.as_object().unwrap() {
        if operations.get("get").is_some() && !path.contains('{') {
            assert_eq!(server.get(path).status, 200, "{path}");
        }
    }
}

#[test]
fn methods() {
    let server = Server::start();
    let wrong = server.get(GENERATIONS);
    let message = "this path does not take this method";
    assert_eq!(wrong.json(), openai_error(message, None));
    assert_eq!(wrong.status, 405);
    assert_eq!(wrong.header("Allow"), Some("POST"));
    let wrong = server.get(TXT2IMG);
    assert_eq!(wrong.json(), webui_error("Method Not Allowed", message));
    let head = Response::read(server.send("HEAD /healthz", &[], b""));
    assert_eq!((head.status, head.body.len()), (200, 0));
    let preflight = Response::read(server.send(&format!("OPTIONS {TXT2IMG}"), &[], b""));
    assert_eq!(preflight.status, 405);
    assert_eq!(preflight.header("Access-Control-Allow-Origin"), None);
}

#[test]
fn names_and_keys() {
    let server = Server::with(|options| options.key = Some("secret".into()));
    let get = |path: &str, headers: &[(&str, &str)]| {
        Response::read(server.send(&format!("GET {path}"), headers, b""))
    };
    let message = "the key is missing or wrong";
    let refused = get("/v1/models", &[("Authorization", "Bearer wrong")]);
    let mut expected = openai_error(message, None);
    expected["error"]["type"] = "authentication_error".into();
    assert_eq!(refused.json(), expected);
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header("WWW-Authenticate"), Some("Bearer"));
    let refused = get("/sdapi/v1/options", &[]);
    assert_eq!(refused.json(), webui_error("Unauthorized", message));
    assert_eq!(refused.status, 401);
    assert_eq!(get("/metrics", &[]).status, 401);
    assert_eq!(get("/healthz", &[]).status, 200);
    for key in [
        "Bearer secret",
        "bearer secret",
        "Basic YW55b25lOnNlY3JldA==",
    ] {
        assert_eq!(get("/v1/models", &[("Authorization", key)]).status, 200);
        assert_eq!(
            get("/sdapi/v1/options", &[("Authorization", key)]).status,
            200
        );
    }
    let refused = get("/healthz", &[("Host", "evil.example")]);
    let message = "this server does not have the name of the `Host` header; `--allow-host` gives \
        it one";
    assert_eq!(refused.json(), openai_error(message, None));
    assert_eq!(refused.status, 403);
    let refused = get("/sdapi/v1/options", &[("Origin", "https://evil.example")]);
    let message = "pages of other sites may not use this server";
    assert_eq!(refused.json(), webui_error("Forbidden", message));
    assert_eq!(refused.status, 403);
}

#[test]
fn large_bodies() {
    let server = Server::with(|options| options.limits.body = 100_000);
    let body = format!("{{\"prompt\": \"{}\"}}", "a".repeat(1_000_000));
    let answer = server.post_text(GENERATIONS, &body);
    let message = "the body is too large: at most 100000 bytes here";
    assert_eq!(answer.json(), openai_error(message, None));
    assert_eq!(answer.status, 413);
    let answer = server.post_text(TXT2IMG, &body);
    assert_eq!(answer.json(), webui_error("Payload Too Large", message));
    assert_eq!(answer.status, 413);
    let image = vec![0; 1_000_000];
    let answer = server.post_form("/v1/images/edits", &[("image", &image)]);
    assert_eq!(answer.json(), openai_error(message, None));
    assert_eq!(answer.status, 413);
}

#[test]
fn expect_continue() {
    let server = Server::start();
    let body = small().to_string();
    let mut stream = server.connect();
    let head = format!(
        "POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = [0; 25];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(body.as_bytes()).unwrap();
    Response::read(stream).ok();
}

#[test]
fn a_full_queue() {
    let server = Server::with(|options| options.queue = 1);
    let running = server.send_json(GENERATIONS, &long());
    server.wait_for("diffuse_steps_total", 1);
    let waiting = server.send_json(GENERATIONS, &long());
    server.wait_for("diffuse_queue_length", 1);
    let refused = server.post(GENERATIONS, &small());
    let mut expected = openai_error("the queue is full; try again in 1 s", None);
    expected["error"]["type"] = "rate_limit_error".into();
    assert_eq!(refused.json(), expected);
    assert_eq!(refused.status, 429);
    assert_eq!(refused.header("Retry-After"), Some("1"));
    let refused = server.post(TXT2IMG, &json!({}));
    let message = "the queue is full; try again in 1 s";
    assert_eq!(refused.json(), webui_error("Too Many Requests", message));
    assert_eq!(refused.status, 429);
    assert_eq!(server.metric("diffuse_rejected_total"), 2);

    // The place of a client that leaves is free at once.
    drop(waiting);
    server.wait_for("diffuse_jobs_total{outcome=\"cancelled\"}", 1);
    assert_eq!(server.metric("diffuse_queue_length"), 0);
    let waiting = server.send_json(GENERATIONS, &small());
    server.wait_for("diffuse_queue_length", 1);
    // So is the model, when the client of the run leaves.
    drop(running);
    Response::read(waiting).ok();
    assert_eq!(
        server.metric("diffuse_jobs_total{outcome=\"cancelled\"}"),
        2
    );
    assert_eq!(server.metric("diffuse_jobs_total{outcome=\"ok\"}"), 1);
    assert!(server.metric("diffuse_steps_total") < 900);
}

#[test]
fn leaving_a_stream() {
    let server = Server::start();
    let mut request = long();
    request["stream"] = true.into();
    let mut running = server.send_json(GENERATIONS, &request);
    // Its headers are there at once.
    let mut start = [0; 15];
    running.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"HTTP/1.1 200 OK");
    server.wait_for("diffuse_steps_total", 1);
    let waiting = server.send_json(GENERATIONS, &request);
    server.wait_for("diffuse_queue_length", 1);
    drop((running, waiting));
    server.wait_for("diffuse_jobs_total{outcome=\"cancelled\"}", 2);
    assert!(server.metric("diffuse_steps_total") < 900);
    server.post(GENERATIONS, &small()).ok();
}

#[test]
fn progress_and_interrupt() {
    let server = Server::start();
    let idle = server.get("/sdapi/v1/progress").ok();
    assert_eq!(
        (&idle["progress"], &idle["state"]["job_count"]),
        (&json!(0.0), &json!(0))
    );
    let request = json!({"prompt": "a", "width": 64, "height": 64, "steps": 900});
    let running = server.send_json(TXT2IMG, &request);
    server.wait_for("diffuse_steps_total", 1);
    let waiting = server.send_json(GENERATIONS, &small());
    server.wait_for("diffuse_queue_length", 1);
    let progress = server
        .get("/sdapi/v1/progress?skip_current_image=False")
        .ok();
    assert_eq!(progress["state"]["job_count"], 2);
    assert!(progress["progress"].as_f64().unwrap() > 0.0);
    assert!(progress["current_image"].is_string());
    let progress = server
        .get("/sdapi/v1/progress?skip_current_image=true")
        .ok();
    assert!(progress["current_image"].is_null());
    server.post("/sdapi/v1/interrupt", &json!({})).ok();
    // Its client gets the image as it is.
    let answer = Response::read(running).ok();
    let info: Value = serde_json::from_str(answer["info"].as_str().unwrap()).unwrap();
    assert_eq!(info["interrupted"], true);
    assert_eq!(decoded(&answer["images"][0]).dimensions(), (64, 64));
    Response::read(waiting).ok();
    assert!(server.metric("diffuse_steps_total") < 900);
}

#[test]
fn the_end_waits_for_the_run() {
    let mut server = Server::start();
    let mut request = small();
    request["steps"] = 100.into();
    request["stream"] = true.into();
    let running = server.send_json(GENERATIONS, &request);
    server.wait_for("diffuse_steps_total", 1);
    let waiting = server.send_json(GENERATIONS, &small());
    let streaming = server.send_json(GENERATIONS, &request);
    server.wait_for("diffuse_queue_length", 2);
    // Connections without a request, and with half of one, do not keep it.
    let idle = server.connect();
    server.stop.cancel();
    let refused = Response::read(waiting);
    let mut expected = openai_error("the server shuts down", None);
    expected["error"]["type"] = "server_error".into();
    assert_eq!(refused.json(), expected);
    assert_eq!(refused.status, 503);
    let text = Response::read(streaming).text();
    let error = expected["error"].take();
    let data = json!({"type": "error", "error": error});
    assert_eq!(text, format!("event: error\ndata: {data}\n\n"));
    let text = Response::read(running).text();
    assert!(
        text.starts_with("event: image_generation.completed\n"),
        "{text}"
    );
    let start = Instant::now();
    server.end();
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(idle);
}

#[test]
fn the_end_does_not_wait_for_ever() {
    let mut server = Server::with(|options| options.grace = Duration::from_millis(200));
    let running = server.send_json(GENERATIONS, &long());
    server.wait_for("diffuse_steps_total", 1);
    // One that never comes to the end of its headers.
    let mut slow = server.connect();
    slow.write_all(b"GET /healthz HTTP/1.1\r\nHost: loc")
        .unwrap();
    let start = Instant::now();
    server.end();
    assert!(start.elapsed() < Duration::from_secs(3));
    let answer = Response::read(running);
    assert_eq!(answer.status, 503);
}

#[test]
fn health() {
    let server = Server::start();
    assert_eq!(server.get("/healthz").text(), "ok\n");
    assert_eq!(server.get("/readyz").text(), "ready\n");
    // A server that ends still answers who is connected.
    let mut stream = server.connect();
    stream
        .write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n")
        .unwrap();
    thread::sleep(Duration::from_millis(50));
    server.stop.cancel();
    thread::sleep(Duration::from_millis(50));
    stream.write_all(b"\r\n").unwrap();
    let answer = Response::read(stream);
    assert_eq!(
        (answer.status, answer.text()),
        (503, "shutting down\n".into())
    );
}
