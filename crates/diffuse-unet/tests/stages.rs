//! Every block of both UNets against values recorded from Diffusers.

use burn::tensor::{Tensor, TensorData, activation::silu, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_testing::{Values, assert_stage, is_another_set, reference};
use diffuse_unet::{
    ControlNetModel, LoadOptions, Pretrained, Timestep, UNet2DConditionModel,
    UNet2DConditionOptions, UNet2DModel,
};

/// The first batch row: blocks are recorded for it only.
fn first_row<B: Backend, const D: usize>(x: &Tensor<B, D>) -> Tensor<B, D> {
    x.clone().narrow(0, 0, 1)
}

/// The recorded blocks of a stage. A reference records all but the last, and of some stages none.
struct Blocks<'a> {
    values: &'a Values,
    left: Vec<String>,
}

impl<'a> Blocks<'a> {
    /// Blocks of a stage that has `count` of them in the set that lies here.
    fn new(values: &'a Values, count: usize) -> Self {
        let mut left = values.names();
        left.retain(|name| name.starts_with("block."));
        assert!(left.len() == count || is_another_set(), "{left:?}");
        Self { values, left }
    }

    /// Compares a block with its recorded value, if it has one.
    fn check<B: Backend, const D: usize>(&mut self, name: &str, got: &Tensor<B, D>) {
        let key = format!("block.{name}");
        if let Some(index) = self.left.iter().position(|left| *left == key) {
            self.left.swap_remove(index);
            assert_stage(&key, first_row(got), &self.values.data(&key));
        }
    }

    /// Fails where a recorded block was not compared.
    fn finish(self) {
        assert_eq!(self.left, [""; 0]);
    }
}

/// Timesteps for the batch; a single one may be recorded without a dimension.
fn timesteps(values: &Values, batch: usize) -> Timestep {
    let recorded = values.list("timestep");
    match recorded[..] {
        [timestep] => Timestep::Each(vec![timestep; batch]),
        _ => Timestep::Each(recorded),
    }
}

fn check_unet_2d<B: Backend>(folder: &str, stage: &str, blocks: usize) {
    let device = B::Device::default();
    let unet = UNet2DModel::<B>::from_pretrained(reference().join(folder), &device).unwrap();
    let values = Values::open(reference().join("ddpm/stages").join(stage));
    let mut blocks = Blocks::new(&values, blocks);
    let sample: Tensor<B, 4> = values.tensor("sample", &device);
    let timestep = timesteps(&values, sample.dims()[0]);

    let centered = if unet.config().center_input_sample {
        sample.clone() * 2.0 - 1.0
    } else {
        sample.clone()
    };
    let temb = unet.embed_time(&sample, &timestep);
    blocks.check("time_embedding", &temb);
    // Blocks use it after its activation.
    let temb = silu(temb);
    let mut x = unet.conv_in.forward(centered);
    let mut skips = vec![x.clone()];
    for (index, block) in unet.down_blocks.iter().enumerate() {
        x = block.forward(x, Some(&temb), None, &mut skips);
        blocks.check(&format!("down_blocks.{index}"), &x);
    }
    x = unet
        .mid_block
        .as_ref()
        .unwrap()
        .forward(x, Some(&temb), None);
    blocks.check("mid_block", &x);
    for (index, block) in unet.up_blocks.iter().enumerate() {
        x = block.forward(x, Some(&temb), None, &mut skips);
        blocks.check(&format!("up_blocks.{index}"), &x);
    }
    assert!(skips.is_empty(), "every skip connection is used");
    blocks.finish();

    let output = unet.forward(sample, timestep);
    assert_stage("output", output, &values.data("output"));
}

fn check_unet_2d_condition<B: Backend>(folder: &str, stage: &str, blocks: usize) {
    let device = B::Device::default();
    let unet =
        UNet2DConditionModel::<B>::from_pretrained(reference().join(folder), &device).unwrap();
    let values = Values::open(reference().join("sd/stages").join(stage));
    let mut blocks = Blocks::new(&values, blocks);
    let mut sample: Tensor<B, 4> = values.tensor("sample", &device);
    let mut context: Tensor<B, 3> = values.tensor("encoder_hidden_states", &device);
    let mut timestep = timesteps(&values, sample.dims()[0]);
    let mut expected = values.data("output");

    // Networks conditioned on the guidance scale are recorded with this one in the first row.
    let guidance = unet.config().time_cond_proj_dim.map(|_| 7.5);
    if guidance.is_some() {
        (sample, context) = (first_row(&sample), first_row(&context));
        timestep = Timestep::Each(values.list("timestep")[..1].to_vec());
        expected = first_row(&values.tensor::<B, 4>("output", &device)).into_data();
    }

    let context = context.into();
    let temb = unet.embed_time(&sample, &timestep, guidance);
    blocks.check("time_embedding", &temb);
    // Blocks use it after its activation.
    let temb = silu(temb);
    let mut x = unet.conv_in.forward(sample.clone());
    blocks.check("conv_in", &x);
    let mut skips = vec![x.clone()];
    for (index, block) in unet.down_blocks.iter().enumerate() {
        x = block.forward(x, Some(&temb), Some(&context), &mut skips);
        blocks.check(&format!("down_blocks.{index}"), &x);
    }
    let mid_block = unet.mid_block.as_ref().unwrap();
    x = mid_block.forward(x, Some(&temb), Some(&context));
    blocks.check("mid_block", &x);
    for (index, block) in unet.up_blocks.iter().enumerate() {
        x = block.forward(x, Some(&temb), Some(&context), &mut skips);
        blocks.check(&format!("up_blocks.{index}"), &x);
    }
    assert!(skips.is_empty(), "every skip connection is used");
    blocks.finish();

    let options = UNet2DConditionOptions {
        guidance_scale: guidance,
        ..UNet2DConditionOptions::default()
    };
    let output = unet.forward_with(sample, timestep, &context, options);
    assert_stage("output", output, &expected);
}

