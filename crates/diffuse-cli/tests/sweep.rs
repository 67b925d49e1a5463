//! Many images in one: `--grid`, and the contact sheets of `diffuse sweep`.

mod common;

use std::fs;
use std::path::Path;

use diffuse_testing::reference;
use image::RgbImage;
use image::imageops::crop_imm;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Runs the program in a folder, and returns what it prints, or else its message.
fn run(folder: &TempDir, arguments: &[&str]) -> Result<String, String> {
    let output = common::diffuse(arguments).current_dir(folder).output();
    let output = output.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    match output.status.code() {
        Some(0) => Ok(text(output.stdout)),
        code => {
            assert_eq!(code, Some(1), "{arguments:?}");
            Err(text(output.stderr))
        }
    }
}

fn open(folder: &TempDir, name: &str) -> RgbImage {
    image::open(folder.path().join(name)).unwrap().into_rgb8()
}

fn record(folder: &TempDir, name: &str) -> Value {
    common::record(folder.path().join(name))
}

/// Where an image is in another.
fn find(whole: &RgbImage, part: &RgbImage) -> (u32, u32) {
    let (width, height) = part.dimensions();
    let row = |image: &RgbImage, x, y| crop_imm(image, x, y, width, 1).to_image();
    let first = row(part, 0, 0);
    for y in 0..=whole.height() - height {
        for x in 0..=whole.width() - width {
            let starts = whole.get_pixel(x, y) == part.get_pixel(0, 0);
            if starts
                && row(whole, x, y) == first
                && crop_imm(whole, x, y, width, height).to_image() == *part
            {
                return (x, y);
            }
        }
    }
    panic!("the image is not there");
}

#[test]
fn cells_are_the_images_of_single_runs() {
    let folder = tempfile::tempdir().unwrap();
    let prompt = "a boat on the sea at sunset";
    let names = ["euler", "ddim", "DPM++ 2M Karras"];
    let option = ["--scheduler-option", "timestep_spacing=trailing"];
    let sweep = ["sweep", prompt, "--seed", "0,-1", "--steps", "3"];
    let axis = ["--scheduler", "euler,ddim,DPM++ 2M Karras"];
    let outputs = ["--grid", "all.png", "--output", "one.png"];
    let told = run(&folder, &[&sweep[..], &axis, &option, &outputs].concat());
    let expected = "seed 0,18446744073709551615\none-0.png\none-1.png\none-2.png\none-3.png\n\
                    one-4.png\none-5.png\nall.png\n";
    assert_eq!(told.unwrap(), expected);

    let sheet = open(&folder, "all.png");
    let mut places = Vec::new();
    for (row, name) in names.into_iter().enumerate() {
        for (column, seed) in ["0", "-1"].into_iter().enumerate() {
            let single = ["txt2img", prompt, "--steps", "3", "--seed", seed];
            let arguments = [&single[..], &["--scheduler", name], &option].concat();
            run(&folder, &arguments).unwrap();
            let expected = open(&folder, "out.png");
            let of_sweep = format!("one-{}.png", 2 * row + column);
            assert!(open(&folder, &of_sweep) == expected, "{name} {seed}");
            let mut shown = record(&folder, "out.png");
            // A sweep has no such option.
            shown.as_object_mut().unwrap().remove("init_latents");
            assert_eq!(record(&folder, &of_sweep), shown);
            places.push(find(&sheet, &expected));
        }
    }
    // Schedulers are rows, seeds are columns.
    let [columns, rows] = [[places[0].0, places[1].0], [places[0].1, places[2].1]];
    let height = rows[1] - rows[0];
    assert!(columns[1] > columns[0] + 128 && height > 128);
    for (index, place) in places.into_iter().enumerate() {
        let row = rows[0] + height * (index as u32 / 2);
        assert_eq!(place, (columns[index % 2], row), "{index}");
    }

    let record = record(&folder, "all.png");
    for (key, expected) in [
        ("command", json!("sweep")),
        ("prompt", json!([prompt])),
        (
            "scheduler",
            json!([
                "EulerDiscreteScheduler",
                "DDIMScheduler",
                "DPMSolverMultistepScheduler"
            ]),
        ),
        ("steps", json!([3])),
        ("guidance_scale", json!([2.0])),
        ("seed", json!([0, u64::MAX])),
        ("columns", json!("seed")),
        ("rows", json!(["scheduler"])),
    ] {
        assert_eq!(record[key], expected, "{key}");
    }
    assert_eq!(record["scheduler_config"][2]["use_karras_sigmas"], true);
}

