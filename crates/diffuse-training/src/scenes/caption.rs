//! Captions of scenes.

use rand::Rng;
use rand::seq::IndexedRandom;

use super::{Color, Ground, Kind, Scene, Side, Size, Sky, Subject};

/// The detail of a caption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// Sky, ground, subjects and colors, and unusual sizes and sides.
    Full,
    /// Like a user's prompt: some details are left out.
    Casual,
}

/// A caption of `scene` in varied words.
pub fn caption(scene: &Scene, detail: Detail, rng: &mut impl Rng) -> String {
    let mut told = |probability: f64| detail == Detail::Full || rng.random_bool(probability);
    let (tell_ground, tell_sky, tell_side, tell_color) =
        (told(0.92), told(0.92), told(0.85), told(0.95));
    let mut wording = Wording {
        rng,
        tell_side,
        tell_color,
    };
    let subjects = wording.subjects(&scene.subjects);
    let ground = tell_ground.then(|| wording.ground(scene.ground));
    let sky = tell_sky.then(|| wording.sky(scene.sky));
    let rng = wording.rng;
    match (ground, sky) {
        (Some(ground), Some(sky)) => match rng.random_range(0..6) {
            0 => format!("{sky}, {subjects} {ground}"),
            1 => format!("{subjects}, {ground}, {sky}"),
            2 => format!("a picture of {subjects} {ground} {sky}"),
            3 => format!("{subjects} {sky} {ground}"),
            _ => format!("{subjects} {ground} {sky}"),
        },
        (Some(place), None) | (None, Some(place)) => format!("{subjects} {place}"),
        (None, None) => subjects,
    }
}

struct Wording<'a, R> {
    rng: &'a mut R,
    tell_side: bool,
    tell_color: bool,
}

impl<R: Rng> Wording<'_, R> {
    fn one_of(&mut self, words: &[&'static str]) -> &'static str {
        words.choose(self.rng).expect("there are words")
    }

    fn subjects(&mut self, subjects: &[Subject]) -> String {
        match subjects {
            [first, second] if first.kind == second.kind => {
                format!("two {}s", self.described(first))
            }
            [first, second] => {
                // In either order.
                let (first, second) = if self.rng.random_bool(0.5) {
                    (first, second)
                } else {
                    (second, first)
                };
                let joint = self.one_of(&["and", "and", "with"]);
                format!("{} {joint} {}", self.subject(first), self.subject(second))
            }
            _ => self.subject(&subjects[0]),
        }
    }

    /// `a small red house on the left`
    fn subject(&mut self, subject: &Subject) -> String {
        let described = self.described(subject);
        let article = match described.chars().next() {
            Some('a' | 'e' | 'i' | 'o' | 'u') => "an",
            _ if subject.kind.is_celestial() && self.rng.random_bool(0.5) => "the",
            _ => "a",
        };
        match subject.side.filter(|_| self.tell_side) {
            Some(side) => format!("{article} {described} {}", self.side(side)),
            None => format!("{article} {described}"),
        }
    }

    /// `small red house`
    fn described(&mut self, subject: &Subject) -> String {
        let size = match subject.size {
            Size::Small => self.one_of(&["small", "little", "tiny"]),
            Size::Medium => "",
            Size::Large => self.one_of(&["large", "big", "huge"]),
        };
        let color = match subject.color.filter(|_| self.tell_color) {
            Some(Color::Red) => "red",
            Some(Color::Blue) => "blue",
            Some(Color::Yellow) => "yellow",
            Some(Color::Purple) => "purple",
            None => "",
        };
        let kind = match subject.kind {
            Kind::House => self.one_of(&["house", "house", "cottage"]),
            Kind::Tree => "tree",
            Kind::Boat => self.one_of(&["boat", "boat", "sailboat"]),
            Kind::Mountain => "mountain",
            Kind::Sun => "sun",
            Kind::Moon => self.one_of(&["moon", "moon", "full moon"]),
        };
        let words: Vec<&str> = [size, color, kind]
            .into_iter()
            .filter(|word| !word.is_empty())
            .collect();
        words.join(" ")
    }

    fn side(&mut self, side: Side) -> &'static str {
        match side {
            Side::Left => self.one_of(&["on the left", "to the left"]),
            Side::Right => self.one_of(&["on the right", "to the right"]),
        }
    }

    fn ground(&mut self, ground: Ground) -> &'static str {
        match ground {
            Ground::Meadow => self.one_of(&[
                "in a meadow",
                "on a meadow",
                "on the grass",
                "in a green field",
                "over a meadow",
            ]),
            Ground::Sand => self.one_of(&[
                "on the sand",
                "on sand",
                "on a beach",
                "in the desert",
                "over the sand",
            ]),
            Ground::Snow => self.one_of(&[
                "in the snow",
                "on snow",
                "in a snowy field",
                "on the snow",
                "over the snow",
            ]),
            Ground::Sea => self.one_of(&[
                "at sea",
                "on the sea",
                "on the water",
                "over the sea",
                "in the sea",
            ]),
        }
    }

    fn sky(&mut self, sky: Sky) -> &'static str {
        match sky {
            Sky::Day => self.one_of(&[
                "by day",
                "during the day",
                "under a blue sky",
                "in daylight",
            ]),
            Sky::Sunset => self.one_of(&[
                "at sunset",
                "at dusk",
                "in the evening",
                "under an orange sky",
            ]),
            Sky::Night => self.one_of(&[
                "at night",
                "by night",
                "under the stars",
                "under a night sky",
            ]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use std::collections::HashSet;

    #[test]
    fn captions_vary_and_tell_everything_that_is_asked_for() {
        let mut rng = StdRng::seed_from_u64(0);
        let mut seen = HashSet::new();
        for _ in 0..2_000 {
            let scene = Scene::random(&mut rng);
            let text = caption(&scene, Detail::Full, &mut rng);
            if let Some(color) = scene.combination().color {
                let word = format!("{color:?}").to_lowercase();
                assert!(text.contains(&word), "{text}: {scene:?}");
            }
            if scene.sky == Sky::Sunset {
                let words = ["sunset", "dusk", "evening", "orange"];
                assert!(words.iter().any(|word| text.contains(word)), "{text}");
            }
            seen.insert(text);
        }
        assert!(seen.len() > 1_900, "only {} differ", seen.len());
    }
}
