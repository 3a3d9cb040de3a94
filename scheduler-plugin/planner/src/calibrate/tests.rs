use super::*;

const A100_TP2: PrefillCost = PrefillCost { c0_ms: 38.5, c1_ms_per_token: 0.310, c2_ms_per_token2: 6.89e-6 };
const H100_TP8: PrefillCost = PrefillCost { c0_ms: 46.5, c1_ms_per_token: 0.0219, c2_ms_per_token2: 1.05e-5 };

/// The sizes that Splitwise measured, five times each, with noise of the given share.
fn rows(cost: &PrefillCost, noise: f64) -> Vec<Row> {
    let mut seed = 1_u64;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 11) as f64 / (1_u64 << 53) as f64 * 2.0 - 1.0
    };
    let sizes = [128.0, 256.0, 512.0, 1_024.0, 2_048.0, 4_096.0, 8_192.0];
    let repeated = sizes.iter().flat_map(|&size| std::iter::repeat_n(size, 5));
    repeated
        .map(|prompt_tokens| Row {
            prompt_tokens,
            cached_tokens: 0.0,
            ttft_ms: prefill_ms(cost, prompt_tokens, 0.0) * (1.0 + noise * random()),
        })
        .collect()
}

#[test]
fn published_coefficients_are_found_again_without_noise() {
    for cost in [A100_TP2, H100_TP8] {
        let found = fit(&rows(&cost, 0.0)).unwrap();
        assert!((found.cost.c0_ms / cost.c0_ms - 1.0).abs() < 1e-6, "{found:?}");
        assert!((found.cost.c2_ms_per_token2 / cost.c2_ms_per_token2 - 1.0).abs() < 1e-6, "{found:?}");
        assert!(found.mape < 1e-9 && found.max_error < 1e-9, "{found:?}");
    }
}

#[test]
fn noise_is_reported_as_error_and_coefficients_stay_near() {
    let found = fit(&rows(&H100_TP8, 0.2)).unwrap();
    assert!((0.05..0.15).contains(&found.mape), "{found:?}");
    assert!(found.max_error <= 0.35, "{found:?}");
    assert!((found.cost.c0_ms / H100_TP8.c0_ms - 1.0).abs() < 0.3, "{found:?}");
    assert_eq!(found.buckets.len(), 7);
    assert_eq!(found.buckets.iter().map(|bucket| bucket.rows).sum::<usize>(), found.rows);
}

#[test]
fn no_coefficient_is_negative() {
    // Faster than linear: an unbounded fit would make c2 negative.
    let rows: Vec<Row> = (1..=10)
        .map(|i| Row {
            prompt_tokens: f64::from(i) * 500.0,
            cached_tokens: 0.0,
            ttft_ms: f64::from(i).sqrt() * 100.0,
        })
        .collect();
    let cost = fit(&rows).unwrap().cost;
    assert!(cost.c0_ms >= 0.0 && cost.c1_ms_per_token >= 0.0 && cost.c2_ms_per_token2 >= 0.0, "{cost:?}");
}

#[test]
fn cached_tokens_are_told_from_new_ones() {
    let mut rows = rows(&A100_TP2, 0.0);
    for (at, row) in rows.iter_mut().enumerate() {
        row.cached_tokens = row.prompt_tokens * (at % 5) as f64 / 5.0;
        row.ttft_ms = prefill_ms(&A100_TP2, row.prompt_tokens - row.cached_tokens, row.cached_tokens);
    }
    let found = fit(&rows).unwrap();
    assert!((found.cost.c1_ms_per_token / A100_TP2.c1_ms_per_token - 1.0).abs() < 1e-6, "{found:?}");
}

#[test]
fn what_cannot_be_fitted_is_refused_with_what_to_do() {
    let one = Row { prompt_tokens: 100.0, cached_tokens: 0.0, ttft_ms: 5.0 };
    assert_eq!(fit(&[one; 3]), Err(FitError::Rows(3)));
    assert_eq!(fit(&[one; 10]), Err(FitError::OneSize));
    let mut rows = rows(&A100_TP2, 0.0);
    rows[4].ttft_ms = 0.0;
    assert_eq!(fit(&rows), Err(FitError::Row(4)));
}