#[test]
fn all_axes_and_a_choice_of_columns() {
    let folder = tempfile::tempdir().unwrap();
    let sweep = [
        "sweep",
        "a boat",
        "a house",
        "--negative-prompt",
        "snow",
        "night",
        "--seed",
        "3",
        "--steps",
        "1,2",
        "--guidance-scale",
        "1,4",
        "--columns",
        "prompt",
        "--output",
        "a.png",
    ];
    let told = run(&folder, &sweep).unwrap();
    let images: String = (0..8).map(|index| format!("a-{index}.png\n")).collect();
    assert_eq!(told, format!("seed 3\n{images}sheet.png\n"));
    let shown = record(&folder, "sheet.png");
    assert_eq!(shown["columns"], "prompt");
    assert_eq!(shown["rows"], json!(["steps", "guidance_scale"]));
    // Columns vary fastest, then the last axis of the rows.
    for (index, prompt, negative, steps, guidance) in [
        (0, "a boat", "snow", 1, 1.0),
        (1, "a house", "night", 1, 1.0),
        (2, "a boat", "snow", 1, 4.0),
        (5, "a house", "night", 2, 1.0),
        (7, "a house", "night", 2, 4.0),
    ] {
        let name = format!("a-{index}.png");
        let record = record(&folder, &name);
        let found = ["prompt", "negative_prompt", "steps", "guidance_scale"];
        let found = found.map(|key| record[key].clone());
        let expected = [
            json!([prompt]),
            json!([negative]),
            json!(steps),
            json!(guidance),
        ];
        assert_eq!(found, expected, "{index}");
        let (steps, guidance) = (steps.to_string(), guidance.to_string());
        let single = [
            "txt2img",
            prompt,
            "--negative-prompt",
            negative,
            "--seed",
            "3",
            "--steps",
            &steps,
            "--guidance-scale",
            &guidance,
        ];
        run(&folder, &single).unwrap();
        assert!(open(&folder, "out.png") == open(&folder, &name), "{index}");
    }

    // Without `--output` only the sheet is written.
    let folder = tempfile::tempdir().unwrap();
    run(&folder, &["sweep", "a boat", "--steps", "1", "--quiet"]).unwrap();
    let files = fs::read_dir(&folder).unwrap();
    let names: Vec<_> = files.map(|file| file.unwrap().file_name()).collect();
    assert_eq!(names, ["sheet.png"]);
}

#[test]
fn what_a_sweep_refuses() {
    let folder = tempfile::tempdir().unwrap();
    let check = |arguments: &[&str], expected: &str| {
        let arguments = [&["sweep", "a boat"], arguments].concat();
        let message = run(&folder, &arguments).unwrap_err();
        assert_eq!(message, format!("error: {expected}\n"), "{arguments:?}");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 0);
    };
    check(
        &["--scheduler", "euler,eular"],
        &common::unknown_scheduler("eular"),
    );
    check(
        &["--scheduler", "ddim,euler", "--steps", "3,0"],
        "ddim, 0 steps: `num_inference_steps` is `0`, `DDIMScheduler` supports 1 to 1000 \
         (`num_train_timesteps`)",
    );
    check(
        &["--guidance-scale", "2,NaN"],
        "guidance NaN: `guidance_scale` is NaN",
    );
    check(
        &["--width", "250"],
        "`height` and `width` have to be divisible by 8 and not zero, but `width` is 250",
    );
    check(
        &["--timesteps", "900,400"],
        "`timesteps` cannot be used by `PNDMScheduler`: its `set_timesteps` takes a number of \
         steps",
    );
    check(
        &["a [red|blue] boat", "--prompt-syntax", "a1111"],
        "a [red|blue] boat: `[red|blue]` alternates between texts from step to step, which is not \
         supported; a bracket is written `\\[`",
    );
    check(
        &["--num-images", "2"],
        "a sweep has one image of each combination: give several seeds to `--seed`",
    );
    check(
        &["--output-latents", "a.safetensors"],
        "a sweep writes no latents",
    );
    check(
        &["--negative-prompt", "x", "--negative-prompt", "y"],
        "2 negative prompts for 1 prompts: give one for all, or one for each",
    );
    for [option, value, other] in [["--seed", "1", "2"], ["--scheduler", "euler", "ddim"]] {
        let expected = format!(
            "the prompt `{other}` looks like a value of an option: several values are separated \
             by commas, as in `--seed 0,1,2`"
        );
        check(&[option, value, other], &expected);
    }
    check(&["--grid", "a.jpg"], "`a.jpg`: images are written as .png");
    check(
        &["--grid", "a-0.png", "--output", "a.png", "--seed", "1,2"],
        "`a-0.png` is given for two images",
    );
    let seeds: Vec<String> = (0..1025).map(|seed: u32| seed.to_string()).collect();
    check(
        &["--seed", &seeds.join(",")],
        "a sweep of 1025 images is too large: at most 1024",
    );
    assert_eq!(
        run(&folder, &["sweep", "--seed", "1"]).unwrap_err(),
        "error: no prompt is given; one is, for example, in `diffuse sweep \"a boat at sunset\" \
         --seed 0,1,2 --scheduler euler,ddim`\n"
    );
}

