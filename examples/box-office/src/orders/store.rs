//! The orders' rows. Every change of a step is conditional on the step and the lease it was decided under.

use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::postgres::PgRow;
use sqlx::{FromRow, PgPool, Row};
use tokio::sync::{Notify, broadcast};
use uuid::Uuid;

use crate::nest::{Broken, Fault, Refusal};

/// How long a worker may be busy with one step. The longest step asks three neighbours for 3 s each; who takes longer is
/// dead, and its order is free for others.
const LEASE: Duration = Duration::from_secs(15);

/// What has been done for an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Written down.
    Placed,
    /// Its tickets are the buyer's while the payment runs.
    Held,
    /// The money is here.
    Paid,
    /// The events-service counts its tickets as sold.
    Reserved,
    /// Done, and told.
    Completed,
    /// Something said no: what was done is being undone.
    Undoing,
    /// Undone, and told.
    Cancelled,
}

impl Step {
    const ALL: [Self; 7] =
        [Self::Placed, Self::Held, Self::Paid, Self::Reserved, Self::Completed, Self::Undoing, Self::Cancelled];

    /// As it is stored.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Placed => "placed",
            Self::Held => "held",
            Self::Paid => "paid",
            Self::Reserved => "reserved",
            Self::Completed => "completed",
            Self::Undoing => "undoing",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A row.
#[derive(Debug, Clone)]
pub struct Order {
    pub id: i64,
    pub user_id: i64,
    pub event_id: i64,
    pub category_id: i64,
    pub quantity: i32,
    pub lock_id: Option<String>,
    pub with_lock: bool,
    pub step: Step,
    pub code: Option<String>,
    pub message: Option<String>,
    pub created_at: DateTime<Utc>,
    pub updated_at: DateTime<Utc>,
    pub lease: Option<Uuid>,
    pub attempts: i32,
}

impl FromRow<'_, PgRow> for Order {
    fn from_row(row: &PgRow) -> sqlx::Result<Self> {
        let step: &str = row.try_get("step")?;
        let step = Step::ALL.into_iter().find(|known| known.as_str() == step);
        Ok(Self {
            id: row.try_get("id")?,
            user_id: row.try_get("user_id")?,
            event_id: row.try_get("event_id")?,
            category_id: row.try_get("category_id")?,
            quantity: row.try_get("quantity")?,
            lock_id: row.try_get("lock_id")?,
            with_lock: row.try_get::<&str, _>("flow")? == "with_lock",
            step: step.ok_or_else(|| sqlx::Error::ColumnNotFound("a known step".to_owned()))?,
            code: row.try_get("code")?,
            message: row.try_get("message")?,
            created_at: row.try_get("created_at")?,
            updated_at: row.try_get("updated_at")?,
            lease: row.try_get("lease")?,
            attempts: row.try_get("attempts")?,
        })
    }
}

impl Order {
    /// What `order-completed` and `order-cancelled` carry.
    pub fn report(&self, message: &str) -> Value {
        json!({
            "orderId": self.id,
            "eventId": self.event_id,
            "categoryId": self.category_id,
            "quantity": self.quantity,
            "userId": self.user_id,
            "lockId": self.lock_id,
            "message": message,
        })
    }
}

/// An order to be placed.
pub struct Place {
    pub request_id: Uuid,
    pub user_id: i64,
    pub event_id: i64,
    pub category_id: i64,
    pub quantity: i32,
    /// In the flow `with_lock`.
    pub lock_id: Option<String>,
}

/// The orders and the outbox.
#[derive(Clone)]
pub struct Store {
    pool: PgPool,
    moves: broadcast::Sender<i64>,
    work: Arc<Notify>,
}

impl Store {
    pub fn new(pool: PgPool) -> Self {
        Self { pool, moves: broadcast::Sender::new(1024), work: Arc::default() }
    }

    pub const fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// The ids of orders that this process moves.
    pub fn moves(&self) -> broadcast::Receiver<i64> {
        self.moves.subscribe()
    }

    /// Until there may be something to do.
    pub async fn work(&self) {
        self.work.notified().await;
    }

    fn moved(&self, order_id: i64) {
        // Nobody may be waiting.
        let _ = self.moves.send(order_id);
        self.work.notify_one();
    }

    /// Writes an order down, or finds the one that the same request made.
    pub async fn place(&self, place: &Place) -> Result<Order, Fault> {
        let flow = if place.lock_id.is_some() { "with_lock" } else { "validate" };
        let written = sqlx::query_as(
            "insert into orders.purchase (request_id, user_id, event_id, category_id, quantity, lock_id, flow)
             values ($1, $2, $3, $4, $5, $6, $7)
             on conflict (request_id) do update set request_id = excluded.request_id
             returning *",
        )
        .bind(place.request_id)
        .bind(place.user_id)
        .bind(place.event_id)
        .bind(place.category_id)
        .bind(place.quantity)
        .bind(&place.lock_id)
        .bind(flow)
        .fetch_one(&self.pool)
        .await;
        let order: Order = match written {
            Err(error) if is_taken(&error) => {
                return Err(Refusal::new(409, "order_exists", "There is an order for this lock already").into());
            }
            written => written.map_err(Broken)?,
        };
        if order.user_id != place.user_id {
            return Err(Refusal::new(409, "request_id_taken", "The request id is another order's").into());
        }
        self.moved(order.id);
        Ok(order)
    }

