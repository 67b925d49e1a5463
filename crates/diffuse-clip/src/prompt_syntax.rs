//! The prompt syntax of AUTOMATIC1111's web UI: weights, breaks and LoRA tags.
//!
//! | Written | Means |
//! |---|---|
//! | `(word)`, `((word))` | weight 1.1, 1.1² |
//! | `(word:1.3)` | weight 1.3 |
//! | `[word]` | weight 1/1.1 |
//! | `\(`, `\)`, `\[`, `\]`, `\\` | the character itself |
//! | `BREAK` | what follows starts a new chunk |
//! | `<lora:name:0.8>` | a LoRA and its scale |
//! | `<lora:name:0.8:0.5>` | its scales for the text encoder and the UNet |
//!
//! Weights of nested brackets are multiplied. A bracket that is not closed reaches to the end.
//! `[from:to:when]`, `[a|b]` and `AND` make the prompt change during the run, and are errors. The
//! one difference: `BREAK` inside brackets is a break here, and a word there.

use thiserror::Error;

/// Why a prompt could not be parsed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PromptSyntaxError {
    /// `[from:to:when]`
    #[error(
        "`{0}` changes the prompt during the run, which is not supported; a bracket is written \
         `\\[`"
    )]
    Schedule(String),
    /// `[a|b]`
    #[error(
        "`{0}` alternates between texts from step to step, which is not supported; a bracket is \
         written `\\[`"
    )]
    Alternation(String),
    /// `AND`
    #[error("`AND` combines several prompts, which is not supported; the word is written `and`")]
    Combination,
    /// `<hypernet:name:1>`
    #[error("`{0}` is not supported; of tags in angle brackets, `<lora:name:scale>` is")]
    Tag(String),
    /// `(word:1.2.3)`
    #[error("`{number}` in `{place}` is not a number")]
    Number {
        /// What should be one.
        number: String,
        /// Where it stands.
        place: String,
    },
}

/// A part of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub enum Span {
    /// Text of one weight.
    Text {
        /// Without its brackets.
        text: String,
        /// 1 where there are none.
        weight: f64,
    },
    /// What follows starts a new chunk.
    Break,
}

/// A LoRA that a prompt names.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTag {
    /// The file's name, without folder and extension.
    pub name: String,
    /// Scale for the text encoder.
    pub text_encoder: f64,
    /// Scale for the UNet.
    pub unet: f64,
}

/// A prompt without its brackets and tags.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ParsedPrompt {
    /// In order; neighbours differ in weight.
    pub spans: Vec<Span>,
    /// In order.
    pub loras: Vec<LoraTag>,
}

impl ParsedPrompt {
    /// Parses a prompt.
    ///
    /// # Errors
    /// If a number is malformed, or it uses a part of the syntax that is not supported.
    pub fn new(prompt: &str) -> Result<Self, PromptSyntaxError> {
        let (text, loras) = take_lora_tags(prompt)?;
        refuse_schedules(&text)?;
        let spans = weighted_spans(&text)?;
        Ok(Self { spans, loras })
    }
}

/// Whether a character is part of a word.
fn is_word(character: char) -> bool {
    character.is_alphanumeric() || character == '_'
}

/// Whether `text[start..end]` is a word of its own.
fn is_whole_word(text: &str, start: usize, end: usize) -> bool {
    !text[..start].ends_with(is_word) && !text[end..].starts_with(is_word)
}

