//! Kernels for `Flex`, burn's CPU backend, in `f32`.
//!
//! Weights of products may also be of half precision. With gradients the backend is `Autodiff`,
//! which has no kernels.
//!
//! Products of all kinds are sums over packed tiles (`kernel.rs`); they differ in what packs them.
//! Other loops are written for the compiler's vectoriser, and [`vectorized`] compiles them for each
//! generation of instructions. `unsafe` is only in `memory.rs`: buffers that are used again, and a
//! hint to the system.

mod attention;
mod conv;
mod elementwise;
mod kernel;
mod matrix;
mod memory;
mod norm;
mod transform;
mod weights;
mod winograd;

use std::any::{Any, TypeId};

use burn::tensor::{DType, Shape, Tensor, TensorPrimitive, backend::Backend};
use burn_flex::{Flex, FlexTensor, Layout};

pub use attention::attention;
pub use conv::conv2d;
pub use elementwise::{
    activation, add_channel_bias, concat_channels, image_to_tokens, tokens_to_image, upsample_2x,
};
pub use matrix::{linear, linear_geglu, linear_to_image};
pub use memory::free_pooled_memory;
pub use norm::{group_norm, layer_norm};

use kernel::vectorized;
use memory::PooledBuffer;

/// See [`on_worker`](crate::on_worker).
pub fn on_worker<B: Backend, R: Send>(network: impl FnOnce() -> R + Send) -> R {
    if TypeId::of::<B>() == TypeId::of::<Flex>() {
        rayon::scope(|_| network())
    } else {
        network()
    }
}

/// A tensor's values in their order, if they are `Flex`'s and `f32`.
struct Values(FlexTensor);

impl Values {
    fn of<B: Backend, const D: usize>(tensor: &Tensor<B, D>) -> Option<Self> {
        let tensor = (tensor as &dyn Any).downcast_ref::<Tensor<Flex, D>>()?;
        Self::is_for(tensor).then(|| Self::own(tensor.clone()))
    }

    /// A bias, or as many zeros.
    fn of_bias<B: Backend>(bias: Option<&Tensor<B, 1>>, len: usize) -> Option<Self> {
        match bias {
            Some(bias) => Self::of(bias),
            None => {
                let mut zeros = PooledBuffer::new(len);
                zeros.fill(0.0);
                Some(Self::new(zeros, [len]))
            }
        }
    }

    fn new<const D: usize>(values: PooledBuffer, shape: [usize; D]) -> Self {
        let layout = Layout::contiguous(Shape::from(shape));
        Self(FlexTensor::new(values.into_bytes(), layout, DType::F32))
    }

    /// As [`of`](Values::of), without a second owner: what nobody else has can be changed in place.
    fn take<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> Result<Self, Tensor<B, D>> {
        let mut slot = Some(tensor);
        let flex = (&mut slot as &mut dyn Any)
            .downcast_mut::<Option<Tensor<Flex, D>>>()
            .and_then(|slot| slot.take_if(|tensor| Self::is_for(tensor)));
        match (flex, slot) {
            (Some(flex), _) => Ok(Self::own(flex)),
            (None, Some(tensor)) => Err(tensor),
            (None, None) => unreachable!("nothing was taken"),
        }
    }

    /// Whether a tensor has `f32` values and the machine the instructions for them: without, fused
    /// multiplications and additions would be calls of a function.
    fn is_for<const D: usize>(tensor: &Tensor<Flex, D>) -> bool {
        #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
        let has_instructions = is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2");
        #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
        let has_instructions = true;
        has_instructions && tensor.dtype() == DType::F32
    }

    fn own<const D: usize>(tensor: Tensor<Flex, D>) -> Self {
        match tensor.into_primitive() {
            TensorPrimitive::Float(values) => Self(values.to_contiguous()),
            TensorPrimitive::QFloat(_) => unreachable!("a quantised tensor is not f32"),
        }
    }

    /// The first three of four dimensions.
    fn leading_dims(&self) -> [usize; 3] {
        let shape = self.0.layout().shape();
        [shape[0], shape[1], shape[2]]
    }

    fn as_slice(&self) -> &[f32] {
        self.0.as_slice().expect("values in their order")
    }

