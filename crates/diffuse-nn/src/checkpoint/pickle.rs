//! PyTorch's files: a pickle of tensors that point into stored bytes. Since PyTorch 1.6 a zip
//! archive of `*/data.pkl` and the files `*/data/KEY`; before, pickles one after the other, then
//! the bytes.
//!
//! The pickle is a program for a small stack machine. Nothing is imported or called: what is not
//! part of a dictionary of tensors becomes an object of no use. Every value lives in one flat list,
//! so that neither depth nor cycles in a hostile file can do harm.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read};
use std::ops::Range;
use std::rc::Rc;

use zip::{CompressionMethod, ZipArchive};

use super::source::SourceReader;
use super::{Listed, TensorInfo, TensorSource};

/// No dictionary of weights comes near these.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
const MAX_VALUES: usize = 1 << 20;
const MAX_TEXT_BYTES: usize = 1 << 12;
/// Dictionaries and lists in one another.
const MAX_DEPTH: usize = 4;
/// An expanded tensor has elements that are stored once.
const MAX_REPEATS: usize = 1 << 16;

/// What files before PyTorch 1.6 begin with: the pickle of a number.
const LEGACY_MAGIC: [u8; 15] = *b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.";

/// The tensors of a PyTorch file.
pub(super) fn list(file: &dyn TensorSource) -> Result<Listed, String> {
    let mut start = [0; LEGACY_MAGIC.len()];
    let short = file.read_at(&mut start, 0).is_err();
    let tensors = if !short && start.starts_with(b"PK") {
        list_archive(file)
    } else if start == LEGACY_MAGIC {
        list_legacy(file)
    } else {
        Err("it is neither a zip archive nor a file of PyTorch before 1.6".into())
    };
    Ok(Listed {
        tensors: tensors?,
        ..Listed::default()
    })
}

fn list_archive(file: &dyn TensorSource) -> Result<BTreeMap<String, TensorInfo>, String> {
    let mut archive = ZipArchive::new(BufReader::new(SourceReader::new(file)))
        .map_err(|error| format!("it is truncated or damaged ({error})"))?;
    let pickle_name = archive
        .file_names()
        .find(|name| *name == "data.pkl" || name.ends_with("/data.pkl"))
        .ok_or("it has no `data.pkl`")?
        .to_string();
    let root = pickle_name.trim_end_matches("data.pkl").to_string();

    let mut files: HashMap<String, Range<u64>> = HashMap::new();
    let mut pickle = Vec::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|error| error.to_string())?;
        let name = entry.name().to_string();
        if name == format!("{root}byteorder") {
            let mut order = String::new();
            let _ = (&mut entry).take(16).read_to_string(&mut order);
            if order == "big" {
                return Err("its numbers are big-endian".into());
            }
        } else if name == pickle_name {
            if entry.size() > MAX_PICKLE_BYTES {
                return Err(format!("its pickle has {} bytes", entry.size()));
            }
            (&mut entry)
                .take(MAX_PICKLE_BYTES)
                .read_to_end(&mut pickle)
                .map_err(|error| error.to_string())?;
        } else if let Some(key) = name.strip_prefix(&format!("{root}data/")) {
            if entry.compression() != CompressionMethod::Stored {
                return Err(format!("`{name}` is compressed"));
            }
            let start = entry.data_start().ok_or("an entry has no data")?;
            let end = start.checked_add(entry.size());
            match end {
                Some(end) if end <= file.len() => files.insert(key.to_string(), start..end),
                _ => return Err(format!("`{name}` reaches beyond the end of the file")),
            };
        }
    }

    let mut machine = Machine::new(&pickle);
    let result = machine.run()?;
    machine.tensors(result, &files)
}

