//! `AutoencoderTiny` in folders and files, and as the autoencoder of a pipeline.

use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use burn_flex::Flex;
use diffuse_nn::checkpoint::Checkpoint;
use diffuse_pipelines::convert::{ConvertOptions, convert};
use diffuse_pipelines::inspect::Inspection;
use diffuse_pipelines::schedulers::{Overrides, scheduler_from_config};
use diffuse_pipelines::unet::ModelConfig;
use diffuse_pipelines::vae::{Autoencoder, AutoencoderTiny, AutoencoderTinyConfig};
use diffuse_pipelines::{
    FileKind, LatentPreview, LatentRgb, LoadOptions, PipelineError, Pretrained,
    StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline, load_vae,
};
use diffuse_testing::reference;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::family::lay_over;

type B = Flex;

fn folder() -> PathBuf {
    reference().join("autoencoders")
}

fn load(path: PathBuf) -> Result<Autoencoder<B>, PipelineError> {
    load_vae(path, None, &LoadOptions::default(), &Default::default())
}

/// `sd/base` with an `AutoencoderTiny`.
fn checkpoint() -> TempDir {
    let together = tempfile::tempdir().unwrap();
    lay_over(&reference().join("sd/base"), together.path());
    fs::remove_dir_all(together.path().join("vae")).unwrap();
    lay_over(&folder().join("tiny"), &together.path().join("vae"));
    let path = together.path().join("model_index.json");
    let index = fs::read_to_string(&path).unwrap();
    fs::write(path, index.replace("AutoencoderKL", "AutoencoderTiny")).unwrap();
    together
}

fn levels(pipeline: &StableDiffusionPipeline<B>) -> Vec<u8> {
    let options = StableDiffusionOptions {
        num_inference_steps: 2,
        seeds: vec![1],
        ..StableDiffusionOptions::from("a lighthouse")
    };
    let generated = pipeline.generate(&options).unwrap();
    generated.images[0].as_raw().clone()
}

#[test]
fn a_pipeline_with_a_tiny_autoencoder_is_loaded_inspected_and_converted() {
    let checkpoint = checkpoint();
    let device = Default::default();
    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(checkpoint.path(), &device).unwrap();
    assert!(matches!(pipeline.vae, Autoencoder::Tiny(_)));
    let expected = levels(&pipeline);
    pipeline.vae = load(reference().join("sd/base/vae")).unwrap();
    assert!(matches!(pipeline.vae, Autoencoder::KL(_)));
    assert_ne!(levels(&pipeline), expected);

    let inspection = Inspection::read::<B>(checkpoint.path()).unwrap();
    assert!(inspection.all_problems().is_empty());
    let vae = inspection.components.iter().find(|part| part.name == "vae");
    assert_eq!(vae.unwrap().parameters, Some(10_967));

    let target = checkpoint.path().join("converted");
    convert::<B>(
        checkpoint.path(),
        &target,
        &ConvertOptions::default(),
        |_| {},
    )
    .unwrap();
    let pipeline = StableDiffusionPipeline::<B>::from_pretrained(&target, &device).unwrap();
    assert_eq!(levels(&pipeline), expected);

    // The original layout has no names for it.
    let file = checkpoint.path().join("model.safetensors");
    let error = convert::<B>(checkpoint.path(), &file, &ConvertOptions::default(), |_| {});
    assert_eq!(
        error.unwrap_err().to_string(),
        format!(
            "`{}` is not a valid configuration: its class is AutoencoderTiny, not AutoencoderKL",
            checkpoint.path().join("vae/config.json").display()
        )
    );

    // The index decides what a component is.
    let config = checkpoint.path().join("vae/config.json");
    fs::copy(reference().join("sd/base/vae/config.json"), &config).unwrap();
    let error = StableDiffusionPipeline::<B>::from_pretrained(checkpoint.path(), &device);
    assert_eq!(
        error.err().unwrap().to_string(),
        format!(
            "`{}` is not a valid configuration: its class is AutoencoderKL, not AutoencoderTiny",
            config.display()
        )
    );
}

/// Configuration and weights of an `AutoencoderTiny`, from the files that it is saved to.
fn saved(vae: Autoencoder<B>) -> (Value, Vec<(String, Vec<f32>)>) {
    let Autoencoder::Tiny(vae) = vae else {
        panic!("it is an AutoencoderKL")
    };
    let folder = tempfile::tempdir().unwrap();
    vae.save_pretrained(folder.path()).unwrap();
    let config = fs::read_to_string(folder.path().join("config.json")).unwrap();
    let weights = folder.path().join("diffusion_pytorch_model.safetensors");
    let weights = Checkpoint::open(weights).unwrap();
    let tensors = weights.tensors().keys().map(|key| {
        let values = weights.read_f32(key).unwrap();
        (key.clone(), values.iter().collect())
    });
    (serde_json::from_str(&config).unwrap(), tensors.collect())
}

#[test]
fn files_of_a_tiny_autoencoder_are_the_same_model() {
    let expected = saved(load(folder().join("tiny")).unwrap());
    for name in [
        "tiny/diffusion_pytorch_model.safetensors",
        "taesd_decoder.pth",
        "taesd_encoder.pth",
    ] {
        let path = folder().join(name);
        assert_eq!(FileKind::read(&path).unwrap(), FileKind::TinyVae, "{name}");
        assert!(FileKind::TinyVae.is_supported());
        assert!(saved(load(path).unwrap()) == expected, "{name}");
    }
}

