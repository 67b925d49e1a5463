//! From texts to embeddings.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use diffuse_nn::checkpoint::float_dtype;
use diffuse_unet::Pretrained;

use super::{StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline};
use crate::PipelineError;

/// Embeddings of some texts.
#[derive(Debug, Clone)]
pub struct EncodedPrompt<B: Backend> {
    /// `[texts, tokens, hidden_size]`
    pub embeds: Tensor<B, 3>,
    /// For each text that was too long, the part that was cut.
    pub truncated: Vec<String>,
}

/// The embeddings of a run, a row for each image.
#[derive(Debug, Clone)]
pub struct PreparedPrompt<B: Backend> {
    /// What the UNet is called with: negative rows before positive ones where there is guidance,
    /// else the positive rows: `[batch or 2 · batch, tokens, hidden_size]`.
    pub context: Tensor<B, 3>,
    /// Whether there are negative rows.
    pub guided: bool,
    /// For each text that was too long, the part that was cut.
    pub truncated: Vec<String>,
}

impl<B: Backend> StableDiffusionPipeline<B> {
    /// Embeddings of texts, after the text encoder's final norm; `clip_skip` leaves out its last
    /// layers.
    ///
    /// # Errors
    /// If the tokenizer refuses a text.
    pub fn encode_prompt(
        &self,
        texts: &[String],
        clip_skip: Option<usize>,
    ) -> Result<EncodedPrompt<B>, PipelineError> {
        let mut ids = Vec::new();
        let mut truncated = Vec::new();
        for text in texts {
            let encoding = self.tokenizer.encode(text)?;
            ids.extend(encoding.ids.into_iter().map(i64::from));
            truncated.extend(encoding.truncated);
        }
        let shape = [texts.len(), self.tokenizer.max_length()];
        let device = self.unet.conv_in.weight.device();
        let ids = Tensor::<B, 2, Int>::from_data(TensorData::new(ids, shape), &device);
        let embeds = self.text_encoder.forward_skip(ids, clip_skip.unwrap_or(0));
        Ok(EncodedPrompt { embeds, truncated })
    }

    /// Embeddings for the UNet: those of the prompts, a row for each image, after those of the
    /// negative prompts where the run is guided.
    ///
    /// # Errors
    /// If the tokenizer refuses a text.
    pub fn prepare_prompt(
        &self,
        options: &StableDiffusionOptions,
        inputs: &StableDiffusionInputs<'_, B>,
    ) -> Result<PreparedPrompt<B>, PipelineError> {
        let mut truncated = Vec::new();
        let mut encode = |texts: &[String], clip_skip| {
            let encoded = self.encode_prompt(texts, clip_skip)?;
            truncated.extend(encoded.truncated);
            Ok::<_, PipelineError>(encoded.embeds)
        };
        let positive = match &inputs.prompt_embeds {
            Some(embeds) => embeds.clone(),
            None => encode(&options.prompt, options.clip_skip)?,
        };
        let [texts, tokens, dim] = positive.dims();
        // A network that takes the guidance scale as an input needs no second pass.
        let distilled = self.unet.config().time_cond_proj_dim.is_some();
        let guided = options.guidance_scale > 1.0 && !distilled;
        let mut rows = Vec::new();
        if guided {
            let negative = match (&inputs.negative_prompt_embeds, &options.negative_prompt[..]) {
                (Some(embeds), _) => embeds.clone(),
                (None, []) => encode(&[String::new()], None)?,
                (None, negative) => encode(negative, None)?,
            };
            let [given, _, _] = negative.dims();
            rows.push(if given == texts {
                negative
            } else {
                negative.expand([texts, tokens, dim])
            });
        }
        rows.push(positive);
        let images = options.num_images_per_prompt;
        let rows = rows
            .into_iter()
            .map(|rows| {
                let repeated = rows.unsqueeze_dim::<4>(1).repeat_dim(1, images);
                repeated.reshape([texts * images, tokens, dim])
            })
            .collect();
        Ok(PreparedPrompt {
            context: Tensor::cat(rows, 0).cast(float_dtype(&self.unet)),
            guided,
            truncated,
        })
    }
}
