//! Options of a run, and their checks.

use burn::tensor::{Tensor, backend::Backend};
use diffuse_schedulers::{NoiseSource, TimestepRequest};
use diffuse_unet::{FreeU, Pretrained};

use super::{StableDiffusionControl, StableDiffusionPipeline};
use crate::PipelineError;
use crate::generation::check_generators;

/// Options of [`StableDiffusionPipeline`], by the reference's names and with its defaults.
#[derive(Debug, Clone)]
pub struct StableDiffusionOptions {
    /// What to show; several are a batch.
    pub prompt: Vec<String>,
    /// What not to show: none, one for all prompts, or one for each.
    pub negative_prompt: Vec<String>,
    /// How prompts are read.
    pub prompt_syntax: PromptSyntax,
    /// Height in pixels, a multiple of 8; by default that of `latents`, or else what the UNet was
    /// made for.
    pub height: Option<usize>,
    /// Width in pixels, a multiple of 8; by default that of `latents`, or else what the UNet was
    /// made for.
    pub width: Option<usize>,
    /// Number of steps.
    pub num_inference_steps: usize,
    /// In place of `num_inference_steps`: the timesteps themselves, falling.
    pub timesteps: Option<Vec<f64>>,
    /// In place of `num_inference_steps`: the sigmas themselves, falling.
    pub sigmas: Option<Vec<f64>>,
    /// How far to go beyond the prompt's own prediction; there is no second forward pass at 1 and
    /// below.
    pub guidance_scale: f64,
    /// How much of the guided noise's spread is taken back, in `[0, 1]`.
    pub guidance_rescale: f64,
    /// Images of each prompt.
    pub num_images_per_prompt: usize,
    /// How much noise each step adds, for schedulers that take it (DDIM), from 0 (none) to 1 (as
    /// DDPM).
    pub eta: f64,
    /// How many of the text encoder's last layers the prompt leaves out; the negative prompt goes
    /// through all, unless the syntax is A1111's.
    pub clip_skip: Option<usize>,
    /// Whether ControlNets see the conditional half of a guided run only, and their residuals rise
    /// from 0.1 to 1 with depth: they find out what their image shows even without a prompt. A
    /// guidance scale of 3 to 5 is recommended.
    pub guess_mode: bool,
    /// FreeU: another balance of backbone and skip connections.
    pub freeu: Option<FreeU>,
    /// DeepCache: the inner blocks of the UNet are computed in every so many steps, and kept in
    /// between; 1 computes all.
    pub cache_interval: usize,
    /// DeepCache: the skip connection that is the last to be computed in each step
    /// ([`DeepCache::new`](diffuse_unet::DeepCache::new)).
    pub cache_branch_id: usize,
    /// Whether [`StepEvent::pred_original_sample`](crate::StepEvent::pred_original_sample) is
    /// computed with schedulers that do without it, too; for previews.
    pub predict_original: bool,
    /// None: one at random. One: a generator for the whole batch. As many as images: a generator
    /// each.
    pub seeds: Vec<u64>,
}

impl Default for StableDiffusionOptions {
    fn default() -> Self {
        Self {
            prompt: Vec::new(),
            negative_prompt: Vec::new(),
            prompt_syntax: PromptSyntax::Plain,
            height: None,
            width: None,
            num_inference_steps: 50,
            timesteps: None,
            sigmas: None,
            guidance_scale: 7.5,
            guidance_rescale: 0.0,
            num_images_per_prompt: 1,
            eta: 0.0,
            clip_skip: None,
            guess_mode: false,
            freeu: None,
            cache_interval: 1,
            cache_branch_id: 0,
            predict_original: false,
            seeds: Vec::new(),
        }
    }
}

impl From<&str> for StableDiffusionOptions {
    fn from(prompt: &str) -> Self {
        Self {
            prompt: vec![prompt.to_string()],
            ..Self::default()
        }
    }
}

