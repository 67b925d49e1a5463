//! Python's dialect of JSON.
//!
//! `json.dumps` writes the three floats that JSON lacks as bare words, `NaN`, `Infinity` and
//! `-Infinity`, and saved configurations hold them (`"lambda_min_clipped": -Infinity`). Inside this
//! crate such a number is a string with that spelling. [`parse`] and [`write`] convert it, and
//! [`from_value`] reads it as a float.

use std::any::Any;

use serde::Serialize;
use serde::de::{DeserializeOwned, IntoDeserializer, value::F64Deserializer};
use serde_json::{Error, Value};

const WORDS: [(&str, f64); 3] = [
    ("NaN", f64::NAN),
    ("-Infinity", f64::NEG_INFINITY),
    ("Infinity", f64::INFINITY),
];

/// Reads JSON text with the three words as values.
pub(crate) fn parse(text: &str) -> Result<Value, Error> {
    serde_json::from_str(&quote_words(text))
}

/// Writes two-space indented JSON with sorted keys and a final newline, as Python's configurations
/// are.
pub(crate) fn write(value: &Value) -> String {
    let mut value = value.clone();
    value.sort_all_objects();
    let mut text = serde_json::to_string_pretty(&value).expect("a JSON value can be written");
    for (word, _) in WORDS {
        text = text.replace(&format!(": \"{word}\""), &format!(": {word}"));
    }
    text + "\n"
}

/// Reads a `T`. As in Python, a float may be a word, and null counts as `false`.
pub(crate) fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, Error> {
    T::deserialize(value).or_else(|error| match value {
        Value::Null => T::deserialize(&Value::Bool(false)).map_err(|_: Error| error),
        Value::String(text) => match WORDS.iter().find(|(word, _)| word == text) {
            Some((_, number)) => {
                let number: F64Deserializer<Error> = number.into_deserializer();
                T::deserialize(number)
            }
            None => Err(error),
        },
        _ => Err(error),
    })
}

/// Writes a `T`; a float that JSON lacks becomes a string.
pub(crate) fn to_value<T: Serialize + 'static>(value: &T) -> Value {
    let float = (value as &dyn Any).downcast_ref::<f64>();
    match float.filter(|number| !number.is_finite()) {
        Some(number) if number.is_nan() => "NaN".into(),
        Some(number) if *number > 0.0 => "Infinity".into(),
        Some(_) => "-Infinity".into(),
        None => serde_json::to_value(value).expect("an option can be written as JSON"),
    }
}

/// A value as a message shows it: a string without its quotation marks.
pub(crate) fn bare(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_string)
}

/// Puts quotation marks around the three words outside of strings.
fn quote_words(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 8);
    let mut rest = text;
    let mut in_string = false;
    while let Some(next) = rest.chars().next() {
        let word = WORDS
            .iter()
            .find(|(word, _)| !in_string && rest.starts_with(word));
        let taken = match (next, word) {
            (_, Some((word, _))) => {
                quoted.extend(["\"", word, "\""]);
                rest = &rest[word.len()..];
                continue;
            }
            // Copies an escape sequence whole, so that `\"` does not end the string.
            ('\\', _) => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            ('"', _) => {
                in_string = !in_string;
                1
            }
            (other, _) => other.len_utf8(),
        };
        quoted.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[track_caller]
    fn check(text: &str, expected: Value) {
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn bare_words_are_numbers() {
        check(
            r#"{"a": -Infinity, "b": [NaN,Infinity]}"#,
            json!({"a": "-Infinity", "b": ["NaN", "Infinity"]}),
        );
        let value = parse(r#"{"a": -Infinity}"#).unwrap();
        assert_eq!(from_value::<f64>(&value["a"]).unwrap(), f64::NEG_INFINITY);
        assert!(from_value::<f64>(&parse("NaN").unwrap()).unwrap().is_nan());
    }

    #[test]
    fn words_in_strings_stay() {
        check(
            r#"{"a \" Infinity \\": "x NaN é -Infinity"}"#,
            json!({"a \" Infinity \\": "x NaN é -Infinity"}),
        );
    }

    #[test]
    fn writes_what_it_reads() {
        let text = "{\n  \"a\": -Infinity,\n  \"b\": [],\n  \"c\": 1.0\n}\n";
        assert_eq!(write(&parse(text).unwrap()), text);
        assert_eq!(to_value(&f64::NEG_INFINITY), json!("-Infinity"));
        assert_eq!(to_value(&0.5), json!(0.5));
    }

    #[test]
    fn broken_text_is_an_error() {
        for (text, expected) in [
            ("", "EOF while parsing a value at line 1 column 0"),
            ("{", "EOF while parsing an object at line 1 column 1"),
            (
                "{\"a\": Infinityy}",
                "expected `,` or `}` at line 1 column 17",
            ),
            (
                "{\"a\": \"\\",
                "EOF while parsing a string at line 1 column 8",
            ),
            ("-Infinity-", "trailing characters at line 1 column 12"),
            ("\u{feff}{}", "expected value at line 1 column 1"),
        ] {
            assert_eq!(parse(text).unwrap_err().to_string(), expected, "{text:?}");
        }
    }

    #[test]
    fn null_is_false_but_not_a_number() {
        assert!(!from_value::<bool>(&Value::Null).unwrap());
        assert_eq!(
            from_value::<f64>(&Value::Null).unwrap_err().to_string(),
            "invalid type: null, expected f64"
        );
        assert_eq!(from_value::<Option<f64>>(&Value::Null).unwrap(), None);
    }
}
