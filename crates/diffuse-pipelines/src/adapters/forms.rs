//! What adapters compute: the change of a weight `W` from the tensors of its module.
//!
//! With `s = alpha / rank`, and `[outputs, inputs · kernel]` for the shape of `W`:
//! - LoRA and LoCon: `s · up · down`, or `s · up · mid · down` (Tucker)
//! - LoHa (Hyeon-Woo et al. 2021, <https://arxiv.org/abs/2108.06098>):
//!   `s · (w1_a · w1_b) ∘ (w2_a · w2_b)`
//! - LoKr (Yeh et al. 2023, <https://arxiv.org/abs/2309.14859>): `s · (w1 ⊗ w2)`, where `s` is 1
//!   if neither is factored
//! - GLoRA (Chavan et al. 2023, <https://arxiv.org/abs/2306.07967>): `s · (W · a1 · a2 + b1 · b2)`
//! - the whole difference
//!
//! DoRA (Liu et al. 2024, <https://arxiv.org/abs/2402.09353>) scales the changed weight `V` of any
//! of them to magnitudes `m`: `W' = m · V / ‖V‖`, with a norm for each output or for each input.
//! A strength `k` makes `W + k · (W' − W)`.

use std::io;

use diffuse_nn::checkpoint::{Checkpoint, Patch, TensorInfo};
use rayon::prelude::*;

use super::names::Attribute;

/// A change of a weight, not yet read.
#[derive(Debug)]
pub enum Form {
    Lora {
        up: TensorInfo,
        mid: Option<TensorInfo>,
        down: TensorInfo,
        scale: f32,
    },
    Loha {
        factors: [Factored; 2],
        scale: f32,
    },
    Lokr {
        factors: [Factor; 2],
        scale: f32,
    },
    Glora {
        a: [TensorInfo; 2],
        b: [TensorInfo; 2],
        scale: f32,
    },
    Full(TensorInfo),
}

/// A matrix as a product: `a · b`, or with a core between two that are stored transposed.
#[derive(Debug)]
pub struct Factored {
    a: TensorInfo,
    b: TensorInfo,
    core: Option<TensorInfo>,
}

/// A matrix, whole or as a product.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "there are two a module")]
pub enum Factor {
    Whole(TensorInfo),
    Product(Factored),
}

/// The tensors of a module, each taken once.
type Take<'a> = dyn FnMut(Attribute) -> Option<TensorInfo> + 'a;

/// Some of a form's tensors are missing.
pub struct Incomplete;

impl Form {
    /// Takes the tensors of one form out of a module's, whose weight has `outputs` rows. `None` if
    /// there are none.
    pub fn take(take: &mut Take<'_>, outputs: usize) -> Result<Option<Self>, Incomplete> {
        use Attribute::*;
        if let Some(difference) = take(Difference).or_else(|| take(NormWeight)) {
            return Ok(Some(Self::Full(difference)));
        }
        let scale = 1.0;
        match (take(Up), take(Mid), take(Down)) {
            (Some(up), mid, Some(down)) => {
                return Ok(Some(Self::Lora {
                    up,
                    mid,
                    down,
                    scale,
                }));
            }
            (None, None, None) => {}
            _ => return Err(Incomplete),
        }
        let first = Factored::take(take, HadaW1A, HadaW1B, Some(HadaT1))?;
        match (first, Factored::take(take, HadaW2A, HadaW2B, Some(HadaT2))?) {
            (Some(first), Some(second)) => {
                let factors = [first, second];
                return Ok(Some(Self::Loha { factors, scale }));
            }
            (None, None) => {}
            _ => return Err(Incomplete),
        }
        let first = match Factored::take(take, LokrW1A, LokrW1B, None)? {
            Some(product) => Some(Factor::Product(product)),
            None => take(LokrW1).map(Factor::Whole),
        };
        let second = match Factored::take(take, LokrW2A, LokrW2B, Some(LokrT2))? {
            Some(product) => Some(Factor::Product(product)),
            None => take(LokrW2).map(Factor::Whole),
        };
        match (first, second) {
            (Some(first), Some(second)) => {
                let factors = [first, second];
                return Ok(Some(Self::Lokr { factors, scale }));
            }
            (None, None) => {}
            _ => return Err(Incomplete),
        }
        match [take(GloraA1), take(GloraA2), take(GloraB1), take(GloraB2)] {
            [Some(a1), Some(a2), Some(b1), Some(b2)] => {
                // Some programs number the factors the other way round.
                let (a, b) = if b1.shape.first() == Some(&outputs) {
                    ([a1, a2], [b1, b2])
                } else {
                    ([a2, a1], [b2, b1])
                };
                Ok(Some(Self::Glora { a, b, scale }))
            }
            [None, None, None, None] => Ok(None),
            _ => Err(Incomplete),
        }
    }
}

