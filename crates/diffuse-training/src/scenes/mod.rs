//! The data set: small captioned scenes with a sky, a ground, and one or two subjects, rendered on
//! demand.
//!
//! [`render`] draws a [`Scene`], [`caption`] describes it, and [`checker`] recognises it in an
//! image.

pub mod caption;
pub mod checker;
pub mod dutch_angle;
pub mod palette;
pub mod render;

use rand::Rng;
use rand::seq::IndexedRandom;

/// The sky, which determines the light.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sky {
    Day,
    Sunset,
    Night,
}

/// The ground below the horizon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Ground {
    Meadow,
    Sand,
    Snow,
    Sea,
}

/// The kind of a subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    House,
    Tree,
    Boat,
    Mountain,
    Sun,
    Moon,
}

/// Color of a house's walls or of a boat's hull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Color {
    Red,
    Blue,
    Yellow,
    Purple,
}

/// The size of a subject, for its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Size {
    Small,
    Medium,
    Large,
}

/// The side of a subject; without one it is near the middle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    Left,
    Right,
}

impl Sky {
    pub const ALL: [Sky; 3] = [Sky::Day, Sky::Sunset, Sky::Night];
}

impl Ground {
    pub const ALL: [Ground; 4] = [Ground::Meadow, Ground::Sand, Ground::Snow, Ground::Sea];
}

impl Color {
    pub const ALL: [Color; 4] = [Color::Red, Color::Blue, Color::Yellow, Color::Purple];
}

impl Kind {
    pub const ALL: [Kind; 6] = [
        Kind::House,
        Kind::Tree,
        Kind::Boat,
        Kind::Mountain,
        Kind::Sun,
        Kind::Moon,
    ];

    /// Whether subjects of this kind have a color.
    pub fn is_colored(self) -> bool {
        matches!(self, Kind::House | Kind::Boat)
    }

    /// Whether it is in the sky.
    pub fn is_celestial(self) -> bool {
        matches!(self, Kind::Sun | Kind::Moon)
    }

    /// Whether a scene with this sky and ground may have this kind.
    fn fits(self, sky: Sky, ground: Ground) -> bool {
        match self {
            Kind::Boat => ground == Ground::Sea,
            Kind::Sun => sky != Sky::Night,
            Kind::Moon => sky == Sky::Night,
            Kind::House | Kind::Tree | Kind::Mountain => true,
        }
    }
}

/// A house, a tree, ...
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Subject {
    pub kind: Kind,
    /// Of houses and boats only.
    pub color: Option<Color>,
    pub size: Size,
    pub side: Option<Side>,
}

/// The contents of an image.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Scene {
    pub sky: Sky,
    pub ground: Ground,
    /// One or two; two of the same kind differ in their sides only.
    pub subjects: Vec<Subject>,
}

/// A scene without sizes, sides and numbers: the attributes that are held out and checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Combination {
    pub sky: Sky,
    pub ground: Ground,
    /// Sorted, without repetition.
    pub kinds: Vec<Kind>,
    /// Of the house or boat, if there is one.
    pub color: Option<Color>,
}

impl Combination {
    /// Whether this combination is held out from training: about one in sixteen, by a hash.
    pub fn is_held_out(&self) -> bool {
        let digits = [self.sky as u64, self.ground as u64]
            .into_iter()
            .chain(self.kinds.iter().map(|kind| *kind as u64))
            .chain([self.color.map_or(7, |color| color as u64)]);
        // FNV-1a: the same on every machine and in every version.
        let hash = digits.fold(0xcbf2_9ce4_8422_2325_u64, |hash, digit| {
            (hash ^ (digit + 1)).wrapping_mul(0x0100_0000_01b3)
        });
        // The three low bits hardly depend on the last digit, and hold out all colors together; the
        // high bit separates colors.
        hash & (0b111 << 17 | 1 << 41) == 0
    }
}

impl Scene {
    /// A random scene of any combination.
    pub fn random(rng: &mut impl Rng) -> Self {
        let sky = *Sky::ALL.choose(rng).expect("there are skies");
        let ground = *Ground::ALL.choose(rng).expect("there are grounds");
        let kinds: Vec<Kind> = Kind::ALL
            .into_iter()
            .filter(|kind| kind.fits(sky, ground))
            .collect();
        let first = Subject::random(*kinds.choose(rng).expect("some kind fits"), rng);
        let mut subjects = vec![first];
        if rng.random_bool(0.6) {
            let others: Vec<Kind> = kinds
                .into_iter()
                .filter(|kind| first.kind.goes_with(*kind))
                .collect();
            if let Some(kind) = others.choose(rng) {
                subjects.push(Subject::random(*kind, rng));
            }
        }
        if let [first, second] = &mut subjects[..] {
            if first.kind == second.kind {
                *second = *first;
            }
            if first.kind.is_celestial() == second.kind.is_celestial() {
                // Side by side.
                let (one, other) = if rng.random_bool(0.5) {
                    (Side::Left, Side::Right)
                } else {
                    (Side::Right, Side::Left)
                };
                (first.side, second.side) = (Some(one), Some(other));
            }
        }
        Self {
            sky,
            ground,
            subjects,
        }
    }

    /// A random scene for training. Boats are at sea only, and would be rare: most scenes without
    /// one are drawn again.
    pub fn for_training(rng: &mut impl Rng) -> Self {
        loop {
            let scene = Self::random_where(rng, false);
            let has_boat = scene.subjects.iter().any(|it| it.kind == Kind::Boat);
            if has_boat || rng.random_bool(0.15) {
                return scene;
            }
        }
    }

