use burn::tensor::ops::{ConvOptions, InterpolateMode, InterpolateOptions};
use burn::tensor::{Int, Tensor, TensorData, backend::Backend, module};

use diffuse_kernels::gpu;

use super::{add_channel_bias, flex};

/// Stride and zero padding of a convolution, the same for height and width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConvGeometry {
    /// Step between output positions.
    pub stride: usize,
    /// Zeros added above and to the left.
    pub padding_start: usize,
    /// Zeros added below and to the right, at least as many.
    pub padding_end: usize,
}

impl ConvGeometry {
    /// That of a convolution that keeps the size of a picture, for an odd kernel.
    pub fn same(kernel: usize) -> Self {
        Self {
            stride: 1,
            padding_start: kernel / 2,
            padding_end: kernel / 2,
        }
    }

    /// Height or width of the output; none if the kernel has no room.
    pub fn output(self, input: usize, kernel: usize) -> Option<usize> {
        let room = (input + self.padding_start + self.padding_end).checked_sub(kernel)?;
        Some(room / self.stride + 1)
    }
}

/// A 2-D convolution (cross-correlation, as everywhere in the field).
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - `weight`: `[out, in, kernel, kernel]`, of any floating point type
/// - `bias`: `[out]`, of the type of `x`
/// - output: `[batch, out, height', width']`
///
/// # Panics
/// If `x` does not have the channels that `weight` is for, `bias` has another size, or the padding is larger at the start.
pub fn conv2d<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
) -> Tensor<B, 4> {
    any_conv2d(x, weight, bias, geometry, None)
}

/// [`conv2d`], and a residual that its result is added to.
///
/// # Shapes
/// - `residual`: that of the output, of the type of `x`
///
/// # Panics
/// As [`conv2d`], or if the residual has another shape or type.
pub fn conv2d_add<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
    residual: Tensor<B, 4>,
) -> Tensor<B, 4> {
    any_conv2d(x, weight, bias, geometry, Some(residual))
}

/// [`conv2d`], and a value for each channel of each image that its result is added to.
///
/// # Shapes
/// - `channel_bias`: `[batch, out]`, of the type of `x`
///
/// # Panics
/// As [`conv2d`], or if the channel bias has another shape.
pub fn conv2d_channel_bias<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
    channel_bias: Tensor<B, 2>,
) -> Tensor<B, 4> {
    let ([batch, _, height, width], [outputs, _, kernel, _]) = (x.dims(), weight.dims());
    assert_eq!(
        channel_bias.dims(),
        [batch, outputs],
        "a bias of another size"
    );
    let size = [height, width].map(|size| geometry.output(size, kernel));
    if let [Some(height), Some(width)] = size {
        let conv = gpu::Conv2d {
            stride: geometry.stride,
            padding: geometry.padding_start,
            output: [height, width],
            enlarged: false,
            bias: bias.clone(),
            channel_bias: Some(channel_bias.clone()),
            residual: None,
        };
        if let Some(y) = gpu::conv2d(&x, &weight, conv) {
            return y;
        }
    }
    add_channel_bias(conv2d(x, weight, bias, geometry), channel_bias)
}

/// [`upsample_nearest`] to twice the size, then a [`conv2d`] that keeps the size.
///
/// # Shapes
/// - `x`: `[batch, in, height, width]`
/// - output: `[batch, out, 2 height, 2 width]`
///
/// # Panics
/// As [`conv2d`].
pub fn upsample_conv2d<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
) -> Tensor<B, 4> {
    let ([_, _, height, width], [_, _, kernel, _]) = (x.dims(), weight.dims());
    let geometry = ConvGeometry::same(kernel);
    let conv = gpu::Conv2d {
        stride: 1,
        padding: geometry.padding_start,
        output: [2 * height, 2 * width],
        enlarged: true,
        bias: bias.clone(),
        channel_bias: None,
        residual: None,
    };
    if let Some(y) = gpu::conv2d(&x, &weight, conv) {
        return y;
    }
    conv2d(
        upsample_nearest(x, [2 * height, 2 * width]),
        weight,
        bias,
        geometry,
    )
}

