//! Reads the kernel's type information (BTF): where structures keep their fields, how many arguments functions have.
//!
//! Format: Linux `Documentation/bpf/btf.rst`. What is read comes from the kernel, but is handled as untrusted: sizes and
//! depths are bounded, nothing panics.

/// More than any kernel's: 6.18's is 5.5 MB.
const MAX_BYTES: usize = 64 << 20;
const MAGIC: u16 = 0xEB9F;
/// Anonymous members within anonymous members.
const MAX_DEPTH: u32 = 16;

const PTR: u32 = 2;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const RESTRICT: u32 = 11;
const FUNC: u32 = 12;
const FUNC_PROTO: u32 = 13;
const TYPE_TAG: u32 = 18;
const ENUM64: u32 = 19;

/// Why type information cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// It cannot be read; a kernel without `CONFIG_DEBUG_INFO_BTF` has none.
    #[error("cannot read the kernel's type information")]
    Read(#[source] std::io::Error),
    /// It does not have the documented form.
    #[error("the kernel's type information is damaged at byte {at}: {what}")]
    Damaged {
        /// Byte from its beginning.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
}

/// The types of a kernel.
#[derive(Debug)]
pub(crate) struct Btf {
    bytes: Vec<u8>,
    /// Where each type begins, by number; the first is `void`.
    types: Vec<usize>,
    strings: std::ops::Range<usize>,
    /// Structures, unions, functions, enumerations and type names, by the hash of their names: a map of the names themselves
    /// would be several times as large as all else.
    named: Vec<(u32, u32)>,
}

/// The head of a type.
#[derive(Clone, Copy)]
struct Type {
    at: usize,
    name: u32,
    kind: u32,
    members: usize,
    bit_fields: bool,
    /// Size or the type that it is made of.
    other: u32,
}

/// A place within a structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Field {
    bits: u32,
    kind: u32,
}

impl Btf {
    /// That of the running kernel.
    pub(crate) fn running() -> Result<Self, BtfError> {
        Self::parse(std::fs::read("/sys/kernel/btf/vmlinux").map_err(BtfError::Read)?)
    }

