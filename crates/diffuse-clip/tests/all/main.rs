//! The tests of CLIP, as one program: what burn instantiates is compiled once.

mod prompts;
mod refused_folders;
mod stages;
mod textual_inversion;
mod tokenizer_folders;
