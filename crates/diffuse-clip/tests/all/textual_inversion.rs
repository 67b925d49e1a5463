//! Textual inversions, against Diffusers' `load_textual_inversion`.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData, backend::Backend};
use burn_flex::Flex;
use burn_ndarray::NdArray;
use diffuse_clip::{CLIPTextModel, CLIPTokenizer, LoadOptions, Pretrained, TextualInversion};
use diffuse_testing::{Values, assert_close, assert_stage, read_json, reference};
use serde_json::json;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/inversions")
}

fn tokenizer() -> CLIPTokenizer {
    CLIPTokenizer::from_pretrained(reference().join("sd/base/tokenizer")).unwrap()
}

fn text_encoder<B: Backend>() -> CLIPTextModel<B> {
    let folder = reference().join("sd/base/text_encoder");
    CLIPTextModel::from_pretrained(folder, &B::Device::default()).unwrap()
}

fn check<B: Backend>() {
    let (mut tokenizer, mut text_encoder) = (tokenizer(), text_encoder::<B>());
    let expected = read_json(fixtures().join("expected.json"));
    let values = Values::open(fixtures().join("expected.safetensors"));
    let files = expected["files"].as_array().unwrap();
    assert_eq!(files.len(), 8);
    for file in files {
        let name = file["name"].as_str().unwrap();
        let path = fixtures().join(file["file"].as_str().unwrap());
        let inversion = TextualInversion::open(path).unwrap().with_name(name);
        inversion
            .load_into(&mut tokenizer, &mut text_encoder)
            .unwrap();
        assert_eq!(json!(tokenizer.vocab_size()), file["size"], "{name}");
    }
    let rows = text_encoder.token_embedding().narrow(0, 641, 16);
    assert_eq!(rows.into_data(), values.data("token_embedding"));
    assert_eq!(text_encoder.config().vocab_size, 657);

    let cases = expected["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 5);
    for (index, case) in cases.iter().enumerate() {
        let text = case["text"].as_str().unwrap();
        assert_eq!(
            tokenizer.expand(text).unwrap(),
            case["converted"].as_str().unwrap()
        );
        let ids = tokenizer.encode(text).unwrap().ids;
        assert_eq!(json!(ids), case["ids"], "{text:?}");
        let ids: Vec<i64> = ids.into_iter().map(i64::from).collect();
        let ids = TensorData::new(ids, [1, 77]);
        let ids = Tensor::<B, 2, Int>::from_data(ids, &B::Device::default());
        let hidden = text_encoder.forward_skip(ids, 0);
        assert_stage(text, hidden, &values.data(&format!("prompt_{index}")));
    }
}

#[test]
fn words_become_vectors() {
    check::<Flex>();
    check::<NdArray>();
}

#[test]
fn files_say_what_they_hold() {
    let check = |file: &str, name: &str, token: Option<&str>, vectors| {
        let inversion = TextualInversion::open(fixtures().join(file)).unwrap();
        assert_eq!((inversion.name(), inversion.token()), (name, token));
        let size = (inversion.num_vectors(), inversion.width());
        assert_eq!(size, (vectors, 24), "{file}");
    };
    check("vector.bin", "vector", Some("<cat-toy>"), 1);
    check("row.bin", "row", Some("<row>"), 1);
    check("two.bin", "two", Some("<another name>"), 2);
    check("raw.bin", "raw", None, 3);
    check("emb.safetensors", "emb", None, 2);
    check("half.safetensors", "half", None, 1);
    check("webui.pt", "webui", None, 4);
    check("parameters.pt", "parameters", None, 2);
}

#[test]
fn vectors_take_the_embeddings_type() {
    let device = Default::default();
    let options = LoadOptions {
        dtype: Some(FloatDType::F16),
        ..LoadOptions::default()
    };
    let folder = reference().join("sd/base/text_encoder");
    let mut text_encoder =
        CLIPTextModel::<Flex>::from_pretrained_with(folder, &options, &device).unwrap();
    let inversion = TextualInversion::open(fixtures().join("emb.safetensors")).unwrap();
    inversion
        .load_into(&mut tokenizer(), &mut text_encoder)
        .unwrap();
    let embedding = text_encoder.token_embedding();
    assert_eq!(
        (embedding.dtype(), embedding.dims()),
        (DType::F16, [643, 24])
    );
    let values = Values::open(fixtures().join("expected.safetensors"));
    let expected = values
        .tensor::<Flex, 2>("token_embedding", &device)
        .narrow(0, 7, 2);
    let rows = embedding.narrow(0, 641, 2);
    assert_close("rows", rows, &expected.into_data(), 1e-6, 5e-4);
}

#[test]
fn rows_are_replaced_before_they_are_added() {
    let mut text_encoder = text_encoder::<Flex>();
    let before = text_encoder.token_embedding();
    let rows = Tensor::<Flex, 2>::ones([3, 24], &Default::default());
    text_encoder.set_token_embeddings(600, rows.clone());
    assert_eq!(text_encoder.config().vocab_size, 641);
    text_encoder.set_token_embeddings(640, rows.clone());
    assert_eq!(text_encoder.config().vocab_size, 643);
    let expected = vec![
        before.clone().narrow(0, 0, 600),
        rows.clone(),
        before.narrow(0, 603, 37),
        rows,
    ];
    let expected = Tensor::cat(expected, 0).into_data();
    assert_eq!(text_encoder.token_embedding().into_data(), expected);
}

#[track_caller]
fn check_error(file: &str, name: &str, message: &str) {
    let (mut tokenizer, mut text_encoder) = (tokenizer(), text_encoder::<Flex>());
    tokenizer.add_token("taken", 2).unwrap();
    let rows = Tensor::<Flex, 2>::ones([2, 24], &Default::default());
    text_encoder.set_token_embeddings(641, rows);
    let path = fixtures().join(file);
    let result = TextualInversion::open(&path).and_then(|one| {
        one.with_name(name)
            .load_into(&mut tokenizer, &mut text_encoder)
    });
    let error = result.unwrap_err();
    let mut found = error.to_string();
    if let Some(source) = std::error::Error::source(&error) {
        found = format!("{found}: {source}");
    }
    assert_eq!(found.replace(&path.display().to_string(), "FILE"), message);
    assert_eq!(tokenizer.vocab_size(), 643, "nothing was added");
    assert_eq!(text_encoder.token_embedding().dims(), [643, 24]);
}

#[test]
fn what_does_not_fit_is_refused() {
    check_error(
        "xl.safetensors",
        "x",
        "`FILE` is not a textual inversion for this model: `clip_l` is for Stable Diffusion XL",
    );
    check_error(
        "several.bin",
        "x",
        "`FILE` is not a textual inversion for this model: it has 2 tensors, not one",
    );
    check_error(
        "deep.safetensors",
        "x",
        "`FILE` is not a textual inversion for this model: its tensor `emb_params` has shape \
         [1, 2, 24], not [vectors, width]",
    );
    check_error(
        "wide.bin",
        "x",
        "the vectors of `FILE` have 1024 numbers, but the text encoder's have 24: 1024 is for \
         Stable Diffusion 2",
    );
    check_error(
        "a.png",
        "x",
        "`FILE` is not a textual inversion for this model: vectors inside images are not supported",
    );
    let taken = |token: &str| {
        format!(
            "cannot add `FILE`: the tokenizer already has a token `{token}`: choose another name"
        )
    };
    check_error("two.bin", "taken", &taken("taken"));
    check_error("two.bin", "taken_1", &taken("taken_1"));
    // Its last vector would be an existing token, and a letter is in the vocabulary.
    check_error("vector.bin", "taken", &taken("taken"));
    check_error("vector.bin", "a", &taken("a"));
    check_error("vector.bin", " ", "cannot add `FILE`: a token needs a name");
}

#[test]
fn a_name_is_not_extended_by_another() {
    let mut tokenizer = tokenizer();
    tokenizer.add_token("x9_1", 1).unwrap();
    let error = tokenizer.add_token("x9", 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the tokenizer already has a token `x9_1`: choose another name"
    );
}

#[test]
fn longer_names_come_first() {
    let mut tokenizer = tokenizer();
    tokenizer.add_token("sks", 2).unwrap();
    tokenizer.add_token("sks style", 3).unwrap();
    tokenizer.add_token("Sks", 2).unwrap_or_default();
    let expanded = tokenizer.expand("sks, sks style sks").unwrap();
    assert_eq!(
        expanded,
        "sks sks_1, sks style sks style_1 sks style_2 sks sks_1"
    );
    assert_eq!(tokenizer.expand("a style").unwrap(), "a style");
}

#[test]
fn damaged_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixtures().join("parameters.pt")).unwrap();
    for length in (0..bytes.len()).step_by(97) {
        let path = folder.path().join("cut.pt");
        fs::write(&path, &bytes[..length]).unwrap();
        let reason = match length {
            0 => "it is neither a zip archive nor a file of PyTorch before 1.6",
            _ => "it is truncated or damaged (invalid Zip archive: Could not find EOCD)",
        };
        assert_eq!(
            TextualInversion::open(&path).unwrap_err().to_string(),
            format!("`{}` is not a valid PyTorch file: {reason}", path.display())
        );
    }
}
