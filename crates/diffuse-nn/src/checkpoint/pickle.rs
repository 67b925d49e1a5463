//! PyTorch's zip format: `*/data.pkl`, a pickle of tensors that point into the stored files
//! `*/data/KEY`.
//!
//! The pickle is a program for a small stack machine. Only the instructions that a dictionary of
//! tensors needs are carried out, nothing is imported or called, and every value lives in one flat
//! list, so that neither depth nor cycles in a hostile file can do harm.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Read};
use std::ops::Range;
use std::rc::Rc;

use zip::{CompressionMethod, ZipArchive};

use super::source::SourceReader;
use super::{TensorInfo, TensorSource};

/// No dictionary of weights comes near these.
const MAX_PICKLE_BYTES: u64 = 64 << 20;
const MAX_VALUES: usize = 1 << 20;
const MAX_TEXT_BYTES: usize = 1 << 12;

/// The tensors of a PyTorch file.
pub(super) fn list(file: &dyn TensorSource) -> Result<BTreeMap<String, TensorInfo>, String> {
    let mut start = [0; 2];
    if file.read_at(&mut start, 0).is_err() || start != *b"PK" {
        return Err(
            "it is not a zip archive; files from before PyTorch 1.6 must be saved again".into(),
        );
    }
    let mut archive = ZipArchive::new(BufReader::new(SourceReader::new(file)))
        .map_err(|error| error.to_string())?;
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
    machine
        .state_dict(result)?
        .into_iter()
        .map(|(key, tensor)| {
            let info = tensor
                .locate(&files)
                .map_err(|message| format!("`{key}`: {message}"))?;
            Ok((key, info))
        })
        .collect()
}

/// Index of a value in the machine's list.
type Id = usize;

#[derive(Debug, Clone)]
enum Value {
    Nothing,
    Bool,
    Int(i64),
    Text(Rc<str>),
    Global(String),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// A `ParameterDict`: its dictionary of parameters, once it has its attributes.
    Parameters(Option<Id>),
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
        let mut expected = 1usize;
        for (size, stride) in self.shape.iter().zip(&self.stride).rev() {
            if *size != 1 && *stride != expected {
                return Err("its elements are not contiguous".into());
            }
            expected = expected
                .checked_mul(*size)
                .ok_or("its shape is too large")?;
        }
        let file = files
            .get(&*self.storage.file)
            .ok_or_else(|| format!("there is no `data/{}`", self.storage.file))?;
        let start = self.offset.checked_mul(self.storage.element_bytes);
        let bytes = expected.checked_mul(self.storage.element_bytes);
        let range = start
            .zip(bytes)
            .and_then(|(start, bytes)| Some((start as u64, start.checked_add(bytes)? as u64)))
            .filter(|(_, end)| *end <= file.end - file.start)
            .ok_or_else(|| format!("it reaches beyond the end of `data/{}`", self.storage.file))?;
        Ok(TensorInfo {
            dtype: self.storage.dtype.to_string(),
            shape: self.shape.clone(),
            source: 0,
            bytes: file.start + range.0..file.start + range.1,
        })
    }
}

/// torch's storage classes: name, safetensors type, bytes an element.
const STORAGES: [(&str, &str, usize); 9] = [
    ("DoubleStorage", "F64", 8),
    ("FloatStorage", "F32", 4),
    ("HalfStorage", "F16", 2),
    ("BFloat16Storage", "BF16", 2),
    ("LongStorage", "I64", 8),
    ("IntStorage", "I32", 4),
    ("ShortStorage", "I16", 2),
    ("ByteStorage", "U8", 1),
    ("BoolStorage", "BOOL", 1),
];