/// How prompts are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum PromptSyntax {
    /// As text, of which the text encoder takes the first 75 tokens. As Diffusers does.
    #[default]
    Plain,
    /// With weights, `(word:1.3)`, `((word))` and `[word]`, with `BREAK`, and of any length. As
    /// AUTOMATIC1111's web UI does ([`prompt_syntax`](diffuse_clip::prompt_syntax)); `clip_skip`
    /// counts for the negative prompt as well. A prompt that names a LoRA is an error: see
    /// [`set_adapters`](StableDiffusionPipeline::set_adapters) and
    /// [`take_lora_tags`](diffuse_clip::prompt_syntax::take_lora_tags).
    A1111,
}

/// Tensors and noise of a run, in place of what it would make of its options.
pub struct StableDiffusionInputs<'a, B: Backend> {
    /// In place of [`prompt`](StableDiffusionOptions::prompt): `[batch, tokens, hidden_size]`.
    pub prompt_embeds: Option<Tensor<B, 3>>,
    /// In place of [`negative_prompt`](StableDiffusionOptions::negative_prompt): shaped as
    /// `prompt_embeds`.
    pub negative_prompt_embeds: Option<Tensor<B, 3>>,
    /// The initial noise of unit variance, in place of drawing it: `[batch, channels, height / 8,
    /// width / 8]`.
    pub latents: Option<Tensor<B, 4>>,
    /// The noise to draw, in place of [`seeds`](StableDiffusionOptions::seeds).
    pub noise: Option<&'a mut dyn NoiseSource>,
    /// ControlNets, whose residuals are added up. Without `height` and `width` images have the size
    /// of the first one's image, rounded down to multiples of 8.
    pub control: Vec<StableDiffusionControl<'a, B>>,
}

impl<B: Backend> Default for StableDiffusionInputs<'_, B> {
    fn default() -> Self {
        Self {
            prompt_embeds: None,
            negative_prompt_embeds: None,
            latents: None,
            noise: None,
            control: Vec::new(),
        }
    }
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Checks options and inputs against each other and against the parts, before anything is
    /// computed.
    ///
    /// # Errors
    /// If one makes no sense.
    pub fn check_inputs(
        &self,
        options: &StableDiffusionOptions,
        inputs: &StableDiffusionInputs<'_, B>,
    ) -> Result<(), PipelineError> {
        self.check_unet_for("text to image")?;
        self.check_run(options, inputs)
    }

    /// [`check_inputs`](Self::check_inputs) with any UNet.
    pub(super) fn check_run(
        &self,
        options: &StableDiffusionOptions,
        inputs: &StableDiffusionInputs<'_, B>,
    ) -> Result<(), PipelineError> {
        check_options(options, inputs).map_err(PipelineError::Options)?;
        let [batch, channels, height, width] = self.latent_shape(options, inputs)?;
        check_generators(options.seeds.len(), batch)?;
        self.check_controls(&inputs.control, batch / options.num_images_per_prompt)?;
        if let Some(latents) = &inputs.latents {
            let given = latents.dims();
            let expected = [batch, channels, height, width];
            if given != expected {
                return Err(PipelineError::Options(format!(
                    "`latents` has shape {given:?}, but these options need {expected:?}"
                )));
            }
        }
        let branches = self.unet.down_blocks[0].num_layers();
        if options.cache_branch_id > branches {
            return Err(PipelineError::Options(format!(
                "`cache_branch_id` is {}, but has to be in 0..={branches} for this UNet",
                options.cache_branch_id
            )));
        }
        let layers = self.text_encoder.text_model.encoder.layers.len();
        if let Some(skip) = options.clip_skip.filter(|skip| *skip > layers) {
            return Err(PipelineError::Options(format!(
                "`clip_skip` is {skip}, but the text encoder has {layers} layers"
            )));
        }
        let dim = self.text_encoder.config().hidden_size;
        for (name, embeds) in [
            ("prompt_embeds", &inputs.prompt_embeds),
            ("negative_prompt_embeds", &inputs.negative_prompt_embeds),
        ] {
            let Some([rows, tokens, size]) = embeds.as_ref().map(Tensor::dims) else {
                continue;
            };
            if size != dim || rows == 0 || tokens == 0 {
                return Err(PipelineError::Options(format!(
                    "`{name}` has shape {:?}, but the UNet takes embeddings of {dim}",
                    [rows, tokens, size]
                )));
            }
            let texts = self.tokenizer.max_length();
            let both = inputs.prompt_embeds.is_some() && inputs.negative_prompt_embeds.is_some();
            let guided = options.guidance_scale > 1.0;
            if !both && guided && tokens != texts {
                return Err(PipelineError::Options(format!(
                    "`{name}` has {tokens} tokens, but the texts beside it have {texts}: give embeddings for both"
                )));
            }
        }
        Ok(())
    }
}

