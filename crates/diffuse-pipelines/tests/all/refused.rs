//! Everything that the reference refuses is refused here, with a message that names what is wrong.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use burn_flex::Flex;
use diffuse_pipelines::clip::CLIPTextModel;
use diffuse_pipelines::schedulers::{Overrides, scheduler_from_config};
use diffuse_pipelines::unet::{ModelConfig, UNet2DConditionModel, UNet2DModel};
use diffuse_pipelines::vae::AutoencoderKL;
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, Pretrained, StableDiffusionInputs, StableDiffusionOptions,
    StableDiffusionPipeline, generators,
};
use diffuse_testing::{is_another_set, read_json, reference};
use serde_json::{Map, Value};

type B = Flex;

/// What this crate's types make impossible: a prompt that is a number, callbacks by name.
const IMPOSSIBLE: [&str; 3] = [
    "pipeline_prompt_is_number",
    "pipeline_callback_steps",
    "pipeline_callback_tensors",
];

/// What the reference refuses and is allowed here: one negative prompt serves all prompts.
const ALLOWED: [&str; 2] = [
    "pipeline_negative_of_other_type",
    "pipeline_negative_of_other_length",
];

/// What is refused, and the message, which names the key or the option that is wrong.
const MESSAGES: [(&str, &str); 46] = [
    (
        "unet_fewer_up_blocks",
        "`up_block_types` is 3, but UNet2DConditionModel supports as many entries as \
         `block_out_channels` (4)",
    ),
    (
        "unet_fewer_channels",
        "`down_block_types` is 4, but UNet2DConditionModel supports as many entries as \
         `block_out_channels` (3)",
    ),
    (
        "unet_head_dims_length",
        "`attention_head_dim` is [2,4], but UNet2DConditionModel supports one value, or as many \
         as `block_out_channels` (4)",
    ),
    (
        "unet_layers_length",
        "`layers_per_block` is [1,1,1], but UNet2DConditionModel supports one value, or as many \
         as `block_out_channels` (4)",
    ),
    (
        "unet_cross_dims_length",
        "`cross_attention_dim` is [24,24], but UNet2DConditionModel supports one value, or as \
         many as `block_out_channels` (4)",
    ),
    (
        "unet_only_cross_length",
        "`only_cross_attention` is [true,false], but UNet2DConditionModel supports one value, or \
         as many as `block_out_channels` (4)",
    ),
    (
        "unet_num_attention_heads",
        "`num_attention_heads` is 8, but UNet2DConditionModel supports only null",
    ),
    (
        "unet_unknown_down_block",
        "`config.json` is not a valid configuration: `down_block_types[3]`: unknown variant \
         `SidewaysBlock2D`, expected one of `DownBlock2D`, `CrossAttnDownBlock2D`, \
         `ResnetDownsampleBlock2D`",
    ),
    (
        "unet_unknown_up_block",
        "`config.json` is not a valid configuration: `up_block_types[0]`: unknown variant \
         `SidewaysBlock2D`, expected one of `UpBlock2D`, `CrossAttnUpBlock2D`, \
         `ResnetUpsampleBlock2D`",
    ),
    (
        "unet_unknown_mid_block",
        "`config.json` is not a valid configuration: `mid_block_type`: unknown variant \
         `SidewaysMidBlock2D`, expected `UNetMidBlock2DCrossAttn` or `UNetMidBlock2D`",
    ),
    (
        "unet_unknown_activation",
        "`config.json` is not a valid configuration: `act_fn`: unknown variant `sigmoidal`, \
         expected one of `silu`, `swish`, `gelu`, `quick_gelu`",
    ),
    (
        "unet_groups_do_not_divide",
        "`block_out_channels` is 16, but UNet2DConditionModel supports multiples of \
         `norm_num_groups` (3)",
    ),
    (
        "unet_unknown_time_embedding",
        "`time_embedding_type` is \"learned\", but UNet2DConditionModel supports only \
         \"positional\"",
    ),
    (
        "unet_projection_without_width",
        "`projection_class_embeddings_input_dim` is null, but UNet2DConditionModel supports 1 to \
         65536 for projections",
    ),
    (
        "unet_2d_fewer_up_blocks",
        "`up_block_types` is 2, but UNet2DModel supports as many entries as `block_out_channels` \
         (3)",
    ),
    (
        "unet_2d_fewer_channels",
        "`down_block_types` is 3, but UNet2DModel supports as many entries as \
         `block_out_channels` (2)",
    ),
    (
        "unet_2d_unknown_down_block",
        "`config.json` is not a valid configuration: `down_block_types[1]`: unknown variant \
         `SidewaysBlock2D`, expected one of `DownBlock2D`, `AttnDownBlock2D`, \
         `ResnetDownsampleBlock2D`",
    ),
    (
        "unet_2d_unknown_activation",
        "`config.json` is not a valid configuration: `act_fn`: unknown variant `sigmoidal`, \
         expected one of `silu`, `swish`, `gelu`, `quick_gelu`",
    ),
    (
        "unet_2d_groups_do_not_divide",
        "`block_out_channels` is 8, but UNet2DModel supports multiples of `norm_num_groups` (5)",
    ),
    (
        "vae_unknown_down_block",
        "`config.json` is not a valid configuration: `down_block_types[3]`: unknown variant \
         `SidewaysBlock2D`, expected `DownEncoderBlock2D`",
    ),
    (
        "vae_unknown_up_block",
        "`config.json` is not a valid configuration: `up_block_types[3]`: unknown variant \
         `SidewaysBlock2D`, expected `UpDecoderBlock2D`",
    ),
    (
        "vae_unknown_activation",
        "`config.json` is not a valid configuration: `act_fn`: unknown variant `sigmoidal`, \
         expected one of `silu`, `swish`, `gelu`, `quick_gelu`",
    ),
    (
        "vae_groups_do_not_divide",
        "`block_out_channels` is 8, but AutoencoderKL supports multiples of `norm_num_groups` (3)",
    ),
    (
        "text_encoder_heads_do_not_divide",
        "`num_attention_heads` is 5, but CLIPTextModel supports divisors of `hidden_size` (24)",
    ),
    (
        "text_encoder_unknown_activation",
        "`config.json` is not a valid configuration: `hidden_act`: unknown variant `sigmoidal`, \
         expected one of `silu`, `swish`, `gelu`, `quick_gelu`",
    ),
    (
        "pipeline_height",
        "`height` and `width` have to be divisible by 8 and not zero, but `height` is 60",
    ),
    (
        "pipeline_width",
        "`height` and `width` have to be divisible by 8 and not zero, but `width` is 100",
    ),
    (
        "pipeline_prompt_and_embeds",
        "provide only one of `prompt` and `prompt_embeds`",
    ),
    (
        "pipeline_no_prompt",
        "provide either `prompt` or `prompt_embeds`",
    ),
    (
        "pipeline_negative_and_embeds",
        "provide only one of `negative_prompt` and `negative_prompt_embeds`",
    ),
    (
        "pipeline_embeds_of_other_shape",
        "`prompt_embeds` [1, 77, 24] and `negative_prompt_embeds` [2, 77, 24] must have the same \
         shape",
    ),
    (
        "pipeline_timesteps_and_sigmas",
        "only one of `timesteps` or `sigmas` can be given",
    ),
    (
        "pipeline_pndm_timesteps",
        "`timesteps` cannot be used by `PNDMScheduler`: its `set_timesteps` takes a number of \
         steps",
    ),
    (
        "pipeline_ddim_timesteps",
        "`timesteps` cannot be used by `DDIMScheduler`: its `set_timesteps` takes a number of \
         steps",
    ),
    (
        "pipeline_unipc_timesteps",
        "`timesteps` cannot be used by `UniPCMultistepScheduler`: its `set_timesteps` takes a \
         number of steps",
    ),
    (
        "pipeline_ddpm_sigmas",
        "`sigmas` cannot be used by `DDPMScheduler`: its `set_timesteps` takes a number of steps",
    ),
    (
        "pipeline_ddpm_timesteps_rising",
        "`timesteps` cannot be used by `DDPMScheduler`: they must be in descending order",
    ),
    (
        "pipeline_ddpm_timesteps_too_late",
        "`timesteps` cannot be used by `DDPMScheduler`: each must be in `0..num_train_timesteps`",
    ),
    (
        "pipeline_euler_timesteps_karras",
        "`timesteps` cannot be used by `EulerDiscreteScheduler`: they are chosen already, by \
         `use_*_sigmas`, `use_lu_lambdas` or `timestep_type`",
    ),
    (
        "pipeline_euler_two_spacings",
        "`use_karras_sigmas`, `use_exponential_sigmas` and `use_beta_sigmas` do not go together \
         in `EulerDiscreteScheduler`: only one of them can be true",
    ),
    (
        "pipeline_ddim_too_many_steps",
        "`num_inference_steps` is `1001`, `DDIMScheduler` supports 1 to 1000 \
         (`num_train_timesteps`)",
    ),
    (
        "pipeline_ddpm_too_many_steps",
        "`num_inference_steps` is `1001`, `DDPMScheduler` supports 1 to 1000 \
         (`num_train_timesteps`)",
    ),
    (
        "pipeline_generators",
        "3 seeds for an effective batch size of 2: give one for the whole batch, or one an image",
    ),
    (
        "pipeline_generators_for_images",
        "3 seeds for an effective batch size of 2: give one for the whole batch, or one an image",
    ),
    (
        "pipeline_latents_of_other_channels",
        "`latents` has shape [1, 3, 8, 8], but these options need [1, 4, 8, 8]",
    ),
    (
        "pipeline_ddim_generators",
        "3 seeds for an effective batch size of 2: give one for the whole batch, or one an image",
    ),
];