/// What a pickle of tensors may name besides storages.
const GLOBALS: [&str; 6] = [
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    PARAMETER_DICT,
    // Attributes of modules.
    "__builtin__.set",
    "builtins.set",
];
const PARAMETER_DICT: &str = "torch.nn.modules.container.ParameterDict";

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

    /// Carries out the program up to its end and gives the value that is left.
    fn run(&mut self) -> Result<Id, String> {
        loop {
            let [instruction] = self.take()?;
            match instruction {
                0x80 => self.take::<1>().map(drop)?, // PROTO
                0x95 => self.take::<8>().map(drop)?, // FRAME
                b'.' => return self.pop(),           // STOP
                b'(' => self.marks.push(self.stack.len()),
                b'N' => self.push(Value::Nothing)?,
                0x88 | 0x89 => self.push(Value::Bool)?, // NEWTRUE, NEWFALSE
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
                0x81 => self.new_object()?,
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
        let path = format!("{module}.{name}");
        let is_storage = module == "torch" && STORAGES.iter().any(|(storage, ..)| *storage == name);
        if !is_storage && !GLOBALS.contains(&path.as_str()) {
            return Err(format!(
                "its pickle names `{path}`, which is not part of a dictionary of tensors"
            ));
        }
        self.push(Value::Global(path))
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
            _ => return Err("its pickle appends to something that is not a list".into()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: Vec<Id>) -> Result<(), String> {
        let top = self.top()?;
        match &mut self.values[top] {
            Value::Dict(dict) if items.len().is_multiple_of(2) => {
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

    /// NEWOBJ: an empty `ParameterDict`.
    fn new_object(&mut self) -> Result<(), String> {
        let (arguments, class) = (self.pop()?, self.pop()?);
        match (&self.values[class], &self.values[arguments]) {
            (Value::Global(class), Value::Tuple(arguments))
                if class == PARAMETER_DICT && arguments.is_empty() =>
            {
                self.push(Value::Parameters(None))
            }
            _ => Err("its pickle makes an object that no dictionary of tensors needs".into()),
        }
    }

    /// BUILD: the parameters of a `ParameterDict`. Other attributes, such as `_metadata`, say
    /// nothing about the tensors.
    fn build(&mut self) -> Result<(), String> {
        let state = self.pop()?;
        let object = self.top()?;
        if let (Value::Parameters(_), Value::Dict(items)) =
            (&self.values[object], &self.values[state])
        {
            let parameters = self.item(items, "_parameters");
            self.values[object] = Value::Parameters(parameters);
        }
        Ok(())
    }

    /// The value of a key.
    fn item(&self, items: &[(Id, Id)], wanted: &str) -> Option<Id> {
        let mut items = items.iter();
        let found = items
            .find(|(key, _)| matches!(&self.values[*key], Value::Text(key) if **key == *wanted));
        found.map(|(_, value)| *value)
    }

    /// The calls that a dictionary of tensors consists of.
    fn reduce(&mut self) -> Result<(), String> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let Value::Tuple(arguments) = &self.values[arguments] else {
            return Err("its pickle calls something without a tuple of arguments".into());
        };
        let Value::Global(function) = &self.values[function] else {
            return Err("its pickle calls something that is not a function".into());
        };
        let value = match (function.as_str(), &arguments[..]) {
            ("collections.OrderedDict", []) => Value::Dict(Vec::new()),
            ("__builtin__.set" | "builtins.set", _) => Value::Nothing,
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
            ("torch._utils._rebuild_parameter", [tensor, ..]) => {
                let tensor = *tensor;
                let Value::Tensor(_) = &self.values[tensor] else {
                    return Err("its pickle has a parameter without a tensor".into());
                };
                self.stack.push(tensor);
                return Ok(());
            }
            _ => return Err(format!("its pickle calls `{function}` in an unknown way")),
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

    /// The tensors of a dictionary, which may be wrapped as `{"state_dict": ...}`, or, as in files
    /// of textual inversions, `{"string_to_param": ...}`; or a tensor alone, whose key is empty.
    fn state_dict(&self, id: Id) -> Result<Vec<(String, PickledTensor)>, String> {
        let items = match &self.values[id] {
            Value::Tensor(tensor) => return Ok(vec![(String::new(), tensor.clone())]),
            Value::Dict(items) => items,
            _ => return Err("its pickle is not a dictionary".into()),
        };
        let wrapped = ["state_dict", "string_to_param"]
            .into_iter()
            .find_map(|key| {
                let mut value = self.item(items, key)?;
                if let Value::Parameters(parameters) = self.values[value] {
                    value = parameters?;
                }
                match &self.values[value] {
                    Value::Dict(items) => Some(items),
                    _ => None,
                }
            });
        wrapped
            .unwrap_or(items)
            .iter()
            .map(|(key, value)| {
                let key = self.text(*key)?.to_string();
                match &self.values[*value] {
                    Value::Tensor(tensor) => Ok((key, tensor.clone())),
                    _ => Err(format!("`{key}` is not a tensor")),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_error(code: &[u8], expected: &str) {
        let mut machine = Machine::new(code);
        let message = machine
            .run()
            .and_then(|id| machine.state_dict(id).map(drop))
            .unwrap_err();
        assert!(message.contains(expected), "{message}");
    }

    #[test]
    fn code_is_not_executed() {
        check_error(
            b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
            "os.system",
        );
        check_error(b"\x80\x02c__builtin__\neval\n.", "__builtin__.eval");
        check_error(
            b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81.",
            "torch.nn.modules.linear.Linear",
        );
        check_error(b"\x80\x02ccollections\nOrderedDict\n)\x81.", "an object");
        check_error(
            b"\x80\x02ctorch.nn.modules.container\nParameterDict\nN\x85\x81.",
            "an object",
        );
    }

    #[test]
    fn broken_programs_are_errors() {
        check_error(b"", "truncated");
        check_error(b"\x80\x02}", "truncated");
        check_error(b"\x80\x02.", "more values");
        check_error(b"\x80\x02u.", "mark");
        check_error(b"\x80\x02h\x07.", "not stored");
        check_error(b"\x80\x02X\xff\xff\xff\xffabc.", "truncated");
        check_error(b"\x80\x02X\x01\x00\x00\x00\xff.", "UTF-8");
        check_error(b"\x80\x02N.", "not a dictionary");
        check_error(b"\x80\x02}K\x01K\x02s.", "string");
        check_error(b"\x80\x02}X\x01\x00\x00\x00aK\x02s.", "`a` is not a tensor");
        check_error(b"\x80\x02i", "0x69");
        check_error(b"(K\x01(0", "0x30");
    }

    #[test]
    fn cycles_and_depth_do_no_harm() {
        // A list that contains itself.
        check_error(b"\x80\x02]q\x00h\x00a.", "not a dictionary");
        // A million tuples, one in another.
        let mut deep = b"\x80\x02N".to_vec();
        deep.extend(std::iter::repeat_n(0x85, 1_000_000));
        deep.push(b'.');
        check_error(&deep, "not a dictionary");
    }

    #[test]
    fn small_programs_stay_small() {
        let nothings = |count| std::iter::repeat_n(b'N', count);
        let many: Vec<u8> = nothings(2 << 20).collect();
        check_error(&many, "more than");
        let mut text = b"X\x00\x00\x10\x00".to_vec();
        text.extend(std::iter::repeat_n(b'a', 1 << 20));
        check_error(&text, "a string of");
        // A parameter that is a long list in place of a tensor.
        let mut list = b"ctorch._utils\n_rebuild_parameter\n(]".to_vec();
        list.extend(b"tR.");
        check_error(&list, "without a tensor");
    }

    #[test]
    fn values_below_a_mark_are_out_of_reach() {
        check_error(b"K\x01(R.", "more values");
        check_error(b"K\x01(q\x00.", "more values");
        check_error(b"K\x01(Nb.", "more values");
    }

    #[test]
    fn parameter_dictionaries_are_their_parameters() {
        let wrapped = |state: &[u8]| {
            let class = b"ctorch.nn.modules.container\nParameterDict\n)\x81";
            let mut code = b"\x80\x02}X\x0f\x00\x00\x00string_to_param".to_vec();
            code.extend([class, state, b"s."].concat());
            code
        };
        let parameters = b"}X\x0b\x00\x00\x00_parameters}X\x01\x00\x00\x00aK\x02ssb";
        check_error(&wrapped(parameters), "`a` is not a tensor");
        // Without parameters, with parameters that are something else, and in a circle.
        let not_a_tensor = "`string_to_param` is not a tensor";
        check_error(&wrapped(b"}b"), not_a_tensor);
        check_error(&wrapped(b"}X\x0b\x00\x00\x00_parametersNsb"), not_a_tensor);
        check_error(
            &wrapped(b"q\x00}X\x0b\x00\x00\x00_parametersh\x00sb"),
            not_a_tensor,
        );
    }
}
