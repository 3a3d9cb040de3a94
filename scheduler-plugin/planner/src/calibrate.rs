//! Prefill times from measurements: `T(m, h) = c0 + c1 m + c2 ((h + m)^2 - h^2)`.
//!
//! [`fit`] minimises the squares of *relative* errors: a prompt of 128 tokens counts as much as one of 8,192. No
//! coefficient is negative; with three of them, every choice of which are 0 is tried. Measure one request at a time: in
//! a loaded engine the time to first token contains the queue.
//!
//! Two places to get measurements from: [`csv`] (one row per request) and [`metrics`] (an engine's histograms, from which
//! only one factor on a known profile can be had).

pub mod csv;
pub mod metrics;

use crate::cost::prefill_ms;
use crate::profile::PrefillCost;

/// Fewest rows that a fit of three coefficients is made from: fewer would be fitted exactly and tell nothing.
pub const MIN_ROWS: usize = 6;
/// Most rows that are kept: an hour of a busy engine, 24 MB.
pub const MAX_ROWS: usize = 1_000_000;

/// One measured request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// Length of the prompt, tokens.
    pub prompt_tokens: f64,
    /// Of them, cached.
    pub cached_tokens: f64,
    /// Time to first token, ms, above 0.
    pub ttft_ms: f64,
}

/// A fit and how good it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// The coefficients.
    pub cost: PrefillCost,
    /// Rows that it was made from.
    pub rows: usize,
    /// Mean relative error, 0.05 is 5 %.
    pub mape: f64,
    /// Largest relative error.
    pub max_error: f64,
    /// By prompt length, short first.
    pub buckets: Vec<Bucket>,
}

/// Rows whose prompts have between `from` and twice as many tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    /// Shortest prompt, tokens; a power of two.
    pub from_tokens: u64,
    /// Rows in it.
    pub rows: usize,
    /// Mean relative error.
    pub mape: f64,
    /// Mean of (fitted - measured) / measured: above 0 the fit is too slow here.
    pub bias: f64,
}

/// Nothing can be fitted.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum FitError {
    /// Too few or too many rows.
    #[error("{0} rows: give {MIN_ROWS} to {MAX_ROWS}")]
    Rows(usize),
    /// A row is no measurement.
    #[error("row {0} is not a measurement: prompt and time must be above 0, cached tokens 0 to the prompt's")]
    Row(usize),
    /// All rows have the same size.
    #[error(
        "all rows have the same prompt and cached length: measure several lengths, best from 128 tokens to the longest"
    )]
    OneSize,
}

// === impl Row ===

impl Row {
    /// (1, new tokens, pairs): what the coefficients multiply.
    fn factors(&self) -> [f64; 3] {
        let new = self.prompt_tokens - self.cached_tokens;
        [1.0, new, self.prompt_tokens * self.prompt_tokens - self.cached_tokens * self.cached_tokens]
    }

    fn is_measurement(&self) -> bool {
        let all = [self.prompt_tokens, self.cached_tokens, self.ttft_ms];
        all.iter().all(|value| value.is_finite())
            && self.prompt_tokens > 0.0
            && self.ttft_ms > 0.0
            && (0.0..=self.prompt_tokens).contains(&self.cached_tokens)
    }
}

