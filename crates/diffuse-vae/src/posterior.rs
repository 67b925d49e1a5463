use burn::tensor::{Tensor, backend::Backend};

/// The distribution of latents: an independent normal distribution for each value.
#[derive(Debug, Clone)]
pub struct DiagonalGaussian<B: Backend> {
    /// `[batch, latent_channels, height / 8, width / 8]`
    pub mean: Tensor<B, 4>,
    /// Logarithm of the variance, clamped to `[-30, 20]`; shaped as the mean.
    pub logvar: Tensor<B, 4>,
}

impl<B: Backend> DiagonalGaussian<B> {
    /// From the encoder's output, means followed by logarithms of variances:
    /// `[batch, 2 · latent_channels, ..]`.
    ///
    /// # Panics
    /// If the number of channels is odd.
    pub fn from_moments(moments: Tensor<B, 4>) -> Self {
        let [_, channels, _, _] = moments.dims();
        assert!(
            channels.is_multiple_of(2),
            "{channels} channels have no halves"
        );
        let latent = channels / 2;
        Self {
            mean: moments.clone().narrow(1, 0, latent),
            logvar: moments.narrow(1, latent, latent).clamp(-30.0, 20.0),
        }
    }

    /// `mean + exp(logvar / 2) · noise`; `noise` is standard normal and shaped as the mean.
    pub fn sample(&self, noise: Tensor<B, 4>) -> Tensor<B, 4> {
        self.mean.clone() + (self.logvar.clone() * 0.5).exp() * noise
    }

    /// The most likely latents: the mean.
    pub fn mode(&self) -> Tensor<B, 4> {
        self.mean.clone()
    }
}
