//! The vocabulary that CLIP was published with (<https://github.com/openai/CLIP>, MIT licence,
//! copyright (c) 2021 OpenAI), which Stable Diffusion 1 and 2 use: see `VOCABULARY.md`.
//!
//! `merges.txt.gz` has the 48,894 merges. The 49,408 tokens follow from them: the 256 bytes, each
//! as a printable character; the same at the end of a word; the merged pairs; start and end.

use std::io::Read;

use flate2::read::GzDecoder;
use tokenizers::models::bpe::{Merges, Vocab};

use super::vocabulary::pair;
use super::{END, END_OF_WORD, START};

static MERGES: &[u8] = include_bytes!("merges.txt.gz");

/// Tokens with their ids, and merges.
pub(super) fn vocabulary() -> (Vocab, Merges) {
    let mut text = String::new();
    GzDecoder::new(MERGES)
        .read_to_string(&mut text)
        .expect("the vocabulary is part of the program");
    let merges: Merges = text
        .lines()
        .map(|line| pair(line).expect("a line is two tokens"))
        .collect();
    let letters: Vec<String> = alphabet().map(String::from).collect();
    let ends = letters
        .iter()
        .map(|letter| format!("{letter}{END_OF_WORD}"));
    let pairs = merges.iter().map(|(left, right)| format!("{left}{right}"));
    let marks = [START, END].map(String::from);
    let tokens = letters
        .iter()
        .cloned()
        .chain(ends)
        .chain(pairs)
        .chain(marks);
    (tokens.zip(0..).collect(), merges)
}

/// A printable character for each byte: first the bytes that are printable themselves, then the
/// others, as the characters from U+0100 on.
fn alphabet() -> impl Iterator<Item = char> {
    let printable = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ');
    printable.chain('\u{100}'..='\u{143}')
}
