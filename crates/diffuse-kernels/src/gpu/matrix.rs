//! Linear layers and convolutions.

use burn::tensor::{DType, Shape};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::launch::{array, empty, empty_of, grid, widest};
use super::layout::{Image, Rows, kernel_channels_last, with_layout};
use super::norm::{ROW_UNITS, rows_are_planes};
use super::product::{
    BIAS, CHANNEL_BIAS, FEW, FEW_UNITS, Output, Plan, RESIDUAL, SizesLaunch, Source, VECTORS,
    few_rows, finish, product,
};
use super::tiles::{Cut, has_tensor_cores};

/// What is added to a product.
pub struct Added<R: CubeRuntime> {
    /// `[columns]`
    pub bias: Option<CubeTensor<R>>,
    /// `[batch, columns]`, contiguous.
    pub channel_bias: Option<CubeTensor<R>>,
    /// As the output, contiguous in its order.
    pub residual: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime> Default for Added<R> {
    fn default() -> Self {
        Self {
            bias: None,
            channel_bias: None,
            residual: None,
        }
    }
}

impl<R: CubeRuntime> Added<R> {
    fn bits(&self) -> u32 {
        let bit = |there: bool, bit| if there { bit } else { 0 };
        bit(self.bias.is_some(), BIAS)
            | bit(self.channel_bias.is_some(), CHANNEL_BIAS)
            | bit(self.residual.is_some(), RESIDUAL)
    }
}

/// The inputs of a product.
struct Operands<'a, R: CubeRuntime> {
    a: &'a CubeTensor<R>,
    weights: &'a [CubeTensor<R>],
    added: &'a Added<R>,
}

/// The numbers of a product; see [`Sizes`](super::product::Sizes).
#[derive(Clone, Copy)]
struct Numbers {
    source: Source,
    rows: usize,
    columns: usize,
    channels: usize,
    pitch: usize,
    weight_pitch: usize,
    positions: usize,
    input: [usize; 2],
    out_width: usize,
    kernel: usize,
    stride: usize,
    padding: usize,
    enlarged: usize,
    gated: bool,
    /// The sums themselves are wanted, in `f32`.
    sums: bool,
}

impl Numbers {
    /// The numbers of a product with the rows of a matrix, without those of `W`.
    fn of_rows<R: CubeRuntime>(x: &Rows<R>) -> Self {
        Self {
            source: Source::Rows,
            rows: x.rows,
            columns: 0,
            channels: x.columns,
            pitch: x.pitch,
            weight_pitch: 0,
            positions: x.rows.max(1),
            input: [1, 1],
            out_width: 1,
            kernel: 1,
            stride: 1,
            padding: 0,
            enlarged: 0,
            gated: false,
            sums: false,
        }
    }
}

