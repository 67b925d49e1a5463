//! Files that the visitor chose.

use std::io;

use diffuse_pipelines::TensorSource;
use js_sys::Uint8Array;
use send_wrapper::SendWrapper;
use wasm_bindgen::{JsCast, JsValue};
use web_sys::{File, FileReaderSync};

/// A file of the browser, read where and when a tensor is needed. Only workers may read it.
#[derive(Debug)]
pub struct BrowserFile(SendWrapper<File>);

impl BrowserFile {
    pub fn new(file: File) -> Self {
        Self(SendWrapper::new(file))
    }
}

impl TensorSource for BrowserFile {
    fn len(&self) -> u64 {
        self.0.size() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        let Some(end) = end.filter(|end| *end <= self.len()) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let blob = self.0.slice_with_f64_and_f64(offset as f64, end as f64);
        let bytes = blob
            .and_then(|blob| FileReaderSync::new()?.read_as_array_buffer(&blob))
            .map_err(|error| io::Error::other(message(&error)))?;
        let bytes = Uint8Array::new(&bytes);
        if bytes.length() as usize != buffer.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.copy_to(buffer);
        Ok(())
    }
}

/// The text of an exception.
fn message(error: &JsValue) -> String {
    match error.dyn_ref::<js_sys::Error>() {
        Some(error) => String::from(error.message()),
        None => format!("{error:?}"),
    }
}