    /// Parses a `.BTF` section.
    pub(crate) fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        if bytes.len() > MAX_BYTES {
            return Err(BtfError::Damaged { at: 0, what: "it is too long" });
        }
        let mut btf = Self { bytes, types: vec![usize::MAX], strings: 0..0, named: Vec::new() };
        if btf.word(0)? & 0xFFFF != u32::from(MAGIC) {
            return Err(BtfError::Damaged { at: 0, what: "no magic number" });
        }
        let header = btf.word(4)? as usize;
        let section = |at: usize| -> Result<std::ops::Range<usize>, BtfError> {
            let start = header.saturating_add(btf.word(at)? as usize);
            let end = start.saturating_add(btf.word(at + 4)? as usize);
            if end > btf.bytes.len() {
                return Err(BtfError::Damaged { at, what: "a section reaches beyond the end" });
            }
            Ok(start..end)
        };
        let types = section(8)?;
        btf.strings = section(16)?;
        btf.index(types)?;
        btf.named.sort_unstable();
        Ok(btf)
    }

    fn index(&mut self, types: std::ops::Range<usize>) -> Result<(), BtfError> {
        let mut at = types.start;
        while at < types.end {
            let one = self.head(at)?;
            let id = u32::try_from(self.types.len()).unwrap_or(u32::MAX);
            let per_member = match one.kind {
                1 | 14 | 17 => 0,
                3 | STRUCT | UNION | 15 | ENUM64 => 12,
                ENUM | FUNC_PROTO => 8,
                PTR | 7..=12 | 16 | TYPE_TAG => 0,
                _ => return Err(BtfError::Damaged { at, what: "an unknown kind of type" }),
            };
            let fixed = match one.kind {
                1 | 14 | 17 => 4,
                3 => 12,
                _ => 0,
            };
            let members = if one.kind == 3 { 0 } else { one.members * per_member };
            if matches!(one.kind, STRUCT | UNION | ENUM | ENUM64 | TYPEDEF | FUNC) && one.name != 0 {
                let hash = hash(self.text(one.name));
                self.named.push((hash, id));
            }
            self.types.push(at);
            at += 12 + fixed + members;
        }
        Ok(())
    }

    fn word(&self, at: usize) -> Result<u32, BtfError> {
        let bytes = self.bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map(|bytes| u32::from_le_bytes(*bytes)).ok_or(BtfError::Damaged { at, what: "it ends" })
    }

    fn head(&self, at: usize) -> Result<Type, BtfError> {
        let info = self.word(at + 4)?;
        Ok(Type {
            at,
            name: self.word(at)?,
            kind: (info >> 24) & 0x1F,
            members: (info & 0xFFFF) as usize,
            bit_fields: info >> 31 == 1,
            other: self.word(at + 8)?,
        })
    }

    fn text(&self, offset: u32) -> &[u8] {
        let strings = self.bytes.get(self.strings.clone()).unwrap_or_default();
        let text = strings.get(offset as usize..).unwrap_or_default();
        text.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    fn by_id(&self, id: u32) -> Option<Type> {
        let at = *self.types.get(id as usize).filter(|at| **at != usize::MAX)?;
        self.head(at).ok()
    }

    fn by_name<'a>(&'a self, name: &'a str, kinds: &'a [u32]) -> impl Iterator<Item = Type> + 'a {
        self.ids(name).filter_map(|id| self.by_id(id)).filter(move |one| kinds.contains(&one.kind))
    }

    /// Numbers of what has this name.
    fn ids<'a>(&'a self, name: &'a str) -> impl Iterator<Item = u32> + 'a {
        let hash = hash(name.as_bytes());
        let first = self.named.partition_point(|(one, _)| *one < hash);
        let same =
            self.named.get(first..).unwrap_or_default().iter().take_while(move |(one, _)| *one == hash);
        same.map(|(_, id)| *id)
            .filter(move |id| self.by_id(*id).is_some_and(|found| self.text(found.name) == name.as_bytes()))
    }

    /// The kernel's number of a function's type.
    pub(crate) fn function(&self, name: &str) -> Option<u32> {
        self.ids(name).find(|id| self.by_id(*id).is_some_and(|one| one.kind == FUNC))
    }

    /// Follows type names and qualifiers.
    fn plain(&self, mut id: u32) -> Option<Type> {
        for _ in 0..MAX_DEPTH {
            let one = self.by_id(id)?;
            if !matches!(one.kind, TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG) {
                return Some(one);
            }
            id = one.other;
        }
        None
    }

    /// A member, also one of an anonymous member.
    fn member(&self, of: Type, name: &str, depth: u32) -> Option<(Field, u32)> {
        if depth == 0 {
            return None;
        }
        for number in 0..of.members {
            let at = of.at + 12 + number * 12;
            let (text, kind, place) = (self.word(at).ok()?, self.word(at + 4).ok()?, self.word(at + 8).ok()?);
            let bits = if of.bit_fields { place & 0x00FF_FFFF } else { place };
            let found = self.text(text);
            if found == name.as_bytes() {
                return Some((Field { bits, kind }, bits));
            }
            if !found.is_empty() {
                continue;
            }
            let Some(inner) = self.plain(kind).filter(|one| matches!(one.kind, STRUCT | UNION)) else {
                continue;
            };
            if let Some((field, inner_bits)) = self.member(inner, name, depth - 1) {
                return Some((field, bits.checked_add(inner_bits)?));
            }
        }
        None
    }

    /// Bits from the beginning of `structure` to `path` (`a.b` for a member of a member).
    fn bits(&self, structure: &str, path: &str) -> Option<u32> {
        self.by_name(structure, &[STRUCT, UNION]).find_map(|one| {
            let mut at = Some(one);
            let mut sum = 0_u32;
            for name in path.split('.') {
                let (field, bits) = self.member(at?, name, MAX_DEPTH)?;
                sum = sum.checked_add(bits)?;
                at = self.plain(field.kind);
            }
            Some(sum)
        })
    }

    /// Bytes from the beginning of `structure` to `path`; `None`: there is no such member, or it is a bit field.
    pub(crate) fn offset(&self, structure: &str, path: &str) -> Option<u32> {
        self.bits(structure, path).filter(|bits| bits % 8 == 0).map(|bits| bits / 8)
    }

    /// The byte and the mask of a one-bit member, on a little-endian machine.
    pub(crate) fn bit(&self, structure: &str, path: &str) -> Option<(u32, u32)> {
        self.bits(structure, path).map(|bits| (bits / 8, 1 << (bits % 8)))
    }

    /// Whether there is a structure or union of this name.
    pub(crate) fn has_structure(&self, name: &str) -> bool {
        self.by_name(name, &[STRUCT, UNION]).next().is_some()
    }

    /// How many arguments a function has; `None`: there is no such function.
    pub(crate) fn arguments(&self, function: &str) -> Option<u32> {
        let one = self.by_name(function, &[FUNC]).next()?;
        self.count(one.other)
    }

    /// How many arguments a tracepoint has; `None`: there is no such tracepoint.
    pub(crate) fn tracepoint_arguments(&self, tracepoint: &str) -> Option<u32> {
        let one = self.by_name(&format!("btf_trace_{tracepoint}"), &[TYPEDEF]).next()?;
        let pointer = self.plain(one.other).filter(|one| one.kind == PTR)?;
        // The first is the tracepoint's own.
        self.count(pointer.other)?.checked_sub(1)
    }

    fn count(&self, prototype: u32) -> Option<u32> {
        let one = self.plain(prototype).filter(|one| one.kind == FUNC_PROTO)?;
        u32::try_from(one.members).ok()
    }

    /// The value of a name of an enumeration.
    pub(crate) fn value(&self, enumeration: &str, name: &str) -> Option<u32> {
        self.by_name(enumeration, &[ENUM, ENUM64]).find_map(|one| {
            let size = if one.kind == ENUM { 8 } else { 12 };
            let places = (0..one.members).map(|number| one.at + 12 + number * size);
            let mut found =
                places.filter(|at| self.word(*at).is_ok_and(|text| self.text(text) == name.as_bytes()));
            found.next().and_then(|at| self.word(at + 4).ok())
        })
    }
}

