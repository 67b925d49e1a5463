//! Renders a scene with mild variation: horizon, places, sizes, clouds and stars are random.

use image::RgbImage;
use rand::Rng;
use tiny_skia::{
    Color as Paint32, FillRule, GradientStop, LinearGradient, Paint, Path, PathBuilder, Pixmap,
    Point, Rect, Shader, SpreadMode, Transform,
};

use super::palette::{self, Rgb, mix};
use super::{Ground, Kind, Scene, Side, Size, Sky, Subject};

/// The image of a scene, of `size` x `size` pixels.
///
/// # Panics
/// If `size` is zero.
pub fn render(scene: &Scene, size: u32, rng: &mut impl Rng) -> RgbImage {
    let horizon = rng.random_range(0.57..0.63);
    let mut canvas = Canvas {
        pixels: Pixmap::new(size, size).expect("a size above zero"),
        scale: size as f32,
        sky: scene.sky,
    };
    canvas.sky(horizon, rng);
    // From the back to the front.
    let mut subjects: Vec<&Subject> = scene.subjects.iter().collect();
    subjects.sort_by_key(|subject| match subject.kind {
        Kind::Sun | Kind::Moon => 0,
        Kind::Mountain => 1,
        _ => 2,
    });
    let behind = subjects
        .partition_point(|subject| subject.kind.is_celestial() || subject.kind == Kind::Mountain);
    for subject in &subjects[..behind] {
        canvas.subject(subject, scene.ground, horizon, rng);
    }
    canvas.ground(scene.ground, horizon, rng);
    for subject in &subjects[behind..] {
        canvas.subject(subject, scene.ground, horizon, rng);
    }
    canvas.into_image()
}

/// Coordinates go from 0 to 1, down and to the right.
struct Canvas {
    pixels: Pixmap,
    scale: f32,
    sky: Sky,
}

impl Canvas {
    fn sky(&mut self, horizon: f32, rng: &mut impl Rng) {
        let [top, bottom] = self.sky.colors();
        self.gradient(0.0, 1.0, [0.0, horizon], [top, bottom]);
        match self.sky {
            Sky::Day => {
                for _ in 0..rng.random_range(0..3) {
                    let (x, y) = (rng.random_range(0.05..0.95), rng.random_range(0.12..0.36));
                    let width = rng.random_range(0.07..0.12);
                    for (dx, dy, r) in [(-0.7, 0.15, 0.5), (0.0, 0.0, 0.75), (0.7, 0.15, 0.55)] {
                        let cloud = ellipse(
                            [x + dx * width, y + dy * width],
                            [r * width, r * width * 0.55],
                        );
                        self.fill(cloud, [1.0; 3], 0.45);
                    }
                }
            }
            Sky::Sunset => {}
            Sky::Night => {
                for _ in 0..rng.random_range(15..30) {
                    let (x, y) = (
                        rng.random_range(0.0..1.0),
                        rng.random_range(0.0..horizon - 0.1),
                    );
                    let star = ellipse([x, y], [rng.random_range(0.003..0.006); 2]);
                    self.fill(star, [1.0, 1.0, 0.95], rng.random_range(0.4..1.0));
                }
            }
        }
    }

    fn ground(&mut self, ground: Ground, horizon: f32, rng: &mut impl Rng) {
        let near = self.sky.light(ground.color());
        // Distant ground has a little of the sky's color.
        let far = mix(near, self.sky.colors()[1], 0.18);
        self.gradient(horizon, 1.0, [horizon, 0.95], [far, near]);
        for _ in 0..rng.random_range(5..9) {
            let (x, y) = (
                rng.random_range(0.0..1.0),
                rng.random_range(horizon + 0.06..0.98),
            );
            let width = rng.random_range(0.04..0.10);
            let (shade, height) = match ground {
                Ground::Sea => (mix(near, [1.0; 3], 0.30), 0.004),
                Ground::Meadow => (mix(near, [0.0; 3], 0.14), 0.006),
                Ground::Sand | Ground::Snow => (mix(near, [0.0; 3], 0.06), 0.008),
            };
            self.fill(ellipse([x, y], [width, height]), shade, 0.8);
        }
    }