/// The coefficients that fit the rows best.
pub fn fit(rows: &[Row]) -> Result<Fit, FitError> {
    if !(MIN_ROWS..=MAX_ROWS).contains(&rows.len()) {
        return Err(FitError::Rows(rows.len()));
    }
    if let Some(bad) = rows.iter().position(|row| !row.is_measurement()) {
        return Err(FitError::Row(bad));
    }
    let size = |row: &Row| (row.prompt_tokens, row.cached_tokens);
    if rows.iter().all(|row| size(row) == size(&rows[0])) {
        return Err(FitError::OneSize);
    }
    // Sums of squares of the relative factors, scaled so that all columns are of one magnitude.
    let longest = rows.iter().map(|row| row.prompt_tokens).fold(1.0, f64::max);
    let scale = [1.0, longest, longest * longest];
    let (mut matrix, mut right) = ([[0.0; 3]; 3], [0.0; 3]);
    for row in rows {
        let factors = row.factors();
        let x: [f64; 3] = std::array::from_fn(|i| factors[i] / scale[i] / row.ttft_ms);
        for i in 0..3 {
            right[i] += x[i];
            (0..3).for_each(|j| matrix[i][j] += x[i] * x[j]);
        }
    }
    let loss = |c: &[f64; 3]| {
        let quadratic: f64 = (0..3).map(|i| (0..3).map(|j| c[i] * matrix[i][j] * c[j]).sum::<f64>()).sum();
        quadratic - 2.0 * (0..3).map(|i| c[i] * right[i]).sum::<f64>()
    };
    let candidates = (1_u8..8).filter_map(|used| solve(&matrix, &right, used));
    let feasible = candidates.filter(|c| c.iter().all(|&value| value >= 0.0 && value.is_finite()));
    let best = feasible.min_by(|a, b| loss(a).total_cmp(&loss(b))).ok_or(FitError::OneSize)?;
    let cost = PrefillCost {
        c0_ms: best[0] / scale[0],
        c1_ms_per_token: best[1] / scale[1],
        c2_ms_per_token2: best[2] / scale[2],
    };
    Ok(judge(cost, rows))
}

/// How good these coefficients are for these rows.
pub fn judge(cost: PrefillCost, rows: &[Row]) -> Fit {
    let error = |row: &Row| {
        let fitted = prefill_ms(&cost, row.prompt_tokens - row.cached_tokens, row.cached_tokens);
        (fitted - row.ttft_ms) / row.ttft_ms
    };
    let mut buckets: Vec<Bucket> = Vec::new();
    let (mut sum, mut max_error) = (0.0, 0.0_f64);
    for row in rows {
        let error = error(row);
        sum += error.abs();
        max_error = max_error.max(error.abs());
        let from_tokens = 1_u64 << (row.prompt_tokens.max(1.0) as u64).ilog2();
        let at =
            buckets.binary_search_by_key(&from_tokens, |bucket| bucket.from_tokens).unwrap_or_else(|at| {
                buckets.insert(at, Bucket { from_tokens, rows: 0, mape: 0.0, bias: 0.0 });
                at
            });
        buckets[at].rows += 1;
        buckets[at].mape += error.abs();
        buckets[at].bias += error;
    }
    for bucket in &mut buckets {
        bucket.mape /= bucket.rows as f64;
        bucket.bias /= bucket.rows as f64;
    }
    Fit { cost, rows: rows.len(), mape: sum / rows.len().max(1) as f64, max_error, buckets }
}

/// Least squares with the coefficients whose bit is set, the others 0. `None` if they cannot be told apart.
fn solve(matrix: &[[f64; 3]; 3], right: &[f64; 3], used: u8) -> Option<[f64; 3]> {
    // Unused rows become "c = 0".
    let mut a = [[0.0; 4]; 3];
    for i in 0..3 {
        let used_i = used >> i & 1 == 1;
        for j in 0..3 {
            let used_j = used >> j & 1 == 1;
            a[i][j] = if used_i && used_j { matrix[i][j] } else { f64::from(u8::from(i == j && !used_i)) };
        }
        a[i][3] = if used_i { right[i] } else { 0.0 };
    }
    for column in 0..3 {
        let pivot = (column..3).max_by(|&x, &y| a[x][column].abs().total_cmp(&a[y][column].abs()))?;
        a.swap(column, pivot);
        if a[column][column].abs() < SINGULAR * matrix[0][0].max(1e-300) {
            return None;
        }
        for row in 0..3 {
            if row != column {
                let factor = a[row][column] / a[column][column];
                (column..4).for_each(|at| a[row][at] -= factor * a[column][at]);
            }
        }
    }
    Some(std::array::from_fn(|i| a[i][3] / a[i][i]))
}

/// A pivot below this share of the sum of squares is rounding.
const SINGULAR: f64 = 1e-12;

#[cfg(test)]
#[path = "calibrate/tests.rs"]
mod tests;
