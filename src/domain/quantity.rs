//! How many tickets: at least one.

use std::fmt;

/// A number of tickets in one lock or order, 1..=[`Quantity::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Quantity(u32);

/// A quantity that is zero, negative, fractional or above [`Quantity::MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a quantity must be an integer between 1 and {}", Quantity::MAX)]
pub struct QuantityError;

impl Quantity {
    /// A bound that no order approaches and that keeps every sum of a category far below 2^53. The limit that a
    /// deployment sets per lock (`SEATLOCK_MAX_PER_LOCK`) is below it and checked where requests are parsed.
    pub const MAX: u32 = 100_000;

    /// Accepts 1..=[`Quantity::MAX`].
    ///
    /// # Errors
    /// [`QuantityError`] for anything else.
    pub const fn new(value: u64) -> Result<Self, QuantityError> {
        if value == 0 || value > Self::MAX as u64 {
            return Err(QuantityError);
        }
        #[expect(clippy::cast_possible_truncation, reason = "checked against MAX, which is a u32")]
        Ok(Self(value as u32))
    }

    /// The number itself.
    #[must_use]
    pub const fn value(self) -> u32 {
        self.0
    }

    /// The number, for sums.
    #[must_use]
    pub const fn wide(self) -> u64 {
        self.0 as u64
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
