//! The operations for single measurements.

/// Operations of Stable Diffusion v1 for an image of 512 x 512 with guidance: names and sizes.
///
/// - `conv`, `conv_stride_2`: `BATCH CHANNELS OUTPUTS HEIGHT WIDTH KERNEL`
/// - `linear ROWS INPUTS OUTPUTS`, and `linear_geglu` with twice the outputs before the gate
/// - `attention BATCH TOKENS CONTEXT HEADS SIZE`
/// - `group_norm_silu`, `channel_bias`: `BATCH CHANNELS HEIGHT WIDTH`
/// - `layer_norm`: `ROWS WIDTH`, and `silu SIZE`
pub const OPERATIONS: [&str; 23] = [
    "conv 2 320 320 64 64 3",
    "conv 2 960 320 64 64 3",
    "conv 2 640 640 32 32 3",
    "conv 2 1280 1280 16 16 3",
    "conv 2 1280 1280 8 8 3",
    "conv 1 512 512 64 64 3",
    "conv 1 512 512 256 256 3",
    "conv 1 256 256 256 256 3",
    "conv 1 128 128 512 512 3",
    "conv 2 640 320 64 64 1",
    "conv_stride_2 2 320 320 64 64 3",
    "linear 8192 320 320",
    "linear_geglu 8192 320 1280",
    "linear 8192 1280 320",
    "linear_geglu 2048 640 2560",
    "linear_geglu 512 1280 5120",
    "attention 2 4096 4096 8 40",
    "attention 2 1024 1024 8 80",
    "attention 2 4096 77 8 40",
    "group_norm_silu 2 320 64 64",
    "layer_norm 8192 320",
    "silu 2621440",
    "channel_bias 2 320 64 64",
];

/// Multiplications and additions of a direct computation.
pub fn flops(operation: &str) -> Option<f64> {
    let mut words = operation.split(' ');
    let name = words.next()?;
    let sizes: Option<Vec<f64>> = words.map(|word| word.parse().ok()).collect();
    let product: f64 = sizes.as_ref()?.iter().product();
    match name {
        // `product` is a linear layer without a bias, for measurements only.
        "linear" | "product" => Some(2.0 * product),
        "linear_geglu" => Some(4.0 * product),
        // The kernel's height and width.
        "conv" => Some(2.0 * product * sizes?.last()?),
        // A quarter of the positions.
        "conv_stride_2" => Some(0.5 * product * sizes?.last()?),
        "attention" => Some(4.0 * product),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted() {
        assert_eq!(flops("linear 2 3 4"), Some(48.0));
        assert_eq!(flops("product 2 3 4"), Some(48.0));
        assert_eq!(flops("conv 1 2 3 4 5 3"), Some(2.0 * 120.0 * 9.0));
        assert_eq!(flops("attention 1 2 3 4 5"), Some(480.0));
        assert_eq!(flops("linear_geglu 2 3 4"), Some(96.0));
        assert_eq!(flops("silu 9"), None);
        assert_eq!(flops("unet folder/unet 2 64 64 77"), None);
    }
}
