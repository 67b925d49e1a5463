//! Kernels for `Flex`, burn's CPU backend, in `f32`.
//!
//! Weights may also be in half precision. With gradients the backend is `Autodiff`, for which there
//! are no kernels.
//!
//! Linear layers and convolutions are matrix products with one micro-kernel (`micro_kernel.rs`);
//! they differ in how they pack their panels. Other loops rely on the compiler's vectoriser;
//! [`vectorized`] compiles them for each generation of vector instructions. `unsafe` is only in
//! `memory.rs` (pooled buffers, and a hint to the system) and in `avx2.rs` (assembly).

#![expect(
    clippy::result_large_err,
    reason = "an operation without a kernel is given back"
)]

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod conv;
mod elementwise;
mod matrix;
mod memory;
mod micro_kernel;
mod norm;
mod parts;
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

#[cfg(feature = "tuning")]
pub use micro_kernel::disable_avx512;
#[cfg(feature = "tuning")]
pub use parts::measure_parts;

use memory::PooledBuffer;
use micro_kernel::vectorized;

/// See [`on_worker`](crate::on_worker).
pub fn on_worker<B: Backend, R: Send>(network: impl FnOnce() -> R + Send) -> R {
    if TypeId::of::<B>() == TypeId::of::<Flex>() {
        rayon::scope(|_| network())
    } else {
        network()
    }
}

/// Runs a kernel, if the operation is one of `Flex`. Kernels name the backend, so that they are
/// compiled once, here, and not again for each program.
pub fn run<Operation, Output, OnFlex, FlexOutput>(
    operation: Operation,
    kernel: impl FnOnce(OnFlex) -> Result<FlexOutput, OnFlex>,
) -> Result<Output, Operation>
where
    Operation: 'static,
    Output: 'static,
    OnFlex: 'static,
    FlexOutput: 'static,
{
    const SAME: &str = "both are of `Flex`";
    match kernel(same_type(operation)?) {
        Ok(output) => Ok(same_type(output).ok().expect(SAME)),
        Err(operation) => Err(same_type(operation).ok().expect(SAME)),
    }
}

/// A value as one of another type, if that is its own.
fn same_type<T: 'static, U: 'static>(value: T) -> Result<U, T> {
    let mut slot = Some(value);
    let other = (&mut slot as &mut dyn Any).downcast_mut::<Option<U>>();
    match (other.and_then(Option::take), slot) {
        (Some(value), _) => Ok(value),
        (None, Some(value)) => Err(value),
        (None, None) => unreachable!("the value is in one of the two"),
    }
}

/// The contiguous values of an `f32` tensor.
struct Values(FlexTensor);

impl Values {
    /// `None` for other types.
    fn of<const D: usize>(tensor: &Tensor<Flex, D>) -> Option<Self> {
        is_supported(tensor).then(|| Self::from_flex(tensor.clone()))
    }

