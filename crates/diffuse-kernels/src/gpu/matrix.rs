//! Linear layers and convolutions.

use burn::tensor::{DType, Shape};
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

use super::launch::{array, empty, empty_of, grid, max_vector_size};
use super::layout::{Image, Rows, kernel_channels_last, with_layout};
use super::norm::{ROW_UNITS, rows_are_planes};
use super::product::{
    BIAS, CHANNEL_BIAS, FEW_ROWS, FEW_UNITS, K_VECTORS, Output, Plan, RESIDUAL, SizesLaunch,
    Source, few_rows, finish, product,
};
use super::tiles::{Tiling, has_tensor_cores};

/// The tensors added to a product.
pub struct Addends<R: CubeRuntime> {
    /// `[columns]`
    pub bias: Option<CubeTensor<R>>,
    /// `[batch, columns]`, contiguous.
    pub channel_bias: Option<CubeTensor<R>>,
    /// The shape of the output, contiguous in its memory order.
    pub residual: Option<CubeTensor<R>>,
}

impl<R: CubeRuntime> Default for Addends<R> {
    fn default() -> Self {
        Self {
            bias: None,
            channel_bias: None,
            residual: None,
        }
    }
}

impl<R: CubeRuntime> Addends<R> {
    fn flags(&self) -> u32 {
        let flag = |is_some: bool, flag| if is_some { flag } else { 0 };
        flag(self.bias.is_some(), BIAS)
            | flag(self.channel_bias.is_some(), CHANNEL_BIAS)
            | flag(self.residual.is_some(), RESIDUAL)
    }
}

/// The inputs of a product.
struct Operands<'a, R: CubeRuntime> {
    a: &'a CubeTensor<R>,
    weights: &'a [CubeTensor<R>],
    addends: &'a Addends<R>,
}

/// A product to compute; see [`Sizes`](super::product::Sizes).
#[derive(Clone, Copy)]
struct Problem {
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
    upsample: usize,
    gated: bool,
    /// The result is the sums themselves, in `f32`.
    sums: bool,
}

impl Problem {
    /// A product with the rows of a matrix, without the sizes of `W`.
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
            upsample: 0,
            gated: false,
            sums: false,
        }
    }
}

/// Computes a product into a new tensor of `shape`; `None` if the kernel does not support its
/// sizes.
fn launch<R: CubeRuntime>(
    operands: Operands<R>,
    problem: Problem,
    shape: Shape,
) -> Option<CubeTensor<R>> {
    let Operands {
        a,
        weights,
        addends,
    } = operands;
    let out = if problem.sums {
        empty_of(a, shape, DType::F32)
    } else {
        empty(a, shape)
    };
    if out.meta.num_elements() == 0 {
        return Some(out);
    }
    let client = &a.client;
    let whole = |n: usize| {
        [problem.channels, problem.pitch, problem.weight_pitch]
            .iter()
            .all(|size| size.is_multiple_of(n))
    };
    let max_vector_size = max_vector_size(client, a.dtype.size());
    let tensor_cores = max_vector_size == 8 && whole(8) && has_tensor_cores(client, a.dtype);
    let n = match tensor_cores {
        true => 8,
        false => [4, 2, 1]
            .into_iter()
            .find(|n| *n <= max_vector_size && whole(*n))?,
    };
    // GEGLU has half as many results, for which staging does not pay.
    let staged =
        tensor_cores && !problem.gated && !problem.sums && problem.columns.is_multiple_of(8);
    let out_vector = if problem.columns.is_multiple_of(2) {
        2
    } else {
        1
    };
    if out.meta.num_elements() > u32::MAX as usize / 2
        || (problem.gated && !problem.columns.is_multiple_of(4))
    {
        return None;
    }
    if problem.source == Source::Rows
        && problem.rows <= FEW_ROWS
        && !problem.gated
        && !problem.sums
        && addends.channel_bias.is_none()
        && weights.len() == 1
    {
        let or_a = |x: &Option<CubeTensor<R>>| array(x.as_ref().unwrap_or(a));
        // SAFETY: the kernel checks every index against the sizes, which are those of the tensors.
        unsafe {
            few_rows::launch_unchecked::<R>(
                client,
                grid(problem.columns as u32, (FEW_UNITS / ROW_UNITS) as u32),
                CubeDim::new_1d(FEW_UNITS as u32),
                n,
                array(a),
                array(&weights[0]),
                or_a(&addends.bias),
                or_a(&addends.residual),
                array(&out),
                problem.columns as u32,
                (problem.channels / n) as u32,
                (problem.pitch / n) as u32,
                (problem.weight_pitch / n) as u32,
                addends.flags(),
                problem.rows,
                rows_are_planes(client),
                a.dtype.into(),
            );
        }
        return Some(out);
    }
    let depth = K_VECTORS * n;
    let taps = problem.kernel * problem.kernel;
    let steps = taps * problem.channels.div_ceil(depth);
    let processors = client
        .properties()
        .hardware
        .num_streaming_multiprocessors
        .unwrap_or(64) as usize;
    let weight_rows = problem.columns / weights.len();
    let tiling = Tiling::choose(
        [problem.rows, problem.columns],
        steps,
        processors,
        !problem.gated && !problem.sums,
        tensor_cores,
        |tile| weights.len() == 1 || (tensor_cores && weight_rows.is_multiple_of(tile.columns)),
    )?;
    let steps_per_cube = steps.div_ceil(tiling.splits);
    let splits = steps.div_ceil(steps_per_cube);
    let count = CubeCount::Static(
        problem.columns.div_ceil(tiling.tile.columns) as u32,
        problem.rows.div_ceil(tiling.tile.rows) as u32,
        splits as u32,
    );
    let sizes = SizesLaunch::new(
        problem.rows as u32,
        problem.columns as u32,
        weight_rows as u32,
        problem.channels as u32,
        problem.pitch as u32,
        problem.weight_pitch as u32,
        steps as u32,
        steps_per_cube as u32,
        problem.positions as u32,
        problem.input[0] as u32,
        problem.input[1] as u32,
        problem.out_width as u32,
        problem.kernel as u32,
        problem.stride as u32,
        problem.padding as u32,
        problem.upsample as u32,
        addends.flags(),
    );
    let or_a = |x: &Option<CubeTensor<R>>| array(x.as_ref().unwrap_or(a));
    let (sums, output) = match (splits, problem.gated) {
        (1, _) if problem.sums => (out.clone(), Output::Partial),
        (1, false) => (out.clone(), Output::Finished),
        (1, true) => (out.clone(), Output::Geglu),
        _ => {
            let shape = Shape::from(vec![splits, problem.rows, problem.columns]);
            (empty_of(a, shape, DType::F32), Output::Partial)
        }
    };
    let staged = staged && output != Output::Partial;
    let out_vector = if staged { 8 } else { out_vector };
    // `finish` reads and writes in wider vectors.
    let finish_vector = [4, 2, 1]
        .into_iter()
        .find(|n| problem.columns.is_multiple_of(*n))?;
    let plan = Plan {
        tile: tiling.tile,
        source: problem.source,
        output,
        weights: weights.len(),
        staged,
    };
    // SAFETY: the kernel checks every index against the sizes, which are those of the tensors.
    unsafe {
        product::launch_unchecked::<R>(
            client,
            count,
            CubeDim::new_1d(tiling.tile.units() as u32),
            n,
            out_vector,
            array(a),
            array(&weights[0]),
            array(weights.get(1).unwrap_or(a)),
            array(weights.get(2).unwrap_or(a)),
            or_a(&addends.bias),
            or_a(&addends.channel_bias),
            or_a(&addends.residual),
            array(&sums),
            sizes,
            plan,
            [a.dtype.into(), sums.dtype.into()],
        );
        if splits > 1 {
            finish::launch_unchecked::<R>(
                client,
                grid((problem.rows * problem.columns / finish_vector) as u32, 256),
                CubeDim::new_1d(256),
                finish_vector,
                array(&sums),
                or_a(&addends.bias),
                or_a(&addends.channel_bias),
                or_a(&addends.residual),
                array(&out),
                problem.rows as u32,
                problem.columns as u32,
                problem.positions as u32,
                splits as u32,
                addends.flags(),
                a.dtype.into(),
            );
        }
    }
    Some(out)
}

