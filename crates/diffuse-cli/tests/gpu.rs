//! The models on a GPU, or on a software driver: what `Flex` computes, and the reference's values.
//!
//! `cargo test --release -p diffuse-cli --features wgpu --test gpu` needs an adapter: Mesa's
//! software driver will do. With `--features cuda` alone it runs on the first CUDA GPU.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use std::process::{Command, Output};

use burn::tensor::{DType, Int, Tensor, TensorData, backend::Backend};
use burn_flex::Flex;
use diffuse_pipelines::clip::CLIPTextModel;
use diffuse_pipelines::schedulers::{Overrides, scheduler_from_config};
use diffuse_pipelines::unet::{
    Timestep, UNet2DConditionModel, UNet2DConditionOptions, UNet2DModel,
};
use diffuse_pipelines::vae::AutoencoderKL;
use diffuse_pipelines::{
    DDIMPipeline, DDPMOptions, DDPMPipeline, Generated, LoadOptions, Pretrained,
    StableDiffusionOptions, StableDiffusionPipeline,
};
use diffuse_testing::{Values, reference};

#[cfg(feature = "wgpu")]
type Gpu = burn::backend::Wgpu;
#[cfg(not(feature = "wgpu"))]
type Gpu = burn::backend::Cuda;

/// The program's name of it.
const BACKEND: &str = if cfg!(feature = "wgpu") {
    "wgpu"
} else {
    "cuda"
};

/// Differences of whole runs, in parts of the largest latent.
const RUN: f64 = 1e-3;
/// Levels by which an image of such a run differs.
const LEVELS: u8 = 1;
/// Differences of a model's output in `f32`, in parts of the largest value.
const STAGE: f64 = 1e-4;
/// The same in `f16`, which has 11 bits, over some dozen layers.
const STAGE_F16: f64 = 2e-2;
/// The same in `bf16`, which has 8 bits.
const STAGE_BF16: f64 = 8.0 * STAGE_F16;

fn load(dtype: DType) -> LoadOptions {
    LoadOptions {
        dtype: Some(dtype.into()),
        ..LoadOptions::default()
    }
}

