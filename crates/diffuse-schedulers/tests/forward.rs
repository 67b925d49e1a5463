//! `add_noise` and `get_velocity` against Diffusers'.

mod common;

use burn::prelude::*;
use burn::tensor::DType;
use burn_flex::Flex;
use common::{SHAPE, Tensors, another_set, check_close, numbers, object, rows, values, wave};
use diffuse_schedulers::{
    DDPMConfig, DDPMScheduler, Generator, Overrides, Scheduler, SchedulerConfig, randn_tensor,
    scheduler_from_config,
};

fn draw(generator: &mut Generator) -> Tensor<Flex, 4> {
    randn_tensor(generator, SHAPE, DType::F32, &Default::default()).unwrap()
}

#[test]
fn rows_with_different_timesteps() {
    let expected = Tensors::read("add_noise.safetensors");
    let cases = rows("add_noise.json");
    let mut velocities = 0;
    for case in &cases {
        let (name, class) = (case["name"].as_str().unwrap(), case["scheduler"].as_str());
        let config = SchedulerConfig::from_values(object(&case["config"]));
        let mut scheduler =
            scheduler_from_config::<Flex>(&config, class, &Overrides::new()).unwrap();
        scheduler
            .set_timesteps(&(case["num_inference_steps"].as_u64().unwrap() as usize).into())
            .unwrap();
        let mut generator = Generator::new(case["seed"].as_u64().unwrap());
        let (original, noise) = (wave(DType::F32), draw(&mut generator));
        let timesteps = numbers(&case["timesteps"]);
        let noisy = scheduler
            .add_noise(original.clone(), noise.clone(), &timesteps)
            .unwrap();
        let check = |part: &str, actual: Tensor<Flex, 4>| {
            let expected = expected.get(&format!("{name}.{part}"));
            check_close(
                &format!("{name}: {part}"),
                &values(&actual),
                &expected,
                |x| 1e-6 + 1e-6 * x.abs(),
            );
        };
        check("noisy", noisy);
        let velocity = scheduler.get_velocity(original, noise, &timesteps);
        match expected.has(&format!("{name}.velocity")) {
            true => {
                check("velocity", velocity.unwrap());
                velocities += 1;
            }
            false => assert_eq!(
                velocity.unwrap_err().to_string(),
                format!("`{}` has no velocity", case["scheduler"].as_str().unwrap())
            ),
        }
    }
    if another_set().is_none() {
        assert_eq!((cases.len(), velocities), (36, 10));
    }
}

#[test]
fn one_timestep_is_for_all_rows() {
    let scheduler = DDPMScheduler::<Flex>::new(DDPMConfig::default()).unwrap();
    let mut generator = Generator::new(3);
    let (original, noise) = (draw(&mut generator), draw(&mut generator));
    let add = |timesteps: &[f64]| scheduler.add_noise(original.clone(), noise.clone(), timesteps);
    assert_eq!(
        values(&add(&[500.0]).unwrap()),
        values(&add(&[500.0, 500.0]).unwrap())
    );
    for timesteps in [&[1.0, 2.0, 3.0][..], &[]] {
        assert_eq!(
            add(timesteps).unwrap_err().to_string(),
            format!(
                "{} timesteps were given for a batch of 2: give one, or one for each row",
                timesteps.len()
            )
        );
    }
    for timestep in [1000.0, 0.5] {
        assert_eq!(
            add(&[timestep]).unwrap_err().to_string(),
            format!("timestep `{timestep}` is not a whole number in `0..1000`")
        );
    }
}

/// Half precision is widened for the computation: the result is the rounded single-precision one.
#[test]
fn half_precision() {
    let scheduler = DDPMScheduler::<Flex>::new(DDPMConfig::default()).unwrap();
    let mut generator = Generator::new(4);
    let device = Default::default();
    let original = randn_tensor::<Flex>(&mut generator, SHAPE, DType::F16, &device).unwrap();
    let noise = randn_tensor::<Flex>(&mut generator, SHAPE, DType::F16, &device).unwrap();
    let half = scheduler
        .add_noise(original.clone(), noise.clone(), &[20.0, 700.0])
        .unwrap();
    assert_eq!(half.dtype(), DType::F16);
    let full = scheduler
        .add_noise(
            original.cast(DType::F32),
            noise.cast(DType::F32),
            &[20.0, 700.0],
        )
        .unwrap();
    check_close("half", &values(&half), &values(&full), |x| {
        5e-4 * x.abs() + 1e-7
    });
}
