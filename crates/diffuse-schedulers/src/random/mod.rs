//! The random numbers of `torch.Generator("cpu")`.
//!
//! The source of bits is the Mersenne Twister MT19937 (Matsumoto and Nishimura, 1998, section 2.1).
//! Normal numbers are made from pairs of uniform ones by Box and Muller's method (1958):
//!
//! ```text
//! r = √(-2 ln(1 - u1)),  θ = 2π u2,  z1 = r cos θ,  z2 = r sin θ
//! ```
//!
//! torch does this in two ways. Draws of 16 numbers and more use f32 with 24-bit uniforms, in
//! blocks of 16 where entry `j` of the first half pairs with entry `j` of the second; a last block
//! that is not full overlaps the one before, and is drawn again. (In half precision the entries of
//! that last block are drawn once only, so the generator advances by less.) Shorter draws use f64
//! with 53-bit uniforms, one pair at a time; the second number of a pair is kept for the next such
//! draw. `randn(seed 0)` here is `torch.manual_seed(0); torch.randn(..)` there, up to the last bit
//! of `ln`, `sin` and `cos`.

pub(crate) mod brownian;

use std::f64::consts::TAU;

use burn::prelude::*;
use burn::tensor::DType;

use crate::SchedulerError;

/// A source of standard normal numbers for the noise in samples.
///
/// A [`Generator`] is one; so is a `Vec<Generator>`, with one generator for each image of the
/// batch, and any closure from a shape to that many numbers.
pub trait NoiseSource {
    /// Standard normal numbers for a tensor of this shape and type, in row-major order. They need
    /// not be rounded to the type.
    fn randn(&mut self, shape: [usize; 4], dtype: DType) -> Result<Vec<f32>, SchedulerError>;

    /// The generators of the images, if each image of the batch has its own.
    fn generators(&mut self) -> Option<&mut [Generator]> {
        None
    }
}

impl NoiseSource for Generator {
    fn randn(&mut self, shape: [usize; 4], dtype: DType) -> Result<Vec<f32>, SchedulerError> {
        Ok(self.normal(shape.iter().product(), dtype))
    }
}

impl NoiseSource for Vec<Generator> {
    fn randn(&mut self, shape: [usize; 4], dtype: DType) -> Result<Vec<f32>, SchedulerError> {
        let [batch, channels, height, width] = shape;
        match self.as_mut_slice() {
            [generator] => generator.randn(shape, dtype),
            generators if generators.len() == batch => {
                let image = channels * height * width;
                Ok(generators
                    .iter_mut()
                    .flat_map(|generator| generator.normal(image, dtype))
                    .collect())
            }
            generators => Err(SchedulerError::Generators {
                generators: generators.len(),
                batch,
            }),
        }
    }

    fn generators(&mut self) -> Option<&mut [Generator]> {
        (self.len() > 1).then_some(self)
    }
}

impl<F: FnMut([usize; 4]) -> Vec<f32>> NoiseSource for F {
    fn randn(&mut self, shape: [usize; 4], _dtype: DType) -> Result<Vec<f32>, SchedulerError> {
        Ok(self(shape))
    }
}

/// Draws a tensor `[batch, channels, height, width]` of standard normal numbers; in half precision
/// they are the f32 ones rounded.
pub fn randn_tensor<B: Backend>(
    noise: &mut dyn NoiseSource,
    shape: [usize; 4],
    dtype: DType,
    device: &B::Device,
) -> Result<Tensor<B, 4>, SchedulerError> {
    let numbers = noise.randn(shape, dtype)?;
    let expected = shape.iter().product();
    if numbers.len() != expected {
        return Err(SchedulerError::NoiseLength {
            given: numbers.len(),
            expected,
        });
    }
    Ok(Tensor::from_data(
        TensorData::new(numbers, shape),
        (device, dtype),
    ))
}

const STATE: usize = 624;
const BLOCK: usize = 16;

