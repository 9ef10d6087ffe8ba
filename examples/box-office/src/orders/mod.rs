//! The orders-service: turns a lock into an order, step by step.
//!
//! An order is a row whose `step` says what has been done. Each step asks one neighbour something that may be asked
//! again, and only then is the next step written: whoever is killed between two steps leaves a row that another worker,
//! or the same one restarted, takes up where it stood.
//!
//! ```text
//! placed ──► held ──► paid ──► reserved ──► completed
//!    │         │        │          │            │
//!    └─────────┴────────┴──────────┴────────────┴──► undoing ──► cancelled
//!
//! flow `validate`  (create-order)            flow `with_lock`  (create-order-with-lock)
//!   placed    validate-user-locks              get-lock, confirm-lock
//!   held      payment                          payment
//!   paid      reserve-tickets                  reserve-tickets
//!   reserved  confirm-ticket-lock
//!   undoing   refund, release-tickets, release-ticket-lock
//! ```
//!
//! The payment stands between the lock and the reservation, so that the tickets are counted once while the buyer pays:
//! by the lock, and from the reservation on by the stock.

mod store;
mod worker;

use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::time::{Instant, timeout};
use uuid::Uuid;

use crate::broker::Broker;
use crate::config::Config;
use crate::events::read;
use crate::nest::{Broken, Fault, Refusal, Service};

use store::{Order, Place, Step, Store};

/// How long `create-order` waits for the lock to be checked before it answers with the order as it stands.
const CREATE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often it looks meanwhile, if nobody tells it.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The orders-service.
pub struct Orders {
    store: Store,
}

/// `create-order` and `create-order-with-lock`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Create {
    user_id: i64,
    event_id: i64,
    category_id: i64,
    quantity: i32,
    lock_id: Option<String>,
    /// The same id is the same order.
    request_id: Option<Uuid>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OfOrder {
    order_id: i64,
    user_id: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OfUser {
    user_id: i64,
}

impl Orders {
    /// Starts the workers; they take up whatever a predecessor left.
    pub fn start(pool: PgPool, broker: &Arc<Broker>, config: &Config) -> Arc<Self> {
        let store = Store::new(pool);
        worker::start(&store, broker, config);
        Arc::new(Self { store })
    }

    async fn create(&self, asked: Create, with_lock: bool) -> Result<Value, Fault> {
        if asked.quantity < 1 {
            return Err(Refusal::new(400, "invalid_request", "quantity must be at least 1").into());
        }
        if with_lock && asked.lock_id.is_none() {
            return Err(Refusal::new(400, "invalid_request", "lockId is required").into());
        }
        let place = Place {
            request_id: asked.request_id.unwrap_or_else(Uuid::new_v4),
            user_id: asked.user_id,
            event_id: asked.event_id,
            category_id: asked.category_id,
            quantity: asked.quantity,
            lock_id: asked.lock_id.filter(|_| with_lock),
        };
        let mut moves = self.store.moves();
        let order = self.store.place(&place).await?;
        // What the buyer should hear at once, that there is no such lock, is known after the first step.
        let end = Instant::now() + CREATE_TIMEOUT;
        loop {
            let order = self.store.order(order.id).await.map_err(Broken)?.unwrap_or_else(|| order.clone());
            match order.step {
                Step::Placed => {}
                Step::Undoing | Step::Cancelled => return Err(order.refusal().into()),
                Step::Held | Step::Paid | Step::Reserved | Step::Completed => return Ok(order.json()),
            }
            if Instant::now() >= end {
                return Ok(order.json());
            }
            let told = async { while moves.recv().await.is_ok_and(|id| id != order.id) {} };
            // Another process may have the order in hand: then nobody here is told, and a look now and then must do.
            drop(timeout(LOOK_EVERY, told).await);
        }
    }

    async fn cancel(&self, asked: OfOrder) -> Result<Value, Fault> {
        let order = self.own(asked.order_id, asked.user_id).await?;
        match order.step {
            Step::Undoing | Step::Cancelled => Ok(order.json()),
            Step::Placed | Step::Held | Step::Paid | Step::Reserved | Step::Completed => {
                let refusal = Refusal::new(409, "cancelled_by_buyer", "Cancelled by the buyer");
                self.store.cancel(order.id, &refusal).await.map_err(Broken)?;
                Ok(self.own(asked.order_id, asked.user_id).await?.json())
            }
        }
    }

    /// An order, if it is the user's: others are told that there is none.
    async fn own(&self, order_id: i64, user_id: i64) -> Result<Order, Fault> {
        let order = self.store.order(order_id).await.map_err(Broken)?.filter(|order| order.user_id == user_id);
        Ok(order.ok_or_else(|| Refusal::new(404, "order_not_found", format!("Order with ID {order_id} not found")))?)
    }
}

impl Service for Orders {
    async fn handle(&self, pattern: &str, data: Value) -> Result<Value, Fault> {
        match pattern {
            "create-order" => self.create(read(data)?, false).await,
            "create-order-with-lock" => self.create(read(data)?, true).await,
            "cancel-order" => self.cancel(read(data)?).await,
            "get-order" => {
                let asked: OfOrder = read(data)?;
                Ok(self.own(asked.order_id, asked.user_id).await?.json())
            }
            "get-orders" => {
                let asked: OfUser = read(data)?;
                let orders = self.store.orders_of(asked.user_id).await.map_err(Broken)?;
                Ok(orders.iter().map(Order::json).collect())
            }
            _ => Err(Fault::NoHandler),
        }
    }
}

impl Order {
    fn refusal(&self) -> Refusal {
        let code = self.code.as_deref().unwrap_or("cancelled");
        Refusal::new(409, code, self.message.as_deref().unwrap_or("The order was cancelled"))
    }

    fn json(&self) -> Value {
        json!({
            "orderId": self.id,
            "userId": self.user_id,
            "eventId": self.event_id,
            "categoryId": self.category_id,
            "quantity": self.quantity,
            "lockId": self.lock_id,
            "status": match self.step {
                Step::Placed | Step::Held | Step::Paid | Step::Reserved => "pending",
                Step::Completed => "completed",
                Step::Undoing | Step::Cancelled => "cancelled",
            },
            "step": self.step.as_str(),
            "code": self.code,
            "message": self.message,
            "createdAt": self.created_at,
            "updatedAt": self.updated_at,
        })
    }
}