#[test]
fn columns_are_found_by_name_and_bad_rows_by_line() {
    let mut text = "model,prompt_size,prompt_time\n".to_owned();
    text.extend((1..=30).map(|i| format!("m,{},{}\n", i * 100, i * 10)));
    text += "m,abc,3\n";
    let parsed = csv::parse(&text).unwrap();
    assert_eq!((parsed.rows.len(), parsed.skipped), (30, 1));
    assert_eq!(parsed.bad, [(32, "prompt tokens \"abc\" is not a number".to_owned())]);
    assert_eq!(parsed.rows[1], Row { prompt_tokens: 200.0, cached_tokens: 0.0, ttft_ms: 20.0 });
}

#[test]
fn a_file_that_is_mostly_bad_is_refused() {
    let error = csv::parse("prompt_tokens,cached_tokens,ttft_ms\n10,20,5\n10,0,5\n").unwrap_err();
    assert!(matches!(error, csv::CsvError::TooManyBad { skipped: 1, rows: 2, line: 2, .. }), "{error}");
    assert!(csv::parse("a,b\n1,2\n").unwrap_err().to_string().contains("prompt_tokens or prompt_size"));
}

/// An engine that took 0.2 s for each of n prompts of 1,000 tokens, 400 of them cached.
fn scrape(n: u32, prefill: bool) -> String {
    let name = if prefill { "request_prefill_time_seconds" } else { "time_to_first_token_seconds" };
    let f = f64::from(n);
    format!(
        "# HELP x\nvllm:{name}_bucket{{le=\"0.1\",model_name=\"m\"}} 0\nvllm:{name}_bucket{{le=\"0.3\",model_name=\"m\"}} {n}\n\
         vllm:{name}_bucket{{le=\"+Inf\",model_name=\"m\"}} {n}\nvllm:{name}_count{{model_name=\"m\"}} {n}\n\
         vllm:{name}_sum{{model_name=\"m\"}} {}\nvllm:request_prompt_tokens_count{{model_name=\"m\"}} {n}\n\
         vllm:request_prompt_tokens_sum{{model_name=\"m\"}} {}\nvllm:prefix_cache_hits_total{{model_name=\"m\"}} {}\n",
        f * 0.2,
        f * 1_000.0,
        f * 400.0
    )
}

#[test]
fn two_scrapes_give_one_factor_and_its_uncertainty() {
    let base = PrefillCost { c0_ms: 40.0, c1_ms_per_token: 0.1, c2_ms_per_token2: 0.0 };
    let scale = metrics::scale(&scrape(10, true), &scrape(110, true), &base).unwrap();
    assert!((scale.factor - 2.0).abs() < 1e-9, "{scale:?}");
    assert!((scale.mean_cached_tokens - 400.0).abs() < 1e-9 && scale.requests == 100.0, "{scale:?}");
    assert!((scale.cost.c1_ms_per_token - 0.2).abs() < 1e-9, "{scale:?}");
    assert!(scale.uncertainty < 0.01 && scale.remarks.len() == 1, "{scale:?}");
    let only_ttft = metrics::scale(&scrape(10, false), &scrape(110, false), &base).unwrap();
    assert!(only_ttft.remarks[0].contains("upper bound"), "{only_ttft:?}");
}

#[test]
fn a_restart_between_scrapes_is_refused() {
    let base = A100_TP2;
    let restarted = metrics::scale(&scrape(110, true), &scrape(10, true), &base).unwrap_err();
    assert!(matches!(restarted, metrics::MetricsError::Restarted(_)), "{restarted}");
    assert!(matches!(
        metrics::scale("", &scrape(10, true), &base),
        Err(metrics::MetricsError::Requests(10.0))
    ));
    assert!(matches!(metrics::scale("", "", &base), Err(metrics::MetricsError::Missing(_))));
}
