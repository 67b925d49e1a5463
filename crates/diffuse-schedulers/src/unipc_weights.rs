//! The weights of a UniPC step.
//!
//! "UniPC" (<https://arxiv.org/abs/2302.04867>), equations 3, 5 and 8, in the time `λ = ln(α / σ)`. A step goes from `s` to
//! `t` with `h = λ_t - λ_s`; `m_i` are the model's images at points `i`, and `r_i = (λ_i - λ_s) / h`:
//!
//! ```text
//! x_t = (σ_t / σ_s) x_s - α_t (e^-h - 1) m_s - α_t B(h) [ Σ ρ_i (m_i - m_s) / r_i  +  ρ_t (m_t - m_s) ]
//! ```
//!
//! The predictor leaves out `m_t`. `B(h)` is `-h` (bh1) or `e^-h - 1` (bh2). The `ρ` solve the order conditions
//! `Σ ρ_i r_i^(k-1) = k! φ_(k+1)(-h) (-h) / B(h)`, where `φ_(k+1)(z) = (φ_k(z) - 1/k!) / z` and `φ_0 = exp`. If noises are
//! predicted, `α` and `σ` exchange their roles and `h` changes its sign. In f32, as the reference.

use serde::{Deserialize, Serialize};

use crate::exponential::Exponential;
use crate::mixture::Mixture;
use crate::weights::Weights;

/// The function `B(h)` (the key `solver_type`); the other multistep solvers' types are read as `bh2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UniPCSolverType {
    /// `h`
    Bh1,
    /// `e^h - 1`
    #[serde(alias = "midpoint", alias = "heun", alias = "logrho")]
    Bh2,
}

/// Whether the model's answer at the end of a step is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    Predict,
    Correct,
}

/// The weights of a step between the last two of some levels, whose order is one less than their number.
pub(crate) fn weights(
    levels: &[Mixture],
    solver_type: UniPCSolverType,
    predict_x0: bool,
    method: Method,
) -> Weights {
    let [earlier @ .., s, t] = levels else {
        panic!("a step has two ends, {} levels were given", levels.len())
    };
    let h = t.lambda() - s.lambda();
    let Exponential {
        ratio, z, scale, ..
    } = match predict_x0 {
        true => Exponential::of_images(*s, *t),
        false => Exponential::of_noises(*s, *t),
    };
    let expm1 = z.exp_m1();
    let b_of_h = match solver_type {
        UniPCSolverType::Bh1 => z,
        UniPCSolverType::Bh2 => expm1,
    };
    let r = earlier
        .iter()
        .rev()
        .map(|level| (level.lambda() - s.lambda()) / h);
    let r: Vec<f32> = r.chain([1.0]).collect();
    let mut rho = match (method, r.len()) {
        (Method::Predict, 1) => Vec::new(),
        // The shortest cases are taken as one half, which the order conditions give for small `h`.
        (Method::Predict, 2) | (Method::Correct, 1) => vec![0.5],
        (Method::Predict, order) => solve_order_conditions(&r[..order - 1], z, b_of_h),
        (Method::Correct, _) => solve_order_conditions(&r, z, b_of_h),
    };
    let new = if method == Method::Correct {
        rho.pop()
    } else {
        None
    };
    let shares: Vec<f32> = rho.iter().zip(&r).map(|(rho, r)| rho / r).collect();
    let total = shares.iter().sum::<f32>() + new.unwrap_or(0.0);
    let newest = -scale * expm1 + scale * b_of_h * total;
    let earlier = shares.iter().map(|share| -scale * b_of_h * share);
    Weights {
        sample: ratio,
        outputs: [newest].into_iter().chain(earlier).collect(),
        extra: new.map(|rho| -scale * b_of_h * rho),
    }
}

/// The `ρ` of the order conditions, one for each `r`.
fn solve_order_conditions(r: &[f32], z: f32, b_of_h: f32) -> Vec<f32> {
    let mut phi = z.exp_m1() / z - 1.0;
    let mut factorial = 1.0;
    let mut rows: Vec<Vec<f64>> = Vec::new();
    for k in 1..=r.len() {
        let powers = r.iter().map(|r| f64::from(r.powi(k as i32 - 1)));
        rows.push(
            powers
                .chain([f64::from(phi * factorial / b_of_h)])
                .collect(),
        );
        factorial *= (k + 1) as f32;
        phi = phi / z - 1.0 / factorial;
    }
    solve(rows)
}

/// Gaussian elimination with row exchange; the right-hand side is the last column.
fn solve(mut rows: Vec<Vec<f64>>) -> Vec<f32> {
    let count = rows.len();
    for column in 0..count {
        let size = |rows: &[Vec<f64>], row: usize| rows[row][column].abs();
        let largest = (column..count).max_by(|&a, &b| size(&rows, a).total_cmp(&size(&rows, b)));
        rows.swap(column, largest.unwrap_or(column));
        let pivot = rows[column].clone();
        for (_, row) in rows
            .iter_mut()
            .enumerate()
            .filter(|(place, _)| *place != column)
        {
            let factor = row[column] / pivot[column];
            row.iter_mut()
                .zip(&pivot)
                .for_each(|(entry, pivot)| *entry -= factor * pivot);
        }
    }
    rows.iter()
        .enumerate()
        .map(|(place, row)| (row[count] / row[place]) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equations_are_solved() {
        // The first pivot is zero: rows must be exchanged.
        let rows = vec![
            vec![0.0, 2.0, 1.0, 7.0],
            vec![1.0, 1.0, 1.0, 6.0],
            vec![2.0, -1.0, 3.0, 9.0],
        ];
        assert_eq!(solve(rows), [1.0, 2.0, 3.0]);
    }

    /// What a model says that sees the same image everywhere is taken whole, by every order and method.
    #[test]
    fn a_constant_image_is_kept() {
        let levels: Vec<Mixture> = [14.0, 9.0, 5.0, 3.0, 1.5].map(Mixture::of_ratio).to_vec();
        for method in [Method::Predict, Method::Correct] {
            for solver_type in [UniPCSolverType::Bh1, UniPCSolverType::Bh2] {
                for first in 0..levels.len() - 1 {
                    let levels = &levels[first..];
                    let weights = weights(levels, solver_type, true, method);
                    let [.., s, t] = levels else { unreachable!() };
                    let of_image =
                        weights.outputs.iter().sum::<f32>() + weights.extra.unwrap_or(0.0);
                    // x_s = α_s m + σ_s ε becomes x_t = α_t m + σ_t ε.
                    assert!((weights.sample * s.alpha + of_image - t.alpha).abs() < 1e-5);
                    assert!((weights.sample * s.sigma - t.sigma).abs() < 1e-6);
                }
            }
        }
    }
}
