//! What carries orders from step to step, and tells the others.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::Row;
use tokio::time::{sleep, timeout};

use super::store::{Order, Step, Store, is_taken};
use crate::broker::{Broker, CallError};
use crate::config::{self, Config, Queues};
use crate::nest::Refusal;
use crate::payment::{self, Payment};

/// Orders in work at once.
const WORKERS: usize = 16;

/// How often a worker looks for what another process left, or for what has become due.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often a pending payment is asked for.
const PAYMENT_EVERY: Duration = Duration::from_millis(500);

struct Worker {
    store: Store,
    broker: Arc<Broker>,
    queues: Queues,
    payment: config::Payment,
}

/// What a step came to.
enum Next {
    /// It is done.
    To(Step),
    /// It is not to be done: undo the order.
    Undo(Refusal),
    /// Ask again later.
    Wait(Duration),
}

#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    #[error("the payment provider: {0:#}")]
    Payment(anyhow::Error),
}

/// Starts the workers and the relay of the outbox.
pub fn start(store: &Store, broker: &Arc<Broker>, config: &Config) {
    for _ in 0..WORKERS {
        let worker = Worker {
            store: store.clone(),
            broker: Arc::clone(broker),
            queues: config.queues.clone(),
            payment: config.payment,
        };
        tokio::spawn(async move { worker.run().await });
    }
    tokio::spawn(relay(store.clone(), Arc::clone(broker), config.queues.realtime.clone()));
}

