//! What is fetched for a pipeline, from a hub on this machine. `diffuse-hub` has the tests of
//! transfers and the cache.
#![cfg(feature = "hub")]

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use burn_flex::Flex;
use diffuse_pipelines::hub::{FetchOptions, HubError, PipelineFiles, Snapshot, fetch, resolve};
use diffuse_pipelines::{
    DDPMOptions, DDPMPipeline, LoadOptions, PipelineKind, StableDiffusionOptions,
    StableDiffusionPipeline,
};
use diffuse_testing::hub::HubServer;
use diffuse_testing::{read_json, reference};
use serde_json::json;

const SD: &str = "someone/stable-diffusion";
const BIN: &str = "someone/stable-diffusion-bin";
const CAT: &str = "someone/ddpm-cat";
const UNET: &str = "unet/diffusion_pytorch_model.safetensors";

/// A hub with the tests' checkpoints and an empty cache.
struct World {
    hub: HubServer,
    cache: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let hub = HubServer::start();
        hub.publish(SD, reference().join("sd/base"));
        hub.publish(BIN, reference().join("sd/bin"));
        hub.publish(CAT, reference().join("ddpm/cat"));
        // As published repositories have them, and no pipeline here reads.
        for id in [SD, BIN] {
            for file in [
                "README.md",
                "v1-5-pruned.ckpt",
                "v1-5-pruned.safetensors",
                "unet/diffusion_flax_model.msgpack",
                "unet/model.onnx",
                "text_encoder/flax_model.msgpack",
            ] {
                hub.publish_file(id, file, "not needed");
            }
        }
        hub.publish_file(SD, "unet/diffusion_pytorch_model.non_ema.safetensors", "no");
        for file in [
            "unet/diffusion_pytorch_model.bin",
            "vae/diffusion_pytorch_model.bin",
        ] {
            hub.publish_file(SD, file, "a pickle beside a safetensors file");
        }
        Self {
            hub,
            cache: tempfile::tempdir().unwrap(),
        }
    }

    fn options(&self) -> FetchOptions {
        FetchOptions {
            endpoint: Some(self.hub.endpoint()),
            cache: Some(self.cache.path().into()),
            retries: 0,
            ..FetchOptions::default()
        }
    }

    fn fetch(&self, id: &str) -> Result<Snapshot, HubError> {
        fetch(id, &PipelineFiles::default(), &self.options(), |_| {
            ControlFlow::Continue(())
        })
    }

    /// Sorted names of the files whose contents were asked for since the last call.
    fn fetched(&self) -> Vec<String> {
        let requests = self.hub.requests().into_iter();
        let contents = requests.filter(|request| request.from.is_some());
        let mut files: Vec<String> = contents.map(|request| request.file).collect();
        files.sort();
        files.dedup();
        files
    }
}

#[test]
fn the_safety_checker_is_fetched_unless_it_is_not_wanted() {
    let world = World::new();
    let mut index = read_json(reference().join("sd/base/model_index.json"));
    index["safety_checker"] = json!(["stable_diffusion", "StableDiffusionSafetyChecker"]);
    index["feature_extractor"] = json!(["transformers", "CLIPImageProcessor"]);
    let publish = || {
        let files = reference().join("safety_checker");
        for file in [
            "feature_extractor/preprocessor_config.json",
            "safety_checker/config.json",
            "safety_checker/model.safetensors",
        ] {
            let contents = fs::read(files.join(file)).unwrap();
            world.hub.publish_file(SD, file, contents);
        }
        world
            .hub
            .publish_file(SD, "safety_checker/pytorch_model.bin", "a pickle");
    };
    world
        .hub
        .publish_file(SD, "model_index.json", index.to_string());
    // A repository may lack what its index names.
    world.fetch(SD).unwrap();
    publish();
    world.fetched();
    world.fetch(SD).unwrap();
    assert_eq!(world.fetched(), [""; 0]);

    let world = World {
        cache: tempfile::tempdir().unwrap(),
        ..world
    };
    let without = PipelineFiles {
        no_safety_checker: true,
        ..PipelineFiles::default()
    };
    let folder = resolve(SD, &without, &world.options()).unwrap();
    let fetched = world.fetched();
    assert_eq!(fetched.len(), 12, "{fetched:?}");
    assert!(!folder.join("safety_checker").exists());
    // Now it is wanted.
    let offline = FetchOptions {
        offline: true,
        ..world.options()
    };
    resolve(SD, &PipelineFiles::default(), &offline).unwrap();
    let folder = resolve(SD, &PipelineFiles::default(), &world.options()).unwrap();
    let expected = [
        "feature_extractor/preprocessor_config.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
    ];
    assert_eq!(world.fetched(), expected);
    let pipeline = StableDiffusionPipeline::<Flex>::from_pretrained(folder, &Default::default());
    assert!(pipeline.unwrap().safety_checker.is_some());
}

/// What a person reads.
fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

fn image(folder: &Path) -> image::RgbImage {
    let device = Default::default();
    let pipeline = StableDiffusionPipeline::<Flex>::from_pretrained(folder, &device).unwrap();
    let options = StableDiffusionOptions {
        num_inference_steps: 2,
        seeds: vec![3],
        ..StableDiffusionOptions::from("a lighthouse")
    };
    pipeline.generate(&options).unwrap().images.remove(0)
}

#[test]
fn fetches_what_the_pipeline_needs_and_nothing_else() {
    let world = World::new();
    let snapshot = world.fetch(SD).unwrap();
    let mut expected = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        UNET,
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ];
    expected.sort();
    assert_eq!(world.fetched(), expected);
    let mut files = snapshot.files.clone();
    files.sort();
    assert_eq!(files, expected);
    assert_eq!(snapshot.commit, world.hub.commit(SD));
    for file in &files {
        let published = fs::read(reference().join("sd/base").join(file)).unwrap();
        assert_eq!(
            fs::read(snapshot.folder.join(file)).unwrap(),
            published,
            "{file}"
        );
    }
}

