//! Adams methods: integrals of the polynomial through the latest model outputs.
//!
//! With the Lagrange polynomials `l_i` of some points, the coefficients are `∫ w(u) l_i(u) du` over
//! the step: `w = 1` in plain linear multistep, `w = e^(c u)` where the linear half of the equation
//! is solved exactly. With `P_0 = 1` and `P_k(x) = x^k - k P_(k-1)(x)`,
//!
//! ```text
//! ∫ u^k du = u^(k+1) / (k+1),   ∫ e^(c u) u^k du = e^(c u) P_k(c u) / c^(k+1)
//! ```

/// The coefficients of the Adams-Bashforth method of an order from 1 to 4 at evenly spaced points,
/// newest first.
pub(crate) fn adams_bashforth(order: usize) -> &'static [f32] {
    match order {
        1 => &[1.0],
        2 => &[3.0 / 2.0, -1.0 / 2.0],
        3 => &[23.0 / 12.0, -16.0 / 12.0, 5.0 / 12.0],
        _ => &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
    }
}

/// The coefficients of each point's Lagrange polynomial, lowest power first.
fn polynomials(points: &[f64]) -> Vec<Vec<f64>> {
    let polynomial = |(i, here): (usize, &f64)| {
        let mut product = vec![1.0];
        for (_, there) in points.iter().enumerate().filter(|(j, _)| *j != i) {
            // Times (u - u_j) / (u_i - u_j).
            product.insert(0, 0.0);
            for power in 1..product.len() {
                product[power - 1] -= there * product[power];
            }
            product.iter_mut().for_each(|c| *c /= here - there);
        }
        product
    };
    points.iter().enumerate().map(polynomial).collect()
}

/// `∫ l_i(u) du` from `start` to `end`, for each of the points.
pub(crate) fn integrals(points: &[f64], start: f64, end: f64) -> Vec<f64> {
    let antiderivative = |u: f64, power: i32| u.powi(power + 1) / f64::from(power + 1);
    integrate(points, start, end, antiderivative)
}

/// `∫ e^(c (u - end)) l_i(u) du` from `start` to `end`, for each of the points.
pub(crate) fn exponential_integrals(points: &[f64], c: f64, start: f64, end: f64) -> Vec<f64> {
    let antiderivative = |u: f64, power: i32| {
        let x = c * u;
        let p = (1..=power).fold(1.0, |p, k| x.powi(k) - f64::from(k) * p);
        (x - c * (end - start)).exp() * p / c.powi(power + 1)
    };
    integrate(points, start, end, antiderivative)
}

/// The same with any antiderivative of `u^k`, where `u` is counted from `start`.
fn integrate(
    points: &[f64],
    start: f64,
    end: f64,
    antiderivative: impl Fn(f64, i32) -> f64,
) -> Vec<f64> {
    let points: Vec<f64> = points.iter().map(|point| point - start).collect();
    let monomial = |power: usize| {
        antiderivative(end - start, power as i32) - antiderivative(0.0, power as i32)
    };
    let monomials: Vec<f64> = (0..points.len()).map(monomial).collect();
    let integral =
        |polynomial: &Vec<f64>| polynomial.iter().zip(&monomials).map(|(c, m)| c * m).sum();
    polynomials(&points).iter().map(integral).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(actual: &[f64], expected: &[f64]) {
        assert_eq!(actual.len(), expected.len());
        for (a, e) in actual.iter().zip(expected) {
            assert!((a - e).abs() < 1e-12, "{actual:?} is not {expected:?}");
        }
    }

    /// At evenly spaced points the integrals are the coefficients of Adams and Bashforth.
    #[test]
    fn plain() {
        check(&integrals(&[0.0, -1.0], 0.0, 1.0), &[1.5, -0.5]);
        check(
            &integrals(&[5.0, 4.0, 3.0, 2.0], 5.0, 6.0),
            &[55.0 / 24.0, -59.0 / 24.0, 37.0 / 24.0, -9.0 / 24.0],
        );
        let points = [0.0, -1.0, -2.0, -3.0];
        for order in 1..=4 {
            let even = integrals(&points[..order], 0.0, 1.0).into_iter();
            let even: Vec<f32> = even.map(|c| c as f32).collect();
            for (even, tabulated) in even.iter().zip(adams_bashforth(order)) {
                assert!((even - tabulated).abs() < 1e-6, "order {order}");
            }
        }
    }

    /// `∫₀¹ e^(c (u - 1)) u² du`, by the parabola through any three points of `u²`.
    #[test]
    fn exponential() {
        for c in [1.0, 2.0, -1.0] {
            let points = [0.0, -0.5, -2.0];
            let coefficients = exponential_integrals(&points, c, 0.0, 1.0);
            let sum: f64 = coefficients
                .iter()
                .zip(points)
                .map(|(c, u)| c * u * u)
                .sum();
            let exact = (c * c - 2.0 * c + 2.0 - 2.0 * (-c).exp()) / (c * c * c);
            check(&[sum], &[exact]);
        }
    }
}
