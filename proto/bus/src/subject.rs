//! Subjects and filters by the NATS rules, so that every bus refuses and matches the same things.
//!
//! Pure: no bus, no IO. It knows words, dots and wildcards; what kvatlas' own subjects mean is the contract crate's
//! business.

/// Longest subject or filter, in bytes. A NATS server closes the connection of a client whose protocol line exceeds
/// 4,096 bytes by default; the longest kvatlas subject stays below 600.
pub const MAX_SUBJECT_BYTES: usize = 1024;

/// The subject cannot be published to.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "cannot publish to subject {subject:?}: {reason}; use dot-separated words without wildcards or white space"
)]
pub struct InvalidSubjectError {
    /// What was given.
    pub subject: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// The filter cannot be subscribed to.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "cannot subscribe to {filter:?}: {reason}; use dot-separated words, * for one word, > as the last word for the rest"
)]
pub struct InvalidFilterError {
    /// What was given.
    pub filter: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// Says whether a message may be published to `subject`.
///
/// Wildcards are refused although a NATS server takes them literally: nobody means that.
pub fn check_subject(subject: &str) -> Result<(), InvalidSubjectError> {
    let wildcard = |word: &str| matches!(word, "*" | ">");
    let reason =
        words_problem(subject).or_else(|| subject.split('.').any(wildcard).then_some("it has a wildcard"));
    reason.map_or(Ok(()), |reason| Err(InvalidSubjectError { subject: subject.to_owned(), reason }))
}

/// Says whether `filter` may be subscribed to.
pub fn check_filter(filter: &str) -> Result<(), InvalidFilterError> {
    let mut words = filter.split('.');
    words.next_back();
    let reason =
        words_problem(filter).or_else(|| words.any(|w| w == ">").then_some("> is not its last word"));
    reason.map_or(Ok(()), |reason| Err(InvalidFilterError { filter: filter.to_owned(), reason }))
}

/// Whether a subscription to `filter` sees messages published to `subject`.
///
/// `*` stands for exactly one word, `>` (as the last word) for one or more; inside a word they mean themselves. Both
/// arguments should have passed [`check_filter`] and [`check_subject`]; for others the answer is unspecified.
pub fn subject_matches(filter: &str, subject: &str) -> bool {
    let mut words = subject.split('.');
    for wanted in filter.split('.') {
        match (wanted, words.next()) {
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (literal, Some(word)) if literal == word => {}
            _ => return false,
        }
    }
    words.next().is_none()
}

fn words_problem(subject: &str) -> Option<&'static str> {
    if subject.is_empty() {
        Some("it is empty")
    } else if subject.len() > MAX_SUBJECT_BYTES {
        Some("it is longer than 1024 bytes")
    } else if subject.split('.').any(str::is_empty) {
        Some("it has an empty word")
    } else if subject.chars().any(|c| c.is_whitespace() || c.is_control()) {
        Some("it has white space or a control character")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn filters_match_by_the_nats_rules() {
        for (filter, subject, expected) in [
            ("a.b", "a.b", true),
            ("a.b", "a", false),
            ("a.b", "a.b.c", false),
            ("a.b", "a.B", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b.*", "a.b.c", true),
            ("*.b.*", "a.c.c", false),
            ("a.>", "a.b", true),
            ("a.>", "a.b.c.d", true),
            ("a.>", "a", false),
            (">", "a", true),
            (">", "a.b", true),
            ("*.>", "a", false),
            ("*.>", "a.b", true),
            ("a*", "ab", false),
            ("a.b>", "a.bc", false),
        ] {
            assert_eq!(subject_matches(filter, subject), expected, "{filter} {subject}");
        }
    }

    #[test]
    fn unusable_subjects_are_refused() {
        let long = "x".repeat(MAX_SUBJECT_BYTES + 1);
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "a\n", "a.\u{0}", "a.*", ">", "*.b", &long] {
            assert!(check_subject(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "a.b", "a*b.c>d", "kvatlas.v1.ev.00000000000000ab.all.10=2E0.2"] {
            assert_eq!(check_subject(good), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn unusable_filters_are_refused() {
        for bad in ["", "a.", "a..>", ">.a", "a.>.b", "a b.>"] {
            assert!(check_filter(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "*", ">", "a.*.b", "a.*.>", "a*.b>"] {
            assert_eq!(check_filter(good), Ok(()), "{good:?}");
        }
    }

    proptest! {
        #[test]
        fn a_subject_matches_itself_and_every_generalisation(
            words in prop::collection::vec("[a-c]{1,2}", 1..6), stars in any::<u8>(), tail in 0_usize..6,
        ) {
            let subject = words.join(".");
            prop_assert!(subject_matches(&subject, &subject));
            let starred: Vec<&str> = words
                .iter()
                .enumerate()
                .map(|(i, word)| if stars >> i & 1 == 1 { "*" } else { word.as_str() })
                .collect();
            prop_assert!(subject_matches(&starred.join("."), &subject));
            let kept = tail.min(words.len() - 1);
            let filter = starred[..kept].iter().copied().chain([">"]).collect::<Vec<_>>().join(".");
            prop_assert!(subject_matches(&filter, &subject));
        }
    }
}
