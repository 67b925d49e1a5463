//! `cargo xtask clients`: runs real clients, which are Python packages, against `diffuse serve`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::arguments::Arguments;
use crate::{cargo, root, run, target, web};

/// The scripts in `xtask/clients`, in their order.
const SCRIPTS: [&str; 5] = [
    "openai_images.py",
    "webui.py",
    "applications.py",
    "schema.py",
    "stress.py",
];

/// Scripts that run only by name: `page.py` and `web.py` need a browser, `web.py` the target
/// `wasm32-unknown-unknown`, `fleet.py` a program with the feature `fleet`.
const ONLY_BY_NAME: [&str; 3] = ["page.py", "web.py", "fleet.py"];

const USAGE: &str = "usage: cargo xtask clients [--python PYTHON] [--program FILE] [SCRIPT ...]";

pub fn run_all(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse(arguments, &["python", "program"])?;
    let wanted: Vec<&str> = arguments.positional.iter().map(String::as_str).collect();
    let all = [&SCRIPTS[..], &ONLY_BY_NAME].concat();
    if let Some(unknown) = wanted.iter().find(|name| !all.contains(name)) {
        bail!(
            "there is no script `{unknown}`; there are {}\n\n{USAGE}",
            all.join(", ")
        );
    }
    let program = match arguments.get("program") {
        Some(program) => PathBuf::from(program),
        None => {
            run(cargo().args(["build", "--release", "--package", "diffuse-cli"]))?;
            target().join("release/diffuse")
        }
    };
    let scripts = if wanted.is_empty() {
        SCRIPTS.to_vec()
    } else {
        wanted
    };
    for script in scripts {
        say!("{script}");
        let python = arguments.get("python").unwrap_or("python3");
        let path = root().join("xtask/clients").join(script);
        let mut command = Command::new(python);
        command.arg(path).arg(&program);
        match script {
            "page.py" => command.arg(target().join("page")),
            "web.py" => command.arg(web::build(false)?).arg(target().join("page")),
            _ => &mut command,
        };
        run(&mut command)?;
    }
    Ok(())
}