    pub async fn order(&self, id: i64) -> sqlx::Result<Option<Order>> {
        sqlx::query_as("select * from orders.purchase where id = $1").bind(id).fetch_optional(&self.pool).await
    }

    /// A user's last hundred orders, the youngest first.
    pub async fn orders_of(&self, user_id: i64) -> sqlx::Result<Vec<Order>> {
        let found = sqlx::query_as("select * from orders.purchase where user_id = $1 order by id desc limit 100");
        found.bind(user_id).fetch_all(&self.pool).await
    }

    /// Takes an order in hand whose next step is due and that nobody else has.
    pub async fn claim(&self) -> sqlx::Result<Option<Order>> {
        sqlx::query_as(
            "update orders.purchase set lease = $1, lease_until = now() + make_interval(secs => $2),
                 attempts = attempts + 1
             where id = (
                 select id from orders.purchase
                 where step not in ('completed', 'cancelled') and due_at <= now() and lease_until <= now()
                 order by due_at limit 1 for update skip locked)
             returning *",
        )
        .bind(Uuid::new_v4())
        .bind(LEASE.as_secs_f64())
        .fetch_optional(&self.pool)
        .await
    }

    /// Writes that a step is done, and with it what the others have to be told. `None` when the order is no longer as
    /// it was: somebody cancelled it, or the lease ran out.
    pub async fn advance(&self, order: &Order, to: Step) -> sqlx::Result<Option<Order>> {
        let told = match to {
            Step::Completed => Some(("order-completed", "Your tickets are booked")),
            Step::Cancelled => Some(("order-cancelled", order.message.as_deref().unwrap_or("The order was cancelled"))),
            Step::Placed | Step::Held | Step::Paid | Step::Reserved | Step::Undoing => None,
        };
        let mut tx = self.pool.begin().await?;
        let next: Option<Order> = sqlx::query_as(
            "update orders.purchase set step = $4, lock_id = $5, updated_at = now(), due_at = now(), attempts = 0,
                 lease_until = case when $4 in ('completed', 'cancelled') then '-infinity'
                                    else now() + make_interval(secs => $6) end
             where id = $1 and step = $2 and lease = $3
             returning *",
        )
        .bind(order.id)
        .bind(order.step.as_str())
        .bind(order.lease)
        .bind(to.as_str())
        .bind(&order.lock_id)
        .bind(LEASE.as_secs_f64())
        .fetch_optional(&mut *tx)
        .await?;
        if let (Some(next), Some((pattern, message))) = (&next, told) {
            let written = sqlx::query("insert into orders.outbox (pattern, data) values ($1, $2)");
            written.bind(pattern).bind(next.report(message)).execute(&mut *tx).await?;
        }
        tx.commit().await?;
        self.moved(order.id);
        Ok(next)
    }

    /// Turns an order round for the buyer, whoever has it in hand: that worker's next write finds the step changed.
    pub async fn cancel(&self, order_id: i64, why: &Refusal) -> sqlx::Result<()> {
        let turned = sqlx::query(
            "update orders.purchase set step = 'undoing', code = $2, message = $3, updated_at = now(), due_at = now(),
                 attempts = 0
             where id = $1 and step not in ('undoing', 'cancelled')",
        );
        turned.bind(order_id).bind(&why.code).bind(&why.message).execute(&self.pool).await?;
        self.moved(order_id);
        Ok(())
    }

    /// Turns an order round that a worker has in hand. Its `lock_id` is what has to be released, if anything.
    pub async fn give_up(&self, order: &Order, why: &Refusal) -> sqlx::Result<()> {
        let turned = sqlx::query(
            "update orders.purchase set step = 'undoing', code = $3, message = $4, lock_id = $5, updated_at = now(),
                 due_at = now(), lease_until = '-infinity', attempts = 0
             where id = $1 and lease = $2 and step not in ('undoing', 'cancelled')",
        );
        let turned = turned.bind(order.id).bind(order.lease).bind(&why.code).bind(&why.message).bind(&order.lock_id);
        if turned.execute(&self.pool).await?.rows_affected() == 0 {
            self.rest(order, Duration::ZERO).await?;
        }
        self.moved(order.id);
        Ok(())
    }

    /// Puts an order down until its next step is due.
    pub async fn rest(&self, order: &Order, pause: Duration) -> sqlx::Result<()> {
        let put = sqlx::query(
            "update orders.purchase set lease_until = '-infinity',
                 due_at = case when step = $3 then now() + make_interval(secs => $4) else due_at end
             where id = $1 and lease = $2",
        );
        let put = put.bind(order.id).bind(order.lease).bind(order.step.as_str()).bind(pause.as_secs_f64());
        put.execute(&self.pool).await?;
        Ok(())
    }
}

/// True when another row has this lock.
pub fn is_taken(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(|error| error.constraint() == Some("purchase_lock"))
}
