//! `cargo xtask web`: the page that computes in the browser, as a folder for any static server.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use flate2::{Compression, write::GzEncoder};

use crate::{cargo, output, root, target};

const TARGET: &str = "wasm32-unknown-unknown";
/// The program's name, as that of its files.
const NAME: &str = "diffuse_web";
/// The most bytes of the folder, without and with WebGPU.
const MAX_BYTES: [u64; 2] = [16_000_000, 20_000_000];
/// Settings that make the program smaller, and not slower: those packages take little of the time.
const SMALL: [(&str, &str); 6] = [
    ("burn-backend", "opt-level='s'"),
    ("burn-flex", "opt-level='s'"),
    ("gemm-f16", "opt-level='s'"),
    ("regex-automata", "opt-level='s'"),
    ("tokenizers", "opt-level='s'"),
    ("diffuse-web", "codegen-units=1"),
];
/// Files of the page. The style is that of the server's page.
const PAGE: [&str; 4] = [
    "crates/diffuse-web/page/index.html",
    "crates/diffuse-web/page/page.js",
    "crates/diffuse-web/page/worker.js",
    "crates/diffuse-serve/src/page/page.css",
];

pub fn run(arguments: &[String]) -> Result<()> {
    let (mut open, mut webgpu) = (false, false);
    for argument in arguments {
        match argument.as_str() {
            "--open" => open = true,
            "--webgpu" => webgpu = true,
            _ => bail!("usage: cargo xtask web [--open] [--webgpu]"),
        }
    }
    let folder = build(webgpu)?;
    if open {
        serve(&folder)?;
    }
    Ok(())
}

/// Checks that the libraries compile for browsers, or says that there is no compiler.
pub fn check() -> Result<()> {
    match Toolchain::find() {
        Some(toolchain) => [false, true]
            .into_iter()
            .try_for_each(|webgpu| crate::run(toolchain.cargo("check", webgpu).arg("--quiet"))),
        None => {
            say!("the target {TARGET} is not installed: the page is not checked");
            Ok(())
        }
    }
}

/// Builds the folder; with `webgpu` the page can compute on the visitor's GPU.
pub fn build(webgpu: bool) -> Result<PathBuf> {
    let Some(toolchain) = Toolchain::find() else {
        bail!(
            "the target {TARGET} is not installed: run `rustup target add {TARGET}` or, with \
             Debian's Rust, `apt-get install rustc-web cargo-web rust-web-src rust-web-llvm lld-22`"
        );
    };
    let mut command = toolchain.cargo("build", webgpu);
    for (package, setting) in SMALL {
        let setting = format!("profile.release.package.{package}.{setting}");
        command.args(["--config", &setting]);
    }
    crate::run(&mut command)?;
    let program = target().join(TARGET).join("release");
    let program = program.join(NAME).with_extension("wasm");
    let folder = target().join("web");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    crate::run(
        Command::new(wasm_bindgen()?)
            .args([
                "--target",
                "web",
                "--no-typescript",
                "--remove-name-section",
                "--out-dir",
            ])
            .args([&folder, &program]),
    )?;
    compress(&folder)?;
    for page in PAGE.map(|page| root().join(page)) {
        let name = page.file_name().expect("a file");
        fs::copy(&page, folder.join(name))?;
    }
    let mut bytes = 0;
    for entry in fs::read_dir(&folder)? {
        bytes += entry?.metadata()?.len();
    }
    say!("{}: {:.1} MB", folder.display(), bytes as f64 / 1e6);
    let most = MAX_BYTES[usize::from(webgpu)];
    if bytes > most {
        bail!("the page has {bytes} bytes, more than {most}");
    }
    Ok(folder)
}

/// Replaces the program by a compressed one, which the page decompresses: few servers compress
/// files. Its name ends in nothing that a server might have its own idea of.
fn compress(folder: &Path) -> Result<()> {
    let program = folder.join(format!("{NAME}_bg.wasm"));
    let compressed = fs::File::create(folder.join(format!("{NAME}.bin")))?;
    let mut encoder = GzEncoder::new(compressed, Compression::best());
    encoder.write_all(&fs::read(&program)?)?;
    encoder.finish()?;
    Ok(fs::remove_file(program)?)
}

/// A compiler for browsers.
struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    /// Whether it has only the source of the standard library, which is then built, too.
    builds_std: bool,
}

