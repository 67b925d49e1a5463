//! From texts to embeddings.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use diffuse_clip::{PromptChunks, TextualInversion};
use diffuse_nn::TextContext;
use diffuse_nn::checkpoint::float_dtype;
use diffuse_unet::Pretrained;

use super::{PromptSyntax, StableDiffusionInputs, StableDiffusionOptions, StableDiffusionPipeline};
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
    pub context: TextContext<B>,
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
        // A network that takes the guidance scale as an input needs no second pass.
        let distilled = self.unet.config().time_cond_proj_dim.is_some();
        let guided = options.guidance_scale > 1.0 && !distilled;
        let mut truncated = Vec::new();
        let [positive, negative] = match options.prompt_syntax {
            PromptSyntax::Plain => self.encode_plain(options, inputs, guided, &mut truncated)?,
            PromptSyntax::A1111 => self.encode_weighted(options, inputs, guided)?,
        };
        let positive = positive.expect("there are prompts");
        let [texts, tokens, dim] = positive.dims();
        let negative = negative.map(|negative| {
            let [given, _, _] = negative.dims();
            if given == texts {
                negative
            } else {
                negative.expand([texts, tokens, dim])
            }
        });
        let rows = negative.into_iter().chain([positive]);
        let images = options.num_images_per_prompt;
        let rows = rows.map(|rows| {
            let repeated = rows.unsqueeze_dim::<4>(1).repeat_dim(1, images);
            repeated.reshape([texts * images, tokens, dim])
        });
        Ok(PreparedPrompt {
            context: Tensor::cat(rows.collect(), 0)
                .cast(float_dtype(&self.unet))
                .into(),
            guided,
            truncated,
        })
    }

    /// Positive and, in a guided run, negative embeddings of plain prompts.
    fn encode_plain(
        &self,
        options: &StableDiffusionOptions,
        inputs: &StableDiffusionInputs<'_, B>,
        guided: bool,
        truncated: &mut Vec<String>,
    ) -> Result<[Option<Tensor<B, 3>>; 2], PipelineError> {
        let mut encode = |texts: &[String], clip_skip| {
            let encoded = self.encode_prompt(texts, clip_skip)?;
            truncated.extend(encoded.truncated);
            Ok::<_, PipelineError>(encoded.embeds)
        };
        let positive = match &inputs.prompt_embeds {
            Some(embeds) => embeds.clone(),
            None => encode(&options.prompt, options.clip_skip)?,
        };
        if !guided {
            return Ok([Some(positive), None]);
        }
        let negative = match (&inputs.negative_prompt_embeds, &options.negative_prompt[..]) {
            (Some(embeds), _) => embeds.clone(),
            (None, []) => encode(&[String::new()], None)?,
            (None, negative) => encode(negative, None)?,
        };
        Ok([Some(positive), Some(negative)])
    }

    /// Positive and, in a guided run, negative embeddings of weighted prompts, with as many chunks.
    fn encode_weighted(
        &self,
        options: &StableDiffusionOptions,
        inputs: &StableDiffusionInputs<'_, B>,
        guided: bool,
    ) -> Result<[Option<Tensor<B, 3>>; 2], PipelineError> {
        let parse = |texts: &[String], names_lora: &dyn Fn(&str) -> String| {
            let prompts = texts.iter().map(|text| {
                let prompt = PromptChunks::new(&self.tokenizer, text)?;
                match prompt.loras() {
                    [] => Ok(prompt),
                    [lora, ..] => Err(PipelineError::Options(names_lora(&lora.name))),
                }
            });
            prompts.collect::<Result<Vec<_>, _>>()
        };
        let none = [String::new()];
        let texts = match &options.negative_prompt[..] {
            _ if !guided => &[][..],
            [] => &none[..],
            texts => texts,
        };
        let in_prompt = |name: &str| {
            format!("a prompt names the LoRA `{name}`, but no folder of LoRAs is given")
        };
        let in_negative = |name: &str| {
            format!(
                "a negative prompt names the LoRA `{name}`; it changes the whole model: name it in \
                 the prompt"
            )
        };
        let mut prompts = [
            parse(&options.prompt, &in_prompt)?,
            parse(texts, &in_negative)?,
        ];
        // Embeddings that were given have a number of chunks of their own.
        let given = [&inputs.prompt_embeds, &inputs.negative_prompt_embeds];
        let given = given.into_iter().flatten().map(|embeds| {
            let [_, tokens, _] = embeds.dims();
            tokens / self.tokenizer.max_length()
        });
        let numbers = prompts.iter().flatten().map(|prompt| prompt.chunks().len());
        let chunks = numbers.chain(given).max().unwrap_or(1);
        for prompt in prompts.iter_mut().flatten() {
            prompt.pad(chunks);
        }
        let skip = options.clip_skip.unwrap_or(0);
        let [positive, negative] = prompts.map(|prompts| {
            (!prompts.is_empty()).then(|| self.text_encoder.forward_weighted(&prompts, skip))
        });
        let negative_embeds = inputs.negative_prompt_embeds.clone().filter(|_| guided);
        Ok([
            inputs.prompt_embeds.clone().or(positive),
            negative_embeds.or(negative),
        ])
    }

    /// Adds the word of a textual inversion to tokenizer and text encoder.
    ///
    /// # Errors
    /// If its vectors are for another text encoder, or the word exists already.
    pub fn load_textual_inversion(
        &mut self,
        inversion: &TextualInversion,
    ) -> Result<(), PipelineError> {
        Ok(inversion.load_into(&mut self.tokenizer, &mut self.text_encoder)?)
    }
}