    /// The values that results are added to, if there are any, or else room for as many as `shape`
    /// says.
    fn for_results<B: Backend, const D: usize>(
        residual: Option<Tensor<B, D>>,
        shape: [usize; D],
    ) -> Result<Self, Option<Tensor<B, D>>> {
        match residual {
            Some(residual) => Self::take(residual).map_err(Some),
            None => Ok(Self::new(PooledBuffer::new(shape.iter().product()), shape)),
        }
    }

    /// The values to change: a copy, if someone else has them.
    fn make_mut(&mut self) -> &mut [f32] {
        if self.own_mut().is_none() {
            let values = self.as_slice();
            let mut copy = PooledBuffer::new(values.len());
            elementwise::copy(&mut copy, values);
            let layout = self.0.layout().clone();
            self.0 = FlexTensor::new(copy.into_bytes(), layout, DType::F32);
        }
        self.0.storage_mut()
    }

    /// The values to change, if nobody else has them.
    fn own_mut(&mut self) -> Option<&mut [f32]> {
        self.0.try_storage_mut()
    }

    /// As a tensor of `B`, which is `Flex`.
    fn tensor<B: Backend, const D: usize>(self) -> Tensor<B, D> {
        let tensor = Tensor::<Flex, D>::from_primitive(TensorPrimitive::Float(self.0));
        let mut slot = Some(tensor);
        (&mut slot as &mut dyn Any)
            .downcast_mut::<Option<Tensor<B, D>>>()
            .and_then(Option::take)
            .expect("the inputs were of `Flex`")
    }
}

/// A new tensor of `B`, which is `Flex`.
fn tensor<B: Backend, const D: usize>(values: PooledBuffer, shape: [usize; D]) -> Tensor<B, D> {
    Values::new(values, shape).tensor()
}

/// Added to a number, it rounds it to a whole one, which is then in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `2ˣ` within 3 units in the last place for `x` from -126 to 127, and below as at -126; without
/// branches.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // Not `f32::max`, which would make a number of what is none.
    let x = if x < -126.0 { -126.0 } else { x };
    let shifted = x + ROUND;
    exp2_of_parts(shifted, x - (shifted - ROUND))
}

/// `eˣ` within 3 units in the last place for `x` from -87.3 to 88.3, and beyond as at these ends;
/// without branches.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // ln 2, in two parts: the first has so few digits that its product with `n` is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.3, 88.3);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN_2[1], n.mul_add(-LN_2[0], x));
    exp2_of_parts(shifted, r * std::f32::consts::LOG2_E)
}

/// `2ⁿ 2ʳ` for `n + ROUND` and `|r| <= 0.5`.
#[inline(always)]
#[expect(
    clippy::approx_constant,
    reason = "the best polynomial does not have ln 2 itself"
)]
fn exp2_of_parts(shifted: f32, r: f32) -> f32 {
    // The polynomial with the smallest relative error, 7.5e-8 (Remez).
    let mut sum = 1.327_647_2e-3;
    for coefficient in [
        9.675_541e-3,
        5.550_713_3e-2,
        0.240_221_2,
        0.693_147,
        1.000_000_1,
    ] {
        sum = r.mul_add(sum, coefficient);
    }
    // The exponent is in the bits from the 23rd on.
    f32::from_bits(sum.to_bits().wrapping_add(shifted.to_bits() << 23))
}

#[inline(always)]
fn silu_of(x: f32) -> f32 {
    let y = x / (1.0 + exp(-x));
    // There `exp` has ended, and what is left is below 1e-36.
    if x < -88.0 { 0.0 } else { y }
}

/// `x Φ(x)`, the error function within 1.5e-7 (Abramowitz & Stegun 1964, formula 7.1.26).
#[inline(always)]
fn gelu_of(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / z.mul_add(0.327_591_1, 1.0);
    let mut sum = 1.061_405_4;
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        sum = t.mul_add(sum, coefficient);
    }
    // 1 - erf(z)
    let rest = sum * t * exp(-z * z);
    // x > 0: x (2 - rest) / 2; x < 0: x rest / 2.
    0.5 * (x + x.abs() * (1.0 - rest))
}

#[cfg(test)]
mod tests;