fn any_conv2d<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Option<Tensor<B, 1>>,
    geometry: ConvGeometry,
    residual: Option<Tensor<B, 4>>,
) -> Tensor<B, 4> {
    let [batch, channels, height, width] = x.dims();
    let [outputs, expected, kernel, _] = weight.dims();
    assert_eq!(
        channels, expected,
        "a convolution for {expected} channels got {channels}"
    );
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [outputs], "a bias of another size");
    }
    assert!(
        geometry.padding_end >= geometry.padding_start,
        "more padding at the start than at the end"
    );
    if let Some(residual) = &residual {
        let [rows, columns] = [height, width].map(|size| geometry.output(size, kernel));
        let [_, _, height, width] = residual.dims();
        let fits = residual.dims() == [batch, outputs, height, width]
            && [rows, columns] == [Some(height), Some(width)];
        assert!(fits, "a residual of another shape");
        assert_eq!(residual.dtype(), x.dtype(), "a residual of another type");
    }
    let residual = match flex::conv2d(&x, &weight, bias.as_ref(), geometry, residual) {
        Ok(y) => return y,
        Err(residual) => residual,
    };
    let weight = weight.cast(x.dtype());
    if let [Some(height), Some(width)] = [height, width].map(|size| geometry.output(size, kernel)) {
        let conv = gpu::Conv2d {
            stride: geometry.stride,
            padding: geometry.padding_start,
            output: [height, width],
            enlarged: false,
            bias: bias.clone(),
            channel_bias: None,
            residual: residual.clone(),
        };
        if let Some(y) = gpu::conv2d(&x, &weight, conv) {
            return y;
        }
    }
    let extra = geometry.padding_end - geometry.padding_start;
    let x = zeros_after(zeros_after(x, 2, extra), 3, extra);
    let options = ConvOptions::new([geometry.stride; 2], [geometry.padding_start; 2], [1; 2], 1);
    let y = module::conv2d(x, weight, bias, options);
    match residual {
        Some(residual) => y + residual,
        None => y,
    }
}

/// Appends `count` zeros along a dimension. burn's own padding makes them in the backend's default type, which `Flex`
/// refuses for tensors of another.
fn zeros_after<B: Backend>(x: Tensor<B, 4>, dim: usize, count: usize) -> Tensor<B, 4> {
    if count == 0 {
        return x;
    }
    let mut shape = x.dims();
    shape[dim] = count;
    let zeros = Tensor::zeros(shape, (&x.device(), x.dtype()));
    Tensor::cat(vec![x, zeros], dim)
}

/// Nearest-neighbour resizing: output position `i` shows input position `⌊i · input / output⌋`.
///
/// # Shapes
/// - `x`: `[batch, channels, height, width]`
/// - output: `[batch, channels, size[0], size[1]]`
pub fn upsample_nearest<B: Backend>(x: Tensor<B, 4>, size: [usize; 2]) -> Tensor<B, 4> {
    let [_, _, height, width] = x.dims();
    if size == [2 * height, 2 * width] {
        if let Some(y) = flex::upsample_twice(&x) {
            return y;
        }
        let options = InterpolateOptions::new(InterpolateMode::Nearest);
        return module::interpolate(x, size, options);
    }
    // Backends round positions differently where the ratio is not whole, so those are looked up.
    let device = x.device();
    let lookup = |from: usize, to: usize| -> Tensor<B, 1, Int> {
        let indices: Vec<i64> = (0..to).map(|i| (i * from / to) as i64).collect();
        Tensor::from_data(TensorData::new(indices, [to]), &device)
    };
    let rows = lookup(height, size[0]);
    let columns = lookup(width, size[1]);
    x.select(2, rows).select(3, columns)
}

/// A convolution's weight `[out, in, kernel, kernel]` in the order in memory in which the backend's kernels read it;
/// loading calls it, so that they need not do it at each use.
pub fn convolution_weight<B: Backend>(weight: Tensor<B, 4>) -> Tensor<B, 4> {
    gpu::convolution_weight(&weight).unwrap_or(weight)
}
