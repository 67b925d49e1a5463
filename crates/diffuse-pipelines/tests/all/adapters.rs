//! Adapters of every form: the weights that they make, against the programs that make them.

use std::collections::BTreeMap;
use std::path::Path;

use burn_flex::Flex;
use diffuse_nn::checkpoint::Checkpoint;
use diffuse_nn::config::ModelConfig;
use diffuse_pipelines::schedulers::{Overrides, scheduler_from_config};
use diffuse_pipelines::{Adapter, Pretrained, StableDiffusionOptions, StableDiffusionPipeline};
use diffuse_testing::{Values, assert_close, read_json, reference};
use serde_json::Value;

type B = Flex;
type Tensors = BTreeMap<String, Vec<f32>>;

fn base() -> StableDiffusionPipeline<B> {
    let folder = reference().join("sd/base");
    StableDiffusionPipeline::from_pretrained(folder, &Default::default()).unwrap()
}

fn read(path: &Path) -> Tensors {
    let checkpoint = Checkpoint::open(path).unwrap();
    let keys = checkpoint.tensors().keys();
    let values = keys.map(|key| {
        (
            key.clone(),
            checkpoint.read_f32(key).unwrap().iter().collect(),
        )
    });
    values.collect()
}

/// All weights that adapters may change: `unet.` or `text_encoder.` and the key.
fn weights(pipeline: &StableDiffusionPipeline<B>) -> Tensors {
    fn saved<M: Pretrained<B>>(component: &str, module: &M) -> Tensors {
        let folder = tempfile::tempdir().unwrap();
        module.save_pretrained(folder.path()).unwrap();
        let name = format!("{}.safetensors", M::Config::WEIGHTS[0]);
        let tensors = read(&folder.path().join(name)).into_iter();
        tensors
            .map(|(key, values)| (format!("{component}.{key}"), values))
            .collect()
    }
    let mut all = saved("unet", &pipeline.unet);
    all.extend(saved("text_encoder", &pipeline.text_encoder));
    all
}

fn adapters(case: &Value) -> Vec<Adapter> {
    let open = |value: &Value| {
        let path = reference()
            .join("lora")
            .join(value["file"].as_str().unwrap());
        let adapter = Adapter::open(path)
            .unwrap()
            .with_strength(value["strength"].as_f64().unwrap());
        match value["text_encoder_strength"].as_f64() {
            Some(strength) => adapter.with_text_encoder_strength(strength),
            None => adapter,
        }
    };
    case["adapters"]
        .as_array()
        .unwrap()
        .iter()
        .map(open)
        .collect()
}

#[test]
fn every_form_changes_the_weights_as_its_program_does() {
    let folder = reference().join("lora");
    let cases = read_json(folder.join("cases.json"));
    let mut pipeline = base();
    let original = weights(&pipeline);
    let (mut checked, mut runs) = (0, 0);
    for case in cases.as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        // Each set of adapters takes the place of the one before.
        pipeline
            .set_adapters(&adapters(case))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let expected = read(&folder.join(case["weights"].as_str().unwrap()));
        assert_eq!(expected.len() as u64, case["changed"].as_u64().unwrap());
        let found = weights(&pipeline);
        assert_eq!(found.len(), original.len());
        for (key, values) in &found {
            let Some(expected) = expected.get(key) else {
                assert!(*values == original[key], "{name}: {key} changed");
                continue;
            };
            let largest = expected.iter().fold(0.0_f32, |a, b| a.max(b.abs()));
            let difference = values.iter().zip(expected).map(|(a, b)| (a - b).abs());
            let difference = difference.fold(0.0, f32::max);
            assert!(
                difference <= 2e-6 * largest,
                "{name}: {key} differs by {difference} of {largest}"
            );
        }
        checked += 1;
        if let Some(run) = case.get("run") {
            check_run(&mut pipeline, run, case, &folder);
            runs += 1;
        }
    }
    assert_eq!((checked, runs), (49, 4));
    pipeline.set_adapters(&[]).unwrap();
    assert!(
        weights(&pipeline) == original,
        "removed, they leave no trace"
    );
}

fn check_run(pipeline: &mut StableDiffusionPipeline<B>, run: &Value, case: &Value, folder: &Path) {
    let options = StableDiffusionOptions {
        num_inference_steps: run["num_inference_steps"].as_u64().unwrap() as usize,
        guidance_scale: run["guidance_scale"].as_f64().unwrap(),
        seeds: vec![run["seed"].as_u64().unwrap()],
        height: Some(run["height"].as_u64().unwrap() as usize),
        width: Some(run["width"].as_u64().unwrap() as usize),
        ..StableDiffusionOptions::from(run["prompt"].as_str().unwrap())
    };
    let config = pipeline.scheduler.config().clone();
    let scheduler = run["scheduler"].as_str();
    pipeline.scheduler = scheduler_from_config(&config, scheduler, &Overrides::new()).unwrap();
    let generated = pipeline.generate(&options).unwrap();
    let expected = Values::open(folder.join(case["latents"].as_str().unwrap())).data("latents");
    let atol = case["latents_atol"].as_f64().unwrap();
    assert_close(
        case["name"].as_str().unwrap(),
        generated.latents,
        &expected,
        atol,
        0.0,
    );
    pipeline.scheduler = scheduler_from_config(&config, None, &Overrides::new()).unwrap();
}

#[test]
fn adapters_that_do_not_fit_are_refused_and_change_nothing() {
    let mut pipeline = base();
    let original = weights(&pipeline);
    let mut check = |file: &str, expected: &str| {
        let path = reference().join("lora").join(file);
        let adapter = Adapter::open(&path).unwrap();
        let error = pipeline.set_adapters(&[adapter]).unwrap_err().to_string();
        let expected = expected.replace("PATH", &path.display().to_string());
        assert_eq!(error, expected);
        assert!(weights(&pipeline) == original);
    };
    check(
        "refused/wrong_shape.safetensors",
        "`PATH` is for another model: \
         `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight` \
         changes a weight of shape [320, 320], but that of \
         `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` is [16, 16]",
    );
    check(
        "refused/no_key_matches.safetensors",
        "`PATH` is for another model: none of its 6 tensors matches; they are \
         `lora_te2_text_model_encoder_layers_31_mlp_fc1.alpha`, \
         `lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_down.weight`, \
         `lora_te2_text_model_encoder_layers_31_mlp_fc1.lora_up.weight` and 3 more",
    );
    check(
        "partly/half_of_a_pair.safetensors",
        "`PATH`: the tensors \
         `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight`, \
         `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.alpha` are \
         incomplete, do not fit together or are of an unknown form",
    );
}

#[test]
fn files_of_other_kinds_are_no_adapters() {
    let path = reference().join("single_file/kinds/textual-inversion.safetensors");
    let error = Adapter::open(&path).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("`{}` is a textual inversion, not a LoRA", path.display())
    );
    let folder = reference().join("sd/base");
    let error = Adapter::open(&folder).unwrap_err().to_string();
    let expected = "has none of `adapter_model.safetensors`, `adapter_model.bin`, \
                    `pytorch_lora_weights.safetensors`, `pytorch_lora_weights.bin`";
    assert_eq!(error, format!("`{}` {expected}", folder.display()));
}