    /// A random scene of a held-out combination.
    pub fn held_out(rng: &mut impl Rng) -> Self {
        Self::random_where(rng, true)
    }

    fn random_where(rng: &mut impl Rng, held_out: bool) -> Self {
        loop {
            let scene = Self::random(rng);
            if scene.combination().is_held_out() == held_out {
                return scene;
            }
        }
    }

    /// Length of [`features`](Scene::features).
    pub const FEATURES: usize =
        Sky::ALL.len() + Ground::ALL.len() + Color::ALL.len() + 6 * Kind::ALL.len();

    /// The scene as features of 0 and 1: sky, ground and color, and for each kind whether it is
    /// present, twice, small, large, to the left and to the right.
    pub fn features(&self) -> Vec<f32> {
        let color = self.combination().color;
        let mut features: Vec<bool> = Vec::with_capacity(Self::FEATURES);
        features.extend(Sky::ALL.map(|sky| sky == self.sky));
        features.extend(Ground::ALL.map(|ground| ground == self.ground));
        features.extend(Color::ALL.map(|other| Some(other) == color));
        for kind in Kind::ALL {
            let alike = || self.subjects.iter().filter(move |s| s.kind == kind);
            let has = |what: &dyn Fn(&Subject) -> bool| alike().any(what);
            features.extend([
                has(&|_| true),
                alike().count() == 2,
                has(&|subject| subject.size == Size::Small),
                has(&|subject| subject.size == Size::Large),
                has(&|subject| subject.side == Some(Side::Left)),
                has(&|subject| subject.side == Some(Side::Right)),
            ]);
        }
        features.into_iter().map(f32::from).collect()
    }

    /// The combination: the scene without sizes, sides and numbers.
    pub fn combination(&self) -> Combination {
        let mut kinds: Vec<Kind> = self.subjects.iter().map(|subject| subject.kind).collect();
        kinds.sort();
        kinds.dedup();
        Combination {
            sky: self.sky,
            ground: self.ground,
            kinds,
            color: self.subjects.iter().find_map(|subject| subject.color),
        }
    }
}

impl Kind {
    /// Whether a scene may have both: two subjects have the same color, and there is only one sun
    /// or moon.
    fn goes_with(self, other: Kind) -> bool {
        if self == other {
            matches!(self, Kind::House | Kind::Tree | Kind::Boat)
        } else {
            !(self.is_colored() && other.is_colored())
        }
    }
}

impl Subject {
    fn random(kind: Kind, rng: &mut impl Rng) -> Self {
        Self {
            kind,
            color: kind
                .is_colored()
                .then(|| *Color::ALL.choose(rng).expect("there are colors")),
            size: *[Size::Small, Size::Medium, Size::Large]
                .choose(rng)
                .expect("there are sizes"),
            side: *[None, Some(Side::Left), Some(Side::Right)]
                .choose(rng)
                .expect("there are sides"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use std::collections::BTreeSet;

    #[test]
    fn held_out_combinations_are_never_trained_on() {
        let mut rng = StdRng::seed_from_u64(0);
        let combinations = |held_out, rng: &mut StdRng| -> BTreeSet<Combination> {
            (0..20_000)
                .map(|_| Scene::random_where(rng, held_out).combination())
                .collect()
        };
        let trained = combinations(false, &mut rng);
        let held_out = combinations(true, &mut rng);
        assert!(trained.is_disjoint(&held_out));
        let share = held_out.len() as f64 / (trained.len() + held_out.len()) as f64;
        assert!((0.04..0.1).contains(&share), "{share} of all are held out");
        // Training has every single attribute.
        for sky in Sky::ALL {
            assert!(trained.iter().any(|combination| combination.sky == sky));
        }
        for kind in Kind::ALL {
            assert!(trained.iter().any(|c| c.kinds == [kind]));
            assert!(held_out.iter().any(|c| c.kinds.contains(&kind)));
        }
        for color in Color::ALL {
            assert!(trained.iter().any(|c| c.color == Some(color)));
            assert!(held_out.iter().any(|c| c.color == Some(color)));
        }
    }

    #[test]
    fn features_tell_everything() {
        let mut rng = StdRng::seed_from_u64(2);
        let mut seen = std::collections::HashMap::new();
        for _ in 0..5_000 {
            let mut scene = Scene::random(&mut rng);
            scene.subjects.sort_by_key(|s| (s.kind, s.side));
            let features = scene.features();
            assert_eq!(features.len(), Scene::FEATURES);
            let key: Vec<u8> = features.iter().map(|feature| *feature as u8).collect();
            let other = seen.entry(key).or_insert_with(|| scene.clone());
            assert_eq!(*other, scene);
        }
    }

    #[test]
    fn scenes_make_sense() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..2_000 {
            let scene = Scene::random(&mut rng);
            assert!((1..=2).contains(&scene.subjects.len()));
            for subject in &scene.subjects {
                assert!(subject.kind.fits(scene.sky, scene.ground), "{scene:?}");
                assert_eq!(subject.color.is_some(), subject.kind.is_colored());
            }
            if let [first, second] = scene.subjects[..]
                && first.kind.is_celestial() == second.kind.is_celestial()
            {
                assert_ne!(first.side, second.side, "{scene:?}");
            }
        }
    }
}
