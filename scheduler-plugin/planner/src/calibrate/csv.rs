//! Measurements as CSV, columns by the header's names.

use super::{MAX_ROWS, Row};

/// Of all rows, at most this share may be unusable: beyond it the file is something else than it seems.
pub const MAX_BAD_SHARE: f64 = 0.1;
/// Bad rows that are named; the others are counted.
pub const BAD_ROWS_NAMED: usize = 10;

const PROMPT: &[&str] = &["prompt_tokens", "prompt_size", "input_length"];
const CACHED: &[&str] = &["cached_tokens"];
const TTFT: &[&str] = &["ttft_ms", "prompt_time"];

/// What a file held.
#[derive(Clone, Debug, PartialEq)]
pub struct Parsed {
    /// Usable rows.
    pub rows: Vec<Row>,
    /// Rows that were skipped.
    pub skipped: usize,
    /// The first of them: line number (the header is 1) and what is wrong.
    pub bad: Vec<(usize, String)>,
}

/// A file cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CsvError {
    /// There is no such column.
    #[error("there is no column {}: the header has {header:?}", names.join(" or "))]
    Column {
        /// Its possible names.
        names: &'static [&'static str],
        /// The first line.
        header: String,
    },
    /// Too many rows are bad.
    #[error("{skipped} of {rows} rows cannot be used, first line {line}: {what}; at most 10 % may be so")]
    TooManyBad {
        /// How many.
        skipped: usize,
        /// Of how many.
        rows: usize,
        /// Line of the first one.
        line: usize,
        /// What is wrong there.
        what: String,
    },
    /// Too many rows.
    #[error("more than {MAX_ROWS} rows: give a sample")]
    TooManyRows,
}

struct Columns {
    prompt: usize,
    cached: Option<usize>,
    ttft: usize,
}

/// Reads a file of `prompt_tokens` (or `prompt_size`), `ttft_ms` (or `prompt_time`) and, if there is one, `cached_tokens`.
/// Other columns are ignored; commas within quotes are not understood.
pub fn parse(text: &str) -> Result<Parsed, CsvError> {
    let mut lines = text.trim_start_matches('\u{feff}').lines().enumerate();
    let header = lines.next().map_or("", |(_, line)| line);
    let find = |names: &[&str]| {
        header
            .split(',')
            .position(|name| names.contains(&name.trim().trim_matches('"').to_ascii_lowercase().as_str()))
    };
    let missing = |names| CsvError::Column { names, header: header.to_owned() };
    let columns = Columns {
        prompt: find(PROMPT).ok_or_else(|| missing(PROMPT))?,
        cached: find(CACHED),
        ttft: find(TTFT).ok_or_else(|| missing(TTFT))?,
    };
    let mut parsed = Parsed { rows: Vec::new(), skipped: 0, bad: Vec::new() };
    for (at, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
        match columns.row(line) {
            Ok(_) if parsed.rows.len() == MAX_ROWS => return Err(CsvError::TooManyRows),
            Ok(row) => parsed.rows.push(row),
            Err(what) => {
                parsed.skipped += 1;
                if parsed.bad.len() < BAD_ROWS_NAMED {
                    parsed.bad.push((at + 1, what));
                }
            }
        }
    }
    let rows = parsed.rows.len() + parsed.skipped;
    if parsed.skipped as f64 > MAX_BAD_SHARE * rows as f64 {
        let (line, what) = parsed.bad.swap_remove(0);
        return Err(CsvError::TooManyBad { skipped: parsed.skipped, rows, line, what });
    }
    Ok(parsed)
}

// === impl Columns ===

impl Columns {
    fn row(&self, line: &str) -> Result<Row, String> {
        let cell = |at: usize| line.split(',').nth(at).map(|cell| cell.trim().trim_matches('"'));
        let number = |at: usize, name: &str| {
            let text = cell(at).ok_or_else(|| format!("{name} is missing"))?;
            text.parse::<f64>().map_err(|_| format!("{name} {text:?} is not a number"))
        };
        let row = Row {
            prompt_tokens: number(self.prompt, "prompt tokens")?,
            cached_tokens: self.cached.map_or(Ok(0.0), |at| number(at, "cached tokens"))?,
            ttft_ms: number(self.ttft, "time")?,
        };
        if row.is_measurement() {
            return Ok(row);
        }
        Err(format!(
            "{} tokens, {} of them cached, in {} ms is no measurement",
            row.prompt_tokens, row.cached_tokens, row.ttft_ms
        ))
    }
}