/// The magic number, a protocol version, facts about the writer, the dictionary, the storages'
/// keys: a pickle each. Then each storage: its number of elements, and its elements.
fn list_legacy(file: &dyn TensorSource) -> Result<BTreeMap<String, TensorInfo>, String> {
    let length = file.len().min(MAX_PICKLE_BYTES);
    let mut head = vec![0; length as usize];
    file.read_at(&mut head, 0)
        .map_err(|error| error.to_string())?;
    let mut machine = Machine::new(&head[LEGACY_MAGIC.len()..]);
    let _version = machine.run()?;
    let _writer = machine.run()?;
    let result = machine.run()?;
    let keys = machine.run()?;
    let mut position = length - machine.code.len() as u64;

    let sizes: HashMap<Rc<str>, usize> = machine
        .values
        .iter()
        .filter_map(|value| match value {
            Value::Storage(storage) => Some((storage.file.clone(), storage.element_bytes)),
            _ => None,
        })
        .collect();
    let Value::List(keys) = &machine.values[keys] else {
        return Err("it has no list of its storages".into());
    };
    let mut files = HashMap::new();
    for key in keys {
        let key = machine.text(*key)?;
        let element_bytes = *sizes.get(&key).unwrap_or(&1) as u64;
        let mut count = [0; 8];
        file.read_at(&mut count, position)
            .map_err(|_| "it is truncated")?;
        let start = position + 8;
        let end = u64::from_le_bytes(count)
            .checked_mul(element_bytes)
            .and_then(|bytes| start.checked_add(bytes))
            .filter(|end| *end <= file.len())
            .ok_or("it is truncated")?;
        files.insert(key.to_string(), start..end);
        position = end;
    }
    machine.tensors(result, &files)
}

/// Index of a value in the machine's list.
type Id = usize;

#[derive(Debug, Clone)]
enum Value {
    /// Of no use: `None`, booleans, floating point numbers, bytes.
    Other,
    Int(i64),
    Text(Rc<str>),
    Global(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// What an unknown class or function of this name would make, with its items or attributes.
    Object(Rc<str>, Vec<(Id, Id)>),
    Storage(Storage),
    Tensor(PickledTensor),
}

#[derive(Debug, Clone)]
struct Storage {
    dtype: &'static str,
    element_bytes: usize,
    file: Rc<str>,
}

#[derive(Debug, Clone)]
struct PickledTensor {
    storage: Storage,
    offset: usize,
    shape: Vec<usize>,
    stride: Vec<usize>,
}

impl PickledTensor {
    fn locate(&self, files: &HashMap<String, Range<u64>>) -> Result<TensorInfo, String> {
        let too_large = "its shape is too large";
        let mut count = 1usize;
        let mut row_major = true;
        let mut last = 0usize;
        for (size, stride) in self.shape.iter().zip(&self.stride).rev() {
            row_major &= *size == 1 || *stride == count;
            count = count.checked_mul(*size).ok_or(too_large)?;
            let extent = size.saturating_sub(1).checked_mul(*stride);
            let end = extent.and_then(|extent| last.checked_add(extent));
            last = end.ok_or(too_large)?;
        }
        let span = if count == 0 { 0 } else { last + 1 };
        if count > span.saturating_mul(MAX_REPEATS) {
            return Err("its elements are the same ones again and again".into());
        }
        let file = files
            .get(&*self.storage.file)
            .ok_or_else(|| format!("there is no `data/{}`", self.storage.file))?;
        let start = self.offset.checked_mul(self.storage.element_bytes);
        let bytes = span.checked_mul(self.storage.element_bytes);
        let range = start
            .zip(bytes)
            .and_then(|(start, bytes)| Some((start as u64, start.checked_add(bytes)? as u64)))
            .filter(|(_, end)| *end <= file.end - file.start)
            .ok_or_else(|| format!("it reaches beyond the end of `data/{}`", self.storage.file))?;
        Ok(TensorInfo {
            dtype: self.storage.dtype.to_string(),
            shape: self.shape.clone(),
            stored_key: String::new(),
            source: 0,
            offset: file.start + range.0,
            strides: (!row_major).then(|| self.stride.clone()),
            patches: Vec::new(),
        })
    }
}

/// torch's storage classes: name, safetensors type, bytes an element.
const STORAGES: [(&str, &str, usize); 11] = [
    ("DoubleStorage", "F64", 8),
    ("FloatStorage", "F32", 4),
    ("HalfStorage", "F16", 2),
    ("BFloat16Storage", "BF16", 2),
    ("LongStorage", "I64", 8),
    ("IntStorage", "I32", 4),
    ("ShortStorage", "I16", 2),
    ("ByteStorage", "U8", 1),
    ("CharStorage", "I8", 1),
    ("UntypedStorage", "U8", 1),
    ("BoolStorage", "BOOL", 1),
];

struct Machine<'a> {
    code: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn new(code: &'a [u8]) -> Self {
        Self {
            code,
            values: Vec::new(),
            stack: Vec::new(),
            marks: Vec::new(),
            memo: HashMap::new(),
        }
    }