    fn subject(&mut self, subject: &Subject, ground: Ground, horizon: f32, rng: &mut impl Rng) {
        let size = match subject.size {
            Size::Small => 0.72,
            Size::Medium => 1.0,
            Size::Large => 1.35,
        } * rng.random_range(0.95..1.05);
        let x = match subject.side {
            Some(Side::Left) => rng.random_range(0.22..0.30),
            Some(Side::Right) => rng.random_range(0.70..0.78),
            None => rng.random_range(0.42..0.58),
        };
        let base = horizon + rng.random_range(0.07..0.13);
        let on_land = matches!(subject.kind, Kind::House | Kind::Tree);
        if ground == Ground::Sea && on_land {
            let island = ellipse([x, base + 0.012], [0.17 * size, 0.042]);
            self.fill(island, self.sky.light(palette::ISLAND), 1.0);
        }
        match subject.kind {
            Kind::House => self.house([x, base], size, subject),
            Kind::Tree => self.tree([x, base], size),
            Kind::Boat => self.boat([x, base], size, subject),
            Kind::Mountain => self.mountain([x, horizon + 0.02], size),
            Kind::Sun | Kind::Moon => {
                let y = rng.random_range(0.17..0.25);
                self.disc([x, y], 0.075 * size, subject.kind);
            }
        }
    }

    fn house(&mut self, [x, base]: [f32; 2], size: f32, subject: &Subject) {
        let color = subject.color.expect("houses have a color");
        let (half, wall, roof) = (0.125 * size, 0.165 * size, 0.12 * size);
        let eaves = base - wall;
        let walls = rectangle([x - half, eaves], [2.0 * half, wall]);
        self.fill(walls, self.sky.light(color.rgb()), 1.0);
        let roof = polygon(&[
            [x - half * 1.22, eaves],
            [x, eaves - roof],
            [x + half * 1.22, eaves],
        ]);
        self.fill(roof, self.sky.light(palette::ROOF), 1.0);
        let door = rectangle(
            [x - 0.022 * size, base - 0.085 * size],
            [0.044 * size, 0.085 * size],
        );
        self.fill(door, self.sky.light(palette::ROOF), 1.0);
        // Lit from inside.
        for side in [-1.0, 1.0] {
            let pane = [x + side * half * 0.58 - 0.02 * size, eaves + 0.045 * size];
            self.fill(rectangle(pane, [0.04 * size; 2]), palette::WINDOW, 1.0);
        }
    }

    fn tree(&mut self, [x, base]: [f32; 2], size: f32) {
        let trunk = rectangle(
            [x - 0.016 * size, base - 0.13 * size],
            [0.032 * size, 0.13 * size],
        );
        self.fill(trunk, self.sky.light(palette::TRUNK), 1.0);
        let leaves = self.sky.light(palette::LEAVES);
        for (dx, dy, r) in [
            (-0.055, 0.16, 0.07),
            (0.055, 0.16, 0.07),
            (0.0, 0.235, 0.085),
        ] {
            let crown = ellipse([x + dx * size, base - dy * size], [r * size; 2]);
            self.fill(crown, leaves, 1.0);
        }
    }

    fn boat(&mut self, [x, base]: [f32; 2], size: f32, subject: &Subject) {
        let color = subject.color.expect("boats have a color");
        let (half, hull) = (0.15 * size, 0.075 * size);
        let mast = rectangle([x - 0.006, base - 0.32 * size], [0.012, 0.26 * size]);
        self.fill(mast, self.sky.light(palette::TRUNK), 1.0);
        let sail = self.sky.light(palette::SAIL);
        let main = [
            [x + 0.012, base - 0.31 * size],
            [x + 0.012, base - 0.095 * size],
            [x + 0.125 * size, base - 0.095 * size],
        ];
        let jib = [
            [x - 0.012, base - 0.27 * size],
            [x - 0.012, base - 0.095 * size],
            [x - 0.09 * size, base - 0.095 * size],
        ];
        self.fill(polygon(&main), sail, 1.0);
        self.fill(polygon(&jib), sail, 1.0);
        let planks = [
            [x - half, base - hull],
            [x + half, base - hull],
            [x + half * 0.66, base],
            [x - half * 0.66, base],
        ];
        self.fill(polygon(&planks), self.sky.light(color.rgb()), 1.0);
    }

