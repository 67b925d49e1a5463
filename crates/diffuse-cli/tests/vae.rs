//! TAESD, tiling and previews.

mod common;

use std::fs;
use std::path::Path;

use diffuse_testing::reference;
use image::RgbImage;
use tempfile::TempDir;

/// A folder where the program runs: the tiny checkpoint in `m`, a TAESD in a folder and in files.
fn world() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let values = reference().join("autoencoders");
    common::copy(&reference().join("sd/base"), &folder.path().join("m"));
    common::copy(&values.join("tiny"), &folder.path().join("tiny"));
    for name in ["taesd_encoder.pth", "taesd_decoder.pth"] {
        fs::copy(values.join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// Runs the program without `--quiet`, and returns what it says on standard error.
fn try_run(folder: &TempDir, options: &[&str]) -> Result<(), String> {
    let run = ["txt2img", "a boat", "--model", "m", "--seed", "3"];
    let output = common::diffuse(&[&run, options].concat())
        .current_dir(folder)
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    if output.status.success() {
        assert_eq!(message, "", "{options:?}");
        return Ok(());
    }
    assert!(!folder.path().join("out.png").exists(), "{options:?}");
    Err(message)
}

/// The bytes of the image of a run.
#[track_caller]
fn run(folder: &TempDir, options: &[&str]) -> Vec<u8> {
    try_run(folder, &[&["--steps", "3"], options].concat()).unwrap();
    let path = folder.path().join("out.png");
    let bytes = fs::read(&path).unwrap();
    fs::remove_file(path).unwrap();
    bytes
}

#[track_caller]
fn refuse(folder: &TempDir, options: &[&str], expected: &str) {
    assert_eq!(try_run(folder, options).unwrap_err(), expected);
}

fn open(folder: &TempDir, name: impl AsRef<Path>) -> RgbImage {
    let path = folder.path().join(name);
    image::open(path).unwrap().into_rgb8()
}

/// The pixels of a PNG file.
fn pixels(bytes: &[u8]) -> RgbImage {
    image::load_from_memory(bytes).unwrap().into_rgb8()
}

#[test]
fn a_taesd_replaces_the_vae() {
    let folder = world();
    let own = pixels(&run(&folder, &[]));
    let tiny = pixels(&run(&folder, &["--vae", "tiny"]));
    assert!(tiny != own);
    for file in ["taesd_decoder.pth", "taesd_encoder.pth"] {
        assert!(
            pixels(&run(&folder, &["--vae", file])) == tiny,
            "{file} is another"
        );
    }
    fs::remove_file(folder.path().join("taesd_encoder.pth")).unwrap();
    refuse(
        &folder,
        &["--vae", "taesd_decoder.pth"],
        "error: `taesd_decoder.pth` is the decoder of a TAESD: it has to be called \
         `taesd_decoder`, with `taesd_encoder` beside it\n",
    );
    let config = folder.path().join("tiny/config.json");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"relu\"", "\"silu\"")).unwrap();
    refuse(
        &folder,
        &["--vae", "tiny"],
        "error: `tiny/config.json`: `act_fn` is \"silu\", but AutoencoderTiny supports only \
         \"relu\"\n",
    );
}

#[test]
fn tiling_changes_large_images_only() {
    let folder = world();
    // The tiny checkpoint's VAE was made for 64 x 64 pixels.
    let with = |options: &[&str], tiling| {
        pixels(&run(
            &folder,
            &[options, &["--vae-tiling", tiling]].concat(),
        ))
    };
    assert!(with(&[], "on") == with(&[], "off"));
    let large = ["--width", "72", "--height", "104"];
    assert!(with(&large, "off") == pixels(&run(&folder, &large)));
    assert!(with(&large, "on") != with(&large, "off"));
}

