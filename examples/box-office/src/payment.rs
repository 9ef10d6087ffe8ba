//! The payment provider, simulated: a payment takes time, may be declined, and may never be finished.
//!
//! It is somebody else's system: it remembers what it was asked, so asking again is harmless.

use std::time::Duration;

use anyhow::Result;
use sqlx::PgPool;

use crate::config;

/// How a payment stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payment {
    /// The buyer is still at it, or walked away. For so long now.
    Pending(Duration),
    /// Charged.
    Paid,
    /// The bank said no.
    Declined,
}

/// Starts the payment of an order, or says how it stands.
pub async fn ask(pool: &PgPool, settings: &config::Payment, order_id: i64) -> Result<Payment> {
    let chance = f64::from(u32::try_from(uuid::Uuid::new_v4().as_u128() & 0xffff_ffff)?) / f64::from(u32::MAX);
    let outcome = if chance < settings.fails {
        "declined"
    } else if chance < settings.fails + settings.abandons {
        "abandoned"
    } else {
        "paid"
    };
    sqlx::query(
        "insert into payments.payment (order_id, outcome, ready_at)
         values ($1, $2, now() + make_interval(secs => $3)) on conflict do nothing",
    )
    .bind(order_id)
    .bind(outcome)
    .bind(settings.time.as_secs_f64())
    .execute(pool)
    .await?;
    let (known, waited): (Option<String>, f64) = sqlx::query_as(
        "select case when ready_at <= now() and outcome <> 'abandoned' then outcome end,
                extract(epoch from now() - started_at)::float8
         from payments.payment where order_id = $1",
    )
    .bind(order_id)
    .fetch_one(pool)
    .await?;
    Ok(match known.as_deref() {
        None => Payment::Pending(Duration::try_from_secs_f64(waited).unwrap_or_default()),
        Some("paid") => Payment::Paid,
        Some(_) => Payment::Declined,
    })
}

/// Gives the money back, or sees to it that it is never taken.
pub async fn undo(pool: &PgPool, order_id: i64) -> Result<()> {
    sqlx::query(
        "insert into payments.payment (order_id, outcome, ready_at) values ($1, 'void', now())
         on conflict (order_id) do update set outcome =
             case when payment.outcome = 'paid' and payment.ready_at <= now() then 'refunded' else 'void' end
         where payment.outcome in ('paid', 'abandoned')",
    )
    .bind(order_id)
    .execute(pool)
    .await?;
    Ok(())
}