    /// A bias, or zeros without one.
    fn of_bias(bias: Option<&Tensor<Flex, 1>>, len: usize) -> Option<Self> {
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

    /// As [`of`](Values::of), but takes the tensor, so that a unique one can be changed in place.
    fn take<const D: usize>(tensor: Tensor<Flex, D>) -> Result<Self, Tensor<Flex, D>> {
        if is_supported(&tensor) {
            Ok(Self::from_flex(tensor))
        } else {
            Err(tensor)
        }
    }

    fn from_flex<const D: usize>(tensor: Tensor<Flex, D>) -> Self {
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
        self.0.as_slice().expect("contiguous f32 values")
    }

    /// The buffer of a result: the residual, to which results are added, or a new one.
    fn output<const D: usize>(
        residual: Option<Tensor<Flex, D>>,
        shape: [usize; D],
    ) -> Result<Self, Option<Tensor<Flex, D>>> {
        match residual {
            Some(residual) => Self::take(residual).map_err(Some),
            None => Ok(Self::new(PooledBuffer::new(shape.iter().product()), shape)),
        }
    }

    /// The values for writing, copied if another tensor shares them.
    fn make_mut(&mut self) -> &mut [f32] {
        if self.unique_mut().is_none() {
            let values = self.as_slice();
            let mut copy = PooledBuffer::new(values.len());
            elementwise::copy(&mut copy, values);
            let layout = self.0.layout().clone();
            self.0 = FlexTensor::new(copy.into_bytes(), layout, DType::F32);
        }
        self.0.storage_mut()
    }

    /// The values for writing, if no other tensor shares them.
    fn unique_mut(&mut self) -> Option<&mut [f32]> {
        self.0.try_storage_mut()
    }

    fn tensor<const D: usize>(self) -> Tensor<Flex, D> {
        Tensor::from_primitive(TensorPrimitive::Float(self.0))
    }
}

/// Whether a tensor is `f32` and an x86 CPU has FMA instructions: without, each fused multiply-add
/// is a function call.
fn is_supported<const D: usize>(tensor: &Tensor<Flex, D>) -> bool {
    #[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
    let has_instructions = is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2");
    #[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
    let has_instructions = true;
    has_instructions && tensor.dtype() == DType::F32
}

fn tensor<const D: usize>(values: PooledBuffer, shape: [usize; D]) -> Tensor<Flex, D> {
    Values::new(values, shape).tensor()
}

/// `a · b + c`. WebAssembly has no instruction that rounds once, and a function call takes longer.
#[inline(always)]
fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(target_family = "wasm") {
        a * b + c
    } else {
        a.mul_add(b, c)
    }
}

/// 1.5 · 2²³. Adding it rounds a number to an integer, which is then in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `2ˣ` within 3 units in the last place for `x` in -126..127, without branches. Smaller `x` count
/// as -126.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // Not `f32::max`, which would turn NaN into a number.
    let x = if x < -126.0 { -126.0 } else { x };
    let shifted = x + ROUND;
    exp2_of_parts(shifted, x - (shifted - ROUND))
}

/// `eˣ` within 3 units in the last place for `x` in -87.3..88.3, without branches. Other `x` are
/// clamped.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // ln 2 in two parts: the first has so few digits that its product with `n` is exact.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let x = x.clamp(-87.3, 88.3);
    let shifted = mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add(n, -LN_2[1], mul_add(n, -LN_2[0], x));
    exp2_of_parts(shifted, r * std::f32::consts::LOG2_E)
}

/// `2ⁿ 2ʳ` for `n + ROUND` and `|r| <= 0.5`.
#[inline(always)]
#[expect(
    clippy::approx_constant,
    reason = "the minimax coefficient is close to ln 2, but not equal"
)]
fn exp2_of_parts(shifted: f32, r: f32) -> f32 {
    // The minimax polynomial: relative error 7.5e-8 (Remez).
    let mut sum = 1.327_647_2e-3;
    for coefficient in [
        9.675_541e-3,
        5.550_713_3e-2,
        0.240_221_2,
        0.693_147,
        1.000_000_1,
    ] {
        sum = mul_add(r, sum, coefficient);
    }
    // The exponent starts at bit 23.
    f32::from_bits(sum.to_bits().wrapping_add(shifted.to_bits() << 23))
}

#[inline(always)]
fn silu_of(x: f32) -> f32 {
    let y = x / (1.0 + exp(-x));
    // Here `exp` is clamped, and the exact result is below 1e-36.
    if x < -88.0 { 0.0 } else { y }
}

/// `x Φ(x)`, with the error function within 1.5e-7 (Abramowitz & Stegun 1964, formula 7.1.26).
#[inline(always)]
fn gelu_of(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / mul_add(z, 0.327_591_1, 1.0);
    let mut sum = 1.061_405_4;
    for coefficient in [-1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6] {
        sum = mul_add(t, sum, coefficient);
    }
    // 1 - erf(z)
    let rest = sum * t * exp(-z * z);
    // x > 0: x (2 - rest) / 2; x < 0: x rest / 2.
    0.5 * (x + x.abs() * (1.0 - rest))
}

#[cfg(test)]
mod tests;