/// Which timesteps the options ask for.
pub(super) fn timestep_request(options: &StableDiffusionOptions) -> TimestepRequest {
    match (&options.timesteps, &options.sigmas) {
        (Some(timesteps), _) => TimestepRequest::Timesteps(timesteps.clone()),
        (None, Some(sigmas)) => TimestepRequest::Sigmas(sigmas.clone()),
        (None, None) => TimestepRequest::Steps(options.num_inference_steps),
    }
}

/// What can be checked without the parts.
fn check_options<B: Backend>(
    options: &StableDiffusionOptions,
    inputs: &StableDiffusionInputs<'_, B>,
) -> Result<(), String> {
    if inputs.noise.is_some() && !options.seeds.is_empty() {
        return Err("provide only one of `seeds` and a noise source".into());
    }

    match (&options.prompt[..], &inputs.prompt_embeds) {
        ([], None) => return Err("provide either `prompt` or `prompt_embeds`".into()),
        ([_, ..], Some(_)) => {
            return Err("provide only one of `prompt` and `prompt_embeds`".into());
        }
        _ => {}
    }
    if !options.negative_prompt.is_empty() && inputs.negative_prompt_embeds.is_some() {
        return Err("provide only one of `negative_prompt` and `negative_prompt_embeds`".into());
    }
    let texts = match &inputs.prompt_embeds {
        Some(embeds) => embeds.dims()[0],
        None => options.prompt.len(),
    };
    let negative = options.negative_prompt.len();
    if negative > 1 && negative != texts {
        return Err(format!(
            "{negative} negative prompts for {texts} prompts: give one for all, or one for each"
        ));
    }
    if let Some(negative) = inputs.negative_prompt_embeds.as_ref().map(Tensor::dims) {
        if let Some(positive) = inputs.prompt_embeds.as_ref().map(Tensor::dims)
            && positive != negative
        {
            return Err(format!(
                "`prompt_embeds` {positive:?} and `negative_prompt_embeds` {negative:?} must have the same shape"
            ));
        }
        if negative[0] != texts {
            return Err(format!(
                "`negative_prompt_embeds` has {} rows for {texts} prompts",
                negative[0]
            ));
        }
    }
    if options.timesteps.is_some() && options.sigmas.is_some() {
        return Err("only one of `timesteps` or `sigmas` can be given".into());
    }
    if !options.guidance_scale.is_finite() {
        return Err(format!("`guidance_scale` is {}", options.guidance_scale));
    }
    for (name, value) in [
        ("guidance_rescale", options.guidance_rescale),
        ("eta", options.eta),
    ] {
        if !(0.0..=1.0).contains(&value) {
            return Err(format!("`{name}` is {value}, but has to be in [0, 1]"));
        }
    }
    if let Some(FreeU { s1, s2, b1, b2 }) = options.freeu
        && ![s1, s2, b1, b2].iter().all(|factor| factor.is_finite())
    {
        return Err(format!("`freeu` has the factors {s1}, {s2}, {b1}, {b2}"));
    }
    if options.cache_interval == 0 {
        return Err("`cache_interval` is 0".into());
    }
    if options.num_images_per_prompt == 0 {
        return Err("`num_images_per_prompt` is 0".into());
    }
    Ok(())
}
