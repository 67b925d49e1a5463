//! Weighted prompts, against a transcription of their rules over transformers' text encoder.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_clip::prompt_syntax::{LoraTag, ParsedPrompt, Span};
use diffuse_clip::{CLIPTextModel, CLIPTokenizer, Pretrained, PromptChunks, TextualInversion};
use diffuse_testing::{Values, assert_stage, read_json, reference};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

#[test]
fn weights_are_parsed() {
    let cases = read_json(fixtures().join("parsed.json"));
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 55);
    for case in cases {
        let prompt = case[0].as_str().unwrap();
        let parsed = ParsedPrompt::new(prompt).unwrap();
        let expected = case[1].as_array().unwrap();
        assert_eq!(parsed.spans.len(), expected.len(), "{prompt:?}");
        for (span, run) in parsed.spans.iter().zip(expected) {
            match (span, run[1].as_f64()) {
                (Span::Break, None) => {}
                (Span::Text { text, weight }, Some(expected)) => {
                    assert_eq!(text, run[0].as_str().unwrap(), "{prompt:?}");
                    let difference = (weight - expected).abs();
                    // JSON is read to the last place but one.
                    let allowed = 2.0 * f64::EPSILON * expected.abs();
                    assert!(
                        difference <= allowed,
                        "{prompt:?}: {weight}, not {expected}"
                    );
                }
                other => panic!("{prompt:?}: {other:?}"),
            }
        }
        assert_eq!(parsed.loras, [], "{prompt:?}");
    }
}

/// The example of the syntax's own documentation.
#[test]
fn nested_weights_are_multiplied() {
    let prompt = "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).";
    let expected = [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ];
    let expected = expected.map(|(text, weight)| Span::Text {
        text: text.to_string(),
        weight,
    });
    assert_eq!(ParsedPrompt::new(prompt).unwrap().spans, expected);
}

#[test]
fn loras_are_taken_out() {
    let check = |prompt: &str, rest: &str, loras: &[(&str, f64, f64)]| {
        let parsed = ParsedPrompt::new(prompt).unwrap();
        let text = match &parsed.spans[..] {
            [] => "",
            [Span::Text { text, weight: 1.0 }] => text,
            spans => panic!("{prompt:?}: {spans:?}"),
        };
        assert_eq!(text, rest, "{prompt:?}");
        let tag = |&(name, text_encoder, unet): &(&str, f64, f64)| LoraTag {
            name: name.to_string(),
            text_encoder,
            unet,
        };
        let expected: Vec<LoraTag> = loras.iter().map(tag).collect();
        assert_eq!(parsed.loras, expected, "{prompt:?}");
    };
    check("a <lora:x:0.8> b", "a  b", &[("x", 0.8, 0.8)]);
    check("<lora:x>", "", &[("x", 1.0, 1.0)]);
    check("<lora:x_v1.2 b:0.5:-1>", "", &[("x_v1.2 b", 0.5, -1.0)]);
    check("<lora:x:te=0.5>", "", &[("x", 0.5, 0.5)]);
    check("<lora:x:1:te=0.5:unet=.25>", "", &[("x", 0.5, 0.25)]);
    check(
        "<lyco:x:1><lora:y:2>,",
        ",",
        &[("x", 1.0, 1.0), ("y", 2.0, 2.0)],
    );
    check("a < b > c <cat-toy> <x", "a < b > c <cat-toy> <x", &[]);
    check(
        "<lora:> <:x> <<lora:y:0>",
        "<lora:> <:x> <",
        &[("y", 0.0, 0.0)],
    );
}

#[test]
fn what_is_not_computed_is_refused() {
    let check = |prompt: &str, message: &str| {
        let error = ParsedPrompt::new(prompt).unwrap_err();
        assert_eq!(error.to_string(), message, "{prompt:?}");
    };
    for schedule in [
        "[a:b:0.5]",
        "[a:10]",
        "[a::10]",
        "[:b: -1 ]",
        "[a (b:2):.5]",
        "[a\\]b:1]",
    ] {
        let message = format!(
            "`{schedule}` changes the prompt during the run, which is not supported; a bracket is \
             written `\\[`"
        );
        check(&format!("x ({schedule}:1.2) y"), &message);
    }
    for alternation in ["[a|b]", "[a|b|]", "[a:1|b:2]", "[|]"] {
        let message = format!(
            "`{alternation}` alternates between texts from step to step, which is not supported; a \
             bracket is written `\\[`"
        );
        check(&format!("x [{alternation}] y"), &message);
    }
    let and = "`AND` combines several prompts, which is not supported; the word is written `and`";
    check("a cat AND a dog", and);
    check("a cat,AND", and);
    let tag =
        "`<hypernet:x:1>` is not supported; of tags in angle brackets, `<lora:name:scale>` is";
    check("a <hypernet:x:1>", tag);
    let tag = "`<lora:x:1:dyn=4>` is not supported; of tags in angle brackets, \
               `<lora:name:scale>` is";
    check("<lora:x:1:dyn=4>", tag);
    check("(a:1.2.3)", "`1.2.3` in `:1.2.3)` is not a number");
    check("<lora:x:y>", "`y` in `<lora:x:y>` is not a number");

    // Like them, and none of them.
    for prompt in [
        "[a:b]",
        "[a|b",
        "a|b",
        "[(a|b)]",
        "[a:1)",
        "\\[a|b\\]",
        "(a:1)",
        "ANDES BAND and",
        "[(a:2)]",
        "[a:b:]",
    ] {
        ParsedPrompt::new(prompt).unwrap_or_else(|error| panic!("{prompt:?}: {error}"));
    }
}

