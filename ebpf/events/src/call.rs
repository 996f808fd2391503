//! The calls whose failures are watched.

/// A call that changes a name or attributes, `FailedEvent::call`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum Call {
    /// `rename`.
    Rename = 1,
    /// `renameat`.
    Renameat = 2,
    /// `renameat2`.
    Renameat2 = 3,
    /// `link`.
    Link = 4,
    /// `linkat`.
    Linkat = 5,
    /// `lchown`.
    Lchown = 6,
    /// `fchownat`.
    Fchownat = 7,
    /// `utimensat`.
    Utimensat = 8,
    /// Some rename, seen inside the kernel.
    AnyRename = 9,
    /// Some link, seen inside the kernel.
    AnyLink = 10,
    /// Some change of owner, mode or times, seen inside the kernel.
    AnyAttributes = 11,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::Rename,
        Self::Renameat,
        Self::Renameat2,
        Self::Link,
        Self::Linkat,
        Self::Lchown,
        Self::Fchownat,
        Self::Utimensat,
        Self::AnyRename,
        Self::AnyLink,
        Self::AnyAttributes,
    ];

    /// The call with this number.
    pub const fn from_number(number: u16) -> Option<Self> {
        let mut at = 0;
        while at < Self::ALL.len() {
            if Self::ALL[at] as u16 == number {
                return Some(Self::ALL[at]);
            }
            at += 1;
        }
        None
    }

    /// The name of the system call, or what it does where several lead there.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Rename => "rename",
            Self::Renameat => "renameat",
            Self::Renameat2 => "renameat2",
            Self::Link => "link",
            Self::Linkat => "linkat",
            Self::Lchown => "lchown",
            Self::Fchownat => "fchownat",
            Self::Utimensat => "utimensat",
            Self::AnyRename => "rename*",
            Self::AnyLink => "link*",
            Self::AnyAttributes => "setattr*",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_found_by_their_numbers() {
        for call in Call::ALL {
            assert_eq!(Call::from_number(call as u16), Some(call));
        }
        assert_eq!(Call::from_number(0), None);
        assert_eq!(Call::from_number(12), None);
    }
}