/// Launches a product into a new tensor of `shape`, or `None` if the kernel does not fit the sizes.
fn launch<R: CubeRuntime>(
    operands: Operands<R>,
    numbers: Numbers,
    shape: Shape,
) -> Option<CubeTensor<R>> {
    let Operands { a, weights, added } = operands;
    let out = if numbers.sums {
        empty_of(a, shape, DType::F32)
    } else {
        empty(a, shape)
    };
    if out.meta.num_elements() == 0 {
        return Some(out);
    }
    let client = &a.client;
    let whole = |n: usize| {
        [numbers.channels, numbers.pitch, numbers.weight_pitch]
            .iter()
            .all(|size| size.is_multiple_of(n))
    };
    let widest = widest(client, a.dtype.size());
    let tensor_cores = widest == 8 && whole(8) && has_tensor_cores(client, a.dtype);
    let n = match tensor_cores {
        true => 8,
        false => [4, 2, 1].into_iter().find(|n| *n <= widest && whole(*n))?,
    };
    // What GEGLU leaves, half the columns, is not worth the way over shared memory.
    let gathered =
        tensor_cores && !numbers.gated && !numbers.sums && numbers.columns.is_multiple_of(8);
    let pair = if numbers.columns.is_multiple_of(2) {
        2
    } else {
        1
    };
    if out.meta.num_elements() > u32::MAX as usize / 2
        || (numbers.gated && !numbers.columns.is_multiple_of(4))
    {
        return None;
    }
    if numbers.source == Source::Rows
        && numbers.rows <= FEW
        && !numbers.gated
        && !numbers.sums
        && added.channel_bias.is_none()
        && weights.len() == 1
    {
        let or_a = |x: &Option<CubeTensor<R>>| array(x.as_ref().unwrap_or(a));
        // SAFETY: the kernel compares every index with the sizes, which are those of the tensors.
        unsafe {
            few_rows::launch_unchecked::<R>(
                client,
                grid(numbers.columns as u32, (FEW_UNITS / ROW_UNITS) as u32),
                CubeDim::new_1d(FEW_UNITS as u32),
                n,
                array(a),
                array(&weights[0]),
                or_a(&added.bias),
                or_a(&added.residual),
                array(&out),
                numbers.columns as u32,
                (numbers.channels / n) as u32,
                (numbers.pitch / n) as u32,
                (numbers.weight_pitch / n) as u32,
                added.bits(),
                numbers.rows,
                rows_are_planes(client),
                a.dtype.into(),
            );
        }
        return Some(out);
    }
    let depth = VECTORS * n;
    let taps = numbers.kernel * numbers.kernel;
    let steps = taps * numbers.channels.div_ceil(depth);
    let processors = client
        .properties()
        .hardware
        .num_streaming_multiprocessors
        .unwrap_or(64) as usize;
    let weight_rows = numbers.columns / weights.len();
    let cut = Cut::choose(
        [numbers.rows, numbers.columns],
        steps,
        processors,
        !numbers.gated && !numbers.sums,
        tensor_cores,
        |tile| weights.len() == 1 || (tensor_cores && weight_rows.is_multiple_of(tile.columns)),
    )?;
    let steps_per_cube = steps.div_ceil(cut.parts);
    let parts = steps.div_ceil(steps_per_cube);
    let count = CubeCount::Static(
        numbers.columns.div_ceil(cut.tile.columns) as u32,
        numbers.rows.div_ceil(cut.tile.rows) as u32,
        parts as u32,
    );
    let sizes = SizesLaunch::new(
        numbers.rows as u32,
        numbers.columns as u32,
        weight_rows as u32,
        numbers.channels as u32,
        numbers.pitch as u32,
        numbers.weight_pitch as u32,
        steps as u32,
        steps_per_cube as u32,
        numbers.positions as u32,
        numbers.input[0] as u32,
        numbers.input[1] as u32,
        numbers.out_width as u32,
        numbers.kernel as u32,
        numbers.stride as u32,
        numbers.padding as u32,
        numbers.enlarged as u32,
        added.bits(),
    );
    let or_a = |x: &Option<CubeTensor<R>>| array(x.as_ref().unwrap_or(a));
    let (sums, output) = match (parts, numbers.gated) {
        (1, _) if numbers.sums => (out.clone(), Output::Partial),
        (1, false) => (out.clone(), Output::Finished),
        (1, true) => (out.clone(), Output::Geglu),
        _ => {
            let shape = Shape::from(vec![parts, numbers.rows, numbers.columns]);
            (empty_of(a, shape, DType::F32), Output::Partial)
        }
    };
    let gathered = gathered && output != Output::Partial;
    let pair = if gathered { 8 } else { pair };
    // The sums of parts are read and written in wider vectors.
    let finish_pair = [4, 2, 1]
        .into_iter()
        .find(|n| numbers.columns.is_multiple_of(*n))?;
    let plan = Plan {
        tile: cut.tile,
        source: numbers.source,
        output,
        weights: weights.len(),
        gathered,
    };
    // SAFETY: the kernel compares every index with the sizes, which are those of the tensors.
    unsafe {
        product::launch_unchecked::<R>(
            client,
            count,
            CubeDim::new_1d(cut.tile.units() as u32),
            n,
            pair,
            array(a),
            array(&weights[0]),
            array(weights.get(1).unwrap_or(a)),
            array(weights.get(2).unwrap_or(a)),
            or_a(&added.bias),
            or_a(&added.channel_bias),
            or_a(&added.residual),
            array(&sums),
            sizes,
            plan,
            [a.dtype.into(), sums.dtype.into()],
        );
        if parts > 1 {
            finish::launch_unchecked::<R>(
                client,
                grid((numbers.rows * numbers.columns / finish_pair) as u32, 256),
                CubeDim::new_1d(256),
                finish_pair,
                array(&sums),
                or_a(&added.bias),
                or_a(&added.channel_bias),
                or_a(&added.residual),
                array(&out),
                numbers.rows as u32,
                numbers.columns as u32,
                numbers.positions as u32,
                parts as u32,
                added.bits(),
                a.dtype.into(),
            );
        }
    }
    Some(out)
}

