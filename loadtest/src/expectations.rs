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

const RESET_OF_THE_GPU_ALONE: Expectation = Expectation {
    unavoidable: Some(
        "AllBlocksCleared names no tier: after a reset of the GPU alone every tier is cleared, which under-reports",
    ),
    max_inexact: 1,
    max_under: 9,
    ..EXACT
};

const UNRECOVERABLE_GAP: Expectation = Expectation {
    unavoidable: Some(
        "the lost events are in no replay buffer: what was held before is dropped, which under-reports",
    ),
    max_inexact: 2,
    max_under: 10,
    ..EXACT
};

const UNPUBLISHED_NAMESPACE: Expectation = Expectation {
    unavoidable: Some(
        "events do not carry the extra key, so its namespace cannot be found by a query that names it",
    ),
    max_under: 2,
    ..EXACT
};

/// By the recording's name: ending of the stem, expectation.
const KNOWN: [(&str, Expectation); 13] = [
    // The engine announced reused blocks again, so only the last removal counts.
    ("full_report", Expectation { removal: RemovalPolicy::LastCopy, ..EXACT }),
    (
        "vllm0330_extra_keys",
        Expectation {
            unavoidable: Some(
                "the engine hashes an adapter's path, events carry only its name: one name had two paths",
            ),
            max_over: 3,
            ..EXACT
        },
    ),
    (
        "vllm0112_extra_keys",
        Expectation {
            unavoidable: Some("before 0.14 events name no adapter, salt or item: such prompts find nothing"),
            max_under: 18,
            ..EXACT
        },
    ),
    (
        "vllm0112_hybrid_swa",
        Expectation {
            unavoidable: Some("before 0.20 events name no cache group: groups cannot be told apart"),
            max_over: 39,
            max_inexact: 5,
            wrong_blocks: true,
            ..EXACT
        },
    ),
    ("gap_replay", UNRECOVERABLE_GAP),
    (
        "poison_gap",
        Expectation {
            unavoidable: Some(
                "one batch was never encoded: what was held before is dropped, which under-reports",
            ),
            max_inexact: 3,
            max_under: 12,
            ..EXACT
        },
    ),
    ("offload_cpu", RESET_OF_THE_GPU_ALONE),
    ("offload_chunk4", RESET_OF_THE_GPU_ALONE),
    ("offload_placeholder", RESET_OF_THE_GPU_ALONE),
    ("simple_cpu", RESET_OF_THE_GPU_ALONE),
    ("simple_disk", RESET_OF_THE_GPU_ALONE),
    ("namespaces_default", UNPUBLISHED_NAMESPACE),
    ("namespaces_dynamo", UNPUBLISHED_NAMESPACE),
];

/// The expectation of a recording, by its file name.
pub(crate) fn expectation_of(path: &Path) -> Expectation {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.split('.').next().unwrap_or_default();
    KNOWN.iter().find(|(ending, _)| stem.ends_with(ending)).map_or(EXACT, |(_, expectation)| *expectation)
}

// === impl Expectation ===

impl Expectation {
    pub(crate) fn admits_wrong_blocks(&self, wrong: usize) -> bool {
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
