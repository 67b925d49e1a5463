//! Random numbers against torch's.

mod common;

use burn::tensor::DType;
use burn_flex::Flex;
use common::{Tensors, another_set, check_close, rows, values};
use diffuse_schedulers::{Generator, NoiseSource, randn_tensor};

#[test]
fn draws_of_every_size() {
    let expected = Tensors::read("randn.safetensors");
    let cases = rows("randn.json");
    if another_set().is_none() {
        assert_eq!(cases.len(), 79);
    }
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let mut generator = Generator::new(case["seed"].as_u64().unwrap());
        for place in 0..case["draws"].as_array().unwrap().len() {
            let what = format!("{name}.{place}");
            let expected = expected.get(&what);
            let shape = [1, 1, 1, expected.len()];
            let (dtype, ulp) = match case["dtype"].as_str().unwrap() {
                "float16" => (DType::F16, 2f64.powi(-10)),
                "bfloat16" => (DType::BF16, 2f64.powi(-7)),
                _ => (DType::F32, 0.0),
            };
            let numbers =
                randn_tensor::<Flex>(&mut generator, shape, dtype, &Default::default()).unwrap();
            check_close(&what, &values(&numbers), &expected, |x| {
                2e-6 + ulp * x.abs()
            });
        }
    }
}

#[test]
fn low_bits_of_the_seed_count() {
    let draw = |seed: u64| Generator::new(seed).normal(40, DType::F32);
    assert_eq!(draw(7), draw(7 + (1 << 32)));
    assert_ne!(draw(7), draw(8));
    // `manual_seed(-1)` is the seed with all bits set.
    assert_eq!(draw(-1_i64 as u64), draw(u32::MAX.into()));
}

#[test]
fn one_generator_for_each_image() {
    let mut generators: Vec<Generator> = [5, 6].map(Generator::new).into();
    let batch = generators.randn([2, 4, 8, 8], DType::F32).unwrap();
    assert_eq!(batch[..256], Generator::new(5).normal(256, DType::F32));
    assert_eq!(batch[256..], Generator::new(6).normal(256, DType::F32));

    let mut single = vec![Generator::new(5)];
    assert_eq!(
        single.randn([2, 4, 8, 8], DType::F32).unwrap(),
        Generator::new(5).normal(512, DType::F32)
    );

    let error = generators.randn([3, 4, 8, 8], DType::F32).unwrap_err();
    assert_eq!(
        error.to_string(),
        "You have passed a list of generators of length 2, but requested an effective \
         batch size of 3. Make sure the \
         batch size matches the length of the generators."
    );
}

#[test]
fn noise_of_one_s_own() {
    let mut zeros = |shape: [usize; 4]| vec![0.0; shape.iter().product()];
    let noise =
        randn_tensor::<Flex>(&mut zeros, [1, 2, 3, 4], DType::F32, &Default::default()).unwrap();
    assert_eq!(values(&noise), [0.0; 24]);

    let mut short = |_: [usize; 4]| vec![0.0; 5];
    let error = randn_tensor::<Flex>(&mut short, [1, 2, 3, 4], DType::F32, &Default::default())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the noise source gave 5 numbers for a tensor of 24"
    );
}

#[test]
fn numbers_are_normal() {
    let numbers = Generator::new(11).normal(100_000, DType::F32);
    let moment = |power: i32| {
        numbers
            .iter()
            .map(|&x| f64::from(x).powi(power))
            .sum::<f64>()
            / 1e5
    };
    check_close(
        "moments",
        &[moment(1), moment(2), moment(3), moment(4)],
        &[0.0, 1.0, 0.0, 3.0],
        |_| 0.1,
    );
}