    /// Carries out the next program up to its end and gives the value that is left.
    fn run(&mut self) -> Result<Id, String> {
        self.memo.clear();
        loop {
            let [instruction] = self.take()?;
            match instruction {
                0x80 => self.take::<1>().map(drop)?, // PROTO
                0x95 => self.take::<8>().map(drop)?, // FRAME
                b'.' => return self.pop(),           // STOP
                b'(' => self.marks.push(self.stack.len()),
                // NONE, NEWTRUE, NEWFALSE
                b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
                b'G' => {
                    self.take::<8>()?;
                    self.push(Value::Other)?;
                }
                b'C' | b'U' => {
                    let [length] = self.take()?;
                    self.take_slice(length.into())?;
                    self.push(Value::Other)?;
                }
                b'B' | b'T' => {
                    let length = u32::from_le_bytes(self.take()?);
                    self.take_slice(length as usize)?;
                    self.push(Value::Other)?;
                }
                b'K' => {
                    let [byte] = self.take()?;
                    self.push(Value::Int(byte.into()))?;
                }
                b'M' => {
                    let value = u16::from_le_bytes(self.take()?);
                    self.push(Value::Int(value.into()))?;
                }
                b'J' => {
                    let value = i32::from_le_bytes(self.take()?);
                    self.push(Value::Int(value.into()))?;
                }
                0x8a => {
                    // LONG1: a length, then two's complement, little-endian.
                    let [length] = self.take()?;
                    let bytes = self.take_slice(length.into())?;
                    if bytes.len() > 8 {
                        return Err("it has an integer of more than 64 bits".into());
                    }
                    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
                    let mut wide = [if negative { 0xff } else { 0 }; 8];
                    wide[..bytes.len()].copy_from_slice(bytes);
                    self.push(Value::Int(i64::from_le_bytes(wide)))?;
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.take()?);
                    self.push_text(length as usize)?;
                }
                0x8c => {
                    let [length] = self.take()?;
                    self.push_text(length.into())?;
                }
                b'c' => {
                    let module = self.take_line()?;
                    let name = self.take_line()?;
                    self.push_global(&module, &name)?;
                }
                0x93 => {
                    let name = self.pop_text()?;
                    let module = self.pop_text()?;
                    self.push_global(&module, &name)?;
                }
                b'q' => {
                    let [index] = self.take()?;
                    self.remember(index.into())?;
                }
                b'r' => {
                    let index = u32::from_le_bytes(self.take()?);
                    self.remember(index)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?, // MEMOIZE
                b'h' => {
                    let [index] = self.take()?;
                    self.recall(index.into())?;
                }
                b'j' => {
                    let index = u32::from_le_bytes(self.take()?);
                    self.recall(index)?;
                }
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b']' => self.push(Value::List(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b't' => {
                    let items = self.pop_to_mark()?;
                    self.push(Value::Tuple(items))?;
                }
                0x85..=0x87 => {
                    let count = usize::from(instruction - 0x84);
                    let items = self.pop_many(count)?;
                    self.push(Value::Tuple(items))?;
                }
                b'a' => {
                    let items = self.pop_many(1)?;
                    self.extend_list(items)?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.extend_list(items)?;
                }
                b's' => {
                    let items = self.pop_many(2)?;
                    self.extend_dict(items)?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.extend_dict(items)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.reduce()?,
                0x81 => self.reduce()?, // NEWOBJ
                b'b' => self.build()?,
                other => {
                    return Err(format!(
                        "its pickle uses instruction 0x{other:02x}, which no dictionary of tensors needs"
                    ));
                }
            }
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let (head, tail) = self
            .code
            .split_first_chunk::<N>()
            .ok_or("its pickle is truncated")?;
        self.code = tail;
        Ok(*head)
    }

    fn take_slice(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (head, tail) = self
            .code
            .split_at_checked(length)
            .ok_or("its pickle is truncated")?;
        self.code = tail;
        Ok(head)
    }

    fn take_line(&mut self) -> Result<String, String> {
        let end = self
            .code
            .iter()
            .position(|byte| *byte == b'\n')
            .ok_or("its pickle is truncated")?;
        let line = self.take_slice(end)?;
        self.take::<1>()?;
        String::from_utf8(line.to_vec())
            .map_err(|_| "its pickle has a name that is not text".into())
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.values.len() == MAX_VALUES {
            return Err(format!("its pickle has more than {MAX_VALUES} values"));
        }
        self.stack.push(self.values.len());
        self.values.push(value);
        Ok(())
    }

    fn push_text(&mut self, length: usize) -> Result<(), String> {
        let bytes = self.take_slice(length)?;
        if length > MAX_TEXT_BYTES {
            return Err(format!("its pickle has a string of {length} bytes"));
        }
        let text =
            str::from_utf8(bytes).map_err(|_| "its pickle has a string that is not UTF-8")?;
        self.push(Value::Text(text.into()))
    }

    fn push_global(&mut self, module: &str, name: &str) -> Result<(), String> {
        self.push(Value::Global(format!("{module}.{name}")))
    }

    /// The lowest value that instructions may take: what lies below the last mark is not theirs.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Id, String> {
        if self.stack.len() <= self.floor() {
            return Err("its pickle takes more values than there are".into());
        }
        Ok(self.stack.pop().expect("the stack is not empty"))
    }

    fn pop_many(&mut self, count: usize) -> Result<Vec<Id>, String> {
        if self.stack.len() < self.floor() + count {
            return Err("its pickle takes more values than there are".into());
        }
        Ok(self.stack.split_off(self.stack.len() - count))
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, String> {
        let mark = self.marks.pop().ok_or("its pickle lacks a mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn pop_text(&mut self) -> Result<Rc<str>, String> {
        let id = self.pop()?;
        self.text(id)
    }

    fn top(&self) -> Result<Id, String> {
        let top = self
            .stack
            .last()
            .filter(|_| self.stack.len() > self.floor());
        top.copied()
            .ok_or("its pickle takes more values than there are".into())
    }

    fn remember(&mut self, index: u32) -> Result<(), String> {
        let top = self.top()?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        let id = *self
            .memo
            .get(&index)
            .ok_or("its pickle refers to a value that it has not stored")?;
        self.stack.push(id);
        Ok(())
    }

    fn extend_list(&mut self, items: Vec<Id>) -> Result<(), String> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::List(list) => list.extend(items),
            Value::Object(..) => {}
            _ => return Err("its pickle appends to something that is not a list".into()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: Vec<Id>) -> Result<(), String> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(dict) | Value::Object(_, dict) if items.len().is_multiple_of(2) => {
                dict.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
            }
            _ => {
                return Err(
                    "its pickle stores an item in something that is not a dictionary".into(),
                );
            }
        }
        Ok(())
    }

    /// Attributes of an object. Those of dictionaries, such as `_metadata`, say nothing about the
    /// tensors.
    fn build(&mut self) -> Result<(), String> {
        let state = self.pop()?;
        let top = self.top()?;
        let items = match &self.values[state] {
            Value::Dict(items) => items.clone(),
            _ => Vec::new(),
        };
        if let Value::Object(_, attributes) = &mut self.values[top] {
            attributes.extend(items);
        }
        Ok(())
    }

    /// `('storage', torch.FloatStorage, '0', 'cpu', 64)` becomes a storage.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let Value::Tuple(items) = &self.values[id] else {
            return Err("its pickle has a persistent id that is not a storage".into());
        };
        let [_, class, file, ..] = items[..] else {
            return Err("its pickle has an incomplete storage".into());
        };
        let Value::Global(class) = &self.values[class] else {
            return Err("its pickle has a storage without a class".into());
        };
        let (_, dtype, element_bytes) = STORAGES
            .into_iter()
            .find(|(name, ..)| class.strip_prefix("torch.") == Some(name))
            .ok_or_else(|| format!("`{class}` is not a storage"))?;
        let storage = Storage {
            dtype,
            element_bytes,
            file: self.text(file)?,
        };
        self.push(Value::Storage(storage))
    }

    /// The calls that a dictionary of tensors consists of; any other makes an object.
    fn reduce(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return Err("its pickle calls something without a tuple of arguments".into());
        };
        let function = match &self.values[function] {
            Value::Global(function) => function.as_str(),
            _ => "an object",
        };
        let value = match (function, &arguments[..]) {
            ("collections.OrderedDict", []) => Value::Dict(Vec::new()),
            ("torch._utils._rebuild_tensor_v2", [storage, offset, shape, stride, ..]) => {
                let Value::Storage(storage) = &self.values[*storage] else {
                    return Err("its pickle has a tensor without a storage".into());
                };
                let (shape, stride) = (self.sizes(*shape)?, self.sizes(*stride)?);
                if shape.len() != stride.len() {
                    return Err("its pickle has a tensor whose shape and strides differ".into());
                }
                Value::Tensor(PickledTensor {
                    storage: storage.clone(),
                    offset: self.size(*offset)?,
                    shape,
                    stride,
                })
            }
            // A parameter is its tensor.
            (
                "torch._utils._rebuild_parameter"
                | "torch._utils._rebuild_parameter_with_state"
                | "torch._tensor._rebuild_from_type_v2",
                [tensor, ..],
            ) if matches!(self.values[*tensor], Value::Tensor(_)) => {
                let tensor = *tensor;
                self.stack.push(tensor);
                return Ok(());
            }
            _ => Value::Object(function.into(), Vec::new()),
        };
        self.push(value)
    }

