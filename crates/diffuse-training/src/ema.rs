//! An exponential moving average of a model's weights, which makes better samples.

use std::collections::VecDeque;

use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;
use burn::tensor::backend::{AutodiffBackend, Backend};

/// `average · decay + model · (1 - decay)`
pub fn update<B: AutodiffBackend, M: AutodiffModule<B>>(
    average: M::InnerModule,
    model: &M,
    decay: f64,
) -> M::InnerModule {
    let mut weights = Collect(VecDeque::new());
    model.valid().visit(&mut weights);
    average.map(&mut Blend {
        weights: weights.0,
        decay,
    })
}

/// The weights in the order of the model's fields, each flattened.
struct Collect<B: Backend>(VecDeque<Tensor<B, 1>>);

impl<B: Backend> ModuleVisitor<B> for Collect<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.0.push_back(param.val().flatten(0, D - 1));
    }
}

struct Blend<B: Backend> {
    weights: VecDeque<Tensor<B, 1>>,
    decay: f64,
}

impl<B: Backend> ModuleMapper<B> for Blend<B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let weight = self.weights.pop_front().expect("both have the same fields");
        param.map(|average| {
            let weight = weight.reshape(average.shape());
            average * self.decay + weight * (1.0 - self.decay)
        })
    }
}
