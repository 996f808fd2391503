//! Patterns with stars, of image references and host names.

/// Whether `text` fits a pattern in which `*` stands for any characters.
pub(crate) fn fits(pattern: &str, text: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let mut pieces: Vec<&str> = pieces.collect();
    let Some(last) = pieces.pop() else { return rest.is_empty() };
    for piece in pieces {
        let Some((_, after)) = rest.split_once(piece) else { return false };
        rest = after;
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, text, wanted) in [
            ("*", "registry.example/app:1", true),
            ("registry.example/*", "registry.example/team/app:1", true),
            ("registry.example/*", "other.example/app:1", false),
            ("*/app:*", "registry.example/team/app:1", true),
            ("*:latest", "registry.example/app:1", false),
            ("registry.example/app:1", "registry.example/app:1", true),
            ("registry.example/app:1", "registry.example/app:12", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(fits(pattern, text), wanted, "{pattern} {text}");
        }
    }
}