/// Takes `<lora:name>`, `<lora:name:scale>` and `<lora:name:text_encoder:unet>` out of a prompt.
///
/// # Errors
/// If a number is malformed, or there is a tag of another kind.
pub fn take_lora_tags(prompt: &str) -> Result<(String, Vec<LoraTag>), PromptSyntaxError> {
    let (mut text, mut loras) = (String::new(), Vec::new());
    let mut rest = prompt;
    while let Some(start) = rest.find('<') {
        let (before, tag) = rest.split_at(start);
        text.push_str(before);
        let kind = tag[1..].split(|character| !is_word(character)).next();
        let kind = kind.unwrap_or_default();
        let arguments = tag[1 + kind.len()..].strip_prefix(':');
        let end = arguments.and_then(|arguments| arguments.find('>'));
        match (arguments, end) {
            (Some(arguments), Some(end @ 1..)) if !kind.is_empty() => {
                let length = 1 + kind.len() + 1 + end + 1;
                loras.push(lora(&tag[..length], kind, &arguments[..end])?);
                rest = &tag[length..];
            }
            _ => {
                text.push('<');
                rest = &tag[1..];
            }
        }
    }
    text.push_str(rest);
    Ok((text, loras))
}

/// `name`, `name:scale`, `name:text_encoder:unet`; the scales may also be `te=` and `unet=`.
fn lora(tag: &str, kind: &str, arguments: &str) -> Result<LoraTag, PromptSyntaxError> {
    let unsupported = || PromptSyntaxError::Tag(tag.to_string());
    if !matches!(kind, "lora" | "lyco") {
        return Err(unsupported());
    }
    let (mut positional, mut named) = (Vec::new(), [None, None]);
    for argument in arguments.split(':') {
        match argument.split_once('=') {
            None => positional.push(argument),
            Some(("te", scale)) => named[0] = Some(scale),
            Some(("unet", scale)) => named[1] = Some(scale),
            Some(_) => return Err(unsupported()),
        }
    }
    let (name, scales) = match positional[..] {
        [name] => (name, [None, None]),
        [name, scale] => (name, [Some(scale), None]),
        [name, text_encoder, unet] => (name, [Some(text_encoder), Some(unet)]),
        _ => return Err(unsupported()),
    };
    let number = |index: usize, default: f64| match named[index].or(scales[index]) {
        None => Ok(default),
        Some(text) => number(text, tag),
    };
    let text_encoder = number(0, 1.0)?;
    Ok(LoraTag {
        name: name.trim().to_string(),
        text_encoder,
        unet: number(1, text_encoder)?,
    })
}

fn number(text: &str, place: &str) -> Result<f64, PromptSyntaxError> {
    let number = text.trim().parse().ok();
    number
        .filter(|number: &f64| number.is_finite())
        .ok_or_else(|| PromptSyntaxError::Number {
            number: text.to_string(),
            place: place.to_string(),
        })
}

/// An open bracket.
struct Open {
    bracket: char,
    start: usize,
    has_bar: bool,
    /// After its last colon.
    last: Option<usize>,
}

/// `[from:to:when]`, `[to:when]`, `[a|b]` and `AND` are not weights.
fn refuse_schedules(text: &str) -> Result<(), PromptSyntaxError> {
    let mut open: Vec<Open> = Vec::new();
    let mut characters = text.char_indices();
    while let Some((index, character)) = characters.next() {
        match character {
            '\\' => drop(characters.next()),
            '(' | '[' => open.push(Open {
                bracket: character,
                start: index,
                has_bar: false,
                last: None,
            }),
            ')' => drop(open.pop_if(|open| open.bracket == '(')),
            ']' => {
                let Some(closed) = open.pop_if(|open| open.bracket == '[') else {
                    continue;
                };
                let whole = text[closed.start..=index].to_string();
                let when = closed.last.map(|start| &text[start..index]);
                if closed.has_bar {
                    return Err(PromptSyntaxError::Alternation(whole));
                }
                if when.is_some_and(|when| number(when, "").is_ok()) {
                    return Err(PromptSyntaxError::Schedule(whole));
                }
            }
            '|' | ':' => {
                if let Some(open) = open.last_mut() {
                    open.has_bar |= character == '|';
                    open.last = (character == ':').then_some(index + 1).or(open.last);
                }
            }
            _ => {}
        }
    }
    let mut combinations = text.match_indices("AND");
    if combinations.any(|(start, word)| is_whole_word(text, start, start + word.len())) {
        return Err(PromptSyntaxError::Combination);
    }
    Ok(())
}

