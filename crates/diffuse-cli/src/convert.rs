//! `diffuse convert`.

use anyhow::Result;
use diffuse_pipelines::convert::{ConvertOptions, convert};

use crate::args::Convert;
use crate::backend::{AnyBackend, float_type};
use crate::output::say;

pub fn run(args: &Convert) -> Result<()> {
    let options = ConvertOptions {
        variant: args.variant.clone(),
        dtype: args.dtype.map(|dtype| float_type(dtype).into()),
        strict: args.strict,
        ema: args.single_file.ema,
        config: args.single_file.config.clone(),
    };
    convert::<AnyBackend>(&args.source, &args.destination, &options, |file| {
        if !args.quiet {
            say(file);
        }
    })?;
    Ok(())
}
