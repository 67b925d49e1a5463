//! Low-rank adaptation (LoRA, Hu et al. 2021, <https://arxiv.org/abs/2106.09685>): a model's
//! weights stay, and the factors of a small change of some of them are trained.
//!
//! ```text
//! W = W₀ + B · A
//! ```
//!
//! The changed weights are computed from the factors in each step, and the model is the same one
//! that is trained and used without an adapter: gradients reach the factors through its weights.

use std::collections::{HashMap, VecDeque};
use std::path::Path;

use anyhow::{Context, Result};
use burn::module::{Initializer, Module, ModuleMapper, Param};
use burn::tensor::{DType, Shape, Tensor, backend::Backend};
use diffuse_nn::checkpoint::{Parameter, parameters};
use safetensors::tensor::{Dtype, TensorView};

/// The factors of the changes of a UNet's residual and attention blocks, in the order of its
/// parameters.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// One for each changed weight.
    pub layers: Vec<Factors<B>>,
}

/// The change of a weight `[outputs, inputs]`: `B · A`. The kernel of a convolution counts among
/// its inputs.
#[derive(Module, Debug)]
pub struct Factors<B: Backend> {
    /// `[rank, inputs]`
    pub a: Param<Tensor<B, 2>>,
    /// `[outputs, rank]`
    pub b: Param<Tensor<B, 2>>,
}

/// Whether a parameter is changed: linear layers and convolutions, not biases and norms.
fn is_adapted(parameter: &Parameter) -> bool {
    let in_block = ["attentions.", "resnets."].map(|name| parameter.key.contains(name));
    in_block.contains(&true) && parameter.shape.len() > 1
}

impl<B: Backend> Lora<B> {
    /// Factors of no change yet: `A` is random, and `B` zero.
    pub fn new<M: Module<B>>(model: &M, rank: usize, device: &B::Device) -> Self {
        let random = Initializer::KaimingUniform {
            gain: 1.0 / 3f64.sqrt(),
            fan_out_only: false,
        };
        let layers = parameters(model)
            .iter()
            .filter(|parameter| is_adapted(parameter))
            .map(|Parameter { shape, .. }| {
                let inputs = shape[1..].iter().product();
                Factors {
                    a: random.init_with([rank, inputs], Some(inputs), None, device),
                    b: Initializer::Zeros.init([shape[0], rank], device),
                }
            })
            .collect();
        Self { layers }
    }

    /// The model with changed weights, which are computed from the factors.
    pub fn merge<M: Module<B>>(&self, model: M) -> M {
        let mut layers = self.layers.iter();
        let changes = parameters(&model)
            .iter()
            .map(|parameter| {
                is_adapted(parameter).then(|| {
                    let layer = layers.next().expect("factors of the same model");
                    layer.b.val().matmul(layer.a.val())
                })
            })
            .collect();
        model.map(&mut Add(changes))
    }

    /// Writes the factors as Diffusers does: `unet.{module}.lora_A.weight` and `.lora_B.weight`, in
    /// `f16`. `alpha` is the rank, so none is written.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save<M: Module<B>>(&self, unet: &M, path: &Path) -> Result<()> {
        let adapted = parameters(unet).into_iter().filter(is_adapted);
        let mut tensors = Vec::new();
        for (Parameter { key, mut shape }, layer) in adapted.zip(&self.layers) {
            let module = key.strip_suffix(".weight").context("a weight's key")?;
            let [rank, _] = layer.a.dims();
            let outputs = std::mem::replace(&mut shape[0], rank);
            let mut up = vec![1; shape.len()];
            up[..2].copy_from_slice(&[outputs, rank]);
            for (name, factor, shape) in [("A", &layer.a, shape), ("B", &layer.b, up)] {
                let data = factor.val().into_data().convert_dtype(DType::F16);
                tensors.push((format!("unet.{module}.lora_{name}.weight"), data, shape));
            }
        }
        let views = tensors
            .iter()
            .map(|(key, data, shape)| {
                let view = TensorView::new(Dtype::F16, shape.clone(), data.as_bytes())?;
                Ok((key, view))
            })
            .collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), path)
            .with_context(|| format!("cannot write `{}`", path.display()))
    }
}

/// Adds changes to a model's parameters, in their order.
struct Add<B: Backend>(VecDeque<Option<Tensor<B, 2>>>);

impl<B: Backend> ModuleMapper<B> for Add<B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        match self.0.pop_front().expect("as many as parameters") {
            Some(change) => param.map(|weight| {
                let shape: Shape = weight.shape();
                weight + change.reshape(shape)
            }),
            None => param,
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Autodiff;
    use burn::module::{AutodiffModule, ModuleVisitor};
    use burn::tensor::backend::AutodiffBackend;
    use burn::tensor::{TensorData, Tolerance};
    use burn_flex::Flex;
    use diffuse_builtin::SCENES;
    use diffuse_pipelines::unet::{Pretrained, UNet2DConditionModel};
    use diffuse_pipelines::{Adapter, StableDiffusionPipeline};

    use super::*;

