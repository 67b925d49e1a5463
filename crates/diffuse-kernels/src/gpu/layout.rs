//! Memory layouts: channels last for images, rows at a fixed distance for matrices.

use burn::tensor::Shape;
use burn_cubecl::{CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::zspace::Strides;

use super::launch::empty;

/// A view of the same memory with other dimensions.
pub fn with_layout<R: CubeRuntime>(
    mut x: CubeTensor<R>,
    shape: &[usize],
    strides: &[usize],
) -> CubeTensor<R> {
    *x.meta = burn_std::Metadata::new(Shape::from(shape.to_vec()), Strides::new(strides));
    x
}

/// The strides of `[batch, channels, height, width]` with channels last.
fn channels_last_strides([_, channels, height, width]: [usize; 4]) -> [usize; 4] {
    if height * width == 1 {
        // The same memory order; burn takes these strides for contiguous.
        return [channels, 1, 1, 1];
    }
    [height * width * channels, 1, width * channels, channels]
}

fn dims<R: CubeRuntime, const D: usize>(x: &CubeTensor<R>) -> [usize; D] {
    let dims: Vec<usize> = x.meta.shape().iter().copied().collect();
    dims.try_into().expect("a tensor with `D` dimensions")
}

/// An image with channels last.
pub struct Image<R: CubeRuntime> {
    /// `[batch, channels, height, width]`, channels last in memory.
    pub tensor: CubeTensor<R>,
    /// Number of images.
    pub batch: usize,
    /// Number of channels.
    pub channels: usize,
    /// Height in pixels.
    pub height: usize,
    /// Width in pixels.
    pub width: usize,
}

impl<R: CubeRuntime> Image<R> {
    /// Copies the image if its channels are not last in memory.
    pub fn new(x: CubeTensor<R>) -> Self {
        let shape: [usize; 4] = dims(&x);
        let [batch, channels, height, width] = shape;
        let tensor = if same_order(&x, &shape, &channels_last_strides(shape)) {
            with_layout(x, &shape, &channels_last_strides(shape))
        } else {
            let strides: Vec<usize> = x.meta.strides().iter().copied().collect();
            let permuted = with_layout(
                x,
                &[batch, height, width, channels],
                &[strides[0], strides[2], strides[3], strides[1]],
            );
            with_layout(
                into_contiguous(permuted),
                &shape,
                &channels_last_strides(shape),
            )
        };
        Self {
            tensor,
            batch,
            channels,
            height,
            width,
        }
    }

    /// An image with unspecified values.
    pub fn empty(like: &CubeTensor<R>, shape: [usize; 4]) -> Self {
        let [batch, channels, height, width] = shape;
        let tensor = empty(like, Shape::from(shape.to_vec()));
        Self {
            tensor: with_layout(tensor, &shape, &channels_last_strides(shape)),
            batch,
            channels,
            height,
            width,
        }
    }

    /// The pixels as tokens, `[batch, height · width, channels]`, in the same memory.
    pub fn into_tokens(self) -> CubeTensor<R> {
        let tokens = self.height * self.width;
        with_layout(
            self.tensor,
            &[self.batch, tokens, self.channels],
            &[tokens * self.channels, self.channels, 1],
        )
    }
}

/// Tokens `[batch, height · width, channels]` as an image; contiguous ones are not copied.
pub fn image_of_tokens<R: CubeRuntime>(
    x: CubeTensor<R>,
    [height, width]: [usize; 2],
) -> CubeTensor<R> {
    let [batch, _, channels]: [usize; 3] = dims(&x);
    let shape = [batch, channels, height, width];
    with_layout(into_contiguous(x), &shape, &channels_last_strides(shape))
}

/// Whether the strides are equal, ignoring dimensions of size 1.
fn same_order<R: CubeRuntime>(x: &CubeTensor<R>, shape: &[usize], strides: &[usize]) -> bool {
    x.meta
        .strides()
        .iter()
        .zip(strides)
        .zip(shape)
        .all(|((a, b), size)| a == b || *size == 1)
}

/// A tensor as a matrix over its last dimension, with rows at a fixed distance.
pub struct Rows<R: CubeRuntime> {
    /// Any shape.
    pub tensor: CubeTensor<R>,
    /// Product of all dimensions but the last.
    pub rows: usize,
    /// The last dimension.
    pub columns: usize,
    /// Distance of two rows in memory.
    pub pitch: usize,
}

impl<R: CubeRuntime> Rows<R> {
    /// Copies the tensor if its rows are not at a fixed distance.
    pub fn new(x: CubeTensor<R>) -> Self {
        let shape: Vec<usize> = x.meta.shape().iter().copied().collect();
        let last = shape.len() - 1;
        let columns = shape[last];
        let rows = shape[..last].iter().product();
        let pitch = Self::pitch(&x).unwrap_or(columns);
        let tensor = if Self::pitch(&x).is_some() {
            x
        } else {
            into_contiguous(x)
        };
        Self {
            tensor,
            rows,
            columns,
            pitch,
        }
    }

    fn pitch(x: &CubeTensor<R>) -> Option<usize> {
        let shape: Vec<usize> = x.meta.shape().iter().copied().collect();
        let strides: Vec<usize> = x.meta.strides().iter().copied().collect();
        let last = shape.len() - 1;
        if strides[last] != 1 && shape[last] != 1 {
            return None;
        }
        let mut pitch = None;
        let mut expected = 0;
        for dim in (0..last).rev() {
            if shape[dim] == 1 {
                continue;
            }
            match pitch {
                None => {
                    pitch = Some(strides[dim]);
                    expected = strides[dim] * shape[dim];
                }
                Some(_) if strides[dim] == expected => expected *= shape[dim],
                Some(_) => return None,
            }
        }
        let pitch = pitch.unwrap_or(shape[last]);
        (pitch >= shape[last]).then_some(pitch)
    }
}

/// A convolution weight `[out, in, kernel, kernel]` with the input channels last in memory.
pub fn kernel_channels_last<R: CubeRuntime>(weight: CubeTensor<R>) -> CubeTensor<R> {
    Image::new(weight).tensor
}
