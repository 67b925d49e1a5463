//! Arguments of a command: positional ones, and options as `--name value`.

use anyhow::{Result, bail};

/// The arguments of a command.
pub struct Arguments {
    /// Positional arguments.
    pub positional: Vec<String>,
    named: Vec<(String, String)>,
}

impl Arguments {
    /// Parses arguments; `names` are the options, without dashes.
    pub fn parse(arguments: &[String], names: &[&str]) -> Result<Self> {
        let mut parsed = Self {
            positional: Vec::new(),
            named: Vec::new(),
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.strip_prefix("--") {
                None => parsed.positional.push(argument.clone()),
                Some(name) if names.contains(&name) => match rest.next() {
                    Some(value) => parsed.named.push((name.to_string(), value.clone())),
                    None => bail!("`{argument}` needs a value"),
                },
                Some(_) => bail!(
                    "unknown option `{argument}`; there are --{}",
                    names.join(", --")
                ),
            }
        }
        Ok(parsed)
    }

    /// The value of an option.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.named.iter().rev().find(|(given, _)| given == name);
        found.map(|(_, value)| value.as_str())
    }

    /// A number, or its default.
    pub fn number(&self, name: &str, default: usize) -> Result<usize> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => match value.parse() {
                Ok(number) if number > 0 => Ok(number),
                _ => bail!("`--{name} {value}` is not a positive number"),
            },
        }
    }
}
