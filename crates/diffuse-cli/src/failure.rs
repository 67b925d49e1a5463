//! One message in place of a panic.

use std::any::Any;
use std::io::{self, IsTerminal};
use std::panic;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::output::complain;

/// Ends the program with one message and exit code 1 at the first panic of any thread.
///
/// burn reports by panicking what a device cannot do: too little memory, a kernel that does not compile. It does so in
/// threads of its own, where it catches the panic and goes on with buffers that were never written, so waiting for the
/// main thread to fail is not enough.
pub fn exit_on_panic() {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if PANICKED.swap(true, Ordering::SeqCst) {
            // Another thread is about to end the program.
            loop {
                thread::park();
            }
        }
        if std::env::var_os("RUST_BACKTRACE").is_some_and(|value| value != "0") {
            default(info);
        }
        if io::stderr().is_terminal() {
            // Away with the progress bar.
            eprint!("\r\x1b[2K");
        }
        complain(format_args!("error: {}", advise(&message(info.payload()))));
        process::exit(1);
    }));
}

/// What a panic says.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("the backend stopped without a word")
        .trim()
        .to_string()
}

/// A panic's message, with what to do about it where that is known.
fn advise(message: &str) -> String {
    let lower = message.to_lowercase();
    let memory = ["out of memory", "outofmemory", "out_of_memory", "toobig"];
    if memory.iter().any(|words| lower.contains(words)) {
        format!(
            "the device has not enough memory; a smaller picture, fewer pictures at once or `--dtype f16` need less \
             ({message})"
        )
    } else {
        format!("{message} (RUST_BACKTRACE=1 shows where)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_panics_are_kept_and_memory_gets_advice() {
        assert_eq!(message(&"a word"), "a word");
        assert_eq!(message(&String::from(" a word\n")), "a word");
        assert_eq!(message(&7), "the backend stopped without a word");
        assert!(advise("wgpu error: Out of Memory").starts_with("the device has not enough"));
        assert!(advise("BufferTooBig(9)").starts_with("the device has not enough memory"));
        assert!(advise("no such kernel").starts_with("no such kernel ("));
    }
}