/// What a ControlNet gives, and a UNet with it.
fn check_controlnet<B: Backend>(name: &str) {
    let device = B::Device::default();
    let folder = reference().join("denoising");
    let network = ControlNetModel::<B>::from_pretrained(folder.join(name), &device).unwrap();
    let unet = reference().join("sd/base/unet");
    let unet = UNet2DConditionModel::<B>::from_pretrained(unet, &device).unwrap();
    let values = Values::open(folder.join(format!("stages/{name}.safetensors")));
    let sample: Tensor<B, 4> = values.tensor("sample", &device);
    let context: Tensor<B, 3> = values.tensor("encoder_hidden_states", &device);
    let timestep = timesteps(&values, sample.dims()[0]);
    let condition = network.embed_condition(values.tensor("controlnet_cond", &device));
    let output = network.forward(sample.clone(), timestep.clone(), &context, condition);
    assert_eq!(output.down_block_res_samples.len(), 8);
    for (index, residual) in output.down_block_res_samples.iter().enumerate() {
        let expected = values.data(&format!("down.{index}"));
        assert_stage(&format!("down.{index}"), residual.clone(), &expected);
    }
    let mid = output.mid_block_res_sample.clone();
    assert_stage("mid", mid, &values.data("mid"));
    let options = UNet2DConditionOptions {
        control: Some(&output),
        ..UNet2DConditionOptions::default()
    };
    let output = unet.forward_with(sample, timestep, &context.into(), options);
    assert_stage("output", output, &values.data("output"));
}

#[test]
fn controlnets() {
    for name in ["first", "bgr", "pooled"] {
        if recorded(&format!("denoising/stages/{name}.safetensors")) {
            check_controlnet::<Flex>(name);
            check_controlnet::<NdArray>(name);
        }
    }
}

/// Whether a stage is recorded: unusual configurations are only in the folder of this repository.
fn recorded(stage: &str) -> bool {
    let found = reference().join(stage).is_file();
    assert!(found || is_another_set(), "{stage}");
    found
}

#[test]
fn ddpm_with_old_attention_names() {
    check_unet_2d::<Flex>("ddpm/cat", "cat.safetensors", 7);
    check_unet_2d::<NdArray>("ddpm/cat", "cat.safetensors", 7);
}

#[test]
fn ddpm_with_todays_names_and_small_heads() {
    check_unet_2d::<Flex>("ddpm/new-names", "new-names.safetensors", 5);
    check_unet_2d::<NdArray>("ddpm/new-names", "new-names.safetensors", 5);
}

#[test]
fn stable_diffusion() {
    check_unet_2d_condition::<Flex>("sd/base/unet", "unet.safetensors", 11);
    check_unet_2d_condition::<NdArray>("sd/base/unet", "unet.safetensors", 11);
}

#[test]
fn stable_diffusion_at_a_size_that_does_not_halve_evenly() {
    check_unet_2d_condition::<Flex>("sd/base/unet", "unet_not_multiple_of_8.safetensors", 11);
    check_unet_2d_condition::<NdArray>("sd/base/unet", "unet_not_multiple_of_8.safetensors", 11);
}

#[test]
fn stable_diffusion_at_other_timesteps() {
    for stage in [
        "unet_fractional_timestep.safetensors",
        "unet_first_and_last_step.safetensors",
    ] {
        check_unet_2d_condition::<Flex>("sd/base/unet", stage, 0);
    }
}

#[test]
fn ddpm_that_scales_and_shifts() {
    if recorded("ddpm/stages/scale-shift.safetensors") {
        check_unet_2d::<Flex>("ddpm/scale-shift", "scale-shift.safetensors", 5);
        check_unet_2d::<NdArray>("ddpm/scale-shift", "scale-shift.safetensors", 5);
    }
}

#[test]
fn stable_diffusion_with_linear_projections_and_heads_by_level() {
    if recorded("sd/stages/unet_linear.safetensors") {
        check_unet_2d_condition::<Flex>("sd/linear/unet", "unet_linear.safetensors", 9);
        check_unet_2d_condition::<NdArray>("sd/linear/unet", "unet_linear.safetensors", 9);
    }
}

#[test]
fn stable_diffusion_that_takes_the_guidance_scale() {
    if recorded("sd/stages/unet_lcm.safetensors") {
        check_unet_2d_condition::<Flex>("sd/lcm/unet", "unet_lcm.safetensors", 7);
    }
}

#[test]
fn inpainting_with_nine_channels() {
    check_unet_2d_condition::<Flex>("sd/inpaint/unet", "unet_inpaint.safetensors", 9);
}

#[test]
fn half_precision_variant_is_the_rounded_model() {
    let device = Default::default();
    let folder = reference().join("sd/base/unet");
    let options = LoadOptions {
        variant: Some("fp16".into()),
        ..LoadOptions::default()
    };
    let half = UNet2DConditionModel::<Flex>::from_pretrained_with(&folder, &options, &device);
    let values = Values::open(reference().join("sd/stages/unet.safetensors"));
    let sample: Tensor<Flex, 4> = values.tensor("sample", &device);
    let context: Tensor<Flex, 3> = values.tensor("encoder_hidden_states", &device);
    let timestep = timesteps(&values, sample.dims()[0]);
    let output = half.unwrap().forward(sample, timestep, &context);
    let expected: TensorData = values.data("output");
    let error = (output - Tensor::from_data(expected.clone(), &device)).abs();
    let largest: f32 = error.max().into_scalar();
    assert!(largest < 2e-2, "{largest}");
    assert!(largest > 1e-6, "the variant's weights are rounded");
}