impl Factored {
    fn take(
        take: &mut Take<'_>,
        a: Attribute,
        b: Attribute,
        core: Option<Attribute>,
    ) -> Result<Option<Self>, Incomplete> {
        match (take(a), take(b)) {
            (Some(a), Some(b)) => {
                let core = core.and_then(take);
                Ok(Some(Self { a, b, core }))
            }
            (None, None) => Ok(None),
            _ => Err(Incomplete),
        }
    }

    fn rank(&self) -> usize {
        rows(&self.b)
    }

    fn shape(&self) -> [usize; 2] {
        match &self.core {
            Some(core) => [columns(&self.a), columns(&self.b) * kernel(core)],
            None => [rows(&self.a), columns(&self.b)],
        }
    }

    /// Whether the inner dimensions agree.
    fn fits(&self) -> bool {
        match &self.core {
            Some(core) => rows(&self.a) == rows(core) && inner(core) == rows(&self.b),
            None => columns(&self.a) == rows(&self.b),
        }
    }

    fn matrix(&self, checkpoint: &Checkpoint) -> io::Result<Matrix> {
        let a = Matrix::read(checkpoint, &self.a)?;
        let b = Matrix::read(checkpoint, &self.b)?;
        match &self.core {
            Some(core) => Ok(tucker(
                &a.transposed(),
                &Matrix::read(checkpoint, core)?,
                &b,
            )),
            None => Ok(a.times(&b)),
        }
    }
}

impl Factor {
    fn rank(&self) -> Option<usize> {
        match self {
            Self::Whole(_) => None,
            Self::Product(product) => Some(product.rank()),
        }
    }

    fn shape(&self) -> [usize; 2] {
        match self {
            Self::Whole(tensor) => [rows(tensor), columns(tensor)],
            Self::Product(product) => product.shape(),
        }
    }

    fn fits(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Product(product) => product.fits(),
        }
    }

    fn matrix(&self, checkpoint: &Checkpoint) -> io::Result<Matrix> {
        match self {
            Self::Whole(tensor) => Matrix::read(checkpoint, tensor),
            Self::Product(product) => product.matrix(checkpoint),
        }
    }
}

/// Size of the first dimension.
fn rows(tensor: &TensorInfo) -> usize {
    tensor.shape.first().copied().unwrap_or(1)
}

/// Number of elements behind the first dimension.
fn columns(tensor: &TensorInfo) -> usize {
    tensor.shape.iter().skip(1).product()
}

/// Size of a core's second dimension.
fn inner(core: &TensorInfo) -> usize {
    core.shape.get(1).copied().unwrap_or(1)
}

/// Number of elements of a core's kernel.
fn kernel(core: &TensorInfo) -> usize {
    core.shape.iter().skip(2).product()
}

impl Form {
    /// The rank that alpha is divided by.
    pub fn rank(&self) -> usize {
        match self {
            Self::Lora { down, .. } => rows(down),
            Self::Loha { factors, .. } => factors[0].rank(),
            Self::Lokr {
                factors: [first, second],
                ..
            } => second.rank().or(first.rank()).unwrap_or(1),
            Self::Glora { b, .. } => rows(&b[1]),
            Self::Full(_) => 1,
        }
    }

    /// Sets `alpha / rank`, which means nothing to some forms.
    pub fn set_scale(&mut self, value: f32) {
        match self {
            Self::Lora { scale, .. } | Self::Loha { scale, .. } | Self::Glora { scale, .. } => {
                *scale = value;
            }
            Self::Lokr { factors, scale } => {
                if factors.iter().any(|factor| factor.rank().is_some()) {
                    *scale = value;
                }
            }
            Self::Full(_) => {}
        }
    }

