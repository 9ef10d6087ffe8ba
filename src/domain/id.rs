//! Identifiers. Each is a type of its own, so that an event cannot be passed where a category is meant.

use std::fmt;

use uuid::Uuid;

/// The largest integer that JavaScript keeps exact (2^53 - 1); every numeric id of the neighbours fits below it.
pub const ID_MAX: u64 = (1 << 53) - 1;

/// Why a text or a number is not an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// A numeric id outside 1..=2^53-1.
    #[error("an id must be an integer between 1 and 9007199254740991")]
    OutOfRange,
    /// Not a UUID, or a UUID that this service did not make.
    #[error("not a lock id of this service")]
    NotALockId,
    /// A text id that is empty, too long, or holds characters that are not printable ASCII.
    #[error("must be 1 to 64 printable ASCII characters without spaces")]
    BadText,
}

macro_rules! numeric_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// Accepts 1..=2^53-1.
            ///
            /// # Errors
            /// [`IdError::OutOfRange`] for anything else.
            pub const fn new(value: u64) -> Result<Self, IdError> {
                if value == 0 || value > ID_MAX { Err(IdError::OutOfRange) } else { Ok(Self(value)) }
            }

            /// The number itself.
            #[must_use]
            pub const fn value(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                // `u64::from_str` accepts a leading `+`, which no caller of ours writes.
                if !text.bytes().all(|byte| byte.is_ascii_digit()) {
                    return Err(IdError::OutOfRange);
                }
                text.parse::<u64>().map_err(|_| IdError::OutOfRange).and_then(Self::new)
            }
        }
    };
}

numeric_id!(
    /// An event: the show that tickets are for.
    EventId
);
numeric_id!(
    /// A category: a class of an event's tickets. Ids of categories are unique within their event.
    CategoryId
);
numeric_id!(
    /// A user: who owns a lock.
    UserId
);

/// A lock: a UUID of version 8 that carries its event's id in 53 of its bits and 69 random bits.
///
/// Layout, most significant bit first: event id bits 52..5 (48 bits), version (4), event id bits 4..0 (5), random (7),
/// variant (2), random (62). So `confirm {lockId}` finds the event's keys without an index, and the id stays
/// unguessable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockId(Uuid);

impl LockId {
    /// A new, unguessable id that routes to `event`.
    #[must_use]
    pub fn generate(event: EventId) -> Self {
        Self::from_random(event, Uuid::new_v4().as_u128())
    }

    /// The id made of `event` and the random bits in `random`; bits that have another meaning are ignored.
    #[must_use]
    pub const fn from_random(event: EventId, random: u128) -> Self {
        const RANDOM_MASK: u128 = (0x7f << 64) | ((1 << 62) - 1);
        let id = event.0 as u128;
        let bits = ((id >> 5) << 80) | (0x8 << 76) | ((id & 0x1f) << 71) | (0b10 << 62) | (random & RANDOM_MASK);
        Self(Uuid::from_u128(bits))
    }

    /// The event whose keys hold this lock.
    #[must_use]
    pub const fn event(self) -> EventId {
        let bits = self.0.as_u128();
        #[expect(clippy::cast_possible_truncation, reason = "53 bits are left after the shifts and the mask")]
        EventId((((bits >> 80) << 5) | ((bits >> 71) & 0x1f)) as u64)
    }
}

impl fmt::Display for LockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl std::str::FromStr for LockId {
    type Err = IdError;

    /// Accepts only the 36-character form of an id that [`LockId::generate`] can have made.
    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() != 36 {
            return Err(IdError::NotALockId);
        }
        let uuid = Uuid::try_parse(text).map_err(|_| IdError::NotALockId)?;
        let id = Self(uuid);
        if uuid.get_version_num() != 8 || uuid.get_variant() != uuid::Variant::RFC4122 || id.event().0 == 0 {
            return Err(IdError::NotALockId);
        }
        Ok(id)
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Uuid);

        impl $name {
            /// A new random id.
            #[must_use]
            pub fn generate() -> Self {
                Self(Uuid::new_v4())
            }

            /// The id made of these bits (tests and models need chosen ones).
            #[must_use]
            pub const fn from_u128(bits: u128) -> Self {
                Self(Uuid::from_u128(bits))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.simple().fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Uuid::try_parse(text).map(Self).map_err(|_| IdError::BadText)
            }
        }
    };
}

uuid_id!(
    /// One socket's session. Ours, never the transport's own session id: that one is a secret of its client.
    SessionId
);
uuid_id!(
    /// One process of this service, from its start to its end.
    ReplicaId
);

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Box<str>);

        impl $name {
            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::str::FromStr for $name {
            type Err = IdError;

            /// Accepts 1 to 64 printable ASCII characters, no spaces, so that it can be part of a key and of a notice.
            fn from_str(text: &str) -> Result<Self, IdError> {
                let fits = (1..=64).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
                if fits { Ok(Self(text.into())) } else { Err(IdError::BadText) }
            }
        }
    };
}

text_id!(
    /// The client's name for one attempt: the same id answers with the same lock.
    RequestId
);
text_id!(
    /// An order of the orders-service, as text (callers send integers or texts).
    OrderId
);

#[cfg(test)]
mod tests {
    use super::*;

    fn event(value: u64) -> EventId {
        EventId::new(value).expect("a valid event id")
    }

    #[test]
    fn a_lock_id_is_a_version_8_uuid_that_carries_its_event() {
        for value in [1, 2, 31, 32, 33, 12_345, u64::from(u32::MAX), ID_MAX - 1, ID_MAX] {
            let id = LockId::generate(event(value));
            assert_eq!(id.event().value(), value);
            let text = id.to_string();
            assert_eq!(text.len(), 36);
            assert_eq!(text.as_bytes()[14], b'8', "version nibble of {text}");
            assert!(matches!(text.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "variant of {text}");
            assert_eq!(text.parse::<LockId>(), Ok(id));
        }
    }

    #[test]
    fn all_69_random_bits_of_a_lock_id_are_used_and_none_touches_the_event() {
        let none = LockId::from_random(event(77), 0);
        let all = LockId::from_random(event(77), u128::MAX);
        assert_eq!(none.event(), all.event());
        assert_eq!((none.0.as_u128() ^ all.0.as_u128()).count_ones(), 69);
    }

    #[test]
    fn foreign_texts_are_not_lock_ids() {
        let v4 = Uuid::new_v4().to_string();
        for text in ["", "x", "00000000-0000-8000-8000-000000000000", v4.as_str(), &v4.replace('-', "")] {
            assert_eq!(text.parse::<LockId>(), Err(IdError::NotALockId), "{text}");
        }
    }

    #[test]
    fn numeric_ids_keep_to_what_javascript_keeps_exact() {
        assert_eq!(EventId::new(0), Err(IdError::OutOfRange));
        assert_eq!(EventId::new(ID_MAX + 1), Err(IdError::OutOfRange));
        assert_eq!("9007199254740991".parse::<UserId>().map(UserId::value), Ok(ID_MAX));
        for text in ["", "+1", "-1", "1.0", "1e3", " 1", "0", "9007199254740992", "99999999999999999999999"] {
            assert_eq!(text.parse::<UserId>(), Err(IdError::OutOfRange), "{text}");
        }
    }

    #[test]
    fn text_ids_cannot_hold_spaces_control_characters_or_novels() {
        assert!("order-55".parse::<OrderId>().is_ok());
        for text in ["", "a b", "a\nb", "é", &"x".repeat(65)] {
            assert_eq!(text.parse::<RequestId>(), Err(IdError::BadText), "{text}");
        }
    }
}
