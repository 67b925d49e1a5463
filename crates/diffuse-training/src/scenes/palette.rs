//! Colors of materials in each light, used to render a scene and to recognise it.

use super::{Color, Ground, Sky};

/// Red, green and blue in `[0, 1]`.
pub type Rgb = [f32; 3];

pub const ROOF: Rgb = [0.42, 0.24, 0.16];
pub const WINDOW: Rgb = [1.0, 0.88, 0.55];
pub const TRUNK: Rgb = [0.40, 0.26, 0.15];
pub const LEAVES: Rgb = [0.10, 0.38, 0.18];
pub const ROCK: Rgb = [0.48, 0.48, 0.53];
pub const SNOW_CAP: Rgb = [0.96, 0.97, 1.0];
pub const SAIL: Rgb = [0.98, 0.96, 0.90];
pub const ISLAND: Rgb = [0.85, 0.74, 0.50];
pub const SUN: Rgb = [1.0, 0.93, 0.42];
pub const MOON: Rgb = [0.95, 0.95, 0.86];

impl Sky {
    /// Colors at the top and at the horizon.
    pub fn colors(self) -> [Rgb; 2] {
        match self {
            Sky::Day => [[0.33, 0.60, 0.90], [0.74, 0.88, 0.97]],
            Sky::Sunset => [[0.47, 0.30, 0.52], [0.98, 0.60, 0.36]],
            Sky::Night => [[0.03, 0.05, 0.15], [0.12, 0.15, 0.33]],
        }
    }

    /// A color in this light.
    pub fn light(self, [red, green, blue]: Rgb) -> Rgb {
        let [r, g, b] = match self {
            Sky::Day => [1.0, 1.0, 1.0],
            Sky::Sunset => [0.95, 0.80, 0.70],
            Sky::Night => [0.52, 0.55, 0.72],
        };
        [red * r, green * g, blue * b]
    }
}

impl Ground {
    /// Color by day, in the foreground.
    pub fn color(self) -> Rgb {
        match self {
            Ground::Meadow => [0.44, 0.70, 0.30],
            Ground::Sand => [0.91, 0.79, 0.54],
            Ground::Snow => [0.95, 0.97, 1.0],
            Ground::Sea => [0.12, 0.46, 0.60],
        }
    }
}

impl Color {
    /// Color by day.
    pub fn rgb(self) -> Rgb {
        match self {
            Color::Red => [0.82, 0.16, 0.14],
            Color::Blue => [0.14, 0.28, 0.82],
            Color::Yellow => [0.98, 0.80, 0.12],
            Color::Purple => [0.58, 0.22, 0.66],
        }
    }
}

/// Linear interpolation from `a` at 0 to `b` at 1.
pub fn mix(a: Rgb, b: Rgb, t: f32) -> Rgb {
    std::array::from_fn(|i| a[i] + (b[i] - a[i]) * t)
}
