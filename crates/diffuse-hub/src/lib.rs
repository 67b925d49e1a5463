#![doc = include_str!("../README.md")]
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod id;
mod wanted;

mod environment;
mod fetch;
mod options;

mod cache;
mod client;
mod transfer;

mod error;

pub use error::HubError;
pub use fetch::{FetchEvent, Snapshot, fetch, resolve};
pub use id::{as_hub_id, is_hub_id};
pub use options::FetchOptions;
pub use wanted::{Listing, Refusal, Selection, Wanted};
