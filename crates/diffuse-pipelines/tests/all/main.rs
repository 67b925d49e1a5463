//! The tests of pipelines, as one program: what burn instantiates is compiled once.

mod adapters;
mod autoencoders;
mod cases;
mod common;
mod controlnet;
mod convert;
mod family;
mod files;
mod full_size;
mod half;
mod hub;
mod image_to_image;
mod in_memory;
mod refused;
mod safety_checker;
mod saving;