#[test]
fn images_are_those_of_the_folder() {
    let world = World::new();
    let fetched = resolve(SD, &PipelineFiles::default(), &world.options()).unwrap();
    assert_eq!(image(&fetched), image(&reference().join("sd/base")));
    let fetched = resolve(BIN, &PipelineFiles::default(), &world.options()).unwrap();
    assert_eq!(image(&fetched), image(&reference().join("sd/bin")));

    let cat = |folder: &Path| {
        let device = Default::default();
        let pipeline = DDPMPipeline::<Flex>::from_pretrained(folder, &device).unwrap();
        let options = DDPMOptions {
            num_inference_steps: 2,
            seeds: vec![3],
            ..DDPMOptions::default()
        };
        pipeline.generate(&options).unwrap().images.remove(0)
    };
    let fetched = resolve(CAT, &PipelineFiles::default(), &world.options()).unwrap();
    assert_eq!(cat(&fetched), cat(&reference().join("ddpm/cat")));
}

#[test]
fn pickles_where_there_is_no_safetensors_file() {
    let world = World::new();
    world.fetch(BIN).unwrap();
    let mut fetched = world.fetched();
    fetched.retain(|file| file.ends_with(".bin"));
    let expected = [
        "text_encoder/pytorch_model.bin",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
    ];
    assert_eq!(fetched, expected);
}

#[test]
fn variant_is_added_to_what_is_there() {
    let world = World::new();
    world.fetch(SD).unwrap();
    world.fetched();
    let fp16 = PipelineFiles {
        variant: Some("fp16".into()),
        ..PipelineFiles::default()
    };
    let folder = resolve(SD, &fp16, &world.options()).unwrap();
    let expected = [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ];
    assert_eq!(world.fetched(), expected);
    let load = LoadOptions {
        variant: Some("fp16".into()),
        ..LoadOptions::default()
    };
    StableDiffusionPipeline::<Flex>::from_pretrained_with(folder, &load, &Default::default())
        .unwrap();
}

#[test]
fn nothing_but_the_index_is_fetched_for_another_pipeline() {
    let world = World::new();
    let xl = r#"{"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "A"]}"#;
    world.hub.publish_file("some/xl", "model_index.json", xl);
    world
        .hub
        .publish_file("some/broken", "model_index.json", "{");
    let lora = "pytorch_lora_weights.safetensors";
    world.hub.publish_file("some/lora", lora, "1");
    let check = |id: &str, pipeline: Option<PipelineKind>, expected: &str| {
        let wanted = PipelineFiles {
            pipeline,
            ..PipelineFiles::default()
        };
        let error = resolve(id, &wanted, &world.options()).unwrap_err();
        let commit = world.hub.commit(id);
        let folder = format!("models--{}/snapshots/{commit}", id.replace('/', "--"));
        let index = world.cache.path().join(folder).join("model_index.json");
        let expected = expected.replace("INDEX", &index.display().to_string());
        assert_eq!(message(&error), expected);
        world.fetched()
    };
    let fetched = check(
        SD,
        Some(PipelineKind::Unconditional),
        "`someone/stable-diffusion` cannot be used, and nothing more of it was fetched: `INDEX`: \
         its class is StableDiffusionPipeline, not DDPMPipeline: `unet` is a UNet2DConditionModel, \
         but this pipeline needs a UNet2DModel",
    );
    assert_eq!(fetched, ["model_index.json"]);
    let fetched = check(
        "some/xl",
        None,
        "`some/xl` cannot be used, and nothing more of it was fetched: `INDEX`: its class is \
         StableDiffusionXLPipeline, which cannot be run here",
    );
    assert_eq!(fetched, ["model_index.json"]);
    check(
        "some/broken",
        None,
        "`some/broken` cannot be used, and nothing more of it was fetched: `INDEX`: EOF while \
         parsing an object at line 1 column 1",
    );
    let fetched = check(
        "some/lora",
        None,
        "`some/lora` has no file `model_index.json` in revision `main`",
    );
    assert!(fetched.is_empty());
}

#[test]
fn variant_that_is_not_there_is_named_with_those_that_are() {
    let world = World::new();
    let ema = PipelineFiles {
        variant: Some("ema".into()),
        ..PipelineFiles::default()
    };
    let error = resolve(SD, &ema, &world.options()).unwrap_err();
    assert_eq!(
        message(&error),
        "`someone/stable-diffusion` has no file `text_encoder/model.ema.safetensors` in revision \
         `main`, nor `text_encoder/pytorch_model.ema.bin`; it has \
         `text_encoder/model.fp16.safetensors`, `text_encoder/model.safetensors`"
    );

    world.fetch(SD).unwrap();
    let fp16 = PipelineFiles {
        variant: Some("fp16".into()),
        ..PipelineFiles::default()
    };
    let offline = FetchOptions {
        offline: true,
        ..world.options()
    };
    let error = resolve(SD, &fp16, &offline).unwrap_err();
    assert_eq!(
        message(&error),
        format!(
            "`text_encoder/model.fp16.safetensors` of `{SD}` (revision `main`) is not in the cache \
             `{}`, nor `text_encoder/pytorch_model.fp16.bin`; it has \
             `text_encoder/model.safetensors`, and the program works offline: unset \
             `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE` to fetch it",
            world
                .cache
                .path()
                .join("models--someone--stable-diffusion")
                .display()
        )
    );
}
