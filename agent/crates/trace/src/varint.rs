//! Numbers of variable length: seven bits per byte, the lowest first; the highest bit says that more follow.

/// What is read ends early, or is no number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Appends a number.
pub(crate) fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7F) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends a number that may be negative, small ones of both signs short.
pub(crate) fn put_signed(out: &mut Vec<u8>, number: i64) {
    put(out, (number.wrapping_shl(1) ^ (number >> 63)) as u64);
}

/// Appends bytes and, before them, how many.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// Bytes being read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> Result<u8, Malformed> {
        let (first, rest) = self.0.split_first().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*first)
    }

    pub(crate) fn number(&mut self) -> Result<u64, Malformed> {
        let mut number = 0_u64;
        for place in 0..10 {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7F);
            // The tenth byte has room for one bit.
            if place == 9 && bits > 1 {
                return Err(Malformed);
            }
            number |= bits << (place * 7);
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err(Malformed)
    }

    pub(crate) fn signed(&mut self) -> Result<i64, Malformed> {
        let number = self.number()?;
        Ok((number >> 1) as i64 ^ -((number & 1) as i64))
    }

    /// A number of at most `max`.
    pub(crate) fn at_most(&mut self, max: u64) -> Result<u64, Malformed> {
        self.number().and_then(|number| if number <= max { Ok(number) } else { Err(Malformed) })
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        u32::try_from(self.number()?).map_err(|_range| Malformed)
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    /// At most `max` bytes.
    pub(crate) fn bytes(&mut self, max: usize) -> Result<&'a [u8], Malformed> {
        let len = self.at_most(max as u64)?;
        self.take(len as usize)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_come_back(number: u64, signed: i64, bytes: Vec<u8>) {
            let mut out = Vec::new();
            put(&mut out, number);
            put_signed(&mut out, signed);
            put_bytes(&mut out, &bytes);
            let mut input = Input(&out);
            prop_assert_eq!(input.number(), Ok(number));
            prop_assert_eq!(input.signed(), Ok(signed));
            prop_assert_eq!(input.bytes(bytes.len()), Ok(bytes.as_slice()));
            prop_assert!(input.is_empty());
        }

        #[test]
        fn whatever_is_read_comes_to_an_end(bytes: Vec<u8>) {
            let mut input = Input(&bytes);
            while input.number().is_ok() {}
            prop_assert!(input.0.len() <= bytes.len());
        }
    }

    #[test]
    fn too_large_numbers_are_refused() {
        assert_eq!(Input(&[0xFF; 11]).number(), Err(Malformed));
        assert_eq!(
            Input(&[0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 2]).number(),
            Err(Malformed)
        );
        assert_eq!(Input(&[5]).at_most(4), Err(Malformed));
        assert_eq!(Input(&[3, 1, 2]).bytes(2), Err(Malformed));
    }
}
