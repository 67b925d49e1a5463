//! Brownian paths with the numbers of `torchsde`, whose increments do not depend on the order in
//! which they are computed.
//!
//! "Scalable Gradients for Stochastic Differential Equations" (<https://arxiv.org/abs/2001.01328>),
//! section 4: a path is not stored, but recomputed from seeds. The increment over the whole
//! interval is one draw; that over half of an interval follows from the whole, by the Brownian
//! bridge, and one more draw `z`:
//!
//! ```text
//! W_left = (l / h) W + √(l r / h) z,   W_right = W - W_left,   l + r = h
//! ```
//!
//! Each node of the binary tree has its own seed, a hash of the path's seed and the node's
//! position. So an increment depends on its ends only, which are rounded to six decimals.

use burn::tensor::DType;

use super::Generator;

/// A Brownian path in `count` dimensions.
#[derive(Clone, Debug)]
pub(crate) struct BrownianTree {
    seed: u64,
    count: usize,
    dtype: DType,
    root: Node,
}

/// An interval of the tree and the increment over it.
#[derive(Clone, Debug)]
struct Node {
    start: f64,
    end: f64,
    /// The index among the intervals of its depth, from the left.
    place: u64,
    depth: u64,
    increment: Vec<f32>,
}

impl BrownianTree {
    /// A path over an interval, from a seed: `count` numbers, drawn as for a tensor of this type.
    pub fn new(start: f64, end: f64, seed: u64, count: usize, dtype: DType) -> Self {
        let [first, ..] = seeds(seed, None);
        let deviation = (end - start).sqrt() as f32;
        let draw = Generator::new(first.into()).normal(count, dtype);
        let root = Node {
            start: rounded(start),
            end: rounded(end),
            place: 0,
            depth: 0,
            increment: draw.into_iter().map(|z| deviation * z).collect(),
        };
        Self {
            seed,
            count,
            dtype,
            root,
        }
    }

    /// The increment over a part of the interval; times outside of it are clamped.
    pub fn increment(&self, start: f64, end: f64) -> Vec<f32> {
        let within = |time: f64| rounded(time.clamp(self.root.start, self.root.end));
        let mut sum = vec![0.0; self.count];
        self.add(&self.root, within(start), within(end), &mut sum);
        sum
    }

    /// Adds the increment over a part of a node's interval.
    fn add(&self, node: &Node, start: f64, end: f64, sum: &mut [f32]) {
        if start >= end {
            return;
        }
        if (start, end) == (node.start, node.end) {
            sum.iter_mut()
                .zip(&node.increment)
                .for_each(|(sum, w)| *sum += w);
            return;
        }
        let [left, right] = self.halves(node);
        self.add(&left, start, end.min(left.end), sum);
        self.add(&right, start.max(right.start), end, sum);
    }

    fn halves(&self, node: &Node) -> [Node; 2] {
        let middle = rounded(0.5 * (node.end + node.start));
        let (left, right) = (middle - node.start, node.end - middle);
        let reciprocal = 1.0 / (node.end - node.start);
        let [seed, ..] = seeds(self.seed, Some([node.place, node.depth]));
        let draw = Generator::new(seed.into()).normal(self.count, self.dtype);
        let deviation = (left * right * reciprocal).sqrt() as f32;
        let bridge = |(w, z): (&f32, f32)| left as f32 * w * reciprocal as f32 + deviation * z;
        let increment: Vec<f32> = node.increment.iter().zip(draw).map(bridge).collect();
        let rest = node
            .increment
            .iter()
            .zip(&increment)
            .map(|(whole, left)| whole - left);
        let (place, depth) = (2 * node.place, node.depth + 1);
        let rest = Node {
            start: middle,
            end: node.end,
            place: place + 1,
            depth,
            increment: rest.collect(),
        };
        [
            Node {
                start: node.start,
                end: middle,
                place,
                depth,
                increment,
            },
            rest,
        ]
    }
}

/// A time to six decimals.
fn rounded(time: f64) -> f64 {
    format!("{time:.6}")
        .parse()
        .expect("a number that was just written")
}

/// The pool size of the hash.
const POOL: usize = 24;

/// numpy's `SeedSequence(entropy, spawn_key, pool_size=24).generate_state(4)`: a hash of the
/// entropy and the key, after "C++ Seeding Surprises" by M. O'Neill
/// (<https://www.pcg-random.org/posts/developing-a-seed_seq-alternative.html>).
fn seeds(entropy: u64, spawn_key: Option<[u64; 2]>) -> [u32; 4] {
    let mut words = words(entropy);
    if let Some(key) = spawn_key {
        words.resize(POOL, 0);
        words.extend(key.into_iter().flat_map(self::words));
    }
    let mut factor = 0x43b0_d7e5_u32;
    let mut hash = |value: u32| {
        let value = value ^ factor;
        factor = factor.wrapping_mul(0x931e_8875);
        let value = value.wrapping_mul(factor);
        value ^ value >> 16
    };
    let mix = |x: u32, y: u32| {
        let mixed = x
            .wrapping_mul(0xca01_f9dd)
            .wrapping_sub(y.wrapping_mul(0x4973_f715));
        mixed ^ mixed >> 16
    };
    let mut pool = [0; POOL];
    for (place, entry) in pool.iter_mut().enumerate() {
        *entry = hash(words.get(place).copied().unwrap_or(0));
    }
    for source in 0..POOL {
        for target in (0..POOL).filter(|&target| target != source) {
            pool[target] = mix(pool[target], hash(pool[source]));
        }
    }
    for &word in words.iter().skip(POOL) {
        for entry in &mut pool {
            *entry = mix(*entry, hash(word));
        }
    }
    let mut factor = 0x8b51_f9dd_u32;
    std::array::from_fn(|place| {
        let value = pool[place] ^ factor;
        factor = factor.wrapping_mul(0x58f3_8ded);
        let value = value.wrapping_mul(factor);
        value ^ value >> 16
    })
}

/// A number in 32-bit words, lowest first, at least one.
fn words(number: u64) -> Vec<u32> {
    match (number as u32, (number >> 32) as u32) {
        (low, 0) => vec![low],
        (low, high) => vec![low, high],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `SeedSequence(77, pool_size=24)`, and the entropy 2^40 + 5 with the spawn key (6, 3).
    const SEEDS_77: [u32; 4] = [2036740624, 794572212, 3236796866, 1771274298];
    const SEEDS_KEY: [u32; 4] = [3441662451, 2740519228, 118439282, 2317335909];

    #[test]
    fn numpy_seed_sequences() {
        assert_eq!(seeds(77, None), SEEDS_77);
        assert_eq!(seeds(1 << 40 | 5, Some([6, 3])), SEEDS_KEY);
    }

    /// Parts add up to the whole, whichever they are.
    #[test]
    fn increments_add_up() {
        let tree = BrownianTree::new(0.03, 14.6, 0, 20, DType::F32);
        let whole = tree.increment(0.03, 14.6);
        let [left, right] = [tree.increment(0.03, 1.7), tree.increment(1.7, 14.6)];
        for ((whole, left), right) in whole.iter().zip(left).zip(right) {
            assert!((whole - left - right).abs() < 1e-5);
        }
        assert_eq!(tree.increment(2.0, 2.0), vec![0.0; 20]);
        assert!(whole.iter().any(|w| w.abs() > 1.0));
    }
}