#[test]
fn half_of_a_tiny_autoencoder_needs_the_other() {
    let alone = tempfile::tempdir().unwrap();
    let check = |own: &str, other: &str, name: &str| {
        let path = alone.path().join(name);
        fs::copy(folder().join(format!("taesd_{own}.pth")), &path).unwrap();
        assert_eq!(
            load(path.clone()).err().unwrap().to_string(),
            format!(
                "`{}` is the {own} of a TAESD: it has to be called `taesd_{own}`, with \
                 `taesd_{other}` beside it",
                path.display()
            )
        );
        fs::remove_file(path).unwrap();
    };
    check("decoder", "encoder", "taesd_decoder.pth");
    check("encoder", "decoder", "taesd_encoder.pth");
    check("decoder", "encoder", "taesd.pth");
    // Twice the same half.
    for name in ["taesd_decoder.pth", "taesd_encoder.pth"] {
        fs::copy(folder().join("taesd_decoder.pth"), alone.path().join(name)).unwrap();
    }
    let error = load(alone.path().join("taesd_decoder.pth")).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "`{}` lacks `encoder.layers.0.weight`, `encoder.layers.0.bias`, \
             `encoder.layers.1.conv.0.weight` and 28 more",
            alone.path().join("taesd_encoder.pth").display()
        )
    );
}

#[test]
fn configurations_that_are_not_computed_are_refused() {
    let check = |key: &str, value: Value, expected: &str| {
        let mut map = AutoencoderTinyConfig::default().to_map();
        map.insert(key.to_string(), value);
        let error = AutoencoderTinyConfig::from_map(map, &|message| panic!("{message}"));
        assert_eq!(error.unwrap_err().to_string(), expected);
    };
    check(
        "act_fn",
        json!("gelu"),
        "`act_fn` is \"gelu\", but AutoencoderTiny supports only \"relu\"",
    );
    check(
        "upsampling_scaling_factor",
        json!(4),
        "`upsampling_scaling_factor` is 4, but AutoencoderTiny supports only 2",
    );
    check(
        "encoder_block_out_channels",
        json!([64, 64, 64, 32]),
        "`encoder_block_out_channels` is [64,64,64,32], but AutoencoderTiny supports only the same \
         number of channels at each level",
    );
    check(
        "num_decoder_blocks",
        json!([3, 3, 3]),
        "`num_decoder_blocks` is 3, but AutoencoderTiny supports as many entries as \
         `decoder_block_out_channels` (4)",
    );
    check(
        "num_encoder_blocks",
        json!([1, 0, 3, 3]),
        "`num_encoder_blocks` is 0, but AutoencoderTiny supports 1 to 32",
    );
    check(
        "scaling_factor",
        json!(0.0),
        "`scaling_factor` is 0.0, but AutoencoderTiny supports positive numbers",
    );
    let config = AutoencoderTinyConfig::from_file(folder().join("tiny/config.json")).unwrap();
    assert_eq!(config.num_encoder_blocks, [1, 2, 1, 2]);
    assert_eq!(config.downscale(), 8);
    let model = AutoencoderTiny::<B>::from_config(&config, &Default::default());
    assert_eq!(model.config(), &config);
}

#[test]
fn previews_are_of_the_predicted_result_where_there_is_one() {
    let device = Default::default();
    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(reference().join("sd/base"), &device)
            .unwrap();
    let options = StableDiffusionOptions {
        num_inference_steps: 3,
        num_images_per_prompt: 2,
        seeds: vec![1],
        ..StableDiffusionOptions::from("a lighthouse")
    };
    for (scheduler, predicts) in [("PNDMScheduler", false), ("DDIMScheduler", true)] {
        let config = pipeline.scheduler.config();
        pipeline.scheduler =
            scheduler_from_config(config, Some(scheduler), &Overrides::new()).unwrap();
        let without = pipeline.generate(&options).unwrap();
        let previews = [
            LatentPreview::from(LatentRgb::STABLE_DIFFUSION),
            LatentPreview::Decoder(pipeline.vae.clone()),
        ];
        let mut last = Vec::new();
        let inputs = StableDiffusionInputs::default();
        let generated = pipeline.generate_with(&options, inputs, |event| {
            assert_eq!(event.pred_original_sample.is_some(), predicts);
            let expected = event.pred_original_sample.unwrap_or(event.latents);
            let latents = event.preview_latents();
            latents.to_data().assert_eq(&expected.to_data(), true);
            last = previews
                .iter()
                .map(|preview| preview.images(latents).unwrap())
                .collect();
            ControlFlow::Continue(())
        });
        let generated = generated.unwrap();
        // No bit of the result changes.
        let latents = generated.latents.to_data();
        latents.assert_eq(&without.latents.to_data(), true);
        assert!(generated.images == without.images);
        assert_eq!(last[0].len(), 2);
        assert_eq!(last[0][0].dimensions(), (8, 8));
        // The last latents are the result; the last prediction of DDIM is not.
        assert_eq!(last[1] == generated.images, !predicts);
    }
}
