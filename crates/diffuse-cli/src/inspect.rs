//! `diffuse inspect`.

use anyhow::Result;
use diffuse_pipelines::inspect::{Component, Inspection, Weights};

use crate::args::Inspect;
use crate::backend::AnyBackend;
use crate::model::Wanted;
use crate::output::say;

pub fn run(args: &Inspect) -> Result<()> {
    // Nothing is computed: any backend will do.
    let source = Wanted::of_inspect(args).find()?;
    let inspection = Inspection::read::<AnyBackend>(&source.folder)?;
    if let Some(class) = &inspection.class {
        say(format_args!("{class}"));
    }
    for component in &inspection.components {
        print_component(component);
    }
    let problems = inspection.all_problems();
    if problems.is_empty() {
        say(format_args!("everything is supported"));
    } else {
        say(format_args!("not supported:"));
    }
    for problem in problems {
        say(format_args!("  {problem}"));
    }
    Ok(())
}

fn print_component(component: &Component) {
    let mut line = format!("  {:<17} ", component.name);
    if let Some(class) = &component.class {
        line.push_str(&format!("{class:<29}"));
    }
    if let Some(parameters) = component.parameters {
        line.push_str(&format!("{:>13} parameters  ", with_commas(parameters)));
    }
    line.push_str(&component.facts.join(", "));
    say(format_args!("{}", line.trim_end()));
    for weights in &component.weights {
        print_weights(weights);
    }
}

fn print_weights(weights: &Weights) {
    let types: Vec<String> = weights
        .elements
        .iter()
        .map(|(dtype, elements)| format!("{} {dtype}", with_commas(*elements)))
        .collect();
    say(format_args!(
        "    {}: {} tensors, {}",
        weights.path.display(),
        weights.tensors,
        types.join(", ")
    ));
}

/// `859,520,964`
fn with_commas(number: usize) -> String {
    let digits = number.to_string();
    let first = digits.len() % 3;
    let (head, tail) = digits.split_at(first);
    let groups = tail
        .as_bytes()
        .chunks(3)
        .map(|group| String::from_utf8_lossy(group));
    let head = (!head.is_empty()).then(|| head.into());
    let groups: Vec<_> = head.into_iter().chain(groups).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::with_commas;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(with_commas(0), "0");
        assert_eq!(with_commas(999), "999");
        assert_eq!(with_commas(1000), "1,000");
        assert_eq!(with_commas(859_520_964), "859,520,964");
    }
}
