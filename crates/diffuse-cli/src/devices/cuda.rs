//! NVIDIA's GPUs, asked of the driver before burn touches it: without one, burn panics in a thread
//! of its own.

use std::fmt;

use anyhow::{Context, Result, bail};
use burn::backend::cuda::CudaDevice;
use cudarc::driver::result::{self, device};
use cudarc::driver::sys::CUdevice_attribute;

use super::kernel_cache::{self, KernelCache};
use super::{cuda_headers, gibibytes, no_such_device};

/// A GPU.
pub struct Device {
    name: String,
    memory: u64,
    /// Major and minor version.
    compute_capability: (i32, i32),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        let memory = gibibytes(self.memory);
        write!(
            f,
            "{}: {memory}; compute capability {major}.{minor}; f32, f16, bf16",
            self.name
        )
    }
}

impl Device {
    /// What compiled kernels depend on, besides their source: the GPU and the compiler.
    fn kernels_for(&self) -> Result<String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the pointers are to integers that outlive the call.
        unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) }
            .result()
            .context("the CUDA toolkit's compiler does not start")?;
        let (name, capability) = (&self.name, self.compute_capability);
        Ok(format!(
            "cuda, {name}, {capability:?}, NVRTC {major}.{minor}"
        ))
    }
}

/// All GPUs, in the driver's order.
pub fn devices() -> Result<Vec<Device>> {
    // SAFETY: what is loaded is the library of that name in the system's search path, as burn loads
    // it.
    let (driver, compiler) = unsafe {
        (
            cudarc::driver::sys::is_culib_present(),
            cudarc::nvrtc::sys::is_culib_present(),
        )
    };
    if !driver {
        bail!(
            "NVIDIA's driver is not found (`libcuda.so`, or `nvcuda.dll` on Windows): install it, or take \
             `--backend flex`"
        );
    }
    if !compiler {
        bail!(
            "the CUDA toolkit's compiler is not found (`libnvrtc.so`, or `nvrtc64_*.dll` on Windows), with which \
             kernels are built while the program runs: install the toolkit, or take `--backend flex`"
        );
    }
    if cubecl::cuda::install::cuda_path().is_none() {
        bail!(
            "the CUDA toolkit's headers are not found, which kernels include: set `CUDA_PATH` to the toolkit's folder, \
             or take `--backend flex`"
        );
    }
    result::init().context("NVIDIA's driver does not start")?;
    let count = device::get_count().context("NVIDIA's driver lists no GPUs")?;
    if count == 0 {
        bail!("NVIDIA's driver finds no GPU");
    }
    (0..count)
        .map(|index| describe(index).with_context(|| format!("GPU {index}")))
        .collect()
}

fn describe(index: i32) -> Result<Device, result::DriverError> {
    let gpu = device::get(index)?;
    let name = device::get_name(gpu)?;
    // SAFETY: `gpu` comes from `get`.
    let (memory, major, minor) = unsafe {
        (
            device::total_mem(gpu)?,
            device::get_attribute(
                gpu,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
            )?,
            device::get_attribute(
                gpu,
                CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )?,
        )
    };
    Ok(Device {
        name,
        memory: memory as u64,
        compute_capability: (major, minor),
    })
}

/// The GPU with an index, or else the first, and its kernels of earlier runs.
pub fn choose(index: Option<usize>) -> Result<(CudaDevice, Option<KernelCache>)> {
    let devices = devices()?;
    let index = index.unwrap_or(0);
    let Some(device) = devices.get(index) else {
        return Err(no_such_device(index, devices.len()));
    };
    let kernels = KernelCache::enable(&device.kernels_for()?);
    if let Ok(caches) = kernel_cache::caches() {
        // A failure costs time, and nothing else.
        // SAFETY: this is the program's only thread of its own: those of burn start later.
        let _ = unsafe { cuda_headers::install(&caches.join("cuda")) };
    }
    Ok((CudaDevice::new(index), kernels))
}
