//! Where the bytes of a checkpoint are.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

/// Bytes in which tensors lie: a file, or memory.
#[expect(clippy::len_without_is_empty, reason = "nobody asks")]
pub trait TensorSource: Debug + Send + Sync {
    /// Number of bytes.
    fn len(&self) -> u64;

    /// Fills `buffer` with the bytes from `offset` on. Several threads may read at the same time.
    ///
    /// # Errors
    /// If there are fewer bytes, or they cannot be read.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A file that is read where and when a tensor is needed. If it shrinks meanwhile, reading fails.
#[derive(Debug)]
pub(crate) struct FileSource {
    #[cfg(any(unix, windows))]
    file: File,
    #[cfg(not(any(unix, windows)))]
    file: std::sync::Mutex<File>,
    len: u64,
}

impl FileSource {
    pub fn new(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        #[cfg(not(any(unix, windows)))]
        let file = file.into();
        Ok(Self { file, len })
    }
}

impl TensorSource for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    #[cfg(unix)]
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, buffer, offset)
    }

    #[cfg(windows)]
    fn read_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            let read = std::os::windows::fs::FileExt::seek_read(&self.file, buffer, offset)?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = &mut buffer[read..];
            offset += read as u64;
        }
        Ok(())
    }

    #[cfg(not(any(unix, windows)))]
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut file = self.file.lock().map_err(|_| io::ErrorKind::Other)?;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buffer)
    }
}

impl TensorSource for Vec<u8> {
    fn len(&self) -> u64 {
        self.as_slice().len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        copy_from(self, buffer, offset)
    }
}

impl TensorSource for &'static [u8] {
    fn len(&self) -> u64 {
        <[u8]>::len(self) as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        copy_from(self, buffer, offset)
    }
}

fn copy_from(bytes: &[u8], buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let start = usize::try_from(offset).ok();
    let bytes = start.and_then(|start| bytes.get(start..)?.get(..buffer.len()));
    buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
    Ok(())
}

/// Ranges of other sources, one after the other.
#[derive(Debug)]
pub(super) struct Concatenated {
    ranges: Vec<(Arc<dyn TensorSource>, Range<u64>)>,
}

impl Concatenated {
    pub fn new(ranges: Vec<(Arc<dyn TensorSource>, Range<u64>)>) -> Self {
        Self { ranges }
    }
}

impl TensorSource for Concatenated {
    fn len(&self) -> u64 {
        self.ranges
            .iter()
            .map(|(_, range)| range.end - range.start)
            .sum()
    }

    fn read_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        for (source, range) in &self.ranges {
            let length = range.end - range.start;
            if offset >= length {
                offset -= length;
                continue;
            }
            let count = buffer.len().min((length - offset) as usize);
            let (head, tail) = buffer.split_at_mut(count);
            source.read_at(head, range.start + offset)?;
            (buffer, offset) = (tail, 0);
        }
        if buffer.is_empty() {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }
}

/// A source read in order.
pub(super) struct SourceReader<'a> {
    source: &'a dyn TensorSource,
    position: u64,
}

impl<'a> SourceReader<'a> {
    pub fn new(source: &'a dyn TensorSource) -> Self {
        Self {
            source,
            position: 0,
        }
    }
}

impl Read for SourceReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.source.len().saturating_sub(self.position);
        let count = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        self.source.read_at(&mut buffer[..count], self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for SourceReader<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        let position = match position {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.source.len().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_and_memory_are_read_alike() {
        let bytes: Vec<u8> = (0..100).collect();
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, &bytes).unwrap();
        let file = FileSource::new(file).unwrap();
        let whole: Arc<dyn TensorSource> = Arc::new([bytes.clone(), bytes.clone()].concat());
        let ranges = [90..110, 10..10, 30..100].map(|range| (Arc::clone(&whole), range));
        let parts = Concatenated::new(ranges.into());
        let mut buffer = [0; 25];
        parts.read_at(&mut buffer, 5).unwrap();
        let expected: Vec<u8> = (95..100).chain(0..10).chain(30..40).collect();
        assert_eq!(buffer, expected[..]);
        let halves = [100..130, 130..200].map(|range| (Arc::clone(&whole), range));
        let joined = Concatenated::new(halves.into());
        let sources: [&dyn TensorSource; 3] = [&bytes, &file, &joined];
        for source in sources {
            assert_eq!(source.len(), 100);
            let mut buffer = [0; 10];
            source.read_at(&mut buffer, 90).unwrap();
            assert_eq!(buffer, [90, 91, 92, 93, 94, 95, 96, 97, 98, 99]);
            let error = source.read_at(&mut buffer, 91).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            // A file's error is the system's.
            assert!(source.read_at(&mut buffer, u64::MAX - 5).is_err());

            let mut reader = SourceReader::new(source);
            assert_eq!(reader.seek(SeekFrom::End(-3)).unwrap(), 97);
            let mut rest = Vec::new();
            reader.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, [97, 98, 99]);
            assert_eq!(reader.seek(SeekFrom::Start(0)).unwrap(), 0);
            let error = reader.seek(SeekFrom::Current(-1)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        }
    }
}
