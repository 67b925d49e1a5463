//! One message in place of a panic or, where memory runs out, of an abort.

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::process;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::output::complain;

/// What to do about too little memory.
const LESS_MEMORY: &str = "a smaller image, fewer images at once, `--vae-tiling on`, `--weights \
                           f16` or `--dtype f16` need less";

/// Ends the program with one message and exit code 1 at the first panic of any thread.
///
/// burn reports by panicking what a device cannot do: too little memory, a kernel that does not
/// compile. It does so in threads of its own, where it catches the panic and goes on with buffers
/// that were never written, so waiting for the main thread to fail is not enough.
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
            let _ = write!(io::stderr(), "\r\x1b[2K");
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
    // How CubeCL fails to keep a kernel; an image that cannot be written is no panic.
    let disk = ["storagefull", "quotaexceeded"];
    if memory.iter().any(|words| lower.contains(words)) {
        format!(
            "the device has not enough memory; {LESS_MEMORY}, `--backend flex` needs none \
             ({message})"
        )
    } else if disk.iter().any(|words| lower.contains(words)) {
        format!("no space is left where `diffuse devices` says that kernels are kept ({message})")
    } else {
        format!("{message} (RUST_BACKTRACE=1 shows where)")
    }
}

/// The system's allocator, except that memory it does not give ends the program with one message
/// and exit code 1.
///
/// Rust aborts instead, and takes no hook for it outside of nightly. (A system that gives more than
/// it has and kills programs later lets none of them say a word.)
pub struct SystemOrExit;

// SAFETY: every call goes to the system's allocator, with the caller's own promises, and so does
// every result.
unsafe impl GlobalAlloc for SystemOrExit {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: see above.
        or_exit(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: see above.
        or_exit(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: see above.
        or_exit(unsafe { System.realloc(pointer, layout, size) }, size)
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: see above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn or_exit(pointer: *mut u8, bytes: usize) -> *mut u8 {
    if pointer.is_null() {
        exit_without_memory(bytes);
    }
    pointer
}

/// Nothing in here allocates.
#[cold]
fn exit_without_memory(bytes: usize) -> ! {
    static ENDING: AtomicBool = AtomicBool::new(false);
    if ENDING.swap(true, Ordering::SeqCst) {
        // Another thread is about to end the program.
        loop {
            thread::sleep(Duration::MAX);
        }
    }
    complain(format_args!(
        "error: there is not enough memory, {bytes} more bytes were refused; {LESS_MEMORY}"
    ));
    process::exit(1);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_panics_are_kept_and_memory_gets_advice() {
        assert_eq!(message(&"a word"), "a word");
        assert_eq!(message(&String::from(" a word\n")), "a word");
        assert_eq!(message(&7), "the backend stopped without a word");
        for memory in ["wgpu error: Out of Memory", "BufferTooBig(9)"] {
            assert_eq!(
                advise(memory),
                format!(
                    "the device has not enough memory; a smaller image, fewer images at once, \
                     `--vae-tiling on`, `--weights f16` or `--dtype f16` need less, `--backend \
                     flex` needs none ({memory})"
                )
            );
        }
        assert_eq!(
            advise("Os { code: 28, kind: StorageFull }"),
            "no space is left where `diffuse devices` says that kernels are kept (Os { code: 28, \
             kind: StorageFull })"
        );
        assert_eq!(
            advise("no such kernel"),
            "no such kernel (RUST_BACKTRACE=1 shows where)"
        );
    }
}
