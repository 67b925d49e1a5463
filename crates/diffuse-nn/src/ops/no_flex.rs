//! In place of `flex` without the feature of that name: no operation has another body.

use burn::tensor::{Tensor, backend::Backend};

use super::ConvGeometry;

#[expect(
    clippy::extra_unused_type_parameters,
    reason = "where it runs depends on the backend there"
)]
pub fn on_worker<B: Backend, R>(network: impl FnOnce() -> R) -> R {
    network()
}

pub fn silu<B: Backend, const D: usize>(_: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    None
}

pub fn gelu<B: Backend, const D: usize>(_: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    None
}

pub fn quick_gelu<B: Backend, const D: usize>(_: &Tensor<B, D>) -> Option<Tensor<B, D>> {
    None
}

pub fn linear_geglu<B: Backend>(
    _: &Tensor<B, 3>,
    _: &Tensor<B, 2>,
    _: Option<&Tensor<B, 1>>,
) -> Option<Tensor<B, 3>> {
    None
}

pub fn add_channel_bias<B: Backend>(
    x: Tensor<B, 4>,
    _: &Tensor<B, 2>,
) -> Result<Tensor<B, 4>, Tensor<B, 4>> {
    Err(x)
}

pub fn concat_channels<B: Backend>(_: &Tensor<B, 4>, _: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    None
}

pub fn upsample_twice<B: Backend>(_: &Tensor<B, 4>) -> Option<Tensor<B, 4>> {
    None
}

pub fn swap_tokens<B: Backend>(_: &Tensor<B, 3>) -> Option<Tensor<B, 3>> {
    None
}

pub fn attention<B: Backend>(
    _: &Tensor<B, 3>,
    _: &Tensor<B, 3>,
    _: &Tensor<B, 3>,
    _: usize,
    _: bool,
) -> Option<Tensor<B, 3>> {
    None
}

pub fn conv2d<B: Backend>(
    _: &Tensor<B, 4>,
    _: &Tensor<B, 4>,
    _: Option<&Tensor<B, 1>>,
    _: ConvGeometry,
    residual: Option<Tensor<B, 4>>,
) -> Result<Tensor<B, 4>, Option<Tensor<B, 4>>> {
    Err(residual)
}

pub fn linear<B: Backend, const D: usize>(
    _: &Tensor<B, D>,
    _: &Tensor<B, 2>,
    _: Option<&Tensor<B, 1>>,
    residual: Option<Tensor<B, D>>,
) -> Result<Tensor<B, D>, Option<Tensor<B, D>>> {
    Err(residual)
}

pub fn linear_to_image<B: Backend>(
    _: &Tensor<B, 3>,
    _: &Tensor<B, 2>,
    _: Option<&Tensor<B, 1>>,
    residual: Tensor<B, 4>,
) -> Result<Tensor<B, 4>, Tensor<B, 4>> {
    Err(residual)
}

pub fn group_norm<B: Backend>(
    x: Tensor<B, 4>,
    _: &Tensor<B, 1>,
    _: &Tensor<B, 1>,
    _: usize,
    _: f64,
    _: bool,
) -> Result<Tensor<B, 4>, Tensor<B, 4>> {
    Err(x)
}

pub fn layer_norm<B: Backend, const D: usize>(
    _: &Tensor<B, D>,
    _: &Tensor<B, 1>,
    _: &Tensor<B, 1>,
    _: f64,
) -> Option<Tensor<B, D>> {
    None
}