    /// Shape of the change of a weight of shape `weight`: outputs, and inputs times kernel size.
    pub fn shape(&self, weight: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Lora { up, mid, down, .. } => {
                let kernel = mid.as_ref().map_or(1, kernel);
                [rows(up), columns(down) * kernel]
            }
            Self::Loha { factors, .. } => factors[0].shape(),
            Self::Lokr {
                factors: [first, second],
                ..
            } => {
                let ([a, b], [c, d]) = (first.shape(), second.shape());
                [a * c, b * d]
            }
            Self::Glora { b, .. } => [rows(&b[0]), columns(&b[1])],
            Self::Full(tensor) => match tensor.num_elements() {
                // A vector's change may be stored as a matrix of one row.
                elements if elements == weight[0] * weight[1] => weight,
                _ => [rows(tensor), columns(tensor)],
            },
        }
    }

    /// Whether the tensors fit each other, for a weight of shape `weight`.
    pub fn fits(&self, weight: [usize; 2]) -> bool {
        match self {
            Self::Lora {
                up,
                mid: Some(mid),
                down,
                ..
            } => columns(up) == rows(mid) && inner(mid) == rows(down),
            Self::Lora { up, down, .. } => columns(up) == rows(down),
            Self::Loha {
                factors: [first, second],
                ..
            } => first.fits() && second.fits() && first.shape() == second.shape(),
            Self::Lokr { factors, .. } => factors.iter().all(Factor::fits),
            Self::Glora { a, b, .. } => {
                let inputs = rows(&a[0]);
                columns(&a[0]) == rows(&a[1])
                    && columns(&b[0]) == rows(&b[1])
                    && columns(&a[1]) == inputs
                    && inputs > 0
                    && weight[1].is_multiple_of(inputs)
            }
            Self::Full(_) => true,
        }
    }

    /// The change of `weight`, at full strength.
    fn change(
        &self,
        checkpoint: &Checkpoint,
        weight: &[f32],
        shape: [usize; 2],
    ) -> io::Result<Vec<f32>> {
        let read = |tensor| Matrix::read(checkpoint, tensor);
        let (mut change, scale) = match self {
            Self::Lora {
                up,
                mid,
                down,
                scale,
            } => {
                let (up, down) = (read(up)?, read(down)?);
                let product = match mid {
                    Some(mid) => tucker(&up, &read(mid)?, &down),
                    None => up.times(&down),
                };
                (product, *scale)
            }
            Self::Loha {
                factors: [first, second],
                scale,
            } => {
                let mut product = first.matrix(checkpoint)?;
                let second = second.matrix(checkpoint)?;
                for (value, other) in product.values.iter_mut().zip(&second.values) {
                    *value *= other;
                }
                (product, *scale)
            }
            Self::Lokr {
                factors: [first, second],
                scale,
            } => {
                let (first, second) = (first.matrix(checkpoint)?, second.matrix(checkpoint)?);
                (first.kronecker(&second), *scale)
            }
            Self::Glora {
                a: [a1, a2],
                b: [b1, b2],
                scale,
            } => {
                // Inputs are mixed at each place of the kernel.
                let mixing = read(a1)?.times(&read(a2)?).transposed();
                let kernel = shape[1] / mixing.columns;
                let rows = weight.par_chunks_exact(shape[1]).flat_map_iter(|row| {
                    let row = Matrix {
                        rows: mixing.columns,
                        columns: kernel,
                        values: row.to_vec(),
                    };
                    mixing.times(&row).values
                });
                let mut sum = Matrix {
                    rows: shape[0],
                    columns: shape[1],
                    values: rows.collect(),
                };
                let product = read(b1)?.times(&read(b2)?);
                for (value, other) in sum.values.iter_mut().zip(&product.values) {
                    *value += other;
                }
                (sum, *scale)
            }
            Self::Full(tensor) => (read(tensor)?, 1.0),
        };
        if scale != 1.0 {
            change.values.iter_mut().for_each(|value| *value *= scale);
        }
        Ok(change.values)
    }
}

/// DoRA's magnitudes.
#[derive(Debug)]
pub struct Magnitude {
    values: TensorInfo,
    by_output: bool,
}

impl Magnitude {
    /// One for each output.
    pub fn each_output(values: TensorInfo) -> Self {
        Self {
            values,
            by_output: true,
        }
    }

    /// Whether there are as many as a weight of this shape has outputs or inputs.
    pub fn fits(&self, [outputs, columns]: [usize; 2]) -> bool {
        let count = self.values.num_elements();
        match self.by_output {
            true => count == outputs,
            false => count > 0 && columns.is_multiple_of(count),
        }
    }

    /// One for each output (`[outputs, 1, ...]`) or for each input (`[1, inputs, ...]`).
    pub fn by_shape(values: TensorInfo, outputs: usize) -> Self {
        let by_output = values.shape.first() == Some(&outputs);
        Self { values, by_output }
    }
}

/// A change with its strength, made when the weight is read.
pub struct Change {
    /// Where the tensors are.
    pub checkpoint: Checkpoint,
    /// How they change the weight.
    pub form: Form,
    /// DoRA's magnitudes, if there are any.
    pub magnitude: Option<Magnitude>,
    /// How much of the change is made.
    pub strength: f32,
    /// Outputs, and inputs times kernel size.
    pub shape: [usize; 2],
}