/// What a pair of round brackets without a number multiplies by; square ones divide.
const STEP: f64 = 1.1;

fn weighted_spans(prompt: &str) -> Result<Vec<Span>, PromptSyntaxError> {
    const SPECIAL: [char; 6] = ['\\', '(', ')', '[', ']', ':'];
    let mut spans: Vec<Span> = Vec::new();
    // Numbers of spans before each open bracket.
    let (mut round, mut square): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
    let mut rest = prompt;
    while let Some(next) = rest.chars().next() {
        let mut length = next.len_utf8();
        match next {
            '\\' => {
                let escaped = rest[length..].starts_with(['\\', '(', ')', '[', ']']);
                if escaped {
                    push(&mut spans, &rest[1..2]);
                    length = 2;
                }
            }
            '(' => round.push(spans.len()),
            '[' => square.push(spans.len()),
            ':' => match weight(rest) {
                Some((number_of, end)) if !round.is_empty() => {
                    let start = round.pop().unwrap_or_default();
                    multiply(&mut spans[start..], number(number_of, &rest[..end])?);
                    length = end;
                }
                Some((_, end)) => {
                    push(&mut spans, &rest[..end]);
                    length = end;
                }
                None => push(&mut spans, ":"),
            },
            ')' | ']' => {
                let (open, factor) = match next {
                    ')' => (&mut round, STEP),
                    _ => (&mut square, 1.0 / STEP),
                };
                match open.pop() {
                    Some(start) => multiply(&mut spans[start..], factor),
                    None => push(&mut spans, &rest[..1]),
                }
            }
            _ => {
                length = rest.find(SPECIAL).unwrap_or(rest.len());
                push_breaking(&mut spans, &rest[..length]);
            }
        }
        rest = &rest[length..];
    }
    for start in round {
        multiply(&mut spans[start..], STEP);
    }
    for start in square {
        multiply(&mut spans[start..], 1.0 / STEP);
    }
    Ok(merge(spans))
}

/// The number of `:1.3)`, and the length of all of it.
fn weight(text: &str) -> Option<(&str, usize)> {
    let number = text[1..].trim_start();
    let digits = number.strip_prefix(['+', '-']).unwrap_or(number);
    let after = digits.trim_start_matches(|digit: char| digit.is_ascii_digit() || digit == '.');
    let after_space = after.trim_start();
    let is_weight = after.len() < digits.len() && after_space.starts_with(')');
    let number = &number[..number.len() - after.len()];
    is_weight.then(|| (number, text.len() - after_space.len() + 1))
}

fn push(spans: &mut Vec<Span>, text: &str) {
    if !text.is_empty() {
        spans.push(Span::Text {
            text: text.to_string(),
            weight: 1.0,
        });
    }
}

/// Text with the word `BREAK` in it, which takes the white space around it.
fn push_breaking(spans: &mut Vec<Span>, text: &str) {
    let mut start = 0;
    for (at, word) in text.match_indices("BREAK") {
        let end = at + word.len();
        if is_whole_word(text, at, end) {
            let before = text[start..at].trim_end();
            push(
                spans,
                if start > 0 {
                    before.trim_start()
                } else {
                    before
                },
            );
            spans.push(Span::Break);
            start = end;
        }
    }
    let last = &text[start..];
    push(spans, if start > 0 { last.trim_start() } else { last });
}

fn multiply(spans: &mut [Span], factor: f64) {
    for span in spans {
        if let Span::Text { weight, .. } = span {
            *weight *= factor;
        }
    }
}

/// Joins neighbours of equal weight.
fn merge(spans: Vec<Span>) -> Vec<Span> {
    let mut merged: Vec<Span> = Vec::new();
    for span in spans {
        match (merged.last_mut(), span) {
            (
                Some(Span::Text { text, weight }),
                Span::Text {
                    text: more,
                    weight: same,
                },
            ) if *weight == same => text.push_str(&more),
            (_, span) => merged.push(span),
        }
    }
    merged
}