    fn mountain(&mut self, [x, base]: [f32; 2], size: f32) {
        let (half, height) = (0.29 * size, 0.29 * size);
        let peak = [x, base - height];
        let rock = [[x - half, base], peak, [x + half, base]];
        self.fill(polygon(&rock), self.sky.light(palette::ROCK), 1.0);
        let edge = |side: f32, down: f32| [x + side * half * down, peak[1] + height * down];
        let cap = [
            peak,
            edge(1.0, 0.34),
            [x + half * 0.12, peak[1] + height * 0.26],
            [x - half * 0.03, peak[1] + height * 0.36],
            [x - half * 0.16, peak[1] + height * 0.27],
            edge(-1.0, 0.34),
        ];
        self.fill(polygon(&cap), self.sky.light(palette::SNOW_CAP), 1.0);
    }

    fn disc(&mut self, center: [f32; 2], radius: f32, kind: Kind) {
        let color = if kind == Kind::Sun {
            palette::SUN
        } else {
            palette::MOON
        };
        self.fill(ellipse(center, [radius * 1.35; 2]), color, 0.22);
        self.fill(ellipse(center, [radius; 2]), color, 1.0);
        if kind == Kind::Moon {
            let [x, y] = center;
            for (dx, dy, r) in [(-0.3, -0.2, 0.2), (0.25, 0.3, 0.26), (0.3, -0.35, 0.13)] {
                let crater = ellipse([x + dx * radius, y + dy * radius], [r * radius; 2]);
                self.fill(crater, mix(color, [0.5, 0.5, 0.5], 0.25), 1.0);
            }
        }
    }

    fn fill(&mut self, path: Path, color: Rgb, opacity: f32) {
        let paint = Paint {
            shader: Shader::SolidColor(paint(color, opacity)),
            anti_alias: true,
            ..Paint::default()
        };
        let transform = Transform::from_scale(self.scale, self.scale);
        self.pixels
            .fill_path(&path, &paint, FillRule::Winding, transform, None);
    }

    /// Fills the rows from `top` to `bottom`, with a gradient between two heights.
    fn gradient(&mut self, top: f32, bottom: f32, [from, to]: [f32; 2], [a, b]: [Rgb; 2]) {
        let stops = vec![
            GradientStop::new(0.0, paint(a, 1.0)),
            GradientStop::new(1.0, paint(b, 1.0)),
        ];
        let scale = Transform::from_scale(self.scale, self.scale);
        let shader = LinearGradient::new(
            Point::from_xy(0.0, from),
            Point::from_xy(0.0, to),
            stops,
            SpreadMode::Pad,
            Transform::identity(),
        )
        .expect("two different heights");
        let paint = Paint {
            shader,
            anti_alias: true,
            ..Paint::default()
        };
        let rows = rectangle([0.0, top], [1.0, bottom - top]);
        self.pixels
            .fill_path(&rows, &paint, FillRule::Winding, scale, None);
    }

    fn into_image(self) -> RgbImage {
        let side = self.pixels.width();
        // Nothing is transparent, so colors need no conversion.
        let rgb = self
            .pixels
            .pixels()
            .iter()
            .flat_map(|pixel| [pixel.red(), pixel.green(), pixel.blue()])
            .collect();
        RgbImage::from_raw(side, side, rgb).expect("three values a pixel")
    }
}

fn paint([red, green, blue]: Rgb, opacity: f32) -> Paint32 {
    Paint32::from_rgba(red, green, blue, opacity).expect("colors are between 0 and 1")
}

fn rectangle([x, y]: [f32; 2], [width, height]: [f32; 2]) -> Path {
    PathBuilder::from_rect(Rect::from_xywh(x, y, width, height).expect("a size above zero"))
}

fn ellipse([x, y]: [f32; 2], [rx, ry]: [f32; 2]) -> Path {
    let bounds = Rect::from_xywh(x - rx, y - ry, 2.0 * rx, 2.0 * ry);
    PathBuilder::from_oval(bounds.expect("a size above zero")).expect("a size above zero")
}

fn polygon(points: &[[f32; 2]]) -> Path {
    let mut path = PathBuilder::new();
    for (index, [x, y]) in points.iter().enumerate() {
        if index == 0 {
            path.move_to(*x, *y);
        } else {
            path.line_to(*x, *y);
        }
    }
    path.close();
    path.finish().expect("a polygon has corners")
}
