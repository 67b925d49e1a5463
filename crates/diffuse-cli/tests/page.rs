//! What the server answers to its page alone.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Stdio};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use diffuse_testing::reference;
use serde_json::{Value, json};

/// A server with the built-in model, which ends with it.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(options: &[&str]) -> Self {
        let serve = ["serve", "--listen", "127.0.0.1:0"];
        let mut command = common::diffuse(&[&serve, options].concat());
        let mut process = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let output = process.stdout.as_mut().unwrap();
        BufReader::new(output).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").unwrap().to_string();
        Self { process, address }
    }

    /// Status and body of an answer.
    fn request(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        // HTTP/1.0: the connection's end is the body's.
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_string())
    }

    fn generate(&self, fields: &Value) -> Vec<Value> {
        let (status, body) = self.request("POST", "/internal/v1/generate", &fields.to_string());
        assert_eq!(status, 200, "{body}");
        let lines = body.lines().map(|line| serde_json::from_str(line).unwrap());
        lines.collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_page_is_answered() {
    let server = Server::start(&[]);
    let (status, body) = server.request("GET", "/internal/v1/info", "");
    assert_eq!(status, 200);
    let expected = json!({
        "model": "scenes",
        "scheduler": "PNDMScheduler",
        "size": [128, 128],
        "steps": 25,
        "guidance_scale": 2.0,
        "limits": {"pixels": 1_048_576, "steps": 150, "images": 10},
    });
    assert_eq!(serde_json::from_str::<Value>(&body).unwrap(), expected);

    // A line for each step, and A1111's answer.
    let fields = json!({"prompt": "a boat", "steps": 3, "seed": 5, "sampler_name": "DDIM"});
    let mut lines = server.generate(&fields);
    let last = lines.pop().unwrap();
    let steps = lines.iter().map(|line| (&line["step"], &line["steps"]));
    let steps: Vec<String> = steps
        .map(|(step, steps)| format!("{step}/{steps}"))
        .collect();
    assert_eq!(steps, ["1/3", "2/3", "3/3"]);
    let (status, body) = server.request("POST", "/sdapi/v1/txt2img", &fields.to_string());
    assert_eq!(status, 200, "{body}");
    let mut answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(answer["images"].as_array().unwrap().len(), 1);
    // The page knows what it asked for.
    answer["parameters"] = Value::Null;
    assert_eq!(last, answer);

    // The image is the start, if there is one.
    let start = json!({"init_images": [answer["images"][0]], "denoising_strength": 0.5});
    let mut fields = fields;
    fields
        .as_object_mut()
        .unwrap()
        .extend(start.as_object().unwrap().clone());
    let lines = server.generate(&fields);
    assert_eq!((lines.len(), &lines[0]["steps"]), (2, &json!(1)));

    // What is found wrong at once is refused; what the run finds is a line.
    let (status, body) = server.request("POST", "/internal/v1/generate", r#"{"steps": 151}"#);
    let message = "the number of steps is 151, but at most 150 here";
    let error = json!([{"loc": ["body", ""], "msg": message, "type": "value_error"}]);
    assert_eq!(status, 422);
    assert_eq!(
        serde_json::from_str::<Value>(&body).unwrap(),
        json!({ "detail": error })
    );
    let lines = server.generate(&json!({"prompt": "a boat", "width": 12}));
    let message = "`height` and `width` have to be divisible by 8 and not zero, but `width` is 12";
    assert_eq!(lines, [json!({ "error": message })]);
}

#[test]
fn previews_have_the_size_of_what_makes_them() {
    let check = |options: &[&str], size: u32| {
        let server = Server::start(options);
        let lines = server.generate(&json!({"prompt": "a boat", "steps": 1, "seed": 5}));
        let preview = STANDARD.decode(lines[0]["preview"].as_str().unwrap());
        let preview = image::load_from_memory(&preview.unwrap()).unwrap();
        assert_eq!(
            [preview.width(), preview.height()],
            [size; 2],
            "{options:?}"
        );
    };
    check(&[], 16);
    let tiny = reference().join("autoencoders/tiny");
    check(&["--preview-vae", tiny.to_str().unwrap()], 128);
}