/// torch's random number generator on the CPU.
#[derive(Clone, Debug)]
pub struct Generator {
    state: [u32; STATE],
    next: usize,
    waiting: Option<f64>,
}

impl Generator {
    /// A generator like `torch.Generator("cpu").manual_seed(seed)`: the low 32 bits of the seed
    /// count.
    pub fn new(seed: u64) -> Self {
        let mut state = [seed as u32; STATE];
        for i in 1..STATE {
            let previous = state[i - 1];
            state[i] = (previous ^ (previous >> 30))
                .wrapping_mul(1_812_433_253)
                .wrapping_add(i as u32);
        }
        Self {
            state,
            next: STATE,
            waiting: None,
        }
    }

    /// The next `count` standard normal numbers, as one draw of a tensor with that many elements of
    /// this type.
    pub fn normal(&mut self, count: usize, dtype: DType) -> Vec<f32> {
        if count < BLOCK {
            return (0..count).map(|_| self.normal_f64() as f32).collect();
        }
        let whole = count - count % BLOCK;
        let drawn = if matches!(dtype, DType::F16 | DType::BF16) {
            whole
        } else {
            count
        };
        let mut numbers = self.uniforms(drawn);
        numbers
            .as_chunks_mut::<BLOCK>()
            .0
            .iter_mut()
            .for_each(box_muller);
        if whole < count {
            let mut last = [0.0; BLOCK];
            last.copy_from_slice(&self.uniforms(BLOCK));
            box_muller(&mut last);
            numbers.resize(count, 0.0);
            numbers[count - BLOCK..].copy_from_slice(&last);
        }
        numbers
    }

    fn uniforms(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.uniform_f32()).collect()
    }

    /// One normal number of a short draw.
    fn normal_f64(&mut self) -> f64 {
        if let Some(waiting) = self.waiting.take() {
            return waiting;
        }
        let (angle, radius) = (self.uniform_f64(), self.uniform_f64());
        let (radius, angle) = ((-2.0 * (-radius).ln_1p()).sqrt(), TAU * angle);
        self.waiting = Some(radius * angle.sin());
        radius * angle.cos()
    }

    /// A number in `0..1` with 24 random bits.
    fn uniform_f32(&mut self) -> f32 {
        (self.bits() & 0xFF_FFFF) as f32 / (1u32 << 24) as f32
    }

    /// A number in `0..1` with 53 random bits.
    fn uniform_f64(&mut self) -> f64 {
        let bits = u64::from(self.bits()) << 32 | u64::from(self.bits());
        (bits & ((1 << 53) - 1)) as f64 / (1u64 << 53) as f64
    }

    /// The next 32 random bits.
    fn bits(&mut self) -> u32 {
        if self.next == STATE {
            self.twist();
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9D2C_5680;
        y ^= (y << 15) & 0xEFC6_0000;
        y ^ (y >> 18)
    }

    /// The next state: `x[k+n] = x[k+m] ⊕ (upper bit of x[k] | lower bits of x[k+1]) A`.
    fn twist(&mut self) {
        for k in 0..STATE {
            let mixed = (self.state[k] & 0x8000_0000) | (self.state[(k + 1) % STATE] & 0x7FFF_FFFF);
            let twisted = (mixed >> 1) ^ if mixed & 1 == 1 { 0x9908_B0DF } else { 0 };
            self.state[k] = self.state[(k + 397) % STATE] ^ twisted;
        }
        self.next = 0;
    }
}

/// Turns 16 uniform numbers into normal ones.
fn box_muller(block: &mut [f32; BLOCK]) {
    for j in 0..BLOCK / 2 {
        let (radius, angle) = (block[j], block[j + BLOCK / 2]);
        let (radius, angle) = ((-2.0 * (1.0 - radius).ln()).sqrt(), TAU as f32 * angle);
        block[j] = radius * angle.cos();
        block[j + BLOCK / 2] = radius * angle.sin();
    }
}