/// `x Wᵀ` over the last dimension of `x`, and what is added; with `gated`, the first half of the
/// columns times the GELU of the second.
pub fn linear<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    added: Added<R>,
    gated: bool,
) -> Option<CubeTensor<R>> {
    let mut shape: Vec<usize> = x.meta.shape().iter().copied().collect();
    let x = Rows::new(x);
    let weight = Rows::new(weight);
    let columns = weight.rows;
    *shape.last_mut()? = if gated { columns / 2 } else { columns };
    let numbers = Numbers {
        columns,
        weight_pitch: weight.pitch,
        gated,
        ..Numbers::of_rows(&x)
    };
    let operands = Operands {
        a: &x.tensor,
        weights: &[weight.tensor],
        added: &added,
    };
    launch(operands, numbers, Shape::from(shape))
}

/// `x Wᵀ` for two or three matrices of the same size, in one product whose columns the results
/// share; `None` where the device does not compute them in one.
pub fn linears<R: CubeRuntime>(
    x: CubeTensor<R>,
    weights: Vec<CubeTensor<R>>,
) -> Option<Vec<CubeTensor<R>>> {
    let mut shape: Vec<usize> = x.meta.shape().iter().copied().collect();
    let count = weights.len();
    let x = Rows::new(x);
    let weights: Vec<Rows<R>> = weights.into_iter().map(Rows::new).collect();
    let (each, pitch) = (weights[0].rows, weights[0].pitch);
    let same = weights
        .iter()
        .all(|weight| weight.rows == each && weight.pitch == pitch);
    if !same || !(2..=3).contains(&count) {
        return None;
    }
    *shape.last_mut()? = count * each;
    let numbers = Numbers {
        columns: count * each,
        weight_pitch: pitch,
        ..Numbers::of_rows(&x)
    };
    let weights: Vec<CubeTensor<R>> = weights.into_iter().map(|weight| weight.tensor).collect();
    let operands = Operands {
        a: &x.tensor,
        weights: &weights,
        added: &Added::default(),
    };
    let all = launch(operands, numbers, Shape::from(shape.clone()))?;
    *shape.last_mut()? = each;
    let strides: Vec<usize> = all.meta.strides().iter().copied().collect();
    let bytes = (each * all.dtype.size()) as u64;
    let part = |index: usize| {
        let mut part = with_layout(all.clone(), &shape, &strides);
        part.handle = part.handle.offset_start(index as u64 * bytes);
        part
    };
    Some((0..count).map(part).collect())
}

/// `a bᵀ` of two contiguous matrices, in `f32`.
pub fn products<R: CubeRuntime>(a: &CubeTensor<R>, b: &CubeTensor<R>) -> Option<CubeTensor<R>> {
    let (a, b) = (Rows::new(a.clone()), Rows::new(b.clone()));
    let numbers = Numbers {
        columns: b.rows,
        weight_pitch: b.pitch,
        sums: true,
        ..Numbers::of_rows(&a)
    };
    let operands = Operands {
        a: &a.tensor,
        weights: std::slice::from_ref(&b.tensor),
        added: &Added::default(),
    };
    launch(operands, numbers, Shape::from(vec![a.rows, b.rows]))
}

/// Where a convolution reads.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Distance of two receptive fields.
    pub stride: usize,
    /// Zeros above and to the left.
    pub padding: usize,
    /// Height and width of the output.
    pub output: [usize; 2],
    /// The input is enlarged to twice its height and width first, each pixel repeated.
    pub enlarged: bool,
}

/// A convolution of an image, and what is added.
pub fn conv2d<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    added: Added<R>,
    geometry: Geometry,
) -> Option<CubeTensor<R>> {
    let kernel = weight.meta.shape()[2];
    let columns = weight.meta.shape()[0];
    let x = Image::new(x);
    let weight = kernel_channels_last(weight);
    let [height, width] = geometry.output;
    let positions = height * width;
    let numbers = Numbers {
        source: Source::Image,
        rows: x.batch * positions,
        columns,
        channels: x.channels,
        pitch: x.channels,
        weight_pitch: kernel * kernel * x.channels,
        positions,
        input: [x.height, x.width],
        out_width: width,
        kernel,
        stride: geometry.stride,
        padding: geometry.padding,
        enlarged: usize::from(geometry.enlarged),
        gated: false,
        sums: false,
    };
    let added = Added {
        residual: added.residual.map(|residual| Image::new(residual).tensor),
        ..added
    };
    let shape = [x.batch, columns, height, width];
    let operands = Operands {
        a: &x.tensor,
        weights: &[weight],
        added: &added,
    };
    let out = launch(operands, numbers, Shape::from(shape.to_vec()))?;
    Some(with_layout(
        out,
        &shape,
        &[positions * columns, 1, width * columns, columns],
    ))
}
