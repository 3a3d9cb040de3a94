use super::*;

#[test]
fn shipped_documents_are_right_and_sizes_are_those_of_the_table() {
    let shipped = Profiles::shipped();
    for (model, bytes) in [
        ("meta-llama/Llama-3.1-8B-Instruct", 131_072.0),
        ("meta-llama/Llama-3.1-70B-Instruct", 327_680.0),
        ("meta-llama/Llama-3.1-405B", 516_096.0),
        ("Qwen/Qwen3-8B", 147_456.0),
        ("Qwen/Qwen3-32B", 262_144.0),
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", 98_304.0),
        ("Qwen/Qwen3-235B-A22B", 192_512.0),
        ("deepseek-ai/DeepSeek-V3", 70_272.0),
        ("deepseek-ai/DeepSeek-R1", 70_272.0),
        ("moonshotai/Kimi-K2-Instruct", 70_272.0),
        ("openai/gpt-oss-120b", 73_728.0),
        ("meta-llama/Llama-2-70b-chat-hf", 327_680.0),
        ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", 327_680.0),
    ] {
        let profile = shipped.model_for(model).unwrap_or_else(|| panic!("{model}"));
        assert_eq!(profile.bytes_per_token(), bytes, "{model}");
    }
}

#[test]
fn sizes_follow_from_layers_and_heads() {
    // 2 * layers * kv heads * head dimension * 2 bytes, the dimension being 64 for gpt-oss and 128 elsewhere; 576 values
    // a layer for latent attention.
    for model in Profiles::shipped().models {
        let (layers, heads) = (f64::from(model.layers), f64::from(model.kv_heads));
        let expected = if model.groups[0].replicated {
            layers * 576.0 * 2.0
        } else {
            4.0 * layers * heads * if model.name == "gpt-oss-120b" { 64.0 } else { 128.0 }
        };
        assert_eq!(model.bytes_per_token(), expected, "{}", model.name);
    }
}

#[test]
fn an_unknown_field_is_refused_with_what_is_allowed() {
    let mut profiles = Profiles::shipped();
    let error = profiles.extend("mine.toml", "[[model]]\nname = 'x'\nlayer = 3").unwrap_err().to_string();
    assert!(
        error.contains("mine.toml") && error.contains("`layer`") && error.contains("`layers`"),
        "{error}"
    );
}

#[test]
fn a_number_out_of_range_is_named_and_nothing_is_changed() {
    let mut profiles = Profiles::shipped();
    let text = "[[engine]]\nname = 'bad'\nprefill = { c0_ms = -1.0, c1_ms_per_token = 0.1, c2_ms_per_token2 = 0.0 }\n\
                decode = { base_ms = 1.0, per_request_ms = 0.0 }";
    let error = profiles.extend("mine.toml", text).unwrap_err().to_string();
    assert_eq!(error, "mine.toml: engine bad: prefill.c0_ms is -1: give a finite number of at least 0");
    assert!(profiles.engine("bad").is_none());
}

#[test]
fn a_wider_link_class_must_not_be_faster() {
    let text = "[links]\nisland = { alpha_ms = 0.1, gb_per_s = 10 }\nnode = { alpha_ms = 0.1, gb_per_s = 50 }\n\
                rack = { alpha_ms = 1, gb_per_s = 1 }\nzone = { alpha_ms = 1, gb_per_s = 1 }\n\
                other = { alpha_ms = 1, gb_per_s = 1 }";
    let error = Profiles::shipped().extend("l.toml", text).unwrap_err().to_string();
    assert!(error.contains("links.node") && error.contains("links.island"), "{error}");
}

#[test]
fn what_nobody_configured_is_assumed_and_said() {
    let shipped = Profiles::shipped();
    let costs = shipped.resolve("acme/unheard-of", None).unwrap();
    assert_eq!(costs.model.name, FALLBACK_MODEL);
    assert_eq!(costs.assumptions.len(), 4, "{:?}", costs.assumptions);
    assert!(costs.assumptions[0].contains("acme/unheard-of"));
    let named = shipped.resolve("meta-llama/Llama-2-70b-hf", Some("llama-2-70b/a100-tp8")).unwrap();
    assert_eq!(named.engine.prefill.c1_ms_per_token, 0.0862);
    assert_eq!(named.assumptions.len(), 1, "{:?}", named.assumptions);
}

#[test]
fn an_engine_measured_with_another_model_is_scaled_to_this_one() {
    let costs = Profiles::shipped().resolve("meta-llama/Llama-3.1-8B", Some("llama-2-70b/h100-tp4")).unwrap();
    let prefill = costs.engine.prefill;
    assert!((prefill.c1_ms_per_token - 0.0604 * 8.0 / 69.0).abs() < 1e-9);
    assert!((prefill.c2_ms_per_token2 - 7.31e-6 * 0.2).abs() < 1e-12);
    assert!(costs.assumptions.iter().any(|said| said.contains("scaled")), "{:?}", costs.assumptions);
}

#[test]
fn an_unknown_profile_is_refused_with_what_there_is() {
    let error = Profiles::shipped().resolve("x", Some("nope")).unwrap_err().to_string();
    assert!(error.contains("nope") && error.contains(FALLBACK_ENGINE), "{error}");
}

#[test]
fn the_most_specific_pattern_wins() {
    let mut profiles = Profiles::shipped();
    let own = "[[model]]\nname = 'own'\nmodels = ['meta-llama/Llama-3.1-8B-Instruct-Long*']\nlayers = 1\nkv_heads = 1\n\
               query_width = 1\nactive_params_b = 1\ngroup = [{ bytes_per_token = 4 }]";
    profiles.extend("own.toml", own).unwrap();
    assert_eq!(profiles.model_for("META-LLAMA/llama-3.1-8b-instruct-longer").unwrap().name, "own");
    assert_eq!(profiles.model_for("meta-llama/Llama-3.1-8B-Instruct").unwrap().name, "llama-3.1-8b");
}
