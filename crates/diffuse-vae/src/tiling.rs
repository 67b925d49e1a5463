//! Encoding and decoding tile by tile, so that memory depends on the size of a tile, not of the
//! image. As in Diffusers, `tiled_encode` and `tiled_decode` of its autoencoders.
//!
//! Tiles overlap. In the overlap, the result fades from one tile to the next.

use burn::tensor::{Tensor, backend::Backend};

/// Sides of tiles, in positions of a network's input and of its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tiles {
    /// Height and width of a tile of the input.
    input: usize,
    /// Height and width of a tile of the output.
    output: usize,
    /// The part of a tile that overlaps the next: one of this many.
    overlap: usize,
}

impl Tiles {
    pub fn new(input: usize, output: usize, overlap: usize) -> Self {
        Self {
            input,
            output,
            overlap,
        }
    }

    /// Whether an input is larger than a tile.
    pub fn divide<B: Backend>(&self, x: &Tensor<B, 4>) -> bool {
        let [_, _, height, width] = x.dims();
        height > self.input || width > self.input
    }

    /// The network's output for `x`, tile by tile. The start of a tile is blended with the end of
    /// the tile above, then of the tile to the left, both of which are blended already. The weight
    /// grows linearly from 0.
    ///
    /// # Shapes
    /// - `x`: `[batch, channels, height, width]`
    /// - output: the same with `network`'s channels, each side in the ratio of the tiles' sides
    pub fn run_blended<B: Backend>(
        &self,
        x: Tensor<B, 4>,
        network: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let length = self.output / self.overlap;
        let kept = self.output - length;
        // The ends of the tiles above, by column.
        let mut above: Vec<Tensor<B, 4>> = Vec::new();
        let mut left = None;
        self.place(x, network, |mut tile, _, [row, column]| {
            if row > 0 {
                tile = blend(&above[column], tile, 2);
            }
            if let Some(left) = left.take().filter(|_| column > 0) {
                tile = blend(&left, tile, 3);
            }
            let below = end(&tile, 2, length);
            match above.get_mut(column) {
                Some(place) => *place = below,
                None => above.push(below),
            }
            left = Some(end(&tile, 3, length));
            let [_, _, height, width] = tile.dims();
            tile.narrow(2, 0, height.min(kept))
                .narrow(3, 0, width.min(kept))
        })
    }

    /// The network's output for `x`, tile by tile, each mixed with what is in its place already.
    /// The weight of a tile is the product of two that grow linearly from 0 to 1, one for each
    /// direction in which there is a tile before it.
    ///
    /// # Shapes
    /// As [`run_blended`](Self::run_blended).
    pub fn run_masked<B: Backend>(
        &self,
        x: Tensor<B, 4>,
        network: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let last = (self.output / self.overlap - 1) as f32;
        self.place(x, network, |mut tile, present, places| {
            let mut weight: Option<Tensor<B, 4>> = None;
            for (place, dim) in places.into_iter().zip([2, 3]) {
                if place > 0 {
                    let ramp = ramp(&tile, dim, tile.dims()[dim]) / last;
                    let ramp = ramp.clamp_max(1.0);
                    weight = Some(match weight {
                        Some(other) => other * ramp,
                        None => ramp,
                    });
                }
            }
            if let Some(weight) = weight {
                tile = weight.clone() * tile + (weight.ones_like() - weight) * present;
            }
            tile
        })
    }

    /// Puts tiles in their places, row by row. `merge` gets the network's output for a tile, what
    /// is in its place, and its row and column.
    fn place<B: Backend>(
        &self,
        x: Tensor<B, 4>,
        network: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>,
        mut merge: impl FnMut(Tensor<B, 4>, Tensor<B, 4>, [usize; 2]) -> Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let [batch, _, height, width] = x.dims();
        let step = self.input - self.input / self.overlap;
        let scaled = |side: usize| side * self.output / self.input;
        let mut output: Option<Tensor<B, 4>> = None;
        for (row, y) in (0..height).step_by(step).enumerate() {
            for (column, x0) in (0..width).step_by(step).enumerate() {
                let input = x.clone().narrow(2, y, self.input.min(height - y)).narrow(
                    3,
                    x0,
                    self.input.min(width - x0),
                );
                let tile = network(input);
                let [_, channels, tile_height, tile_width] = tile.dims();
                let whole = output.take().unwrap_or_else(|| {
                    let shape = [batch, channels, scaled(height), scaled(width)];
                    Tensor::zeros(shape, (&tile.device(), tile.dtype()))
                });
                let (y, x0) = (scaled(y), scaled(x0));
                let present = whole
                    .clone()
                    .narrow(2, y, tile_height)
                    .narrow(3, x0, tile_width);
                let tile = merge(tile, present, [row, column]);
                let [_, _, tile_height, tile_width] = tile.dims();
                let place = [
                    0..batch,
                    0..channels,
                    y..y + tile_height,
                    x0..x0 + tile_width,
                ];
                output = Some(whole.slice_assign(place, tile));
            }
        }
        output.expect("an image has positions")
    }
}

/// The last `length` positions along a dimension, or all.
fn end<B: Backend>(x: &Tensor<B, 4>, dim: usize, length: usize) -> Tensor<B, 4> {
    let size = x.dims()[dim];
    let length = length.min(size);
    x.clone().narrow(dim, size - length, length)
}

/// `tile`, which fades in along a dimension from the end of the tile before it.
fn blend<B: Backend>(before: &Tensor<B, 4>, tile: Tensor<B, 4>, dim: usize) -> Tensor<B, 4> {
    let length = before.dims()[dim].min(tile.dims()[dim]);
    let before = end(before, dim, length);
    let start = tile.clone().narrow(dim, 0, length);
    let weight = ramp(&tile, dim, length) / length as f32;
    let mixed = before * (weight.ones_like() - weight.clone()) + start * weight;
    let place = mixed.dims().map(|side| 0..side);
    tile.slice_assign(place, mixed)
}

/// 0, 1, 2, ... along a dimension.
fn ramp<B: Backend>(x: &Tensor<B, 4>, dim: usize, length: usize) -> Tensor<B, 4> {
    let values: Vec<f32> = (0..length).map(|i| i as f32).collect();
    let mut shape = [1; 4];
    shape[dim] = length;
    Tensor::<B, 1>::from_data(&values[..], (&x.device(), x.dtype())).reshape(shape)
}