/// `x Wᵀ` over the last dimension of `x`, plus `addends`; with `gated`, the first half of the
/// columns times the GELU of the second.
pub fn linear<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    addends: Addends<R>,
    gated: bool,
) -> Option<CubeTensor<R>> {
    let mut shape: Vec<usize> = x.meta.shape().iter().copied().collect();
    let x = Rows::new(x);
    let weight = Rows::new(weight);
    let columns = weight.rows;
    *shape.last_mut()? = if gated { columns / 2 } else { columns };
    let problem = Problem {
        columns,
        weight_pitch: weight.pitch,
        gated,
        ..Problem::of_rows(&x)
    };
    let operands = Operands {
        a: &x.tensor,
        weights: &[weight.tensor],
        addends: &addends,
    };
    launch(operands, problem, Shape::from(shape))
}

/// `x Wᵀ` for two or three matrices of the same size as one product; the results are views of its
/// columns. `None` if the device does not support it.
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
    let problem = Problem {
        columns: count * each,
        weight_pitch: pitch,
        ..Problem::of_rows(&x)
    };
    let weights: Vec<CubeTensor<R>> = weights.into_iter().map(|weight| weight.tensor).collect();
    let operands = Operands {
        a: &x.tensor,
        weights: &weights,
        addends: &Addends::default(),
    };
    let all = launch(operands, problem, Shape::from(shape.clone()))?;
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
    let problem = Problem {
        columns: b.rows,
        weight_pitch: b.pitch,
        sums: true,
        ..Problem::of_rows(&a)
    };
    let operands = Operands {
        a: &a.tensor,
        weights: std::slice::from_ref(&b.tensor),
        addends: &Addends::default(),
    };
    launch(operands, problem, Shape::from(vec![a.rows, b.rows]))
}

/// The geometry of a convolution.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Distance of neighbouring receptive fields.
    pub stride: usize,
    /// Zeros above and to the left.
    pub padding: usize,
    /// Height and width of the output.
    pub output: [usize; 2],
    /// The input is first upsampled to twice its height and width, each pixel repeated.
    pub upsample: bool,
}

/// A convolution of an image, plus `addends`.
pub fn conv2d<R: CubeRuntime>(
    x: CubeTensor<R>,
    weight: CubeTensor<R>,
    addends: Addends<R>,
    geometry: Geometry,
) -> Option<CubeTensor<R>> {
    let kernel = weight.meta.shape()[2];
    let columns = weight.meta.shape()[0];
    let x = Image::new(x);
    let weight = kernel_channels_last(weight);
    let [height, width] = geometry.output;
    let positions = height * width;
    let problem = Problem {
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
        upsample: usize::from(geometry.upsample),
        gated: false,
        sums: false,
    };
    let addends = Addends {
        residual: addends.residual.map(|residual| Image::new(residual).tensor),
        ..addends
    };
    let shape = [x.batch, columns, height, width];
    let operands = Operands {
        a: &x.tensor,
        weights: &[weight],
        addends: &addends,
    };
    let out = launch(operands, problem, Shape::from(shape.to_vec()))?;
    Some(with_layout(
        out,
        &shape,
        &[positions * columns, 1, width * columns, columns],
    ))
}