impl Worker {
    async fn run(&self) {
        loop {
            match self.store.claim().await {
                Ok(Some(order)) => self.drive(order).await,
                // A notice that is missed is made up for by the next look.
                Ok(None) => drop(timeout(LOOK_EVERY, self.store.work()).await),
                Err(error) => {
                    tracing::warn!(%error, "the database");
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// Carries one order as far as it goes now.
    async fn drive(&self, mut order: Order) {
        loop {
            let next = self.step(&mut order).await;
            let written = match next {
                Ok(Next::To(step)) => match self.store.advance(&order, step).await {
                    Ok(Some(next)) if !matches!(step, Step::Completed | Step::Cancelled) => {
                        order = next;
                        continue;
                    }
                    Ok(Some(_)) => Ok(()),
                    // Turned round by a cancellation meanwhile: whoever claims it next sees that.
                    Ok(None) => self.store.rest(&order, Duration::ZERO).await,
                    Err(error) if is_taken(&error) => {
                        // The lock that was found belongs to another order and is not ours to release.
                        let why = Refusal::new(409, "order_exists", "There is an order for this lock already");
                        order.lock_id = None;
                        self.store.give_up(&order, &why).await
                    }
                    Err(error) => Err(error),
                },
                Ok(Next::Undo(why)) => self.store.give_up(&order, &why).await,
                Ok(Next::Wait(pause)) => self.store.rest(&order, pause).await,
                Err(error) => {
                    // 0.2 s, doubling to 3 s: an outage is ridden out, and its end is noticed soon.
                    let pause = Duration::from_millis(200 << order.attempts.clamp(0, 4)).min(Duration::from_secs(3));
                    tracing::info!(order = order.id, step = order.step.as_str(), %error, ?pause, "again later");
                    self.store.rest(&order, pause).await
                }
            };
            if let Err(error) = written {
                tracing::warn!(order = order.id, %error, "left to the end of its lease");
            }
            return;
        }
    }

    /// Does one step. Everything asked here may be asked again.
    async fn step(&self, order: &mut Order) -> Result<Next, StepError> {
        match order.step {
            Step::Placed if order.with_lock => self.confirm_lock(order).await,
            Step::Placed => self.validate(order).await,
            Step::Held => self.pay(order).await,
            Step::Paid => self.reserve(order).await,
            Step::Reserved if order.with_lock => Ok(Next::To(Step::Completed)),
            Step::Reserved => self.confirm(order).await,
            Step::Undoing => self.give_back(order).await,
            Step::Completed | Step::Cancelled => Ok(Next::Wait(Duration::ZERO)),
        }
    }

    /// `validate`: does the buyer hold what the order needs? The answer pins the lock for the checkout.
    async fn validate(&self, order: &mut Order) -> Result<Next, StepError> {
        let asked = json!({
            "userId": order.user_id, "eventId": order.event_id,
            "categoryId": order.category_id, "quantity": order.quantity,
        });
        let found = self.realtime("validate-user-locks", &asked).await?;
        if found["valid"] != true {
            let text = |name: &str, default: &str| found[name].as_str().unwrap_or(default).to_owned();
            let message = text("message", "No valid locks found for the requested tickets");
            return Ok(Next::Undo(Refusal::new(409, &text("code", "lock_not_found"), message)));
        }
        order.lock_id = found["lockId"].as_str().map(str::to_owned);
        Ok(Next::To(Step::Held))
    }

    /// `with_lock`: the lock must be what the order says. Confirming it keeps the tickets while the buyer pays.
    async fn confirm_lock(&self, order: &mut Order) -> Result<Next, StepError> {
        let invalid = || Next::Undo(Refusal::new(409, "lock_not_found", "Invalid or expired lock"));
        let lock = self.realtime("get-lock", &json!({ "lockId": order.lock_id })).await?;
        let is_it = lock["userId"] == order.user_id
            && lock["eventId"] == order.event_id
            && lock["categoryId"] == order.category_id
            && lock["quantity"] == order.quantity;
        if !is_it {
            // Whatever it is, it was not had for this order and is not released with it.
            order.lock_id = None;
            return Ok(invalid());
        }
        let asked = json!({ "lockId": order.lock_id, "userId": order.user_id, "orderId": order.id });
        let confirmed = self.realtime("confirm-lock", &asked).await?;
        Ok(if confirmed == true { Next::To(Step::Held) } else { invalid() })
    }

    async fn pay(&self, order: &Order) -> Result<Next, StepError> {
        let paid = payment::ask(self.store.pool(), &self.payment, order.id).await.map_err(StepError::Payment)?;
        Ok(match paid {
            Payment::Paid => Next::To(Step::Paid),
            Payment::Declined => Next::Undo(Refusal::new(402, "payment_declined", "The payment was declined")),
            Payment::Pending(waited) if waited < self.payment.window => Next::Wait(PAYMENT_EVERY),
            Payment::Pending(_) => {
                Next::Undo(Refusal::new(402, "payment_abandoned", "The payment was not finished in time"))
            }
        })
    }

    async fn reserve(&self, order: &Order) -> Result<Next, StepError> {
        match self.broker.request(&self.queues.events, "reserve-tickets", &seats(order)).await {
            Ok(_) => Ok(Next::To(Step::Reserved)),
            // A refusal of the rules is final; a service that broke may recover.
            Err(CallError::Refused(refusal)) if refusal.status < 500 => Ok(Next::Undo(refusal)),
            Err(error) => Err(error.into()),
        }
    }

    async fn confirm(&self, order: &Order) -> Result<Next, StepError> {
        let asked = json!({ "lockId": order.lock_id, "orderId": order.id });
        let confirmed = self.realtime("confirm-ticket-lock", &asked).await?;
        Ok(if confirmed == true {
            Next::To(Step::Completed)
        } else {
            let message = "Ticket locks have expired. Please select tickets again.";
            Next::Undo(Refusal::new(409, "lock_expired", message))
        })
    }

    /// Gives everything back, whether or not it was ever had.
    async fn give_back(&self, order: &Order) -> Result<Next, StepError> {
        payment::undo(self.store.pool(), order.id).await.map_err(StepError::Payment)?;
        self.broker.request(&self.queues.events, "release-tickets", &seats(order)).await?;
        if let Some(lock_id) = &order.lock_id {
            // `false` is fine: there was nothing left to release. With the user named, a lock of another stays.
            self.realtime("release-ticket-lock", &json!({ "lockId": lock_id, "userId": order.user_id })).await?;
        }
        Ok(Next::To(Step::Cancelled))
    }

    async fn realtime(&self, pattern: &str, data: &Value) -> Result<Value, CallError> {
        self.broker.request(&self.queues.realtime, pattern, data).await
    }
}

fn seats(order: &Order) -> Value {
    json!({
        "eventId": order.event_id, "categoryId": order.category_id,
        "quantity": order.quantity, "orderId": order.id,
    })
}

/// Tells Seatlock what the outbox holds, in order. A message leaves the outbox once the broker has it: it may be told
/// twice, never not at all.
async fn relay(store: Store, broker: Arc<Broker>, queue: String) {
    loop {
        match relay_some(&store, &broker, &queue).await {
            Ok(0) => drop(timeout(LOOK_EVERY, store.work()).await),
            Ok(_) => {}
            Err(error) => {
                tracing::info!(%error, "the outbox waits");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn relay_some(store: &Store, broker: &Broker, queue: &str) -> Result<usize, StepError> {
    let mut tx = store.pool().begin().await?;
    // One relay at a time, so that an order's completion is told before its cancellation.
    let rows = sqlx::query("select id, pattern, data from orders.outbox order by id limit 50 for update");
    let rows = rows.fetch_all(&mut *tx).await?;
    for row in &rows {
        broker.emit(queue, row.try_get("pattern")?, &row.try_get::<Value, _>("data")?).await?;
        let told = sqlx::query("delete from orders.outbox where id = $1").bind(row.try_get::<i64, _>("id")?);
        told.execute(&mut *tx).await?;
    }
    tx.commit().await?;
    Ok(rows.len())
}
