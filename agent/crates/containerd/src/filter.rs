//! containerd's filter language, as `List` takes it: `labels."a.b"==x,parent~=^sha256`, alternatives in a list.

use thiserror::Error;

use crate::state::SnapshotInfo;

/// Filters longer than this are refused.
const MAX_FILTER_BYTES: usize = 64 << 10;

/// A filter cannot be understood.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FilterError {
    /// Its form is wrong.
    #[error("filter `{filter}`: {reason} at byte {at}")]
    Syntax {
        /// The filter.
        filter: String,
        /// What is wrong.
        reason: &'static str,
        /// Where.
        at: usize,
    },
    /// It is longer than any filter needs to be.
    #[error("the filter has {0} bytes, more than 65536")]
    TooLong(usize),
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Condition {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// containerd takes a Go regular expression here; what is supported are literal characters between `^` and `$`.
    Matches(String),
}

/// Snapshots that fulfil all conditions of any of several filters; all snapshots if there are none.
#[derive(Debug, Clone, Default)]
pub(crate) struct Filters(Vec<Vec<Condition>>);

impl Filters {
    pub(crate) fn parse(texts: &[String]) -> Result<Self, FilterError> {
        texts.iter().map(|text| Parser::new(text)?.filter()).collect::<Result<_, _>>().map(Self)
    }

    pub(crate) fn admit(&self, info: &SnapshotInfo) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|one| one.holds(info)))
    }
}

impl Condition {
    fn holds(&self, info: &SnapshotInfo) -> bool {
        let path: Vec<&str> = self.path.iter().map(String::as_str).collect();
        let (value, present) = match path.as_slice() {
            ["name"] => (info.name.clone(), !info.name.is_empty()),
            ["parent"] => (info.parent.clone(), !info.parent.is_empty()),
            ["kind"] => (info.kind.name().to_owned(), true),
            ["labels", rest @ ..] if !rest.is_empty() => {
                let label = info.labels.get(&rest.join("."));
                (label.cloned().unwrap_or_default(), label.is_some())
            }
            _ => (String::new(), false),
        };
        match &self.test {
            Test::Present => present,
            Test::Equal(wanted) => present && value == *wanted || !present && wanted.is_empty(),
            Test::NotEqual(other) => value != *other,
            Test::Matches(pattern) => present && matches(pattern, &value),
        }
    }
}

/// A literal pattern, anchored where it says so.
fn matches(pattern: &str, value: &str) -> bool {
    let (pattern, start) = pattern.strip_prefix('^').map_or((pattern, false), |rest| (rest, true));
    let (pattern, end) = pattern.strip_suffix('$').map_or((pattern, false), |rest| (rest, true));
    match (start, end) {
        (true, true) => value == pattern,
        (true, false) => value.starts_with(pattern),
        (false, true) => value.ends_with(pattern),
        (false, false) => value.contains(pattern),
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Result<Self, FilterError> {
        if text.len() > MAX_FILTER_BYTES {
            return Err(FilterError::TooLong(text.len()));
        }
        Ok(Self { text, at: 0 })
    }

    fn filter(mut self) -> Result<Vec<Condition>, FilterError> {
        let mut conditions = Vec::new();
        if self.text.is_empty() {
            return Ok(conditions);
        }
        loop {
            conditions.push(self.condition()?);
            if self.rest().is_empty() {
                return Ok(conditions);
            }
            if !self.eat(",") {
                return Err(self.fail("a comma is missing"));
            }
        }
    }

    fn condition(&mut self) -> Result<Condition, FilterError> {
        let mut path = vec![self.field()?];
        while self.eat(".") {
            path.push(self.field()?);
        }
        let test = if self.eat("==") {
            Test::Equal(self.value()?)
        } else if self.eat("!=") {
            Test::NotEqual(self.value()?)
        } else if self.eat("~=") {
            let value = self.value()?;
            let inner = value.strip_prefix('^').unwrap_or(&value);
            let inner = inner.strip_suffix('$').unwrap_or(inner);
            if inner.contains(['\\', '.', '*', '+', '?', '(', '[', '{', '|', '^', '$']) {
                return Err(self.fail("only literal patterns, with ^ and $, are supported"));
            }
            Test::Matches(value)
        } else {
            Test::Present
        };
        Ok(Condition { path, test })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        if self.rest().starts_with('"') {
            return self.quoted();
        }
        let len = self
            .rest()
            .find(|char: char| !char.is_ascii_alphanumeric() && !matches!(char, '_' | '-'))
            .unwrap_or(self.rest().len());
        if len == 0 {
            return Err(self.fail("a field's name is missing"));
        }
        Ok(self.take(len))
    }

    fn value(&mut self) -> Result<String, FilterError> {
        if self.rest().starts_with('"') {
            return self.quoted();
        }
        let len = self.rest().find(',').unwrap_or(self.rest().len());
        Ok(self.take(len))
    }

    /// Go's quoted strings, as `%q` writes them.
    fn quoted(&mut self) -> Result<String, FilterError> {
        let mut value = String::new();
        let mut chars = self.rest().char_indices().skip(1);
        while let Some((index, char)) = chars.next() {
            match char {
                '"' => {
                    self.at += index + 1;
                    return Ok(value);
                }
                '\\' => match chars.next().map(|(_, escaped)| escaped) {
                    Some('n') => value.push('\n'),
                    Some('t') => value.push('\t'),
                    Some(escaped @ ('"' | '\\' | '/')) => value.push(escaped),
                    _ => return Err(self.fail("an escape is not understood")),
                },
                other => value.push(other),
            }
        }
        Err(self.fail("a quotation mark is missing"))
    }

    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn take(&mut self, len: usize) -> String {
        let taken = self.rest().get(..len).unwrap_or_default().to_owned();
        self.at += len;
        taken
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn fail(&self, reason: &'static str) -> FilterError {
        FilterError::Syntax { filter: self.text.to_owned(), reason, at: self.at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Kind;

    fn info() -> SnapshotInfo {
        let labels = [("containerd.io/snapshot.ref", "sha256:abc"), ("plain", "x")];
        SnapshotInfo {
            name: "k".into(),
            parent: "default/1/p".into(),
            kind: Kind::Committed,
            labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            created: Default::default(),
            updated: Default::default(),
        }
    }

    #[test]
    fn filters_decide() {
        for (filter, admitted) in [
            // What containerd's metadata store asks after an "already exists".
            (r#"labels."containerd.io/snapshot.ref"==sha256:abc,parent=="default/1/p""#, true),
            (r#"labels."containerd.io/snapshot.ref"==sha256:abc,parent=="""#, false),
            ("kind==committed", true),
            ("kind!=committed", false),
            ("name==k,labels.plain", true),
            ("labels.missing", false),
            ("labels.plain!=y", true),
            ("parent~=^default/", true),
            ("parent~=^x", false),
            ("nonsense==1", false),
            ("", true),
        ] {
            let filters = Filters::parse(&[filter.to_owned()]).expect(filter);
            assert_eq!(filters.admit(&info()), admitted, "{filter}");
        }
        let either = Filters::parse(&["name==other".to_owned(), "name==k".to_owned()]).expect("valid");
        assert!(either.admit(&info()));
        assert!(Filters::default().admit(&info()));
    }

    #[test]
    fn broken_filters_are_refused() {
        for filter in ["==x", "name==\"x", "name=x", ",", "name~=a.*b"] {
            assert!(Filters::parse(&[filter.to_owned()]).is_err(), "{filter}");
        }
    }
}
