use burn::tensor::{Tensor, backend::Backend};
use serde::{Deserialize, Serialize};

use crate::ops;

/// Activation functions by the names that configuration files use (`act_fn`, `hidden_act`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// `x · σ(x)`; `swish` is its older name.
    #[default]
    #[serde(alias = "swish")]
    Silu,
    /// `x · Φ(x)`, with the exact error function.
    Gelu,
    /// `x · σ(1.702 x)`, the approximation that CLIP was trained with.
    QuickGelu,
}

impl Activation {
    /// Applies the function to each element; any shape.
    pub fn forward<B: Backend, const D: usize>(&self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Activation::Silu => ops::silu(x),
            Activation::Gelu => ops::gelu(x),
            Activation::QuickGelu => ops::quick_gelu(x),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{TensorData, Tolerance};
    use burn_flex::Flex;

    #[track_caller]
    fn check(name: &str, expected: [f32; 3]) {
        let activation: Activation = serde_json::from_str(&format!("\"{name}\"")).unwrap();
        let x = Tensor::<Flex, 1>::from_data([-1.5f32, 0.25, 2.0], &Default::default());
        activation
            .forward(x)
            .into_data()
            .assert_approx_eq::<f32>(&TensorData::from(expected), Tolerance::absolute(1e-6));
    }

    // torch.nn.functional.silu, gelu, and x * sigmoid(1.702 x).
    #[test]
    fn functions_have_the_values_of_torch() {
        check("silu", [-0.273_638_8, 0.140_544_33, 1.761_594]);
        check("swish", [-0.273_638_8, 0.140_544_33, 1.761_594]);
        check("gelu", [-0.100_210_8, 0.149_676_58, 1.954_499_8]);
        check("quick_gelu", [-0.108_337_8, 0.151_199_65, 1.935_658_6]);
    }

    #[test]
    fn unknown_function_is_an_error() {
        let error = serde_json::from_str::<Activation>("\"relu6\"").unwrap_err();
        assert_eq!(
            error.to_string(),
            "unknown variant `relu6`, expected one of `silu`, `swish`, `gelu`, `quick_gelu` at \
             line 1 column 7"
        );
    }
}
