use burn::tensor::{Tensor, backend::Backend};

use diffuse_kernels::{AddChannelBias, ConcatChannels, ImageToTokens, TokensToImage};

/// `[batch, channels, height, width]` as one row a channel, with the shape to go back to.
/// Broadcasting over rows is much faster on CPU backends than over a middle dimension.
pub(super) fn channel_rows<B: Backend>(x: Tensor<B, 4>) -> (Tensor<B, 2>, [usize; 4]) {
    let shape = x.dims();
    let [batch, channels, height, width] = shape;
    (x.reshape([batch * channels, height * width]), shape)
}

/// Adds a value a channel.
///
/// # Shapes
/// - `x`, output: `[batch, channels, height, width]`
/// - `bias`: `[batch, channels]`
///
/// # Panics
/// If `bias` has another shape.
pub fn add_channel_bias<B: Backend>(x: Tensor<B, 4>, bias: Tensor<B, 2>) -> Tensor<B, 4> {
    let [batch, channels, _, _] = x.dims();
    assert_eq!(bias.dims(), [batch, channels], "a bias of another size");
    let AddChannelBias { x, bias } = match (AddChannelBias { x, bias }).run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    let (rows, shape) = channel_rows(x);
    (rows + bias.reshape([shape[0] * shape[1], 1])).reshape(shape)
}

/// The channels of `a`, then those of `b`.
///
/// # Shapes
/// - `a`: `[batch, channels, height, width]`
/// - `b`: `[batch, other channels, height, width]`
/// - output: `[batch, channels + other channels, height, width]`
///
/// # Panics
/// If they differ in another dimension.
pub fn concat_channels<B: Backend>(a: Tensor<B, 4>, b: Tensor<B, 4>) -> Tensor<B, 4> {
    let ([batch, _, height, width], [other, _, rows, columns]) = (a.dims(), b.dims());
    assert_eq!(
        [batch, height, width],
        [other, rows, columns],
        "images of two sizes"
    );
    ConcatChannels { a, b }
        .run()
        .unwrap_or_else(|ConcatChannels { a, b }| Tensor::cat(vec![a, b], 1))
}

/// `x · scale + shift`, a scale and a shift a channel.
///
/// # Shapes
/// - `x`, output: `[batch, channels, height, width]`
/// - `scale`, `shift`: `[batch, channels]`
pub fn scale_shift_channels<B: Backend>(
    x: Tensor<B, 4>,
    scale: Tensor<B, 2>,
    shift: Tensor<B, 2>,
) -> Tensor<B, 4> {
    let (rows, shape) = channel_rows(x);
    let column = [shape[0] * shape[1], 1];
    (rows * scale.reshape(column) + shift.reshape(column)).reshape(shape)
}

/// `[batch, channels, height, width]` to `[batch, height · width, channels]`.
pub fn image_to_tokens<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 3> {
    let [batch, channels, height, width] = x.dims();
    let ImageToTokens { x } = match (ImageToTokens { x }).run() {
        Ok(tokens) => return tokens,
        Err(operation) => operation,
    };
    if height * width == 1 {
        return x.reshape([batch, 1, channels]);
    }
    x.reshape([batch, channels, height * width]).swap_dims(1, 2)
}

/// `[batch, height · width, channels]` to `[batch, channels, height, width]`; `size` is `[height,
/// width]`.
///
/// # Panics
/// If there are more or fewer tokens than positions.
pub fn tokens_to_image<B: Backend>(x: Tensor<B, 3>, size: [usize; 2]) -> Tensor<B, 4> {
    let [batch, tokens, channels] = x.dims();
    assert_eq!(tokens, size[0] * size[1], "tokens for another image");
    let TokensToImage { x, size } = match (TokensToImage { x, size }).run() {
        Ok(image) => return image,
        Err(operation) => operation,
    };
    // Nothing to swap; and on GPUs, burn reshapes a swapped dimension of 1 wrongly where there is a
    // batch.
    if size == [1, 1] {
        return x.reshape([batch, channels, 1, 1]);
    }
    x.swap_dims(1, 2)
        .reshape([batch, channels, size[0], size[1]])
}
