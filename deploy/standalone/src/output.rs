//! Writing results to standard output: a reader that went away (`| head`) ends the output, not the program with a panic.

use std::io::{self, Write as _};

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use serde::Serialize;

/// Prints one line.
pub fn line(text: &str) {
    // Nobody reads any more: that is the reader's choice, not a failure.
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// Says something that is not the result, on standard error.
pub fn note(text: &str) {
    // As above.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints a value as one line of JSON.
pub fn json(value: &impl Serialize) {
    line(&serde_json::to_string(value).expect("plain data serialises"));
}

/// A table in the project's look.
pub fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header.iter().copied());
    table
}
