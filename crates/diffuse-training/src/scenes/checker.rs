//! Recognises a scene in an image: sky, ground, kinds of subjects, and the color of a house or
//! boat.
//!
//! The sky determines the light, so every material has one color. Each pixel belongs to the
//! material or background with the nearest color, and a subject is recognised by enough pixels of
//! its material at its place.

use image::RgbImage;

use super::palette::{self, Rgb, mix};
use super::{Color, Combination, Ground, Kind, Sky};

/// The range of the horizon, from 0 at the top to 1.
const HORIZON: [f32; 2] = [0.57, 0.63];

/// The attributes of a prompt that an image has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub sky: bool,
    pub ground: bool,
    /// One for each kind in the prompt.
    pub subjects: Vec<bool>,
    /// Of the house or boat, if the prompt has one.
    pub color: Option<bool>,
    /// Kinds that are not in the prompt.
    pub extra: Vec<Kind>,
}

impl Verdict {
    /// The attributes of the prompt, correct or not.
    pub fn attributes(&self) -> impl Iterator<Item = bool> {
        [self.sky, self.ground]
            .into_iter()
            .chain(self.subjects.iter().copied())
            .chain(self.color)
    }

    /// Whether the image has everything in the prompt, and nothing else.
    pub fn is_right(&self) -> bool {
        self.attributes().all(|right| right) && self.extra.is_empty()
    }
}

/// Compares an image with a prompt.
pub fn check(image: &RgbImage, wanted: &Combination) -> Verdict {
    let found = read(image);
    let is_wanted = |kind: &Kind| wanted.kinds.contains(kind);
    Verdict {
        sky: found.sky == wanted.sky,
        ground: found.ground == wanted.ground,
        subjects: wanted
            .kinds
            .iter()
            .map(|kind| found.kinds.contains(kind))
            .collect(),
        color: wanted.color.map(|color| found.color == Some(color)),
        extra: found
            .kinds
            .into_iter()
            .filter(|kind| !is_wanted(kind))
            .collect(),
    }
}

/// The contents of an image.
pub fn read(image: &RgbImage) -> Combination {
    let top = mean(image, [0.01, 0.07]);
    let sky = *nearest(&Sky::ALL, top, |sky| sky.colors()[0]);
    let bottom = mean(image, [0.93, 1.0]);
    let ground = *nearest(&Ground::ALL, bottom, |ground| sky.light(ground.color()));
    let areas = Areas::measure(image, sky, ground);

    let mut kinds = Vec::new();
    let color = *Color::ALL
        .iter()
        .max_by(|a, b| areas.walls[**a as usize].total_cmp(&areas.walls[**b as usize]))
        .expect("there are colors");
    let colored = areas.walls[color as usize] > 0.006;
    if colored {
        // A hull is below sails, walls are below a roof.
        kinds.push(if areas.sail > areas.roof {
            Kind::Boat
        } else {
            Kind::House
        });
    }
    for (kind, area, least) in [
        (Kind::Tree, areas.leaves, 0.008),
        (Kind::Mountain, areas.rock, 0.004),
        (Kind::Sun, areas.sun, 0.004),
        (Kind::Moon, areas.moon, 0.004),
    ] {
        if area > least {
            kinds.push(kind);
        }
    }
    kinds.sort();
    Combination {
        sky,
        ground,
        kinds,
        color: colored.then_some(color),
    }
}

/// The material of a pixel.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Material {
    Background,
    Wall(Color),
    Roof,
    Sail,
    Leaves,
    Rock,
    Sun,
    Moon,
}

/// The share of the image that each material covers, at the places that count, from 0 to 1.
#[derive(Debug, Default)]
struct Areas {
    walls: [f32; 4],
    roof: f32,
    sail: f32,
    leaves: f32,
    rock: f32,
    sun: f32,
    moon: f32,
}

impl Areas {
    fn measure(image: &RgbImage, sky: Sky, ground: Ground) -> Self {
        let materials = materials(image, sky, ground);
        let (width, height) = image.dimensions();
        let at = |x: u32, y: u32| materials[(y * width + x) as usize];
        // The border of two colors is grey, like rock: rock counts only among other rock.
        let reach = (width / 64).max(1);
        let is_inside = |x: u32, y: u32, material: Material| {
            (reach..width - reach).contains(&x)
                && (reach..height - reach).contains(&y)
                && [
                    (x - reach, y),
                    (x + reach, y),
                    (x, y - reach),
                    (x, y + reach),
                ]
                .iter()
                .all(|(x, y)| at(*x, *y) == material)
        };
        let pixel = 1.0 / (width * height) as f32;
        let mut areas = Self::default();
        for row in 0..height {
            let y = (row as f32 + 0.5) / height as f32;
            for x in 0..width {
                let material = at(x, row);
                match material {
                    Material::Wall(color) if y > 0.3 => areas.walls[color as usize] += pixel,
                    Material::Roof if y > 0.25 => areas.roof += pixel,
                    Material::Sail if y > 0.25 => areas.sail += pixel,
                    Material::Leaves if y < HORIZON[1] => areas.leaves += pixel,
                    Material::Rock if y < HORIZON[0] && is_inside(x, row, material) => {
                        areas.rock += pixel;
                    }
                    Material::Sun => areas.sun += pixel,
                    Material::Moon => areas.moon += pixel,
                    _ => {}
                }
            }
        }
        areas
    }
}

