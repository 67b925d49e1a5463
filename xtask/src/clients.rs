//! `cargo xtask clients`: runs real clients, which are Python packages, against `diffuse serve`.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::arguments::Arguments;
use crate::{cargo, root, run, target};

/// The scripts in `xtask/clients`, in their order.
const SCRIPTS: [&str; 5] = [
    "openai_images.py",
    "webui.py",
    "applications.py",
    "schema.py",
    "stress.py",
];

const USAGE: &str = "usage: cargo xtask clients [--python PYTHON] [--program FILE] [SCRIPT ...]";

pub fn run_all(arguments: &[String]) -> Result<()> {
    let arguments = Arguments::parse(arguments, &["python", "program"])?;
    let wanted: Vec<&str> = arguments.positional.iter().map(String::as_str).collect();
    if let Some(unknown) = wanted.iter().find(|name| !SCRIPTS.contains(name)) {
        bail!(
            "there is no script `{unknown}`; there are {}\n\n{USAGE}",
            SCRIPTS.join(", ")
        );
    }
    let program = match arguments.get("program") {
        Some(program) => PathBuf::from(program),
        None => {
            run(cargo().args(["build", "--release", "--package", "diffuse-cli"]))?;
            target().join("release/diffuse")
        }
    };
    for script in SCRIPTS {
        if wanted.is_empty() || wanted.contains(&script) {
            say!("{script}");
            let python = arguments.get("python").unwrap_or("python3");
            let script = root().join("xtask/clients").join(script);
            run(Command::new(python).arg(script).arg(&program))?;
        }
    }
    Ok(())
}