    fn text(&self, id: Id) -> Result<Rc<str>, String> {
        match &self.values[id] {
            Value::Text(text) => Ok(text.clone()),
            _ => Err("its pickle has something else where a string belongs".into()),
        }
    }

    fn size(&self, id: Id) -> Result<usize, String> {
        match self.values[id] {
            Value::Int(value) => usize::try_from(value).ok(),
            _ => None,
        }
        .ok_or("its pickle has something else where a size belongs".into())
    }

    fn sizes(&self, id: Id) -> Result<Vec<usize>, String> {
        match &self.values[id] {
            Value::Tuple(items) | Value::List(items) if items.len() <= 8 => {
                items.iter().map(|item| self.size(*item)).collect()
            }
            _ => Err("its pickle has something else where a shape belongs".into()),
        }
    }

    fn items(&self, id: Id) -> Option<&[(Id, Id)]> {
        match &self.values[id] {
            Value::Dict(items) | Value::Object(_, items) => Some(items),
            _ => None,
        }
    }

    /// The tensors of a dictionary, which may be wrapped as `{"state_dict": ...}` or, in files of
    /// textual inversions, as `{"string_to_param": ...}`; or a tensor alone, whose key is empty.
    /// Those of dictionaries and lists inside it have keys with dots; what is no tensor is left
    /// out.
    fn tensors(
        &self,
        root: Id,
        files: &HashMap<String, Range<u64>>,
    ) -> Result<BTreeMap<String, TensorInfo>, String> {
        if let Value::Tensor(tensor) = &self.values[root] {
            return Ok(BTreeMap::from([(String::new(), tensor.locate(files)?)]));
        }
        let mut id = root;
        for _ in 0..MAX_DEPTH {
            let wrappers: &[&str] = match &self.values[id] {
                // A module's, as in a `ParameterDict`.
                Value::Object(..) => &["state_dict", "_parameters"],
                _ => &["state_dict", "string_to_param"],
            };
            let items = self.items(id).unwrap_or_default();
            let wrapped = items.iter().find(|(key, value)| {
                let is_wrapper = matches!(
                    &self.values[*key],
                    Value::Text(key) if wrappers.contains(&&**key)
                );
                is_wrapper && self.items(*value).is_some()
            });
            match wrapped {
                Some((_, inner)) => id = *inner,
                None => break,
            }
        }
        let mut found = BTreeMap::new();
        let mut visited = 0;
        self.collect(id, "", 0, &mut visited, &mut |key, tensor| {
            let mut info = tensor
                .locate(files)
                .map_err(|message| format!("`{key}`: {message}"))?;
            info.stored_key.clone_from(&key);
            found.insert(key, info);
            Ok(())
        })?;
        if found.is_empty() {
            let unknown = self.values.iter().find_map(|value| match value {
                Value::Object(name, _) => Some(name),
                _ => None,
            });
            return Err(match unknown {
                Some(name) => format!(
                    "its pickle is no dictionary of tensors; it calls `{name}`, which was not \
                     executed"
                ),
                None => "its pickle is no dictionary of tensors".into(),
            });
        }
        Ok(found)
    }

