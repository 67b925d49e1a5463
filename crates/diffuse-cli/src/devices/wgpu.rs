//! Adapters of wgpu: GPUs with their drivers.

use std::fmt;

use ::wgpu::{AdapterInfo, DeviceType, Features, Instance, InstanceDescriptor};
use anyhow::{Result, bail};
use burn::backend::wgpu::WgpuDevice;
use burn::backend::wgpu::graphics::{AutoGraphicsApi, GraphicsApi};

use super::{gibibytes, no_such_device};

/// A GPU with its driver, or a driver that computes on the CPU.
pub struct Adapter {
    /// Its name for burn.
    device: WgpuDevice,
    info: AdapterInfo,
    f16: bool,
    largest_buffer: u64,
}

impl fmt::Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = &self.info;
        let kind = match info.device_type {
            DeviceType::DiscreteGpu => "discrete GPU",
            DeviceType::IntegratedGpu => "integrated GPU",
            DeviceType::VirtualGpu => "virtual GPU",
            DeviceType::Cpu => "the CPU, by a software driver",
            DeviceType::Other => "unknown kind",
        };
        let types = if self.f16 { "f32, f16" } else { "f32" };
        write!(f, "{}: {kind}; {:?}", info.name, info.backend)?;
        if !info.driver.is_empty() {
            write!(f, ", {} {}", info.driver, info.driver_info)?;
        }
        // wgpu does not tell how much memory there is.
        let buffer = gibibytes(self.largest_buffer);
        write!(f, "; {types}; tensors up to {buffer}")
    }
}

impl Adapter {
    /// Whether it is known to be more than a driver that computes on the CPU.
    pub fn is_gpu(&self) -> bool {
        matches!(
            self.info.device_type,
            DeviceType::DiscreteGpu | DeviceType::IntegratedGpu | DeviceType::VirtualGpu
        )
    }
}

/// Everything that burn could compute on, in the driver's order.
pub fn adapters() -> Result<Vec<Adapter>> {
    let backend = AutoGraphicsApi::backend();
    let instance = Instance::new(InstanceDescriptor {
        backends: backend.into(),
        ..InstanceDescriptor::new_without_display_handle()
    });
    let found = futures_lite::future::block_on(instance.enumerate_adapters(backend.into()));
    if found.is_empty() {
        bail!(
            "no GPU with a {backend:?} driver is found: install the driver of the GPU's vendor (on Linux also the \
             loader, `libvulkan1` in Debian), or take `--backend flex`"
        );
    }
    let mut adapters: Vec<Adapter> = Vec::new();
    for adapter in found {
        let info = adapter.get_info();
        // burn counts adapters by kind.
        let before = adapters
            .iter()
            .filter(|other| other.info.device_type == info.device_type)
            .count();
        adapters.push(Adapter {
            device: match info.device_type {
                DeviceType::DiscreteGpu => WgpuDevice::DiscreteGpu(before),
                DeviceType::IntegratedGpu => WgpuDevice::IntegratedGpu(before),
                DeviceType::VirtualGpu => WgpuDevice::VirtualGpu(before),
                DeviceType::Cpu => WgpuDevice::Cpu,
                DeviceType::Other => WgpuDevice::DefaultDevice,
            },
            f16: adapter.features().contains(Features::SHADER_F16),
            largest_buffer: adapter.limits().max_storage_buffer_binding_size,
            info,
        });
    }
    Ok(adapters)
}

/// The adapter with an index, or else the one that promises most.
pub fn choose(index: Option<usize>) -> Result<WgpuDevice> {
    let adapters = adapters()?;
    let adapter = match index {
        Some(index) => adapters
            .get(index)
            .ok_or_else(|| no_such_device(index, adapters.len()))?,
        None => adapters
            .iter()
            .min_by_key(|adapter| match adapter.info.device_type {
                DeviceType::DiscreteGpu => 0,
                DeviceType::IntegratedGpu => 1,
                DeviceType::VirtualGpu => 2,
                DeviceType::Other => 3,
                DeviceType::Cpu => 4,
            })
            .expect("there is at least one"),
    };
    if adapter.info.device_type == DeviceType::Cpu {
        crate::output::complain(format_args!(
            "warning: `{}` is a software driver: `--backend flex` is the faster way to compute on the CPU",
            adapter.info.name
        ));
    }
    Ok(adapter.device.clone())
}