impl Patch for Change {
    fn apply(&self, weight: &mut [f32]) -> io::Result<()> {
        let mut change = self.form.change(&self.checkpoint, weight, self.shape)?;
        if let Some(magnitude) = &self.magnitude {
            let magnitudes = self.checkpoint.read_values(&magnitude.values)?;
            for (change, weight) in change.iter_mut().zip(&*weight) {
                *change += weight;
            }
            if magnitude.by_output {
                scale_rows(&mut change, self.shape[1], &magnitudes);
            } else {
                scale_inputs(&mut change, self.shape[1], &magnitudes);
            }
            for (change, weight) in change.iter_mut().zip(&*weight) {
                *change -= weight;
            }
        }
        for (weight, change) in weight.iter_mut().zip(&change) {
            *weight += self.strength * change;
        }
        Ok(())
    }
}

/// Scales each row to a norm.
fn scale_rows(values: &mut [f32], columns: usize, norms: &[f32]) {
    for (row, norm) in values.chunks_exact_mut(columns).zip(norms) {
        let squares: f64 = row.iter().map(|value| f64::from(value * value)).sum();
        let factor = norm / squares.sqrt() as f32;
        row.iter_mut().for_each(|value| *value *= factor);
    }
}

/// Scales the kernels of each input, over all outputs, to a norm.
fn scale_inputs(values: &mut [f32], columns: usize, norms: &[f32]) {
    let kernel = columns / norms.len();
    let mut squares = vec![0.0_f64; norms.len()];
    for row in values.chunks_exact(columns) {
        for (sum, kernel) in squares.iter_mut().zip(row.chunks_exact(kernel)) {
            *sum += kernel
                .iter()
                .map(|value| f64::from(value * value))
                .sum::<f64>();
        }
    }
    for row in values.chunks_exact_mut(columns) {
        let kernels = row.chunks_exact_mut(kernel);
        for ((kernel, norm), squares) in kernels.zip(norms).zip(&squares) {
            let factor = norm / squares.sqrt() as f32;
            kernel.iter_mut().for_each(|value| *value *= factor);
        }
    }
}

/// A matrix in row-major order.
struct Matrix {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// Reads a tensor; dimensions behind the first are columns.
    fn read(checkpoint: &Checkpoint, tensor: &TensorInfo) -> io::Result<Self> {
        let rows = tensor.shape.first().copied().unwrap_or(1);
        Ok(Self {
            rows,
            columns: tensor.num_elements() / rows.max(1),
            values: checkpoint.read_values(tensor)?,
        })
    }

    fn transposed(&self) -> Self {
        let mut values = Vec::with_capacity(self.values.len());
        for column in 0..self.columns {
            values.extend(self.values.iter().skip(column).step_by(self.columns));
        }
        Self {
            rows: self.columns,
            columns: self.rows,
            values,
        }
    }

    /// `self · other`. A product of matrices that do not fit is empty; shapes are checked before.
    fn times(&self, other: &Self) -> Self {
        let columns = other.columns;
        let mut values = vec![0.0; self.rows * columns];
        let rows = values.par_chunks_mut(columns.max(1)).enumerate();
        rows.for_each(|(row, sums)| {
            let factors = &self.values[row * self.columns..][..self.columns];
            for (factor, terms) in factors
                .iter()
                .zip(other.values.chunks_exact(columns.max(1)))
            {
                for (sum, term) in sums.iter_mut().zip(terms) {
                    *sum += factor * term;
                }
            }
        });
        Self {
            rows: self.rows,
            columns,
            values,
        }
    }

    /// `self ⊗ other`
    fn kronecker(&self, other: &Self) -> Self {
        let mut values = Vec::with_capacity(self.values.len() * other.values.len());
        for left in self.values.chunks_exact(self.columns.max(1)) {
            for right in other.values.chunks_exact(other.columns.max(1)) {
                for factor in left {
                    values.extend(right.iter().map(|value| factor * value));
                }
            }
        }
        Self {
            rows: self.rows * other.rows,
            columns: self.columns * other.columns,
            values,
        }
    }
}

/// `left · core · right` for each element of the kernel: `[outputs, r] · [r, r2, kernel] · [r2,
/// inputs]`.
fn tucker(left: &Matrix, core: &Matrix, right: &Matrix) -> Matrix {
    let inner = right.rows;
    let kernel = core.columns / inner.max(1);
    let inputs = right.transposed();
    let mut values = Vec::with_capacity(core.rows * inputs.rows * kernel);
    for plane in core.values.chunks_exact(core.columns.max(1)) {
        let plane = Matrix {
            rows: inner,
            columns: kernel,
            values: plane.to_vec(),
        };
        values.extend(inputs.times(&plane).values);
    }
    left.times(&Matrix {
        rows: core.rows,
        columns: inputs.rows * kernel,
        values,
    })
}