/// FNV-1a.
fn hash(name: &[u8]) -> u32 {
    name.iter().fold(0x811C_9DC5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_is_understood() {
        let btf = Btf::running().expect("this kernel has type information");
        assert_eq!(btf.offset("list_head", "prev"), Some(8));
        assert_eq!(btf.offset("qstr", "name"), Some(8));
        assert_eq!(btf.offset("qstr", "len").map(|at| at % 4), Some(0), "it is in an anonymous member");
        assert!(btf.offset("mnt_namespace", "ns.inum").is_some(), "a member of a member");
        assert!(btf.bit("task_struct", "in_iowait").is_some_and(|(_, mask)| mask.count_ones() == 1));
        assert_eq!(btf.arguments("vfs_fsync"), Some(2));
        assert_eq!(btf.tracepoint_arguments("sched_process_exec"), Some(3));
        assert!(btf.value("pageflags", "PG_head").is_some());
        assert_eq!(btf.offset("task_struct", "no_such_member"), None);
        assert_eq!(btf.arguments("no_such_function"), None);
    }

    #[test]
    fn damage_is_an_error_or_nothing() {
        let whole = std::fs::read("/sys/kernel/btf/vmlinux").expect("read");
        for length in [0, 3, 8, 23, 24, 25, 1000, whole.len() / 2, whole.len() - 1] {
            let cut = whole.get(..length).expect("shorter").to_vec();
            assert!(Btf::parse(cut).is_err(), "cut at {length}");
        }
        // Bytes changed all over, deterministic: whatever comes of it, it comes to an end without panic.
        let mut changed = whole;
        let mut state = 1_u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = 24 + usize::try_from(state >> 33).expect("small") % (changed.len() - 24);
            if let Some(byte) = changed.get_mut(at) {
                *byte = (state >> 20) as u8;
            }
        }
        if let Ok(btf) = Btf::parse(changed) {
            let _unspecified = btf.offset("task_struct", "nsproxy");
        }
    }
}
