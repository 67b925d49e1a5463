//! Tokenizer and text encoder against the reference's values.

use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_clip::{CLIPTextModel, CLIPTokenizer, Pretrained};
use diffuse_testing::{Values, assert_stage, read_json, reference};
use serde_json::Value;

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn real_vocabulary_gives_the_references_ids() {
    let tokenizer = CLIPTokenizer::from_pretrained(reference().join("tokenizer")).unwrap();
    let prompts = read_json(reference().join("tokenizer/prompts.json"));
    let cases = prompts["cases"].as_array().unwrap();
    assert!(cases.len() >= 100);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        assert_eq!(
            tokenizer.tokenize(text).unwrap(),
            ids(&case["ids"]),
            "{text:?}"
        );
    }
    assert_eq!((tokenizer.start_id(), tokenizer.end_id()), (49406, 49407));
    assert_eq!((tokenizer.pad_id(), tokenizer.vocab_size()), (49407, 49408));
}

#[test]
fn texts_are_cut_and_padded_as_in_the_reference() {
    let folder = reference().join("sd/base/tokenizer");
    let tokenizer = CLIPTokenizer::from_pretrained(folder).unwrap();
    let cases = read_json(reference().join("sd/stages/tokens.json"));
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(
            tokenizer.tokenize(text).unwrap(),
            ids(&case["ids"]),
            "{text:?}"
        );
        let encoding = tokenizer.encode(text).unwrap();
        assert_eq!(encoding.ids, ids(&case["padded_to_77"]), "{text:?}");
        assert_eq!(
            encoding.truncated.is_some(),
            ids(&case["ids"]).len() > 77,
            "{text:?}"
        );
    }
}

#[test]
fn what_was_cut_is_told() {
    let tokenizer = CLIPTokenizer::from_pretrained(reference().join("tokenizer")).unwrap();
    let text = "a cat, ".repeat(24) + "and a DOG on the mat with seven hats";
    let encoding = tokenizer.encode(&text).unwrap();
    assert_eq!(encoding.ids.len(), 77);
    let cut = encoding.truncated.unwrap();
    assert_eq!(cut, "on the mat with seven hats");
}

#[test]
fn long_and_odd_texts_are_encoded() {
    let tokenizer = CLIPTokenizer::from_pretrained(reference().join("tokenizer")).unwrap();
    for text in [
        "x".repeat(10_000),
        "\u{0}\u{7f}\u{200d}\u{feff}".repeat(50),
        "🌃".repeat(300),
    ] {
        assert_eq!(tokenizer.encode(&text).unwrap().ids.len(), 77);
    }
}

fn input_ids<B: Backend>(values: &Values, name: &str, device: &B::Device) -> Tensor<B, 2, Int> {
    let data: TensorData = values.data(name);
    Tensor::<B, 2>::from_data(data, device).int()
}

fn check_text_encoder<B: Backend>(folder: &str, stage: &str) {
    let device = B::Device::default();
    let encoder = CLIPTextModel::<B>::from_pretrained(reference().join(folder), &device).unwrap();
    let values = Values::open(reference().join("sd/stages").join(stage));
    let ids = input_ids::<B>(&values, "input_ids", &device);
    let output = encoder.forward(ids.clone());
    let expected = values.data("last_hidden_state");
    assert_stage("last_hidden_state", output.last_hidden_state, &expected);
    assert_stage("no skip", encoder.forward_skip(ids.clone(), 0), &expected);
    for skip in [1, 2] {
        let key = format!("clip_skip_{skip}");
        if values.names().contains(&key) {
            assert_stage(
                &key,
                encoder.forward_skip(ids.clone(), skip),
                &values.data(&key),
            );
        }
    }
    if values.names().contains(&"long.input_ids".to_string()) {
        let ids = input_ids::<B>(&values, "long.input_ids", &device);
        let expected = values.data("long.last_hidden_state");
        assert_stage("long", encoder.forward(ids).last_hidden_state, &expected);
    }
}

#[test]
fn text_encoder_has_the_references_hidden_states() {
    check_text_encoder::<Flex>("sd/base/text_encoder", "text_encoder.safetensors");
    check_text_encoder::<NdArray>("sd/base/text_encoder", "text_encoder.safetensors");
}

#[test]
fn text_encoder_with_gelu_and_without_the_outer_level_of_names() {
    let stage = "text_encoder_gelu.safetensors";
    if reference().join("sd/stages").join(stage).is_file() {
        check_text_encoder::<Flex>("sd/gelu/text_encoder", stage);
    } else {
        assert!(std::env::var_os("DIFFUSE_REFERENCE").is_some());
    }
}

#[test]
fn published_vocabulary_is_that_of_the_folders() {
    let shipped = CLIPTokenizer::stable_diffusion_v1();
    let folder = reference().join("tokenizer");
    let expected = CLIPTokenizer::from_pretrained(&folder).unwrap();
    for (token, id) in read_json(folder.join("vocab.json")).as_object().unwrap() {
        assert_eq!(
            shipped.token_to_id(token).map(u64::from),
            id.as_u64(),
            "{token}"
        );
    }
    check_same(&shipped, &expected);

    let copy = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt", "tokenizer_config.json"] {
        std::fs::copy(folder.join(name), copy.path().join(name)).unwrap();
    }
    // Stable Diffusion 2 fills up with `!`.
    let mut special = read_json(folder.join("special_tokens_map.json"));
    special["pad_token"] = "!".into();
    let path = copy.path().join("special_tokens_map.json");
    std::fs::write(path, special.to_string()).unwrap();
    let expected = CLIPTokenizer::from_pretrained(copy.path()).unwrap();
    let shipped = CLIPTokenizer::stable_diffusion_v2();
    assert_eq!(shipped.pad_id(), 0);
    check_same(&shipped, &expected);
}

fn check_same(shipped: &CLIPTokenizer, expected: &CLIPTokenizer) {
    assert_eq!(shipped.vocab_size(), expected.vocab_size());
    assert_eq!(shipped.added_tokens(), expected.added_tokens());
    let prompts = read_json(reference().join("tokenizer/prompts.json"));
    for case in prompts["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(
            shipped.encode(text).unwrap(),
            expected.encode(text).unwrap(),
            "{text:?}"
        );
    }
}
