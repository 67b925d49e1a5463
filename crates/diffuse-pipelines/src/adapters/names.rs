//! What adapters call the modules of a model, and what they call the tensors of a module.

/// A component that adapters change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdaptedComponent {
    /// The UNet.
    Unet,
    /// The text encoder.
    TextEncoder,
}

impl AdaptedComponent {
    /// The component's name in a pipeline.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unet => "unet",
            Self::TextEncoder => "text_encoder",
        }
    }
}

/// What a tensor of an adapter is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Attribute {
    /// `A` of LoRA: `[rank, inputs, ...]`.
    Down,
    /// `B` of LoRA: `[outputs, rank, ...]`.
    Up,
    /// The core of a Tucker decomposition: `[rank, rank, height, width]`.
    Mid,
    /// What the rank is divided by: the scale is `alpha / rank`.
    Alpha,
    /// DoRA's magnitudes as LyCORIS stores them: of outputs or of inputs.
    DoraScale,
    /// DoRA's magnitudes as PEFT stores them: of outputs.
    Magnitude,
    /// LoHa's factors and cores.
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    HadaT1,
    HadaT2,
    /// LoKr's factors, whole or factored, and its core.
    LokrW1,
    LokrW1A,
    LokrW1B,
    LokrW2,
    LokrW2A,
    LokrW2B,
    LokrT2,
    /// GLoRA's factors.
    GloraA1,
    GloraA2,
    GloraB1,
    GloraB2,
    /// The whole difference of a weight or bias.
    Difference,
    BiasDifference,
    /// The same of a normalisation.
    NormWeight,
    NormBias,
    /// No tensor of any form.
    Unknown,
}

/// Ends of keys; the longer of two that fit comes first.
const ATTRIBUTES: [(&str, Attribute); 43] = {
    use Attribute::*;
    [
        (".lora_down.weight", Down),
        (".lora_up.weight", Up),
        (".lora_mid.weight", Mid),
        (".lora_A.default.weight", Down),
        (".lora_B.default.weight", Up),
        (".lora_A.weight", Down),
        (".lora_B.weight", Up),
        (".lora.down.weight", Down),
        (".lora.up.weight", Up),
        (".lora_linear_layer.down.weight", Down),
        (".lora_linear_layer.up.weight", Up),
        ("_lora.down.weight", Down),
        ("_lora.up.weight", Up),
        (".alpha", Alpha),
        (".dora_scale", DoraScale),
        (".lora_magnitude_vector.default.weight", Magnitude),
        (".lora_magnitude_vector.weight", Magnitude),
        (".lora_magnitude_vector.default", Magnitude),
        (".lora_magnitude_vector", Magnitude),
        (".hada_w1_a", HadaW1A),
        (".hada_w1_b", HadaW1B),
        (".hada_w2_a", HadaW2A),
        (".hada_w2_b", HadaW2B),
        (".hada_t1", HadaT1),
        (".hada_t2", HadaT2),
        (".lokr_w1", LokrW1),
        (".lokr_w1_a", LokrW1A),
        (".lokr_w1_b", LokrW1B),
        (".lokr_w2", LokrW2),
        (".lokr_w2_a", LokrW2A),
        (".lokr_w2_b", LokrW2B),
        (".lokr_t2", LokrT2),
        (".a1.weight", GloraA1),
        (".a2.weight", GloraA2),
        (".b1.weight", GloraB1),
        (".b2.weight", GloraB2),
        (".diff", Difference),
        (".diff_b", BiasDifference),
        (".w_norm", NormWeight),
        (".b_norm", NormBias),
        (".set_weight", Unknown),
        (".reshape_weight", Unknown),
        (".lora_B.bias", Unknown),
    ]
};

/// A key as the module's name and what the tensor is to it.
pub fn split_key(key: &str) -> Option<(&str, Attribute)> {
    ATTRIBUTES
        .iter()
        .find_map(|(end, attribute)| Some((key.strip_suffix(end)?, *attribute)))
}

/// Every name that a file may give to a module; `original` is its name in the original layout.
pub fn names(component: AdaptedComponent, module: &str, original: Option<&str>) -> Vec<String> {
    let mut dotted = vec![module.to_string()];
    let mut prefixes: Vec<&str> = vec!["lycoris_"];
    match component {
        AdaptedComponent::Unet => {
            // Attention processors: `attn1.processor.to_out` for `attn1.to_out.0`.
            for layer in ["to_q", "to_k", "to_v", "to_out.0"] {
                if let Some(attention) = module.strip_suffix(layer) {
                    let layer = layer.trim_end_matches(".0");
                    dotted.push(format!("{attention}processor.{layer}"));
                }
            }
            prefixes.push("lora_unet_");
        }
        AdaptedComponent::TextEncoder => {
            for (projection, layer) in [
                ("q_proj", "to_q"),
                ("k_proj", "to_k"),
                ("v_proj", "to_v"),
                ("out_proj", "to_out"),
            ] {
                if let Some(attention) = module.strip_suffix(projection) {
                    dotted.push(format!("{attention}{layer}"));
                }
            }
            if let Some(short) = module.strip_prefix("text_model.") {
                dotted.push(short.to_string());
            }
            prefixes.extend(["lora_te_", "lora_te1_"]);
        }
    }
    let mut names = Vec::new();
    for name in &dotted {
        let component = component.name();
        names.push(format!("{component}.{name}"));
        names.push(format!("base_model.model.{name}"));
        names.push(format!("{component}.base_model.model.{name}"));
        names.push(name.clone());
    }
    for name in [Some(module), original].into_iter().flatten() {
        let flat = name.replace('.', "_");
        names.extend(prefixes.iter().map(|prefix| format!("{prefix}{flat}")));
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_split() {
        let check = |key: &str, module: &str, attribute| {
            assert_eq!(split_key(key), Some((module, attribute)));
        };
        check(
            "unet.a.to_q.lora_A.default.weight",
            "unet.a.to_q",
            Attribute::Down,
        );
        check(
            "a.processor.to_q_lora.up.weight",
            "a.processor.to_q",
            Attribute::Up,
        );
        check("lora_unet_a.lokr_w1_b", "lora_unet_a", Attribute::LokrW1B);
        check(
            "lora_unet_a.diff_b",
            "lora_unet_a",
            Attribute::BiasDifference,
        );
        assert_eq!(split_key("unet.a.weight"), None);
    }

    #[test]
    fn one_module_has_many_names() {
        let names = names(
            AdaptedComponent::Unet,
            "down_blocks.0.attentions.0.proj_out",
            Some("input_blocks.1.1.proj_out"),
        );
        let expected = [
            "unet.down_blocks.0.attentions.0.proj_out",
            "base_model.model.down_blocks.0.attentions.0.proj_out",
            "unet.base_model.model.down_blocks.0.attentions.0.proj_out",
            "down_blocks.0.attentions.0.proj_out",
            "lycoris_down_blocks_0_attentions_0_proj_out",
            "lora_unet_down_blocks_0_attentions_0_proj_out",
            "lycoris_input_blocks_1_1_proj_out",
            "lora_unet_input_blocks_1_1_proj_out",
        ];
        assert_eq!(names, expected);
    }
}