#[test]
fn brackets_of_any_kind_do_no_harm() {
    let characters = [
        '(', ')', '[', ']', ':', '\\', '<', '>', '|', '1', '.', ' ', 'é', 'A',
    ];
    let mut state = 1u64;
    for _ in 0..20_000 {
        let mut prompt = String::new();
        for _ in 0..12 {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            prompt.push(characters[(state >> 33) as usize % characters.len()]);
        }
        let _ = ParsedPrompt::new(&prompt);
    }
    ParsedPrompt::new(&"(".repeat(10_000)).unwrap();
}

#[test]
fn long_prompts_are_cut_into_chunks() {
    let mut tokenizer = CLIPTokenizer::stable_diffusion_v1();
    let cases = read_json(fixtures().join("chunked.json"));
    let cases = cases.as_array().unwrap();
    for (name, vectors) in cases[0].as_object().unwrap() {
        let vectors = vectors.as_u64().unwrap() as usize;
        tokenizer.add_token(name, vectors).unwrap();
    }
    assert_eq!(cases.len(), 1 + 25);
    for case in &cases[1..] {
        let prompt = case[0].as_str().unwrap();
        let chunks = PromptChunks::new(&tokenizer, prompt).unwrap();
        let expected = case[1].as_array().unwrap();
        assert_eq!(chunks.chunks().len(), expected.len(), "{prompt:?}");
        for (chunk, expected) in chunks.chunks().iter().zip(expected) {
            let numbers = |part: &Value| -> Vec<f64> {
                let part = part.as_array().unwrap().iter();
                part.map(|number| number.as_f64().unwrap()).collect()
            };
            let mut ids = vec![49406];
            ids.extend(numbers(&expected[0]).iter().map(|id| *id as u32));
            ids.resize(77, 49407);
            assert_eq!(chunk.ids, ids, "{prompt:?}");
            let mut weights = vec![1.0];
            weights.extend(numbers(&expected[1]).iter().map(|weight| *weight as f32));
            weights.resize(77, 1.0);
            assert_eq!(chunk.weights, weights, "{prompt:?}");
        }
    }
}

#[test]
fn padding_is_that_of_the_tokenizer() {
    let tokenizer = CLIPTokenizer::stable_diffusion_v2();
    let mut chunks = PromptChunks::new(&tokenizer, "a cat").unwrap();
    let mut ids = vec![49406, 320, 2368, 49407];
    ids.resize(77, 0);
    assert_eq!(chunks.chunks()[0].ids, ids);
    chunks.pad(2);
    let mut ids = vec![49406, 49407];
    ids.resize(77, 0);
    assert_eq!((chunks.chunks().len(), &chunks.chunks()[1].ids), (2, &ids));
    chunks.pad(1);
    assert_eq!(chunks.chunks().len(), 2);
}

#[test]
fn too_many_vectors_are_an_error() {
    let mut tokenizer = CLIPTokenizer::stable_diffusion_v1();
    tokenizer.add_token("everything", 76).unwrap_or_default();
    tokenizer.add_token("zzeverything", 76).unwrap();
    let error = PromptChunks::new(&tokenizer, "a zzeverything").unwrap_err();
    assert_eq!(
        error.to_string(),
        "`zzeverything` has 76 vectors, but a chunk has 75 places"
    );
}

fn check<B: Backend>() {
    let base = reference().join("sd/base");
    let mut tokenizer = CLIPTokenizer::from_pretrained(base.join("tokenizer")).unwrap();
    let device = B::Device::default();
    let folder = base.join("text_encoder");
    let mut text_encoder = CLIPTextModel::<B>::from_pretrained(folder, &device).unwrap();
    TextualInversion::open(fixtures().join("inversions/parameters.pt"))
        .unwrap()
        .with_name("zz9")
        .load_into(&mut tokenizer, &mut text_encoder)
        .unwrap();
    let cases = read_json(fixtures().join("weighted.json"));
    let values = Values::open(fixtures().join("weighted.safetensors"));
    let cases = cases.as_array().unwrap();
    assert_eq!(cases.len(), 6);
    for (index, case) in cases.iter().enumerate() {
        let texts = case["texts"].as_array().unwrap().iter();
        let texts = texts.map(|text| text.as_str().unwrap());
        let prompts = texts.map(|text| PromptChunks::new(&tokenizer, text).unwrap());
        let mut prompts: Vec<PromptChunks> = prompts.collect();
        let chunks = prompts.iter().map(|prompt| prompt.chunks().len()).max();
        for prompt in &mut prompts {
            prompt.pad(chunks.unwrap());
        }
        let clip_skip = case["clip_skip"].as_u64().unwrap() as usize;
        let encoded = text_encoder.forward_weighted(&prompts, clip_skip);
        let expected = values.data(&format!("weighted_{index}"));
        assert_stage(&format!("{case}"), encoded, &expected);
    }
}

#[test]
fn weighted_prompts_are_encoded() {
    check::<Flex>();
    check::<NdArray>();
}

#[test]
fn words_without_weights_are_encoded_as_usual() {
    let base = reference().join("sd/base");
    let tokenizer = CLIPTokenizer::from_pretrained(base.join("tokenizer")).unwrap();
    let device = Default::default();
    let folder = base.join("text_encoder");
    let text_encoder = CLIPTextModel::<Flex>::from_pretrained(folder, &device).unwrap();
    let text = "a photo of a cat on the beach";
    let prompt = PromptChunks::new(&tokenizer, text).unwrap();
    let encoded = text_encoder.forward_weighted(&[prompt], 1);
    let ids = tokenizer.encode(text).unwrap().ids;
    let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
    let ids = Tensor::<Flex, 1, _>::from_ints(&ids[..], &device).unsqueeze();
    let expected = text_encoder.forward_skip(ids, 1).into_data();
    assert_eq!(encoded.into_data(), expected);
}