    fn collect(
        &self,
        id: Id,
        prefix: &str,
        depth: usize,
        visited: &mut usize,
        found: &mut dyn FnMut(String, &PickledTensor) -> Result<(), String>,
    ) -> Result<(), String> {
        let items: Vec<(String, Id)> = match &self.values[id] {
            Value::Dict(items) | Value::Object(_, items) => {
                let items = items
                    .iter()
                    .filter_map(|(key, value)| match &self.values[*key] {
                        Value::Text(key) => Some((key.to_string(), *value)),
                        Value::Int(key) => Some((key.to_string(), *value)),
                        _ => None,
                    });
                items.collect()
            }
            Value::List(items) | Value::Tuple(items) => {
                let items = items.iter().enumerate();
                items
                    .map(|(index, value)| (index.to_string(), *value))
                    .collect()
            }
            _ => Vec::new(),
        };
        for (key, value) in items {
            *visited += 1;
            if *visited > MAX_VALUES {
                return Err(format!(
                    "its dictionaries have more than {MAX_VALUES} items"
                ));
            }
            let key = format!("{prefix}{key}");
            match &self.values[value] {
                Value::Tensor(tensor) => found(key, tensor)?,
                _ if depth < MAX_DEPTH => {
                    self.collect(value, &format!("{key}."), depth + 1, visited, found)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_DICTIONARY: &str = "its pickle is no dictionary of tensors";
    const TOO_FEW: &str = "its pickle takes more values than there are";

    #[track_caller]
    fn check_error(code: &[u8], expected: &str) {
        let mut machine = Machine::new(code);
        let message = machine
            .run()
            .and_then(|id| machine.tensors(id, &HashMap::new()).map(drop))
            .unwrap_err();
        assert_eq!(message, expected);
    }

    #[test]
    fn code_is_not_executed() {
        check_error(
            b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
            "its pickle is no dictionary of tensors; it calls `os.system`, which was not executed",
        );
        check_error(b"\x80\x02c__builtin__\neval\n.", NO_DICTIONARY);
    }

    #[test]
    fn broken_programs_are_errors() {
        check_error(b"", "its pickle is truncated");
        check_error(b"\x80\x02}", "its pickle is truncated");
        check_error(b"\x80\x02.", TOO_FEW);
        check_error(b"\x80\x02u.", "its pickle lacks a mark");
        check_error(
            b"\x80\x02h\x07.",
            "its pickle refers to a value that it has not stored",
        );
        check_error(b"\x80\x02X\xff\xff\xff\xffabc.", "its pickle is truncated");
        check_error(
            b"\x80\x02X\x01\x00\x00\x00\xff.",
            "its pickle has a string that is not UTF-8",
        );
        check_error(b"\x80\x02N.", NO_DICTIONARY);
        check_error(b"\x80\x02}K\x01K\x02s.", NO_DICTIONARY);
        check_error(b"\x80\x02}X\x01\x00\x00\x00aK\x02s.", NO_DICTIONARY);
        check_error(
            b"\x80\x02i",
            "its pickle uses instruction 0x69, which no dictionary of tensors needs",
        );
        check_error(
            b"(K\x01(0",
            "its pickle uses instruction 0x30, which no dictionary of tensors needs",
        );
    }

    #[test]
    fn cycles_and_depth_do_no_harm() {
        // A list that contains itself.
        check_error(b"\x80\x02]q\x00h\x00a.", NO_DICTIONARY);
        // A dictionary that contains itself, again and again.
        check_error(b"}q\x00X\x01\x00\x00\x00ah\x00s.", NO_DICTIONARY);

        // A million tuples, one in another.
        let mut deep = b"\x80\x02N".to_vec();
        deep.extend(std::iter::repeat_n(0x85, 1_000_000));
        deep.push(b'.');
        check_error(&deep, NO_DICTIONARY);
    }

    #[test]
    fn small_programs_stay_small() {
        let nothings = |count| std::iter::repeat_n(b'N', count);
        let many: Vec<u8> = nothings(2 << 20).collect();
        check_error(&many, "its pickle has more than 1048576 values");
        let mut text = b"X\x00\x00\x10\x00".to_vec();
        text.extend(std::iter::repeat_n(b'a', 1 << 20));
        check_error(&text, "its pickle has a string of 1048576 bytes");
        // Dictionaries of dictionaries, each of which has the next a hundred times.
        let mut wide = b"}q\x00".to_vec();
        for level in 0..4_u8 {
            wide.push(b'}');
            for key in 0..100 {
                wide.extend([b'K', key, b'h', level, b's']);
            }
            wide.extend([b'q', level + 1]);
        }
        wide.push(b'.');
        check_error(&wide, "its dictionaries have more than 1048576 items");
    }

    #[test]
    fn values_below_a_mark_are_out_of_reach() {
        check_error(b"K\x01(R.", TOO_FEW);
        check_error(b"K\x01(q\x00.", TOO_FEW);
        check_error(b"K\x01(Nb.", TOO_FEW);
    }
}
