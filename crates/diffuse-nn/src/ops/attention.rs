use burn::tensor::{Bool, Tensor, activation::softmax, backend::Backend};

use diffuse_kernels::Attention;

use super::in_f32;

/// Scores held at once, so that long token sequences do not need `tokens²` of memory.
const SCORES_AT_ONCE: usize = 1 << 24;

/// Multi-head attention, `softmax(q kᵀ / sqrt(d)) v` for each head.
///
/// # Shapes
/// - `query`: `[batch, tokens, heads · d]`
/// - `key`, `value`: `[batch, context tokens, heads · d]`
/// - output: `[batch, tokens, heads · d]`
///
/// # Panics
/// If the size of a token is not a multiple of `heads`.
pub fn attention<B: Backend>(
    query: Tensor<B, 3>,
    key: Tensor<B, 3>,
    value: Tensor<B, 3>,
    heads: usize,
) -> Tensor<B, 3> {
    any_attention(Attention {
        query,
        key,
        value,
        heads,
        causal: false,
    })
}

/// [`attention`] in which each token attends to itself and the tokens before it; shapes are the
/// same.
///
/// # Panics
/// As [`attention`].
pub fn causal_attention<B: Backend>(
    query: Tensor<B, 3>,
    key: Tensor<B, 3>,
    value: Tensor<B, 3>,
    heads: usize,
) -> Tensor<B, 3> {
    any_attention(Attention {
        query,
        key,
        value,
        heads,
        causal: true,
    })
}

fn any_attention<B: Backend>(operation: Attention<B>) -> Tensor<B, 3> {
    let [batch, tokens, inner] = operation.query.dims();
    let [_, context, _] = operation.key.dims();
    let heads = operation.heads;
    assert!(
        inner.is_multiple_of(heads),
        "{inner} features cannot be split into {heads} heads"
    );
    let Attention {
        query,
        key,
        value,
        causal,
        ..
    } = match operation.run() {
        Ok(y) => return y,
        Err(operation) => operation,
    };
    let query = split_heads(query, heads);
    let key = split_heads(key, heads).swap_dims(2, 3);
    let value = split_heads(value, heads);

    if causal {
        let later = Tensor::<B, 2, Bool>::tril_mask([tokens, tokens], 0, &query.device());
        return merge_heads(attend(query, key, value, Some(later)));
    }
    let chunk = (SCORES_AT_ONCE / (batch * heads * context).max(1)).max(1);
    if chunk >= tokens {
        return merge_heads(attend(query, key, value, None));
    }
    let chunks = (0..tokens)
        .step_by(chunk)
        .map(|start| {
            let query = query.clone().narrow(2, start, chunk.min(tokens - start));
            attend(query, key.clone(), value.clone(), None)
        })
        .collect();
    merge_heads(Tensor::cat(chunks, 2))
}

/// `query`: `[batch, heads, tokens, d]`, `key`: `[batch, heads, d, context]`, `value`: `[batch,
/// heads, context, d]`; where `hidden` (`[tokens, context]`) is true, a token is not seen.
fn attend<B: Backend>(
    query: Tensor<B, 4>,
    key: Tensor<B, 4>,
    value: Tensor<B, 4>,
    hidden: Option<Tensor<B, 2, Bool>>,
) -> Tensor<B, 4> {
    let [_, _, _, d] = query.dims();
    // The scale goes to the query before the product: half precision would overflow after it.
    let scores = (query * (d as f64).powf(-0.5)).matmul(key);
    let weights = in_f32(scores, |scores| {
        let scores = match hidden {
            Some(hidden) => {
                let shape = scores.shape();
                // Not -∞, which shaders may take for a number of their choice.
                scores.mask_fill(hidden.unsqueeze::<4>().expand(shape), f32::MIN)
            }
            None => scores,
        };
        softmax(scores, 3)
    });
    weights.matmul(value)
}

/// `[batch, tokens, heads · d]` to `[batch, heads, tokens, d]`.
fn split_heads<B: Backend>(x: Tensor<B, 3>, heads: usize) -> Tensor<B, 4> {
    let [batch, tokens, inner] = x.dims();
    x.reshape([batch, tokens, heads, inner / heads])
        .swap_dims(1, 2)
}

/// `[batch, heads, tokens, d]` to `[batch, tokens, heads · d]`.
fn merge_heads<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 3> {
    let [batch, heads, tokens, d] = x.dims();
    x.swap_dims(1, 2).reshape([batch, tokens, heads * d])
}