/// The material of each pixel, row by row.
fn materials(image: &RgbImage, sky: Sky, ground: Ground) -> Vec<Material> {
    let lit: Vec<(Material, Rgb)> = Color::ALL
        .iter()
        .map(|color| (Material::Wall(*color), color.rgb()))
        .chain([
            (Material::Roof, palette::ROOF),
            (Material::Roof, palette::TRUNK),
            (Material::Sail, palette::SAIL),
            (Material::Leaves, palette::LEAVES),
            (Material::Rock, palette::ROCK),
            (Material::Background, palette::SNOW_CAP),
            (Material::Background, palette::ISLAND),
        ])
        .map(|(material, color)| (material, sky.light(color)))
        .collect();
    let near = sky.light(ground.color());
    let [zenith, far] = sky.colors();
    let rows = (0..image.height()).map(|row| {
        let y = (row as f32 + 0.5) / image.height() as f32;
        let behind = mix(zenith, far, (y / HORIZON[0]).min(1.0));
        let mut candidates = lit.clone();
        let mut background = |color| candidates.push((Material::Background, color));
        if y < HORIZON[1] {
            background(behind);
        }
        if y > HORIZON[0] {
            background(near);
            background(mix(near, far, 0.18));
        }
        if y < 0.45 {
            let (material, light) = match sky {
                Sky::Night => (Material::Moon, palette::MOON),
                Sky::Day | Sky::Sunset => (Material::Sun, palette::SUN),
            };
            // The background around it, and clouds.
            background(mix(behind, light, 0.22));
            if sky == Sky::Day {
                for cloud in [0.45, 0.7, 0.85] {
                    background(mix(behind, [1.0; 3], cloud));
                }
            }
            candidates.push((material, light));
        }
        candidates
    });
    rows.zip(image.rows())
        .flat_map(|(candidates, row)| {
            row.map(|pixel| {
                let color = pixel.0.map(|level| f32::from(level) / 255.0);
                nearest(&candidates, color, |(_, color)| *color).0
            })
            .collect::<Vec<_>>()
        })
        .collect()
}

/// The mean color of the rows from `from` to `to`, as fractions of the height.
fn mean(image: &RgbImage, [from, to]: [f32; 2]) -> Rgb {
    let (width, height) = image.dimensions();
    let row = |part: f32| (part * height as f32) as u32;
    let (from, to) = (row(from), row(to).max(row(from) + 1).min(height));
    let mut sum = [0.0; 3];
    for y in from..to {
        for x in 0..width {
            let pixel = image.get_pixel(x, y).0;
            for (sum, level) in sum.iter_mut().zip(pixel) {
                *sum += f32::from(level) / 255.0;
            }
        }
    }
    sum.map(|sum| sum / (width * (to - from)) as f32)
}

/// The item whose color is nearest to `color`.
fn nearest<T>(items: &[T], color: Rgb, of: impl Fn(&T) -> Rgb) -> &T {
    let distance = |item: &T| -> f32 {
        let other = of(item);
        color.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum()
    };
    items
        .iter()
        .min_by(|a, b| distance(a).total_cmp(&distance(b)))
        .expect("there are items")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::Scene;
    use crate::scenes::render::render;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    /// Each attribute is recognised in at least 98 of 100 rendered scenes, at both sizes.
    #[test]
    fn rendered_scenes_are_read_right() {
        let mut rng = StdRng::seed_from_u64(20_000);
        for size in [64, 128] {
            let scenes = 250;
            let (mut right, mut attributes, mut all) = (0, 0, 0);
            let mut wrong = Vec::new();
            for _ in 0..scenes {
                let scene = Scene::random(&mut rng);
                let wanted = scene.combination();
                let image = render(&scene, size, &mut rng);
                let verdict = check(&image, &wanted);
                attributes += verdict.attributes().count();
                right += verdict.attributes().filter(|right| *right).count();
                all += usize::from(verdict.is_right());
                if !verdict.is_right() {
                    wrong.push((wanted, read(&image)));
                }
            }
            println!("{size}: {right}/{attributes} attributes, {all}/{scenes} scenes");
            for (wanted, read) in wrong.iter().take(20) {
                println!("  {wanted:?}\n  {read:?}\n");
            }
            assert!(right * 100 >= attributes * 98, "{right} of {attributes}");
            assert!(all * 100 >= scenes * 98, "{all} of {scenes}");
        }
    }

    #[test]
    fn an_image_of_something_else_is_wrong() {
        let mut rng = StdRng::seed_from_u64(3);
        let mut right = 0;
        for _ in 0..300 {
            let scene = Scene::random(&mut rng);
            let other = Scene::random(&mut rng).combination();
            if scene.combination() != other {
                let image = render(&scene, 64, &mut rng);
                right += usize::from(check(&image, &other).is_right());
            }
        }
        assert!(right <= 3, "{right} of 300 passed as another scene");
    }
}
