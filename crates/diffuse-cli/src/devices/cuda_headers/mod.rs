//! Short headers in place of three of CUDA's that take its compiler longer than our kernels do.
//!
//! CubeCL includes `<cuda/barrier>` and two headers of cooperative groups in every kernel that
//! waits for asynchronous copies. They bring in a good part of CUDA's C++ library: 1.5 s a kernel,
//! 25 kernels for a first image. What CubeCL takes of them for our kernels is a few instructions.

use std::env;
use std::fs;
use std::io;
use std::path::Path;

use cubecl::cuda::install::cuda_path;
use diffuse_pipelines::replace_file;

/// Each header by its path in the folder of headers.
const HEADERS: [(&str, &str); 3] = [
    ("cuda/barrier", include_str!("barrier.h")),
    ("cooperative_groups.h", include_str!("cooperative_groups.h")),
    // CubeCL uses nothing of it for our kernels.
    ("cooperative_groups/memcpy_async.h", "#pragma once\n"),
];

/// Lets CubeCL find the short headers before CUDA's. They are written to `folder`. On an error, and
/// on systems without symbolic links, CUDA's headers are used, and kernels take longer to compile.
///
/// # Safety
/// No other thread may read or write the environment meanwhile.
pub unsafe fn install(folder: &Path) -> io::Result<()> {
    // It may be that of an earlier call.
    if env::var_os("CUDA_PATH").is_some_and(|path| Path::new(&path) == folder) {
        return Ok(());
    }
    let cuda = cuda_path().ok_or(io::ErrorKind::NotFound)?;
    write(folder, &cuda.join("include"))?;
    // SAFETY: see above.
    unsafe { env::set_var("CUDA_PATH", folder) };
    Ok(())
}

/// CubeCL looks in `include` first, and then in its folder `cccl`, here a link to CUDA's headers.
fn write(folder: &Path, cuda: &Path) -> io::Result<()> {
    let include = folder.join("include");
    for (name, text) in HEADERS {
        let path = include.join(name);
        if fs::read_to_string(&path).is_ok_and(|found| found == text) {
            continue;
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        replace_file(&path, |path| fs::write(path, text))?;
    }
    let link = include.join("cccl");
    if fs::read_link(&link).is_ok_and(|target| target == cuda) {
        return Ok(());
    }
    // Another process may be compiling: the link is replaced at once.
    let new = include.join(format!("cccl.{}", std::process::id()));
    link_folder(cuda, &new)?;
    fs::rename(&new, &link)
}

#[cfg(unix)]
fn link_folder(target: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

#[cfg(not(unix))]
fn link_folder(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn headers_come_before_those_of_cuda() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("headers");
        let cuda = ["a", "b"].map(|name| root.path().join(name));
        for cuda in &cuda {
            fs::create_dir(cuda).unwrap();
            fs::write(cuda.join("cuda_fp16.h"), cuda.to_str().unwrap()).unwrap();
            // The second time, with a header that somebody has changed.
            write(&folder, cuda).unwrap();
            let barrier = folder.join("include/cuda/barrier");
            assert_eq!(fs::read_to_string(&barrier).unwrap(), HEADERS[0].1);
            fs::write(barrier, "").unwrap();
            let half = fs::read_to_string(folder.join("include/cccl/cuda_fp16.h"));
            assert_eq!(half.unwrap(), cuda.to_str().unwrap());
        }
    }
}