#[test]
fn previews_change_no_byte_of_the_image() {
    let folder = world();
    for scheduler in ["pndm", "ddim"] {
        let options = ["--width", "72", "--scheduler", scheduler];
        let expected = run(&folder, &options);
        let preview = ["--preview", "p.png"];
        assert!(run(&folder, &[&options[..], &preview].concat()) == expected);
        let linear = open(&folder, "p.png");
        assert_eq!(linear.dimensions(), (72, 64));
        let preview = ["--preview", "p.png", "--preview-vae", "tiny"];
        assert!(run(&folder, &[&options[..], &preview].concat()) == expected);
        let decoded = open(&folder, "p.png");
        assert_eq!(decoded.dimensions(), (72, 64));
        assert!(decoded != linear);
        // The last prediction is close to the result, but not the result.
        let tiny = pixels(&run(&folder, &[&options[..], &["--vae", "tiny"]].concat()));
        assert!(decoded != tiny);
    }
}

#[test]
fn each_image_has_its_preview() {
    let folder = world();
    let options = ["--num-images", "2", "--preview", "p.png"];
    try_run(&folder, &[&["--steps", "2"], &options[..]].concat()).unwrap();
    assert!(open(&folder, "p-0.png") != open(&folder, "p-1.png"));
    assert!(!folder.path().join("p.png").exists());
}

#[test]
fn previews_that_cannot_be_made_are_refused() {
    let folder = world();
    refuse(
        &folder,
        &["--preview", "p.jpg"],
        "error: `p.jpg`: images are written as .png\n",
    );
    refuse(
        &folder,
        &["--preview", "out.png"],
        "error: `out.png` is given for a preview and for another output\n",
    );
    refuse(
        &folder,
        &[
            "--preview",
            "latents.png",
            "--output-latents",
            "latents.png",
        ],
        "error: `latents.png` is given for a preview and for another output\n",
    );
    refuse(
        &folder,
        &["--preview", "none/p.png"],
        "error: cannot write `none/p.png`: No such file or directory (os error 2)\n",
    );
    refuse(
        &folder,
        &["--preview", "terminal"],
        "error: `--preview terminal`: standard error is not a terminal with colors\n",
    );
    refuse(
        &folder,
        &["--preview", "terminal", "--quiet"],
        "error: `--preview terminal` shows nothing with `--quiet`\n",
    );
    refuse(
        &folder,
        &["--preview", "p.png", "--preview-vae", "none"],
        "error: there is no folder `none`\n",
    );
    refuse(
        &folder,
        &["--preview-vae", "tiny"],
        "error: the following required arguments were not provided:\n  \
         --preview <terminal|FILE>\n\n\
         Usage: diffuse txt2img --preview <terminal|FILE> --model <MODEL> --seed <S[,S...]> \
         --preview-vae <FOLDER|FILE> --backend <BACKEND> <PROMPT>...\n\n\
         For more information, try '--help'.\n",
    );
    refuse(
        &folder,
        &["--vae-tiling", "maybe"],
        "error: invalid value 'maybe' for '--vae-tiling <VAE_TILING>'\n  \
         [possible values: on, off]\n\n\
         For more information, try '--help'.\n",
    );
}

#[test]
fn a_preview_that_fails_is_one_warning() {
    let folder = world();
    let path = folder
        .path()
        .join("tiny/diffusion_pytorch_model.safetensors");
    // Weights so large that their products are infinite.
    let mut bytes = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8 + header..].fill(0x7b);
    fs::write(&path, bytes).unwrap();
    let options = ["--preview", "p.png", "--preview-vae", "tiny"];
    let run = ["txt2img", "a boat", "--model", "m", "--steps", "3"];
    let output = common::diffuse(&[&run[..], &options].concat())
        .current_dir(&folder)
        .output()
        .unwrap();
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(
        message,
        "warning: there is no preview: the images have values that are not finite; try another \
         scheduler, or `f32` instead of half precision\n"
    );
    assert!(output.status.success());
    assert!(!folder.path().join("p.png").exists());
    assert_eq!(open(&folder, "out.png").dimensions(), (64, 64));
}
