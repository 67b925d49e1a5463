//! Writes the built-in models as folders, `FOLDER/scenes` and `FOLDER/scenes-ddpm`, and the LoRA
//! `FOLDER/dutch-angle.safetensors`.
//!
//! `cargo run -p diffuse-builtin --example unpack -- FOLDER`

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: unpack FOLDER")?;
    for model in diffuse_builtin::MODELS {
        let folder = PathBuf::from(&folder).join(model.name);
        model.unpack(&folder)?;
        println!("{}", folder.display());
    }
    for (name, bytes) in diffuse_builtin::ADAPTERS {
        let path = PathBuf::from(&folder).join(format!("{name}.safetensors"));
        std::fs::write(&path, bytes)?;
        println!("{}", path.display());
    }
    Ok(())
}
