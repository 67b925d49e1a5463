//! The program `diffuse`.
// They panic when nobody reads: `output::say` and `complain` do not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod args;
mod backend;
mod batch;
mod builtin;
mod control;
mod convert;
mod ddpm;
mod devices;
mod failure;
#[cfg(feature = "hub")]
mod fetch;
mod generate;
mod grid;
mod img2img;
mod inpaint;
mod inspect;
mod model;
mod output;
mod preview;
mod progress;
mod schedulers;
#[cfg(feature = "serve")]
mod serve;
mod stable_diffusion;
mod sweep;
mod terminal;
mod txt2img;

use std::process::ExitCode;

use args::{Cli, Command};

#[global_allocator]
static ALLOCATOR: failure::SystemOrExit = failure::SystemOrExit;

fn main() -> ExitCode {
    failure::exit_on_panic();
    output::show_warnings();
    let cli = match Cli::read(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // clap exits with 2 on wrong arguments; here every failure is 1.
            let failed = error.use_stderr();
            let _ = error.print();
            return ExitCode::from(u8::from(failed));
        }
    };
    let result = match cli.command {
        Command::Txt2img(args) => txt2img::run(*args),
        Command::Img2img(args) => img2img::run(*args),
        Command::Inpaint(args) => inpaint::run(*args),
        Command::Sweep(args) => sweep::run(args),
        Command::Batch(args) => batch::run(args),
        Command::Ddpm(args) => ddpm::run(args),
        Command::Inspect(args) => inspect::run(&args),
        #[cfg(feature = "hub")]
        Command::Fetch(args) => fetch::run(&args),
        Command::Convert(args) => convert::run(&args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(*args),
        #[cfg(feature = "fleet")]
        Command::Worker(args) => serve::work(*args),
        Command::Schedulers => {
            schedulers::run();
            Ok(())
        }
        Command::Devices => {
            devices::run();
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(format_args!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}