/// The types that the adapter computes in.
fn types() -> Vec<DType> {
    let supported = |dtype: &DType| Gpu::supports_dtype(&Default::default(), *dtype);
    let types: Vec<DType> = [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .filter(supported)
        .collect();
    assert!(types.contains(&DType::F32));
    types
}

/// The largest difference, in parts of the largest expected value.
#[track_caller]
fn difference(got: &TensorData, expected: &TensorData) -> f64 {
    assert_eq!(got.shape, expected.shape);
    let largest = expected
        .iter::<f64>()
        .fold(0.0, |largest, value| f64::max(largest, value.abs()));
    let pairs = got.iter::<f64>().zip(expected.iter::<f64>());
    let difference = pairs.fold(0.0, |worst, (got, expected)| {
        assert!(got.is_finite(), "{got}");
        f64::max(worst, (got - expected).abs())
    });
    difference / largest
}

fn text_to_image<B: Backend>(
    scheduler: &str,
    [width, height]: [usize; 2],
    guidance_scale: f64,
    dtype: DType,
) -> Generated<B> {
    let device = Default::default();
    let folder = reference().join("sd/base");
    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained_with(folder, &load(dtype), &device).unwrap();
    let config = pipeline.scheduler.config();
    pipeline.scheduler = scheduler_from_config(config, Some(scheduler), &Overrides::new()).unwrap();
    let options = StableDiffusionOptions {
        negative_prompt: vec!["blurry".into()],
        num_inference_steps: 8,
        seeds: vec![3],
        width: Some(width),
        height: Some(height),
        guidance_scale,
        ..StableDiffusionOptions::from("a lighthouse on a cliff in the rain")
    };
    pipeline.generate(&options).unwrap()
}

fn unconditional<B: Backend>(folder: &str, ddim: bool, dtype: DType) -> Generated<B> {
    let folder = reference().join("ddpm").join(folder);
    let mut pipeline =
        DDPMPipeline::<B>::from_pretrained_with(folder, &load(dtype), &Default::default()).unwrap();
    if ddim {
        pipeline = DDIMPipeline::new(pipeline).unwrap().inner;
    }
    let options = DDPMOptions {
        batch_size: 2,
        num_inference_steps: 8,
        seeds: vec![3, 4],
        ..DDPMOptions::default()
    };
    pipeline.generate(&options).unwrap()
}

/// Latents within [`RUN`], images within [`LEVELS`].
#[track_caller]
fn check_run(what: &str, got: Generated<Gpu>, expected: Generated<Flex>) {
    let difference = difference(&got.latents.into_data(), &expected.latents.into_data());
    println!("{what}: {difference:.1e} of the largest latent");
    assert!(difference < RUN, "{what}: {difference:e}");
    assert_eq!(got.images.len(), expected.images.len());
    for (got, expected) in got.images.iter().zip(&expected.images) {
        let levels = got.as_raw().iter().zip(expected.as_raw());
        let largest = levels.map(|(got, expected)| got.abs_diff(*expected)).max();
        println!("{what}: {largest:?} levels");
        assert!(largest <= Some(LEVELS), "{what}: {largest:?} levels");
    }
}

#[test]
fn text_to_image_runs_are_those_of_flex() {
    for (scheduler, size, guidance) in [
        ("PNDMScheduler", [64, 64], 7.5),
        ("DDIMScheduler", [64, 64], 1.0),
        ("EulerDiscreteScheduler", [72, 104], 7.5),
        ("UniPCMultistepScheduler", [64, 64], 7.5),
        ("DDPMScheduler", [64, 64], 7.5),
    ] {
        check_run(
            scheduler,
            text_to_image(scheduler, size, guidance, DType::F32),
            text_to_image(scheduler, size, guidance, DType::F32),
        );
    }
}

#[test]
fn unconditional_runs_are_those_of_flex() {
    for (folder, ddim) in [("cat", false), ("cat", true), ("new-names", false)] {
        check_run(
            folder,
            unconditional(folder, ddim, DType::F32),
            unconditional(folder, ddim, DType::F32),
        );
    }
}

#[test]
fn half_precision_gives_nearly_the_images_of_flex() {
    if !types().contains(&DType::F16) {
        println!("the adapter does not compute in f16");
        return;
    }
    let mean = |got: &Generated<Gpu>, expected: &Generated<Flex>| {
        let (got, expected) = (got.images[0].as_raw(), expected.images[0].as_raw());
        let levels = got.iter().zip(expected);
        let sum: u64 = levels
            .map(|(got, expected)| u64::from(got.abs_diff(*expected)))
            .sum();
        sum as f64 / got.len() as f64
    };
    // Noise for half-precision models is drawn in half precision, so both sides are.
    let scheduler = "DDIMScheduler";
    let text = mean(
        &text_to_image(scheduler, [72, 104], 7.5, DType::F16),
        &text_to_image(scheduler, [72, 104], 7.5, DType::F16),
    );
    let cat = mean(
        &unconditional("cat", false, DType::F16),
        &unconditional("cat", false, DType::F16),
    );
    println!("mean difference of levels: {text:.2} and {cat:.2}");
    assert!(text > 0.0 && text < 1.0 && cat > 0.0 && cat < 1.0);
}

/// A model's output in each type against the recorded one.
#[track_caller]
fn check_stage<const D: usize>(
    stage: &str,
    expected: &TensorData,
    output: impl Fn(DType) -> Tensor<Gpu, D>,
) {
    for dtype in types() {
        let output = output(dtype);
        assert_eq!(output.dtype(), dtype, "{stage}");
        let difference = difference(&output.cast(DType::F32).into_data(), expected);
        println!("{stage} in {dtype:?}: {difference:.1e}");
        let allowed = match dtype {
            DType::F16 => STAGE_F16,
            DType::BF16 => STAGE_BF16,
            _ => STAGE,
        };
        assert!(difference < allowed, "{stage} in {dtype:?}: {difference:e}");
    }
}

/// The recorded timesteps, one for each row.
fn timesteps(values: &Values, batch: usize) -> Timestep {
    match values.list("timestep")[..] {
        [timestep] => Timestep::Each(vec![timestep; batch]),
        ref each => Timestep::Each(each.to_vec()),
    }
}

#[test]
fn every_block_of_the_conditional_unet() {
    let device = Default::default();
    for (folder, stage) in [
        ("base", "unet"),
        ("base", "unet_not_multiple_of_8"),
        ("linear", "unet_linear"),
        ("inpaint", "unet_inpaint"),
    ] {
        let path = reference().join(format!("sd/stages/{stage}.safetensors"));
        let values = Values::open(path);
        check_stage(stage, &values.data("output"), |dtype| {
            let folder = reference().join(format!("sd/{folder}/unet"));
            let unet =
                UNet2DConditionModel::<Gpu>::from_pretrained_with(folder, &load(dtype), &device);
            let sample: Tensor<Gpu, 4> = values.tensor("sample", &device);
            let context: Tensor<Gpu, 3> = values.tensor("encoder_hidden_states", &device);
            let timestep = timesteps(&values, sample.dims()[0]);
            unet.unwrap()
                .forward(sample.cast(dtype), timestep, &context.cast(dtype))
        });
    }
}

#[test]
fn unet_that_takes_the_guidance_scale() {
    let device = Default::default();
    let values = Values::open(reference().join("sd/stages/unet_lcm.safetensors"));
    let first_row = |data: TensorData| {
        let tensor = Tensor::<Flex, 4>::from_data(data, &Default::default());
        tensor.narrow(0, 0, 1).into_data()
    };
    let expected = first_row(values.data("output"));
    check_stage("unet_lcm", &expected, |dtype| {
        let folder = reference().join("sd/lcm/unet");
        let unet = UNet2DConditionModel::<Gpu>::from_pretrained_with(folder, &load(dtype), &device);
        let sample: Tensor<Gpu, 4> = values.tensor("sample", &device);
        let context: Tensor<Gpu, 3> = values.tensor("encoder_hidden_states", &device);
        let options = UNet2DConditionOptions {
            guidance_scale: Some(7.5),
            ..UNet2DConditionOptions::default()
        };
        unet.unwrap().forward_with(
            sample.narrow(0, 0, 1).cast(dtype),
            values.list("timestep")[0],
            &context.narrow(0, 0, 1).cast(dtype).into(),
            options,
        )
    });
}

#[test]
fn every_block_of_the_unconditional_unet() {
    let device = Default::default();
    for stage in ["cat", "new-names", "scale-shift"] {
        let path = reference().join(format!("ddpm/stages/{stage}.safetensors"));
        let values = Values::open(path);
        check_stage(stage, &values.data("output"), |dtype| {
            let folder = reference().join("ddpm").join(stage);
            let unet = UNet2DModel::<Gpu>::from_pretrained_with(folder, &load(dtype), &device);
            let sample: Tensor<Gpu, 4> = values.tensor("sample", &device);
            let timestep = timesteps(&values, sample.dims()[0]);
            unet.unwrap().forward(sample.cast(dtype), timestep)
        });
    }
}

#[test]
fn both_activations_of_the_text_encoder() {
    let device = Default::default();
    for (folder, stage) in [("base", "text_encoder"), ("gelu", "text_encoder_gelu")] {
        let path = reference().join(format!("sd/stages/{stage}.safetensors"));
        let values = Values::open(path);
        check_stage(stage, &values.data("last_hidden_state"), |dtype| {
            let folder = reference().join(format!("sd/{folder}/text_encoder"));
            let encoder = CLIPTextModel::<Gpu>::from_pretrained_with(folder, &load(dtype), &device);
            let ids = values.data("input_ids");
            let ids = TensorData::new(ids.iter::<i32>().collect(), ids.shape);
            let ids = Tensor::<Gpu, 2, Int>::from_data(ids, &device);
            encoder.unwrap().forward(ids).last_hidden_state
        });
    }
}

#[test]
fn autoencoder_both_ways() {
    let device = Default::default();
    let values = Values::open(reference().join("sd/stages/vae.safetensors"));
    let folder = reference().join("sd/base/vae");
    let vae =
        |dtype| AutoencoderKL::<Gpu>::from_pretrained_with(&folder, &load(dtype), &device).unwrap();
    check_stage("vae encode", &values.data("encode.mean"), |dtype| {
        let image: Tensor<Gpu, 4> = values.tensor("encode.image", &device);
        vae(dtype).encode(image.cast(dtype)).mode()
    });
    for case in ["decode", "decode_odd"] {
        check_stage(case, &values.data(&format!("{case}.image")), |dtype| {
            let latents: Tensor<Gpu, 4> = values.tensor(&format!("{case}.latents"), &device);
            vae(dtype).decode(latents.cast(dtype))
        });
    }
}

#[test]
fn the_type_in_the_backends_name_is_that_of_the_weights() {
    #[cfg(feature = "wgpu")]
    type Half = burn::backend::Wgpu<burn::tensor::f16>;
    #[cfg(not(feature = "wgpu"))]
    type Half = burn::backend::Cuda<burn::tensor::f16>;
    if !types().contains(&DType::F16) {
        return;
    }
    let device = Default::default();
    let folder = reference().join("ddpm/new-names");
    let pipeline = DDPMPipeline::<Half>::from_pretrained(folder, &device).unwrap();
    let weight = &pipeline.unet.conv_in.weight;
    assert_eq!(weight.dtype(), DType::F16);
    let options = DDPMOptions {
        num_inference_steps: 2,
        seeds: vec![3],
        ..DDPMOptions::default()
    };
    // The latents between steps stay in single precision.
    let generated = pipeline.generate(&options).unwrap();
    assert_eq!(generated.latents.dtype(), DType::F32);
}

fn diffuse(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_diffuse"))
        .args(arguments)
        // Mesa looks for a window system and complains that there is none.
        .env("NODEVICE_SELECT", "1")
        .envs(environment.iter().copied())
        .output()
        .unwrap()
}

#[test]
fn program_lists_adapters_and_computes_on_them() {
    let listed = diffuse(&["devices"], &[]);
    let text = String::from_utf8(listed.stdout).unwrap();
    assert!(text.starts_with("flex\n  0  the CPU"), "{text}");
    assert!(text.contains(&format!("\n{BACKEND}\n  0  ")), "{text}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png").display().to_string();
    let model = reference().join("sd/base").display().to_string();
    let run = |device| {
        let run = ["txt2img", "a cat", "--model", &model, "--steps", "2"];
        let on = ["--backend", BACKEND, "--device", device, "--output", &path];
        diffuse(&[&run[..], &on].concat(), &[])
    };
    let done = run("0");
    assert!(done.status.success(), "{done:?}");
    let image = image::open(&path).unwrap();
    assert_eq!((image.width(), image.height()), (64, 64));

    let failed = run("99");
    assert_eq!(failed.status.code(), Some(1));
    let message = String::from_utf8(failed.stderr).unwrap();
    assert!(message.contains("there is no device 99"), "{message}");
}

/// A run on a backend that cannot work here: one message, exit code 1, no image.
#[track_caller]
fn check_failure(options: &[&str], environment: &[(&str, &str)], expected: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png").display().to_string();
    let model = reference().join("sd/base").display().to_string();
    let run = ["txt2img", "a cat", "--model", &model, "--steps", "2"];
    let output = ["--quiet", "--output", &path];
    let failed = diffuse(&[&run[..], &output, options].concat(), environment);
    let message = String::from_utf8(failed.stderr).unwrap();
    assert_eq!(failed.status.code(), Some(1), "{message}");
    let errors = message.lines().filter(|line| line.starts_with("error: "));
    assert_eq!(errors.count(), 1, "{message}");
    assert!(message.contains(expected), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn missing_drivers_are_told() {
    if cfg!(all(feature = "wgpu", target_os = "linux")) {
        let no_driver = [("VK_DRIVER_FILES", "/"), ("VK_ICD_FILENAMES", "/")];
        check_failure(&["--backend", "wgpu"], &no_driver, "`libvulkan1`");
    }
    let listed = String::from_utf8(diffuse(&["devices"], &[]).stdout).unwrap();
    if cfg!(feature = "cuda") && !listed.contains("compute capability") {
        check_failure(&["--backend", "cuda"], &[], "take `--backend flex`");
    }
}

#[test]
fn types_that_the_device_does_not_have_are_refused() {
    if types().contains(&DType::BF16) {
        return;
    }
    check_failure(
        &["--backend", BACKEND, "--dtype", "bf16"],
        &[],
        "--dtype f32",
    );
}

#[test]
fn the_backend_is_by_default_a_gpu_that_is_there() {
    let listed = String::from_utf8(diffuse(&["devices"], &[]).stdout).unwrap();
    let expected = if listed.contains("compute capability") {
        "cuda"
    } else if ["discrete GPU", "integrated GPU", "virtual GPU"]
        .iter()
        .any(|kind| listed.contains(kind))
    {
        "wgpu"
    } else {
        "flex"
    };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    let model = reference().join("sd/base").display().to_string();
    let run = ["txt2img", "a cat", "--model", &model, "--steps", "1"];
    let output = ["--output", path.to_str().unwrap()];
    let done = diffuse(&[&run[..], &output].concat(), &[]);
    assert!(done.status.success(), "{done:?}");
    let message = String::from_utf8(done.stderr).unwrap();
    let announced = message.contains("computing on the GPU (`--backend ");
    assert_eq!(announced, expected != "flex", "{message}");
    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(path).unwrap()));
    let reader = decoder.read_info().unwrap();
    let record = reader.info().utf8_text[0].get_text().unwrap();
    let backend = format!("\"backend\":\"{expected}\"");
    assert!(record.contains(&backend), "{record}");
}

#[cfg(all(feature = "cuda", target_os = "linux"))]
#[test]
fn devices_tell_where_kernels_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let caches = folder.path().display().to_string();
    let listed = |caches: &str| {
        let output = diffuse(&["devices"], &[("XDG_CACHE_HOME", caches)]);
        String::from_utf8(output.stdout).unwrap()
    };
    let text = listed(&caches);
    let expected = format!("\nkernels are kept in {caches}/diffuse/kernels (0 MiB)\n");
    assert!(text.ends_with(&expected), "{text}");
    let text = listed("/dev/null");
    assert!(text.contains("\nkernels are not kept"), "{text}");
    let mut homeless = Command::new(env!("CARGO_BIN_EXE_diffuse"));
    homeless.env_remove("HOME").env_remove("XDG_CACHE_HOME");
    let output = homeless.arg("devices").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("there is no home folder"), "{text}");
}