impl Toolchain {
    /// The running toolchain if it has the target or the source of the standard library, else the
    /// distribution's.
    fn find() -> Option<Self> {
        let own = std::env::var_os("CARGO").map(PathBuf::from);
        let own = own.map(|cargo| (cargo.with_file_name("rustc"), cargo));
        let distribution = ("/usr/bin/rustc".into(), "/usr/bin/cargo".into());
        let mut found = own.into_iter().chain([distribution]);
        found.find_map(|(rustc, cargo): (PathBuf, PathBuf)| {
            let sysroot = output(Command::new(&rustc).args(["--print", "sysroot"])).ok()?;
            let rustlib = Path::new(sysroot.trim()).join("lib/rustlib");
            let has_target = rustlib.join(TARGET).join("lib").is_dir();
            let has_source = rustlib.join("src/rust/library/Cargo.lock").is_file();
            (has_target || has_source).then_some(Self {
                cargo,
                rustc,
                builds_std: !has_target,
            })
        })
    }

    /// A command of cargo on the page's program.
    fn cargo(&self, command: &str, webgpu: bool) -> Command {
        let mut cargo = Command::new(&self.cargo);
        cargo
            .current_dir(root())
            .env("RUSTC", &self.rustc)
            .args([command, "--release", "--package", "diffuse-web"])
            .args(["--target", TARGET]);
        if webgpu {
            cargo.args(["--features", "webgpu"]);
        }
        if self.builds_std {
            // Cargo's name for what only development versions take.
            cargo
                .env("RUSTC_BOOTSTRAP", "1")
                .arg("-Zbuild-std=std,panic_abort");
        }
        cargo
    }
}

/// wasm-bindgen's program, of the version of the library: the installed one, or one that is built
/// in the target folder.
fn wasm_bindgen() -> Result<PathBuf> {
    let lock: toml::Table = fs::read_to_string(root().join("Cargo.lock"))?.parse()?;
    let packages = lock["package"].as_array().into_iter().flatten();
    let version = packages
        .filter(|package| package["name"].as_str() == Some("wasm-bindgen"))
        .find_map(|package| package["version"].as_str())
        .context("`Cargo.lock` has no `wasm-bindgen`")?;
    let tools = target().join("tools");
    let own = tools.join("bin/wasm-bindgen");
    let is_fit = |program: &Path| {
        let found = output(Command::new(program).arg("--version"));
        found.is_ok_and(|found| found.trim() == format!("wasm-bindgen {version}"))
    };
    let programs = [PathBuf::from("wasm-bindgen"), own.clone()];
    if let Some(program) = programs.into_iter().find(|program| is_fit(program)) {
        return Ok(program);
    }
    say!(
        "installing wasm-bindgen-cli {version} in {}",
        tools.display()
    );
    crate::run(
        cargo()
            .args(["install", "wasm-bindgen-cli", "--force"])
            .args(["--version", version])
            .arg("--root")
            .arg(&tools),
    )
    .with_context(|| format!("wasm-bindgen-cli {version} is needed and cannot be installed"))?;
    Ok(own)
}

/// Serves the folder on loopback, and opens it in the browser.
fn serve(folder: &Path) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("cannot listen on loopback")?;
    let address = format!("http://{}", listener.local_addr()?);
    say!("{address}, until Ctrl+C");
    let opener = if cfg!(target_os = "macos") {
        "open"
    } else if cfg!(windows) {
        "explorer"
    } else {
        "xdg-open"
    };
    let opened = Command::new(opener)
        .arg(&address)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    if opened.is_err() {
        say!("`{opener}` cannot be run: open the address in a browser");
    }
    for stream in listener.incoming() {
        let folder = folder.to_path_buf();
        // A browser that leaves is no error.
        thread::spawn(move || stream.and_then(|stream| answer(stream, &folder)));
    }
    Ok(())
}

/// Answers one request.
fn answer(mut stream: TcpStream, folder: &Path) -> io::Result<()> {
    // Browsers open connections that they do not use.
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut request = String::new();
    let mut lines = BufReader::new(&stream);
    lines.read_line(&mut request)?;
    let mut header = String::new();
    while lines.read_line(&mut header)? > 2 {
        header.clear();
    }
    let path = request.split(' ').nth(1).unwrap_or_default();
    let name = match path.trim_start_matches('/') {
        "" => "index.html",
        name => name,
    };
    // Only names of files in the folder, which has no others.
    let file = fs::read_dir(folder)?
        .flatten()
        .find(|entry| entry.file_name() == *name);
    let (status, kind, body) = match file {
        Some(file) => ("200 OK", media_type(name), fs::read(file.path())?),
        None => ("404 Not Found", "text/plain", b"not found".to_vec()),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
         Cache-Control: no-store\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(&body)
}

fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("wasm") => "application/wasm",
        _ => "application/octet-stream",
    }
}
