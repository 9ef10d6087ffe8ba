//! What each message does: the contract's patterns on one side, the ledger and the stock on the other.
//!
//! Knows no bytes and no broker. Every call may come twice, from a redelivery or from a caller that never heard the
//! answer; the second time changes nothing and answers the same.

use std::sync::Arc;
use std::time::Duration;

use super::StatsSource;
use super::wire::{Answer, Call, Held, NotHeld};
use crate::domain::{
    ConfirmOutcome, LockId, OrderId, OrderOutcome, OrderReport, Personal, ReleaseOutcome, Releaser, UserId,
    ValidateOutcome, ValidateRequest,
};
use crate::inventory::Stock;
use crate::ledger::{Ledger, LedgerError};
use crate::metrics;

/// Carries calls out.
pub struct Dispatcher {
    ledger: Arc<dyn Ledger>,
    stock: Arc<Stock>,
    stats: Arc<dyn StatsSource>,
    /// How long a validated lock lives at least.
    checkout_window: Duration,
}

impl Dispatcher {
    /// One per process.
    #[must_use]
    pub fn new(
        ledger: Arc<dyn Ledger>,
        stock: Arc<Stock>,
        stats: Arc<dyn StatsSource>,
        checkout_window: Duration,
    ) -> Self {
        Self { ledger, stock, stats, checkout_window }
    }

    /// Carries one call out. The future must not be dropped half-way: it talks to the ledger.
    ///
    /// # Errors
    /// When the ledger gave no answer. It is then unknown what changed, and repeating the call is safe.
    pub async fn run(&self, call: &Call) -> Result<Answer, LedgerError> {
        match call {
            Call::Validate { user, event, category, quantity } => {
                let window = self.checkout_window;
                let (user, event, category, quantity) = (*user, *event, *category, *quantity);
                self.validate(&ValidateRequest { event, category, user, quantity, window }).await
            }
            Call::Confirm { lock, user, order } => self.confirm(*lock, *user, order.as_ref()).await,
            Call::Release { lock, user } => self.release(*lock, *user).await,
            Call::Locks { user } => self.ledger.locks_of(*user).await.map(Answer::Locks),
            Call::Find { lock } => match lock {
                Some(lock) => self.ledger.find(*lock).await.map(Answer::Lock),
                None => Ok(Answer::Lock(None)),
            },
            Call::Order { report, order_is_number } => self.order(report, *order_is_number).await,
            Call::StockChanged { event } => {
                self.stock.refresh(*event);
                Ok(Answer::Truth(true))
            }
            Call::Stats => self.stats.stats().await.map(Answer::Stats),
        }
    }

    async fn validate(&self, request: &ValidateRequest) -> Result<Answer, LedgerError> {
        let outcome = self.ledger.validate(request).await?;
        metrics::RPC_VALIDATIONS.count(&[outcome.as_str()]);
        Ok(match outcome {
            ValidateOutcome::Valid { lock, deadline } => Answer::Held(Held::new(lock, deadline)),
            ValidateOutcome::NotFound => Answer::NotHeld(NotHeld::NOT_FOUND),
            ValidateOutcome::Expired => Answer::NotHeld(NotHeld::EXPIRED),
        })
    }

    async fn confirm(
        &self,
        lock: Option<LockId>,
        user: Option<UserId>,
        order: Option<&OrderId>,
    ) -> Result<Answer, LedgerError> {
        let Some(lock) = lock else { return Ok(Answer::Truth(false)) };
        let outcome = self.ledger.confirm(lock, user, order).await?;
        metrics::RPC_CONFIRMS.count(&[outcome.as_str()]);
        Ok(Answer::Truth(match outcome {
            ConfirmOutcome::Confirmed | ConfirmOutcome::AlreadyConfirmed => true,
            ConfirmOutcome::OtherOrder
            | ConfirmOutcome::WrongUser
            | ConfirmOutcome::Expired
            | ConfirmOutcome::Released
            | ConfirmOutcome::NotFound => false,
        }))
    }

    async fn release(&self, lock: Option<LockId>, user: Option<UserId>) -> Result<Answer, LedgerError> {
        let Some(lock) = lock else { return Ok(Answer::Truth(false)) };
        let outcome = self.ledger.release(lock, Releaser::Orders { user }).await?;
        metrics::RPC_RELEASES.count(&[outcome.as_str()]);
        Ok(Answer::Truth(match outcome {
            ReleaseOutcome::Released(_) | ReleaseOutcome::AlreadyReleased(_) => true,
            ReleaseOutcome::ReleasedByOther
            | ReleaseOutcome::Confirmed
            | ReleaseOutcome::WrongUser
            | ReleaseOutcome::Expired
            | ReleaseOutcome::NotFound => false,
        }))
    }

    async fn order(&self, report: &OrderReport, order_is_number: bool) -> Result<Answer, LedgerError> {
        let outcome = self.ledger.order(report).await?;
        metrics::RPC_ORDERS.count(&[report.result.as_str(), outcome.as_str()]);
        match outcome {
            // A repeat may mean that the one before broke off here: to tell the user twice is better than never.
            OrderOutcome::Noted | OrderOutcome::Repeated => {
                let message = Personal::Order {
                    result: report.result,
                    order: report.order.clone(),
                    order_is_number,
                    event: report.event,
                    category: report.category,
                    quantity: report.quantity,
                };
                self.ledger.tell(report.user, &message).await?;
            }
            // The user has heard that the order is cancelled, and that is how it stands.
            OrderOutcome::AfterCancel => {}
        }
        self.stock.refresh(report.event);
        Ok(Answer::Truth(true))
    }
}
