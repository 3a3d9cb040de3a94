//! Name patterns: `*` stands for any characters, everything else for itself; upper and lower case are the same.

/// How many characters of `pattern` other than `*` matched `name`, or `None` if it does not match. Of several patterns
/// the one with the largest number says the most about a name.
pub(crate) fn specificity(pattern: &str, name: &str) -> Option<usize> {
    let pattern = pattern.to_ascii_lowercase();
    let name = name.to_ascii_lowercase();
    matches(pattern.as_bytes(), name.as_bytes()).then(|| pattern.bytes().filter(|&b| b != b'*').count())
}

/// Greedy with one point of return, so linear in practice and quadratic at worst: names are short.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        if p < pattern.len() && pattern[p] == b'*' {
            retry = Some((p, n));
            p += 1;
        } else if p < pattern.len() && pattern[p] == name[n] {
            (p, n) = (p + 1, n + 1);
        } else if let Some((star, from)) = retry {
            (p, n) = (star + 1, from + 1);
            retry = Some((star, from + 1));
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|&b| b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_anything_and_case_does_not_matter() {
        for (pattern, name, expected) in [
            ("meta-llama/Llama-3.1-8B*", "meta-llama/llama-3.1-8b-instruct", Some(23)),
            ("*-8B", "a-8b-8B", Some(3)),
            ("*a*b", "xaxbxb", Some(2)),
            ("*a*b", "xaxbx", None),
            ("*", "", Some(0)),
            ("", "a", None),
            ("a", "ab", None),
        ] {
            assert_eq!(specificity(pattern, name), expected, "{pattern} {name}");
        }
    }
}