    type B = Autodiff<Flex>;

    /// Distinct values between -0.1 and 0.1.
    fn waves<const D: usize>(shape: [usize; D], seed: f32) -> Tensor<B, D> {
        let length: usize = shape.iter().product();
        let values = (0..length).map(|i| ((i as f32 + seed) * 1.7).sin() / 10.0);
        Tensor::from_data(
            TensorData::new(values.collect::<Vec<f32>>(), shape),
            &Default::default(),
        )
    }

    fn model() -> UNet2DConditionModel<B> {
        let folder = tempfile::tempdir().unwrap();
        SCENES.unpack(&folder).unwrap();
        let unet = folder.path().join("unet");
        UNet2DConditionModel::from_pretrained(unet, &Default::default())
            .unwrap()
            .no_grad()
    }

    /// Factors with a change in every layer.
    fn changed(model: &UNet2DConditionModel<B>) -> Lora<B> {
        let mut lora = Lora::new(model, 2, &Default::default());
        for (index, layer) in lora.layers.iter_mut().enumerate() {
            let (a, b) = (layer.a.dims(), layer.b.dims());
            layer.a = Param::from_tensor(waves(a, index as f32));
            layer.b = Param::from_tensor(waves(b, index as f32 + 0.5));
        }
        lora
    }

    fn output(model: &UNet2DConditionModel<B>) -> Tensor<B, 4> {
        model.forward(waves([1, 4, 8, 8], 0.0), 300.0, &waves([1, 5, 128], 0.3))
    }

    /// The values of all parameters.
    struct Values(Vec<TensorData>);

    impl ModuleVisitor<Flex> for Values {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Flex, D>>) {
            self.0.push(param.val().into_data());
        }
    }

    fn values(model: &UNet2DConditionModel<Flex>) -> Vec<TensorData> {
        let mut values = Values(Vec::new());
        model.visit(&mut values);
        values.0
    }

    #[test]
    fn fresh_factors_change_nothing() {
        let model = model();
        let lora = Lora::new(&model, 2, &Default::default());
        let merged = lora.merge(model.clone());
        assert_eq!(output(&merged).into_data(), output(&model).into_data());
    }

    /// Makes weights parameters of their own.
    struct Detach;

    impl ModuleMapper<B> for Detach {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(|weight| weight.detach().require_grad())
        }
    }

    /// The gradients of all parameters, as matrices of as many rows as outputs.
    struct CollectGradients {
        of: <B as AutodiffBackend>::Gradients,
        all: Vec<Tensor<Flex, 2>>,
    }

    impl ModuleVisitor<B> for CollectGradients {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let gradient = param.val().grad(&self.of).unwrap();
            let rows = gradient.dims()[0];
            self.all.push(gradient.reshape([rows as i32, -1]));
        }
    }

    #[test]
    fn gradients_of_a_factor_are_those_of_the_weight_times_the_other_factor() {
        let model = model();
        let lora = changed(&model);
        let merged = lora.merge(model);
        let of_factors = output(&merged).powi_scalar(2).sum().backward();
        let weights = merged.map(&mut Detach);
        let mut of_weights = CollectGradients {
            of: output(&weights).powi_scalar(2).sum().backward(),
            all: Vec::new(),
        };
        weights.visit(&mut of_weights);
        let mut layers = lora.layers.iter();
        for (parameter, gradient) in parameters(&weights).iter().zip(of_weights.all) {
            if !is_adapted(parameter) {
                continue;
            }
            let Factors { a, b } = layers.next().unwrap();
            let expected_a = b.val().inner().transpose().matmul(gradient.clone());
            let expected_b = gradient.matmul(a.val().inner().transpose());
            for (factor, expected) in [(a, expected_a), (b, expected_b)] {
                let found = factor.val().grad(&of_factors).unwrap().into_data();
                let close = Tolerance::rel_abs(1e-3, 1e-4);
                found.assert_approx_eq::<f32>(&expected.into_data(), close);
            }
        }
        assert!(layers.next().is_none());
    }

    #[test]
    fn a_pipeline_makes_the_same_weights_of_the_file() {
        let model = model();
        let lora = changed(&model).valid();
        let model = model.valid();
        let folder = tempfile::tempdir().unwrap();
        SCENES.unpack(&folder).unwrap();
        let file = folder.path().join("lora.safetensors");
        lora.save(&model, &file).unwrap();
        let mut pipeline =
            StableDiffusionPipeline::<Flex>::from_pretrained(&folder, &Default::default()).unwrap();
        pipeline
            .set_adapters(&[Adapter::open(&file).unwrap()])
            .unwrap();
        let (before, expected) = (values(&model), values(&lora.merge(model)));
        let found = values(&pipeline.unet);
        let mut changed = 0;
        for ((before, expected), found) in before.iter().zip(&expected).zip(&found) {
            // Factors of up to 0.1 in `f16`.
            found.assert_approx_eq::<f32>(expected, Tolerance::absolute(5e-5));
            changed += usize::from(before != expected);
        }
        assert_eq!(changed, lora.layers.len());
    }
}
