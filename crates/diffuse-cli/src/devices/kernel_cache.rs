//! Compiled GPU kernels on disk, for the next run.
//!
//! CubeCL compiles kernels while the program runs, which takes seconds at each start. Its cache on
//! disk is off by default, and needs help before it can be on for everybody:
//!
//! - Its keys have a kernel's name and parameters, but neither its source nor the GPU. So each
//!   build of the program has a folder of its own for each kind of GPU.
//! - It panics where it cannot write. So the folder is tried first, and without one the cache stays
//!   off.
//! - It trusts what it reads. So a run that ends well leaves a seal: the files' lengths and
//!   checksums. The next run cuts off what was written later, and removes damaged files.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use cubecl::config::cache::CacheConfig;
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use cubecl::hash::StableHasher;
use diffuse_pipelines::replace_file;

/// Folders that no run has used for so long are removed.
const KEPT: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// A larger cache starts anew: CubeCL reads all of it at each start, some 50 MB/s.
const LARGEST: u64 = 64 << 20;
/// Free space without which the cache stays off: a run's kernels take 6 to 12 MB.
const FREE: usize = 16 << 20;

/// Locked while a run uses the folder; changed last when the last one began.
const LOCK: &str = "run.lock";
const SEAL: &str = "seal.json";
/// CubeCL's own folder in ours.
const KERNELS: &str = "cubecl";

/// Length and checksum of each file, by its path in the folder.
type Seal = BTreeMap<PathBuf, (u64, u64)>;

/// The folder of kernels that a run takes and adds to.
pub struct KernelCache {
    folder: PathBuf,
    _lock: File,
}

impl KernelCache {
    /// Turns the cache on for a device, described by all that compiled kernels depend on. It has to
    /// come before burn touches the device. None if there is no folder for it, or if the user's
    /// `cubecl.toml` names another.
    pub fn enable(device: &str) -> Option<Self> {
        let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
        if config.compilation.cache.is_some() {
            return None;
        }
        let root = root().ok()?;
        let cache = Self::open(&root, &name(device).ok()?).ok()?;
        config.compilation.cache = Some(CacheConfig::File(cache.folder.join(KERNELS)));
        CubeClRuntimeConfig::set(config);
        remove_unused(&root, SystemTime::now());
        Some(cache)
    }

    /// Makes sure that a folder in `root` can be written, and that what is in it can be trusted.
    fn open(root: &Path, name: &str) -> io::Result<Self> {
        let folder = root.join(name);
        let kernels = folder.join(KERNELS);
        fs::create_dir_all(&kernels)?;
        try_to_write(&kernels)?;
        let lock = File::create(folder.join(LOCK))?;
        lock.set_modified(SystemTime::now())?;
        // The kernels that another run is adding are good, although not sealed yet. On a file
        // system without locks, other runs are not seen, and compile such kernels again.
        if !matches!(lock.try_lock(), Err(TryLockError::WouldBlock)) {
            restore(&folder)?;
            let _ = lock.unlock();
        }
        let _ = lock.lock_shared();
        Ok(Self {
            folder,
            _lock: lock,
        })
    }

    /// Keeps the kernels that this run has added. After a panic or Ctrl-C, the next run compiles
    /// them again.
    pub fn seal(&self) {
        // A failure costs the next run its time, and this one nothing.
        let _ = seal(&self.folder);
    }
}

/// Where kernels are kept and how large they are, or why they are not kept.
pub fn describe() -> String {
    let config = CubeClRuntimeConfig::from_current_dir();
    if config.compilation.cache.is_some() {
        return "kernels are kept where `cubecl.toml` says".into();
    }
    let usable = root().and_then(|root| {
        fs::create_dir_all(&root)?;
        try_to_write(&root)?;
        Ok((files(&root)?, root))
    });
    match usable {
        Ok((files, root)) => {
            let sizes = files.iter().filter_map(|file| file.metadata().ok());
            let bytes: u64 = sizes.map(|file| file.len()).sum();
            let mebibytes = bytes as f64 / f64::from(1 << 20);
            format!(
                "kernels are kept in {} ({mebibytes:.0} MiB)",
                root.display()
            )
        }
        Err(error) => format!("kernels are not kept, and compiled at each start: {error}"),
    }
}

