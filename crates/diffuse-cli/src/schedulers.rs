//! `diffuse schedulers`.

use diffuse_pipelines::schedulers::scheduler_catalog;

use crate::output::say;

pub fn run() {
    for info in scheduler_catalog() {
        say(format_args!("{:<18}{}", info.name, info.about));
        let others = [&[info.class], info.popular.as_slice()].concat();
        say(format_args!("{:<18}{}", "", others.join(", ")));
    }
}
