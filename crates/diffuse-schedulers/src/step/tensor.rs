//! The tensor operations of samplers.

use burn::prelude::*;
use burn::tensor::{DType, FloatDType};

use crate::SchedulerError;

/// `Σ cᵢ xᵢ` over tensors `[batch, channels, height, width]`.
pub(crate) fn combine<B: Backend>(
    terms: impl IntoIterator<Item = (f32, Tensor<B, 4>)>,
) -> Tensor<B, 4> {
    let scale = |(factor, x): (f32, Tensor<B, 4>)| {
        if factor == 1.0 {
            x
        } else {
            x.mul_scalar(factor)
        }
    };
    terms
        .into_iter()
        .map(scale)
        .reduce(|sum, term| sum + term)
        .expect("a sum has terms")
}

/// `aᵢ x + bᵢ y` with one pair of factors for each row `i` of the batch, or one pair for all.
pub(crate) fn combine_rows<B: Backend>(
    (a, x): (Vec<f32>, Tensor<B, 4>),
    (b, y): (Vec<f32>, Tensor<B, 4>),
) -> Result<Tensor<B, 4>, SchedulerError> {
    let batch = x.dims()[0];
    if a.len() != 1 && a.len() != batch {
        return Err(SchedulerError::TimestepCount {
            given: a.len(),
            batch,
        });
    }
    let all_equal = |factors: &[f32]| factors.windows(2).all(|pair| pair[0] == pair[1]);
    if all_equal(&a) && all_equal(&b) {
        return Ok(combine([(a[0], x), (b[0], y)]));
    }
    let column = |factors: Vec<f32>| {
        Tensor::from_data(
            TensorData::new(factors, [batch, 1, 1, 1]),
            (&x.device(), x.dtype()),
        )
    };
    Ok(x.clone() * column(a) + y * column(b))
}

/// The tensor, converted to f32 from half precision, which is not enough for samplers.
pub(crate) fn widen<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    match x.dtype() {
        DType::F16 | DType::BF16 | DType::Flex32 => x.cast(FloatDType::F32),
        _ => x,
    }
}

/// The tensor in another float type.
pub(crate) fn cast<B: Backend>(x: Tensor<B, 4>, dtype: DType) -> Tensor<B, 4> {
    if x.dtype() == dtype {
        x
    } else {
        x.cast(FloatDType::from(dtype))
    }
}