/// The folder of all builds and devices.
fn root() -> io::Result<PathBuf> {
    Ok(caches()?.join("kernels"))
}

/// The program's folder in the user's folder for caches.
pub fn caches() -> io::Result<PathBuf> {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    // Elsewhere than on Windows, `dirs` would ask the user database for the home of a service, too.
    let has_home = cfg!(windows) || is_set("HOME") || is_set("XDG_CACHE_HOME");
    dirs::cache_dir()
        .filter(|folder| has_home && folder.is_absolute())
        .map(|folder| folder.join("diffuse"))
        .ok_or_else(|| io::Error::other("there is no home folder"))
}

/// The folder's name for this build of the program and a device.
fn name(device: &str) -> io::Result<String> {
    let program = File::open(std::env::current_exe()?)?;
    let build = if cfg!(debug_assertions) {
        // Its bytes are too many for checksums without optimization.
        let file = program.metadata()?;
        format!("{} {:?}", file.len(), file.modified()?)
    } else {
        format!("{:?}", checksum(program)?)
    };
    let (_, hash) = checksum(format!("{build} {device}").as_bytes())?;
    Ok(format!("{}-{hash:016x}", env!("CARGO_PKG_VERSION")))
}

/// An error where a run's kernels cannot be written: access denied, read-only, full.
fn try_to_write(folder: &Path) -> io::Result<()> {
    tempfile::tempfile_in(folder)?.write_all(&vec![0; FREE])
}

/// Takes the kernels back to the last seal; nothing stays of damaged ones.
fn restore(folder: &Path) -> io::Result<()> {
    let kernels = folder.join(KERNELS);
    let seal = fs::read(folder.join(SEAL)).unwrap_or_default();
    let seal: Seal = serde_json::from_slice(&seal).unwrap_or_default();
    let size: u64 = seal.values().map(|(length, _)| length).sum();
    let is_whole = seal.iter().all(|(path, sealed)| {
        let file = File::open(kernels.join(path));
        let found = file.and_then(|file| checksum(file.take(sealed.0)));
        found.is_ok_and(|found| found == *sealed)
    });
    for file in files(&kernels)? {
        let sealed = file.strip_prefix(&kernels).ok().and_then(|it| seal.get(it));
        match sealed {
            Some((length, _)) if is_whole && size <= LARGEST => {
                File::options().write(true).open(&file)?.set_len(*length)?
            }
            _ => fs::remove_file(&file)?,
        }
    }
    Ok(())
}

fn seal(folder: &Path) -> io::Result<()> {
    let kernels = folder.join(KERNELS);
    let mut seal = Seal::new();
    for file in files(&kernels)? {
        // CubeCL's locks come and go.
        if file.extension().is_none_or(|extension| extension != "lock") {
            let path = file.strip_prefix(&kernels).map_err(io::Error::other)?;
            seal.insert(path.into(), checksum(File::open(&file)?)?);
        }
    }
    let seal = serde_json::to_vec(&seal)?;
    replace_file(&folder.join(SEAL), |path| fs::write(path, seal))
}

