//! What each of our recordings can be expected to show, and why differences are unavoidable where they are.
//!
//! A difference that is not listed here fails the check. Limits are counts, so that a listed cause cannot hide another.

use std::path::Path;

use kvatlas_shim::mirror::RemovalPolicy;

use crate::check::FileReport;

/// What a recording needs and may show.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expectation {
    /// Setting of the engine that was recorded.
    pub removal: RemovalPolicy,
    /// Why something differs; `None`: nothing may.
    pub unavoidable: Option<&'static str>,
    /// Answers that may exceed the engine's.
    pub max_over: usize,
    /// Answers that may stay below the engine's.
    pub max_under: usize,
    /// Checkpoints whose sets may differ.
    pub max_inexact: usize,
    /// Whether sets may hold blocks that the engine does not.
    pub wrong_blocks: bool,
}

const EXACT: Expectation = Expectation {
    removal: RemovalPolicy::PerCopy,
    unavoidable: None,
    max_over: 0,
    max_under: 0,
    max_inexact: 0,
    wrong_blocks: false,
};

/// By the recording's name: ending of the stem, expectation.
const KNOWN: [(&str, Expectation); 1] = [(
    "full_report",
    // The engine announced reused blocks again, so only the last removal counts.
    Expectation { removal: RemovalPolicy::LastCopy, ..EXACT },
)];

/// The expectation of a recording, by its file name.
pub(crate) fn expectation_of(path: &Path) -> Expectation {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.split('.').next().unwrap_or_default();
    KNOWN.iter().find(|(ending, _)| stem.ends_with(ending)).map_or(EXACT, |(_, expectation)| *expectation)
}

// === impl Expectation ===

impl Expectation {
    pub(crate) fn admits_blocks(&self, _missing: usize, wrong: usize) -> bool {
        self.unavoidable.is_some() && (wrong == 0 || self.wrong_blocks)
    }

    pub(crate) fn admits_probe(&self, over: bool) -> bool {
        if over { self.max_over > 0 } else { self.max_under > 0 }
    }

    pub(crate) fn admits(&self, report: &FileReport) -> bool {
        report.over <= self.max_over
            && report.under <= self.max_under
            && report.checkpoints - report.checkpoints_exact <= self.max_inexact
    }
}