/// Checks a grid beside the single images.
fn check_grid(folder: &TempDir, images: u32, columns: u32) {
    let grid = open(folder, "grid.png");
    for index in 0..images {
        let image = open(folder, &format!("out-{index}.png"));
        let (width, height) = image.dimensions();
        let (x, y) = (index % columns * width, index / columns * height);
        let part = crop_imm(&grid, x, y, width, height).to_image();
        assert!(part == image, "{index}");
        let size = [columns * width, images.div_ceil(columns) * height];
        assert_eq!([grid.width(), grid.height()], size);
    }
}

#[test]
fn grids_have_all_images_of_a_run() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--steps", "1", "--seed", "4", "--grid", "grid.png"];
    let txt2img = |more: &[&str]| {
        let arguments = [&["txt2img", "a boat"], more, &options].concat();
        run(&folder, &arguments).unwrap()
    };
    let told = txt2img(&["--num-images", "4"]);
    assert_eq!(
        told,
        "seed 4\nout-0.png\nout-1.png\nout-2.png\nout-3.png\ngrid.png\n"
    );
    check_grid(&folder, 4, 2);
    let shown = record(&folder, "grid.png");
    assert_eq!(
        (&shown["seed"], &shown["image"]),
        (&json!([4]), &Value::Null)
    );
    // A row for each prompt.
    txt2img(&["a house", "--num-images", "3"]);
    check_grid(&folder, 6, 3);
    txt2img(&["a house", "--num-images", "1"]);
    check_grid(&folder, 2, 2);

    let inputs = reference().join("image_to_image/inputs");
    let input = |name: &str| Path::new(&inputs).join(name).display().to_string();
    let model = reference().join("sd/base").display().to_string();
    let (image, mask) = (input("image.png"), input("mask.png"));
    let base = [
        "--image",
        &image,
        "--model",
        &model,
        "--num-images",
        "2",
        "--steps",
        "2",
    ];
    let more = ["--seed", "4", "--grid", "grid.png"];
    run(
        &folder,
        &[&["img2img", "a boat"], &base[..], &more].concat(),
    )
    .unwrap();
    check_grid(&folder, 2, 2);
    let inpaint = ["inpaint", "a boat", "--mask", &mask];
    run(&folder, &[&inpaint[..], &base, &more].concat()).unwrap();
    check_grid(&folder, 2, 2);
    let cat = reference().join("ddpm/cat").display().to_string();
    let ddpm = ["ddpm", "--model", &cat, "--num-images", "5"];
    run(&folder, &[&ddpm[..], &options].concat()).unwrap();
    check_grid(&folder, 5, 3);

    let message = run(&folder, &["ddpm", "--grid", "out.png", "--steps", "1"]).unwrap_err();
    assert_eq!(message, "error: `out.png` is given for two images\n");
}