#[test]
fn what_the_reference_refuses_is_refused() {
    let path = reference().join("refused.json");
    if !path.is_file() {
        assert!(is_another_set());
        return;
    }
    let rows = read_json(path);
    let rows = rows.as_array().unwrap();
    let (mut compared, mut wrong) = (0, Vec::new());
    for row in rows {
        let name = row["name"].as_str().unwrap();
        if IMPOSSIBLE.contains(&name) || ALLOWED.contains(&name) {
            continue;
        }
        let error = match row["component"].as_str().unwrap() {
            "unet" => config_error::<UNet2DConditionModel<B>>(row),
            "unet_2d" => config_error::<UNet2DModel<B>>(row),
            "vae" => config_error::<AutoencoderKL<B>>(row),
            "text_encoder" => config_error::<CLIPTextModel<B>>(row),
            "pipeline" => call_error(row),
            other => panic!("{name}: {other}"),
        };
        let message = error.unwrap_or_else(|| panic!("{name} is not refused"));
        let expected = MESSAGES.iter().find(|(row, _)| *row == name);
        let (_, expected) = expected.unwrap_or_else(|| panic!("no message for {name}"));
        if message != *expected {
            wrong.push(format!("{name}: {message}"));
        }
        compared += 1;
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    if !is_another_set() {
        assert_eq!(compared, MESSAGES.len());
    }
}

/// The error of a configuration with the row's changes.
fn config_error<M: Pretrained<B>>(row: &Value) -> Option<String> {
    let base = reference().join(row["base"].as_str().unwrap());
    let config = read_json(base.join("config.json"));
    let mut map: Map<String, Value> = config.as_object().unwrap().clone();
    map.extend(row["config"].as_object().unwrap().clone());
    let invalid = |message| diffuse_nn::config::ConfigError::Parse {
        path: "config.json".into(),
        message,
    };
    let error = M::Config::from_map(map, &invalid).err()?;
    Some(error.to_string())
}

fn call_error(row: &Value) -> Option<String> {
    let base = reference().join(row["base"].as_str().unwrap());
    let call = row["call"].as_object().unwrap();
    let count = |key: &str| {
        call.get(key)
            .and_then(Value::as_u64)
            .map(|count| count as usize)
    };
    let seeds = match count("generators") {
        // A list of one generator is one generator here.
        Some(1) => vec![0, 1, 2],
        Some(count) => (0..count as u64).collect(),
        None => vec![0],
    };
    if row["pipeline"] != "StableDiffusionPipeline" {
        let pipeline = DDPMPipeline::<B>::from_pretrained(base, &Default::default()).unwrap();
        let options = DDPMOptions {
            batch_size: count("batch_size").unwrap(),
            num_inference_steps: 2,
            seeds,
            ..DDPMOptions::default()
        };
        return pipeline
            .generate(&options)
            .err()
            .map(|error| error.to_string());
    }

    let mut pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(base, &Default::default()).unwrap();
    let overrides: Overrides = row["scheduler_options"].as_object().unwrap().clone();
    let config = pipeline.scheduler.config();
    match scheduler_from_config(config, row["scheduler"].as_str(), &overrides) {
        Ok(scheduler) => pipeline.scheduler = scheduler,
        Err(error) => return Some(error.to_string()),
    }
    let texts = |key: &str| match call.get(key) {
        Some(Value::String(text)) => vec![text.clone()],
        Some(Value::Array(texts)) => {
            let texts = texts.iter().map(|text| text.as_str().unwrap().to_string());
            texts.collect()
        }
        _ => Vec::new(),
    };
    let numbers = |key: &str| {
        let numbers = call.get(key)?.as_array()?.iter();
        Some(numbers.map(|number| number.as_f64().unwrap()).collect())
    };
    let zeros = |key: &str| -> Option<Vec<usize>> {
        let shape = call.get(key)?.get("zeros")?.as_array()?.iter();
        Some(shape.map(|size| size.as_u64().unwrap() as usize).collect())
    };
    let embeds = |key: &str| {
        let shape: [usize; 3] = zeros(key)?.try_into().unwrap();
        Some(Tensor::zeros(shape, &Default::default()))
    };
    let start = zeros("latents").map(|shape| {
        let shape: [usize; 4] = shape.try_into().unwrap();
        Tensor::zeros(shape, &Default::default())
    });
    let options = StableDiffusionOptions {
        prompt: texts("prompt"),
        negative_prompt: texts("negative_prompt"),
        height: count("height"),
        width: count("width"),
        num_inference_steps: count("num_inference_steps").unwrap_or(2),
        timesteps: numbers("timesteps"),
        sigmas: numbers("sigmas"),
        num_images_per_prompt: count("num_images_per_prompt").unwrap_or(1),
        seeds,
        ..StableDiffusionOptions::default()
    };
    let inputs = StableDiffusionInputs {
        prompt_embeds: embeds("prompt_embeds"),
        negative_prompt_embeds: embeds("negative_prompt_embeds"),
        latents: start,
        ..StableDiffusionInputs::default()
    };
    let run = pipeline.generate_with(&options, inputs, |_| ControlFlow::Continue(()));
    let error = run.err()?;
    Some(error.to_string())
}

/// The error of a run with these options.
#[track_caller]
fn check(options: StableDiffusionOptions, expected: &str) {
    check_inputs(options, StableDiffusionInputs::default(), expected);
}

/// The error of a run with these options and inputs.
#[track_caller]
fn check_inputs(
    options: StableDiffusionOptions,
    inputs: StableDiffusionInputs<'_, B>,
    expected: &str,
) {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let run = pipeline.generate_with(&options, inputs, |_| ControlFlow::Continue(()));
    let message = run.unwrap_err().to_string();
    assert_eq!(message, expected);
}

fn options() -> StableDiffusionOptions {
    StableDiffusionOptions {
        num_inference_steps: 1,
        ..StableDiffusionOptions::from("a lighthouse")
    }
}

#[test]
fn options_that_make_no_sense_are_errors() {
    let base = options();
    check(
        StableDiffusionOptions {
            width: Some(0),
            ..base.clone()
        },
        "`height` and `width` have to be divisible by 8 and not zero, but `width` is 0",
    );
    check(
        StableDiffusionOptions {
            height: Some(12),
            ..base.clone()
        },
        "`height` and `width` have to be divisible by 8 and not zero, but `height` is 12",
    );
    check(
        StableDiffusionOptions {
            width: Some(1 << 30),
            height: Some(1 << 30),
            ..base.clone()
        },
        "1 images of 1073741824 x 1073741824 are too large a batch: at most 268435456 pixels at \
         once",
    );
    check(
        StableDiffusionOptions {
            num_inference_steps: 0,
            ..base.clone()
        },
        "`num_inference_steps` is `0`, `PNDMScheduler` supports 1 to 1000 (`num_train_timesteps`)",
    );
    check(
        StableDiffusionOptions {
            num_inference_steps: 1001,
            ..base.clone()
        },
        "`num_inference_steps` is `1001`, `PNDMScheduler` supports 1 to 1000 \
         (`num_train_timesteps`)",
    );
    check(
        StableDiffusionOptions {
            guidance_scale: f64::NAN,
            ..base.clone()
        },
        "`guidance_scale` is NaN",
    );
    check(
        StableDiffusionOptions {
            eta: -0.5,
            ..base.clone()
        },
        "`eta` is -0.5, but has to be in [0, 1]",
    );
    check(
        StableDiffusionOptions {
            guidance_rescale: 2.0,
            ..base.clone()
        },
        "`guidance_rescale` is 2, but has to be in [0, 1]",
    );
    check(
        StableDiffusionOptions {
            clip_skip: Some(99),
            ..base.clone()
        },
        "`clip_skip` is 99, but the text encoder has 3 layers",
    );
    check(
        StableDiffusionOptions {
            num_images_per_prompt: 0,
            ..base.clone()
        },
        "`num_images_per_prompt` is 0",
    );
    check(
        StableDiffusionOptions {
            negative_prompt: vec!["a".into(), "b".into()],
            ..base
        },
        "2 negative prompts for 1 prompts: give one for all, or one for each",
    );
}

#[test]
fn inputs_that_do_not_fit_the_options_are_errors() {
    let inputs = StableDiffusionInputs {
        latents: Some(Tensor::zeros([2, 4, 8, 8], &Default::default())),
        ..StableDiffusionInputs::default()
    };
    check_inputs(
        options(),
        inputs,
        "`latents` has shape [2, 4, 8, 8], but these options need [1, 4, 8, 8]",
    );
    let mut noise = generators(&[3]);
    let inputs = StableDiffusionInputs {
        noise: Some(&mut noise),
        ..StableDiffusionInputs::default()
    };
    let seeded = StableDiffusionOptions {
        seeds: vec![3],
        ..options()
    };
    check_inputs(
        seeded,
        inputs,
        "provide only one of `seeds` and a noise source",
    );
}

#[test]
fn callback_changes_latents_and_stops_the_run() {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let options = StableDiffusionOptions {
        num_inference_steps: 5,
        ..options()
    };
    let mut noise = generators(&[3]);
    let inputs = StableDiffusionInputs {
        noise: Some(&mut noise),
        ..StableDiffusionInputs::default()
    };
    let mut seen = Vec::new();
    let generated = pipeline
        .generate_with(&options, inputs, |event| {
            seen.push((event.step, event.timestep));
            *event.latents = event.latents.zeros_like() + 0.25;
            if event.step == 2 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
    assert!(generated.interrupted);
    let timesteps: Vec<f64> = seen.iter().map(|(_, timestep)| *timestep).collect();
    assert_eq!(timesteps, generated.timesteps[..3]);
    assert!(generated.images.is_empty());
    assert_eq!(pipeline.decode(generated.latents.clone()).unwrap().len(), 1);
    let values = generated.latents.into_data();
    assert!(values.iter::<f32>().all(|value| value == 0.25));
}

#[test]
fn one_pipeline_serves_several_threads() {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let generate = |steps: usize| {
        let options = StableDiffusionOptions {
            num_inference_steps: steps,
            seeds: vec![5],
            ..options()
        };
        pipeline.generate(&options).unwrap().images
    };
    let alone = [2, 3].map(generate);
    assert_ne!(alone[0], alone[1]);
    let together = std::thread::scope(|scope| {
        let threads = [2, 3].map(|steps| scope.spawn(move || generate(steps)));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(together, alone);
}

#[test]
fn embeddings_in_place_of_prompts_give_the_same_image() {
    let folder = reference().join("sd/base");
    let pipeline =
        StableDiffusionPipeline::<B>::from_pretrained(folder, &Default::default()).unwrap();
    let by_text = StableDiffusionOptions {
        seeds: vec![5],
        ..options()
    };
    let embeds = |text: &str| {
        pipeline
            .encode_prompt(&[text.to_string()], None)
            .unwrap()
            .embeds
    };
    let by_embeds = StableDiffusionOptions {
        prompt: Vec::new(),
        ..by_text.clone()
    };
    let inputs = StableDiffusionInputs {
        prompt_embeds: Some(embeds("a lighthouse")),
        negative_prompt_embeds: Some(embeds("")),
        ..StableDiffusionInputs::default()
    };
    let expected = pipeline.generate(&by_text).unwrap();
    let got = pipeline.generate_with(&by_embeds, inputs, |_| ControlFlow::Continue(()));
    let got = got.unwrap();
    assert_eq!(got.images, expected.images);
}
