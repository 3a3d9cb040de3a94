//! A bounded MessagePack reader for hostile input.
//!
//! It reads from a slice, never allocates, never recurses, and believes no length that the remaining bytes cannot
//! hold. Unknown values are skipped in constant memory however deep they nest.

use rmp::Marker;

/// Deepest nesting that is skipped; real engines need 4. A deeper value refuses the message.
const MAX_SKIP_DEPTH: usize = 32;

/// Why a message could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsgpackError {
    /// The message ends inside a value.
    #[error("message ends inside a value")]
    Truncated,
    /// The reserved marker byte 0xc1.
    #[error("reserved MessagePack byte 0xc1")]
    Reserved,
    /// A value of another type stands where this one is needed.
    #[error("expected {0}")]
    Expected(&'static str),
    /// A number does not fit its field.
    #[error("{0} is out of range")]
    Range(&'static str),
    /// Values nest deeper than any engine does.
    #[error("values nest deeper than {MAX_SKIP_DEPTH}")]
    TooDeep,
}

type Result<T> = std::result::Result<T, MsgpackError>;

/// A position in a message.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

/// The head of a value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// nil
    Nil,
    /// true or false
    Bool(bool),
    /// Any integer below 0.
    Negative(i64),
    /// Any integer from 0.
    Unsigned(u64),
    /// A float of either width.
    Float(f64),
    /// A string; UTF-8 is checked by [`Reader::text`].
    Str(&'a [u8]),
    /// A byte string.
    Bin(&'a [u8]),
    /// An array of this many values, which follow.
    Array(u32),
    /// A map of this many pairs, which follow.
    Map(u32),
    /// An extension; its payload was skipped.
    Ext,
}

// === impl Reader ===

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Nothing is left.
    pub fn is_at_end(&self) -> bool {
        self.rest.is_empty()
    }

    #[inline]
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(n).ok_or(MsgpackError::Truncated)?;
        self.rest = rest;
        Ok(head)
    }

    #[inline]
    fn number<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or(MsgpackError::Truncated)?;
        self.rest = rest;
        Ok(*head)
    }

    #[inline]
    fn length8(&mut self) -> Result<usize> {
        Ok(usize::from(self.number::<1>()?[0]))
    }

    #[inline]
    fn length16(&mut self) -> Result<usize> {
        Ok(usize::from(u16::from_be_bytes(self.number()?)))
    }

    #[inline]
    fn length32(&mut self) -> Result<usize> {
        Ok(u32::from_be_bytes(self.number()?) as usize)
    }

    /// Each element takes at least one byte (a map's pair two), so a longer claim is a lie.
    fn elements(&self, count: usize, bytes_each: usize) -> Result<u32> {
        if count.saturating_mul(bytes_each) > self.rest.len() {
            return Err(MsgpackError::Truncated);
        }
        u32::try_from(count).map_err(|_| MsgpackError::Truncated)
    }

    /// The next value's head; strings and byte strings are consumed whole.
    #[inline]
    pub fn value(&mut self) -> Result<Value<'a>> {
        let marker = Marker::from_u8(self.number::<1>()?[0]);
        let signed = |n: i64| if n < 0 { Value::Negative(n) } else { Value::Unsigned(n as u64) };
        Ok(match marker {
            Marker::FixPos(n) => Value::Unsigned(n.into()),
            Marker::FixNeg(n) => Value::Negative(n.into()),
            Marker::Null => Value::Nil,
            Marker::Reserved => return Err(MsgpackError::Reserved),
            Marker::False => Value::Bool(false),
            Marker::True => Value::Bool(true),
            Marker::U8 => Value::Unsigned(self.number::<1>()?[0].into()),
            Marker::U16 => Value::Unsigned(u16::from_be_bytes(self.number()?).into()),
            Marker::U32 => Value::Unsigned(u32::from_be_bytes(self.number()?).into()),
            Marker::U64 => Value::Unsigned(u64::from_be_bytes(self.number()?)),
            Marker::I8 => signed(i8::from_be_bytes(self.number()?).into()),
            Marker::I16 => signed(i16::from_be_bytes(self.number()?).into()),
            Marker::I32 => signed(i32::from_be_bytes(self.number()?).into()),
            Marker::I64 => signed(i64::from_be_bytes(self.number()?)),
            Marker::F32 => Value::Float(f32::from_be_bytes(self.number()?).into()),
            Marker::F64 => Value::Float(f64::from_be_bytes(self.number()?)),
            Marker::FixStr(n) => Value::Str(self.take(usize::from(n))?),
            Marker::Str8 => {
                let n = self.length8()?;
                Value::Str(self.take(n)?)
            }
            Marker::Str16 => {
                let n = self.length16()?;
                Value::Str(self.take(n)?)
            }
            Marker::Str32 => {
                let n = self.length32()?;
                Value::Str(self.take(n)?)
            }
            Marker::Bin8 => {
                let n = self.length8()?;
                Value::Bin(self.take(n)?)
            }
            Marker::Bin16 => {
                let n = self.length16()?;
                Value::Bin(self.take(n)?)
            }
            Marker::Bin32 => {
                let n = self.length32()?;
                Value::Bin(self.take(n)?)
            }
            Marker::FixArray(n) => Value::Array(self.elements(usize::from(n), 1)?),
            Marker::Array16 => {
                let n = self.length16()?;
                Value::Array(self.elements(n, 1)?)
            }
            Marker::Array32 => {
                let n = self.length32()?;
                Value::Array(self.elements(n, 1)?)
            }
            Marker::FixMap(n) => Value::Map(self.elements(usize::from(n), 2)?),
            Marker::Map16 => {
                let n = self.length16()?;
                Value::Map(self.elements(n, 2)?)
            }
            Marker::Map32 => {
                let n = self.length32()?;
                Value::Map(self.elements(n, 2)?)
            }
            Marker::FixExt1 => self.extension(1)?,
            Marker::FixExt2 => self.extension(2)?,
            Marker::FixExt4 => self.extension(4)?,
            Marker::FixExt8 => self.extension(8)?,
            Marker::FixExt16 => self.extension(16)?,
            Marker::Ext8 => {
                let n = self.length8()?;
                self.extension(n)?
            }
            Marker::Ext16 => {
                let n = self.length16()?;
                self.extension(n)?
            }
            Marker::Ext32 => {
                let n = self.length32()?;
                self.extension(n)?
            }
        })
    }

    fn extension(&mut self, payload: usize) -> Result<Value<'a>> {
        self.take(payload.saturating_add(1))?;
        Ok(Value::Ext)
    }

    /// Skips one whole value. The memory used does not depend on the input.
    pub fn skip(&mut self) -> Result<()> {
        // Values still to be read at each level of nesting.
        let mut left = [0u64; MAX_SKIP_DEPTH];
        let mut depth = 0;
        left[0] = 1;
        loop {
            while left[depth] == 0 {
                if depth == 0 {
                    return Ok(());
                }
                depth -= 1;
            }
            left[depth] -= 1;
            let inner = match self.value()? {
                Value::Array(n) => u64::from(n),
                Value::Map(n) => 2 * u64::from(n),
                _ => 0,
            };
            if inner > 0 {
                depth += 1;
                *left.get_mut(depth).ok_or(MsgpackError::TooDeep)? = inner;
            }
        }
    }

    /// Skips one whole value and returns its bytes.
    pub fn raw(&mut self) -> Result<&'a [u8]> {
        let before = self.rest;
        self.skip()?;
        Ok(&before[..before.len() - self.rest.len()])
    }

    /// A token id, the most frequent value by far: the three usual widths first.
    #[inline]
    pub fn token(&mut self) -> Result<Value<'a>> {
        match *self.rest {
            [n, ref rest @ ..] if n < 0x80 => {
                self.rest = rest;
                Ok(Value::Unsigned(n.into()))
            }
            [0xcd, a, b, ref rest @ ..] => {
                self.rest = rest;
                Ok(Value::Unsigned(u16::from_be_bytes([a, b]).into()))
            }
            [0xce, a, b, c, d, ref rest @ ..] => {
                self.rest = rest;
                Ok(Value::Unsigned(u32::from_be_bytes([a, b, c, d]).into()))
            }
            _ => self.value(),
        }
    }

    /// An array's length.
    pub fn array(&mut self, what: &'static str) -> Result<u32> {
        match self.value()? {
            Value::Array(n) => Ok(n),
            _ => Err(MsgpackError::Expected(what)),
        }
    }

    /// A string.
    pub fn text(&mut self, what: &'static str) -> Result<&'a str> {
        self.optional_text(what)?.ok_or(MsgpackError::Expected(what))
    }

    /// A string or nil.
    pub fn optional_text(&mut self, what: &'static str) -> Result<Option<&'a str>> {
        match self.value()? {
            Value::Nil => Ok(None),
            Value::Str(bytes) => {
                std::str::from_utf8(bytes).map(Some).map_err(|_| MsgpackError::Expected("UTF-8 text"))
            }
            _ => Err(MsgpackError::Expected(what)),
        }
    }

    /// A u32 or nil.
    pub fn optional_u32(&mut self, what: &'static str) -> Result<Option<u32>> {
        match self.value()? {
            Value::Nil => Ok(None),
            Value::Unsigned(n) => u32::try_from(n).map(Some).map_err(|_| MsgpackError::Range(what)),
            _ => Err(MsgpackError::Expected(what)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn claimed_lengths_beyond_the_message_are_refused() {
        for bytes in
            [&[0xdd, 0xff, 0xff, 0xff, 0xff][..], &[0xdf, 0x7f, 0xff, 0xff, 0xff], &[0xc6, 0xff, 0, 0, 0]]
        {
            assert_eq!(Reader::new(bytes).value(), Err(MsgpackError::Truncated));
        }
    }

    #[test]
    fn deep_nesting_is_refused_in_constant_memory() {
        let deep = vec![0x91u8; 1 << 20];
        assert_eq!(Reader::new(&deep).skip(), Err(MsgpackError::TooDeep));
    }

    #[test]
    fn reserved_byte_is_named() {
        assert_eq!(Reader::new(&[0xc1]).value(), Err(MsgpackError::Reserved));
    }

    fn any_value() -> impl Strategy<Value = rmpv::Value> {
        let leaf = prop_oneof![
            Just(rmpv::Value::Nil),
            any::<bool>().prop_map(rmpv::Value::from),
            any::<i64>().prop_map(rmpv::Value::from),
            any::<u64>().prop_map(rmpv::Value::from),
            any::<f64>().prop_map(rmpv::Value::from),
            ".{0,300}".prop_map(rmpv::Value::from),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(rmpv::Value::Binary),
            (any::<i8>(), proptest::collection::vec(any::<u8>(), 0..40))
                .prop_map(|(t, b)| rmpv::Value::Ext(t, b)),
        ];
        leaf.prop_recursive(5, 60, 20, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..20).prop_map(rmpv::Value::Array),
                proptest::collection::vec((inner.clone(), inner), 0..10).prop_map(rmpv::Value::Map),
            ]
        })
    }

    proptest! {
        #[test]
        fn every_well_formed_value_is_skipped_exactly(value in any_value()) {
            let mut bytes = Vec::new();
            rmpv::encode::write_value(&mut bytes, &value).unwrap();
            let mut reader = Reader::new(&bytes);
            reader.skip().unwrap();
            prop_assert!(reader.is_at_end());
            // And every truncation is noticed.
            for end in 0..bytes.len() {
                prop_assert_eq!(Reader::new(&bytes[..end]).skip(), Err(MsgpackError::Truncated));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Reader::new(&bytes).skip();
        }
    }
}
