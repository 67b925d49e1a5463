//! ControlNets beside whole runs: files, edges, refusals.

use std::path::PathBuf;

use burn_flex::Flex;
use diffuse_pipelines::unet::{ControlNetConfig, ControlNetModel, FreeU, ModelConfig};
use diffuse_pipelines::{
    LoadOptions, Pretrained, StableDiffusionControl, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, canny, load_controlnet,
};
use diffuse_testing::reference;
use image::RgbImage;

type B = Flex;

fn folder() -> PathBuf {
    reference().join("denoising")
}

fn network(name: &str) -> ControlNetModel<B> {
    ControlNetModel::from_pretrained(folder().join(name), &Default::default()).unwrap()
}

fn pipeline() -> StableDiffusionPipeline<B> {
    let base = reference().join("sd/base");
    StableDiffusionPipeline::from_pretrained(base, &Default::default()).unwrap()
}

#[test]
fn edges_are_opencvs() {
    let open = |name: &str| {
        image::open(folder().join("edges").join(name))
            .unwrap()
            .to_rgb8()
    };
    let image = open("image.png");
    for (low, high) in [(100, 200), (20, 60), (200, 100), (0, 0)] {
        let (edges, expected) = (canny(&image, low, high), open(&format!("{low}_{high}.png")));
        let pairs = edges.pixels().zip(expected.pixels());
        assert_eq!(pairs.filter(|(a, b)| a != b).count(), 0, "{low}, {high}");
    }
    assert_eq!(canny(&RgbImage::new(0, 0), 1, 2).dimensions(), (0, 0));
}

#[test]
fn the_original_layout_has_the_same_weights() {
    let config = ControlNetConfig::from_file(folder().join("first/config.json")).unwrap();
    let options = LoadOptions {
        strict: true,
        ..LoadOptions::default()
    };
    let expected = network("first");
    for file in [
        "original.safetensors",
        "first/diffusion_pytorch_model.safetensors",
    ] {
        let path = folder().join(file);
        let loaded = load_controlnet::<B>(path, Some(&config), &options, &Default::default());
        let loaded = loaded.unwrap();
        let values = |model: &ControlNetModel<B>| {
            let weights = [
                &model.controlnet_cond_embedding.blocks[5].weight,
                &model.controlnet_cond_embedding.conv_out.weight,
                &model.controlnet_down_blocks[7].weight,
                &model.controlnet_mid_block.weight,
                &model.conv_in.weight,
            ];
            weights.map(|weight| weight.val().into_data())
        };
        assert!(values(&loaded) == values(&expected), "{file}");
    }
    let load = |path: PathBuf| {
        let loaded = load_controlnet::<B>(path, None, &options, &Default::default());
        loaded.unwrap_err().to_string()
    };
    let path = reference().join("single_file/vae.safetensors");
    let message = format!("`{}` is a VAE, which cannot be used here", path.display());
    assert_eq!(load(path), message);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let pipeline = pipeline();
    let first = network("first");
    let image = || vec![RgbImage::new(64, 64)];
    let refusal = |control: Vec<StableDiffusionControl<'_, B>>| {
        let inputs = StableDiffusionInputs {
            control,
            ..StableDiffusionInputs::default()
        };
        let checked = pipeline.check_inputs(&"a boat".into(), &inputs);
        checked.unwrap_err().to_string()
    };
    let new = || StableDiffusionControl::new(&first, image());
    assert_eq!(
        refusal(vec![StableDiffusionControl {
            guidance_start: 0.5,
            guidance_end: 0.5,
            ..new()
        }]),
        "`guidance_start` of the ControlNet is 0.5, but has to be below `guidance_end`, which is \
         0.5"
    );
    let end = StableDiffusionControl {
        guidance_end: 1.5,
        ..new()
    };
    assert_eq!(
        refusal(vec![new(), end]),
        "`guidance_end` of ControlNet 2 is 1.5, but has to be in [0, 1]"
    );
    let none = StableDiffusionControl::new(&first, Vec::new());
    assert_eq!(
        refusal(vec![none]),
        "the ControlNet has 0 images for 1 prompts: give one, or one for each"
    );
    let other = network("two-levels");
    assert_eq!(
        refusal(vec![StableDiffusionControl::new(&other, image())]),
        "these parts do not fit together: the ControlNet is for another UNet: its blocks differ"
    );
    let small = StableDiffusionControl::new(&first, vec![RgbImage::new(7, 64)]);
    assert_eq!(
        refusal(vec![small]),
        "`height` and `width` have to be divisible by 8 and not zero, but `width` is 0"
    );
}

#[test]
fn options_of_the_unet_are_checked() {
    let pipeline = pipeline();
    let refusal = |options: StableDiffusionOptions| {
        let checked = pipeline.check_inputs(&options, &StableDiffusionInputs::default());
        checked.unwrap_err().to_string()
    };
    let options = || StableDiffusionOptions::from("a boat");
    let freeu = FreeU {
        s1: 0.9,
        s2: 0.2,
        b1: f64::NAN,
        b2: 1.4,
    };
    assert_eq!(
        refusal(StableDiffusionOptions {
            freeu: Some(freeu),
            ..options()
        }),
        "`freeu` has the factors 0.9, 0.2, NaN, 1.4"
    );
    assert_eq!(
        refusal(StableDiffusionOptions {
            cache_interval: 0,
            ..options()
        }),
        "`cache_interval` is 0"
    );
    assert_eq!(
        refusal(StableDiffusionOptions {
            cache_branch_id: 2,
            ..options()
        }),
        "`cache_branch_id` is 2, but has to be in 0..=1 for this UNet"
    );
}