/// Removes the folders of other builds and devices that no run has used for long.
fn remove_unused(root: &Path, now: SystemTime) {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let used = fs::metadata(entry.path().join(LOCK)).or_else(|_| entry.metadata());
        let age = used
            .and_then(|used| used.modified())
            .map(|used| now.duration_since(used).unwrap_or_default());
        if age.is_ok_and(|age| age > KEPT) {
            // What cannot be removed is in nobody's way.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// All files below a folder.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files(&entry.path())?);
        } else {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Length and checksum.
fn checksum(mut bytes: impl Read) -> io::Result<(u64, u64)> {
    let mut hasher = StableHasher::new();
    let mut buffer = vec![0; 1 << 18];
    let mut length = 0;
    loop {
        let read = bytes.read(&mut buffer)?;
        if read == 0 {
            return Ok((length, hasher.finalize() as u64));
        }
        hasher.update(&buffer[..read]);
        length += read as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens a cache in `root`, and gives the texts of CubeCL's two files then.
    fn open(root: &Path) -> (KernelCache, [Option<String>; 2]) {
        let cache = KernelCache::open(root, "test").unwrap();
        let read = ["toc", "chunk"].map(|file| fs::read_to_string(path(&cache, file)).ok());
        (cache, read)
    }

    fn path(cache: &KernelCache, file: &str) -> PathBuf {
        cache.folder.join(KERNELS).join("cuda").join(file)
    }

    fn append(cache: &KernelCache, text: &str) {
        fs::create_dir_all(path(cache, "")).unwrap();
        for file in ["toc", "chunk"] {
            let mut options = File::options();
            let mut file = options
                .append(true)
                .create(true)
                .open(path(cache, file))
                .unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }
    }

    /// The same text in both files.
    fn both(text: &str) -> [Option<String>; 2] {
        [Some(text.into()), Some(text.into())]
    }

    /// A cache with two sealed kernels, and a lock that a killed run has left.
    fn sealed() -> (tempfile::TempDir, KernelCache) {
        let root = tempfile::tempdir().unwrap();
        let (cache, read) = open(root.path());
        assert_eq!(read, [None, None]);
        append(&cache, "a,b,");
        fs::write(path(&cache, "toc.lock"), "").unwrap();
        cache.seal();
        (root, cache)
    }

    #[test]
    fn sealed_kernels_stay_and_what_was_written_later_goes() {
        let (root, cache) = sealed();
        append(&cache, "half of");
        drop(cache);
        let (cache, read) = open(root.path());
        assert_eq!(read, both("a,b,"));
        assert!(!path(&cache, "toc.lock").exists());
        append(&cache, "c,");
        cache.seal();
        drop(cache);
        assert_eq!(open(root.path()).1, both("a,b,c,"));
    }

    #[test]
    fn nothing_stays_of_damaged_kernels() {
        let check = |damage: &dyn Fn(&KernelCache)| {
            let (root, cache) = sealed();
            damage(&cache);
            drop(cache);
            assert_eq!(open(root.path()).1, [None, None]);
        };
        check(&|cache| fs::write(path(cache, "chunk"), "a,c,").unwrap());
        check(&|cache| fs::write(path(cache, "chunk"), "a,").unwrap());
        check(&|cache| fs::write(path(cache, "toc"), "").unwrap());
        check(&|cache| fs::remove_file(path(cache, "chunk")).unwrap());
        check(&|cache| fs::write(cache.folder.join(SEAL), "{").unwrap());
        check(&|cache| fs::remove_file(cache.folder.join(SEAL)).unwrap());
    }

    #[test]
    fn a_run_leaves_the_kernels_of_another_that_goes_on_alone() {
        let (root, first) = sealed();
        append(&first, "c,");
        let (second, read) = open(root.path());
        assert_eq!(read, both("a,b,c,"));
        append(&second, "d,");
        first.seal();
        drop((first, second));
        assert_eq!(open(root.path()).1, both("a,b,c,d,"));
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(KernelCache::open(&file, "test").is_err());
        fs::create_dir(root.path().join("test")).unwrap();
        fs::write(root.path().join("test").join(KERNELS), "").unwrap();
        assert!(KernelCache::open(root.path(), "test").is_err());
    }

    #[test]
    fn folders_that_no_run_uses_are_removed() {
        let (root, cache) = sealed();
        let old = root.path().join("old");
        fs::create_dir(&old).unwrap();
        let later = |days: u64| SystemTime::now() + Duration::from_secs(days * 24 * 60 * 60);
        remove_unused(root.path(), later(29));
        assert!(old.exists());
        let lock = File::options().write(true).open(cache.folder.join(LOCK));
        lock.unwrap().set_modified(later(30)).unwrap();
        remove_unused(root.path(), later(31));
        assert!(!old.exists() && cache.folder.exists());
        remove_unused(root.path(), later(61));
        assert!(!cache.folder.exists());
    }

    #[test]
    fn each_device_has_a_name() {
        let names = ["a", "a", "b"].map(|device| name(device).unwrap());
        assert_eq!(names[0], names[1]);
        assert_ne!(names[0], names[2]);
    }
}
