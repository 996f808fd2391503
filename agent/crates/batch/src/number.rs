//! Numbers as protocol buffers write them in JSON: 64-bit integers that may be strings, durations like `3.5s`.

use std::fmt;
use std::time::Duration;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The largest duration of protocol buffers, in seconds.
const LONGEST_S: u64 = 315_576_000_000;

/// A 64-bit integer: a JSON number, or a string of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Int64(pub i64);

impl Serialize for Int64 {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0.to_string())
    }
}

impl<'de> Deserialize<'de> for Int64 {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl Visitor<'_> for Reader {
            type Value = Int64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number, or a string of one")
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Int64, E> {
                Ok(Int64(value))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Int64, E> {
                i64::try_from(value).map(Int64).map_err(|error| E::custom(format!("{value}: {error}")))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Int64, E> {
                value
                    .parse()
                    .map(Int64)
                    .map_err(|error| E::custom(format!("`{value}` is not a whole number: {error}")))
            }
        }
        from.deserialize_any(Reader)
    }
}

/// A duration: seconds with at most nine decimals and an `s`, as in `3.5s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Seconds(pub Duration);

impl Seconds {
    /// Reads the form of protocol buffers; negative ones are of no use here and refused.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a duration: write seconds and an s, as in 3600s or 3.5s");
        let number = text.strip_suffix('s').ok_or_else(wrong)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
            return Err(wrong());
        }
        let seconds: u64 = whole.parse().map_err(|error| format!("{}: {error}", wrong()))?;
        let nanoseconds: u32 =
            format!("{fraction:0<9}").parse().map_err(|error| format!("{}: {error}", wrong()))?;
        if seconds > LONGEST_S {
            return Err(format!("`{text}` is longer than the longest duration, {LONGEST_S}s"));
        }
        Ok(Self(Duration::new(seconds, nanoseconds)))
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fraction = format!("{:09}", self.0.subsec_nanos());
        match fraction.trim_end_matches('0') {
            "" => write!(f, "{}s", self.0.as_secs()),
            fraction => write!(f, "{}.{fraction}s", self.0.as_secs()),
        }
    }
}

impl Serialize for Seconds {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [("3.5s", 3500), ("0s", 0), ("3600s", 3_600_000), ("0.000001s", 0), ("1.25s", 1250)]
        {
            let read = Seconds::parse(text).expect(text);
            assert_eq!(read.0.as_millis(), ms, "{text}");
            assert_eq!(read.to_string(), text);
        }
        for text in
            ["", "s", "3", "3.s", ".5s", "-1s", "1h", "1e3s", "0.0000000001s", "999999999999999s", "+1s"]
        {
            assert!(Seconds::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn integers_may_be_strings() {
        let read = |text| serde_json::from_str::<Int64>(text).map(|read| read.0).ok();
        assert_eq!(read("7"), Some(7));
        assert_eq!(read("\"7\""), Some(7));
        assert_eq!(read("1.5"), None);
        assert_eq!(read("\"x\""), None);
        assert_eq!(read("18446744073709551615"), None);
    }
}
