//! Tokenizer folders whose files ask for something that is not done here.

use std::fs;

use diffuse_clip::CLIPTokenizer;
use diffuse_testing::reference;

/// Lays one file over the tiny tokenizer.
#[track_caller]
fn check(file: &str, content: &str, message: &str) {
    let folder = tempfile::tempdir().unwrap();
    for name in ["vocab.json", "merges.txt"] {
        let from = reference().join("sd/base/tokenizer").join(name);
        fs::copy(from, folder.path().join(name)).unwrap();
    }
    let path = folder.path().join(file);
    fs::write(&path, content).unwrap();
    let error = CLIPTokenizer::from_pretrained(folder.path()).unwrap_err();
    let found = error.to_string();
    assert_eq!(found.replace(&path.display().to_string(), "FILE"), message);
}

#[test]
fn ids_that_leave_a_gap() {
    check(
        "added_tokens.json",
        r#"{"<a>": 641, "<b>": 700}"#,
        "`FILE` gives token `<b>` id 700, but the next free id is 642: versions 4 and 5 of \
         transformers disagree about it",
    );
    // `on` is in the vocabulary.
    check(
        "added_tokens.json",
        r#"{"on": 641}"#,
        "`FILE` gives token `on` id 641, but it has id 519 in the vocabulary",
    );
    check(
        "tokenizer_config.json",
        r#"{"added_tokens_decoder": {"641": {"content": "<a>"}, "642": {"content": "<a>"}}}"#,
        "`FILE` gives token `<a>` id 642, but it has id 641 already",
    );
}

#[test]
fn values_of_other_kinds() {
    let config = |content: &str, message: &str| check("tokenizer_config.json", content, message);
    config(
        r#"{"padding_side": "left"}"#,
        r#"`padding_side` in `FILE` is "left"; `right` is supported"#,
    );
    config(
        r#"{"truncation_side": 1}"#,
        "`truncation_side` in `FILE` is 1; `right` is supported",
    );
    config(
        r#"{"split_special_tokens": true}"#,
        "`split_special_tokens` in `FILE` is true; `false` is supported",
    );
    config(
        r#"{"fast_tokenizer_files": ["a.json"]}"#,
        r#"`fast_tokenizer_files` in `FILE` is ["a.json"]; `tokenizer.json` alone is supported"#,
    );
    for length in ["1", "0", "-1", "77.5", "\"77\"", "100000"] {
        config(
            &format!(r#"{{"model_max_length": {length}}}"#),
            &format!("`model_max_length` in `FILE` is {length}; 2 to 65536 are supported"),
        );
    }
    config(
        r#"{"pad_token": null}"#,
        "`pad_token` in `FILE` is null; a token is needed",
    );
    config(
        r#"{"eos_token": {"content": ""}}"#,
        r#"`eos_token` in `FILE` is {"content":""}; a token is needed"#,
    );
    config(
        r#"{"bos_token": {"content": "<s>", "lstrip": 1}}"#,
        "`bos_token.lstrip` in `FILE` is 1; true or false is needed",
    );
    config(
        r#"{"additional_special_tokens": "<a>"}"#,
        r#"`additional_special_tokens` in `FILE` is "<a>"; a list of tokens is needed"#,
    );
    config(
        r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#,
        r#"`added_tokens_decoder.x` in `FILE` is {"content":"a"}; a token under its id is needed"#,
    );
    config(
        r#"{"added_tokens_decoder": ["<a>"]}"#,
        r#"`added_tokens_decoder` in `FILE` is ["<a>"]; a dictionary of ids and tokens is needed"#,
    );
    check(
        "added_tokens.json",
        r#"{"<a>": "641"}"#,
        r#"`<a>` in `FILE` is "641"; an id is needed"#,
    );
    // Long values are cut.
    config(
        &format!(r#"{{"pad_token": [{}]}}"#, "1,".repeat(50) + "2"),
        &format!(
            "`pad_token` in `FILE` is [{}1...; a token is needed",
            "1,".repeat(29)
        ),
    );
    check(
        "special_tokens_map.json",
        "[]",
        "`FILE` is not valid: it is not a JSON object",
    );
}

#[test]
fn other_tokenizers() {
    let whole = |content: &str, message: &str| check("tokenizer.json", content, message);
    whole(
        r#"{"model": {"type": "WordPiece", "vocab": {}}}"#,
        r#"`model.type` in `FILE` is "WordPiece"; `BPE` is supported"#,
    );
    whole(
        "{}",
        "`FILE` is not valid: `model.vocab` is not a dictionary",
    );
    whole(
        r#"{"model": {"vocab": {"a": 0}}}"#,
        "`FILE` is not valid: `model.merges` is not a list",
    );
    whole(
        r#"{"model": {"vocab": {"a": -1}, "merges": []}}"#,
        "`model.vocab.a` in `FILE` is -1; an id is needed",
    );
    whole(
        r#"{"model": {"vocab": {"a": 0}, "merges": ["a"]}}"#,
        "`FILE` is not valid: `model.merges[0]` is not two tokens",
    );
    whole(
        r#"{"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}}"#,
        "`FILE` is not valid: its merges do not fit its tokens: Token `b` out of vocabulary",
    );
    whole(
        r#"{"normalizer": {"type": "NFC"}, "model": {"vocab": {"a": 0}, "merges": []}}"#,
        r#"`normalizer` in `FILE` is {"type":"NFC"}; one with `Lowercase` is supported"#,
    );
    whole(
        r#"{"padding": {"direction": "Left"}, "model": {"vocab": {"a": 0}, "merges": []}}"#,
        r#"`padding.direction` in `FILE` is "Left"; `right` is supported"#,
    );
    whole(
        r#"{"added_tokens": [{"content": "<a>"}], "model": {"vocab": {"a": 0}, "merges": []}}"#,
        r#"`added_tokens[0]` in `FILE` is {"content":"<a>"}; a token's `id` is needed"#,
    );
}
