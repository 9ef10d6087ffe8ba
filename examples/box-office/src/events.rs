//! The events-service: owns what is sold. Answers over NestJS TCP and over RabbitMQ alike.
//!
//! It cannot oversell by itself: a reservation is one conditional update, and the table's own check stands behind it.

use anyhow::anyhow;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sqlx::{PgPool, Postgres, Transaction};

use crate::nest::{Broken, Fault, Refusal, Service};

/// An event with its categories, as NestJS entities are written.
const EVENTS: &str = r#"
    select json_build_object(
        'idEvent', e.id, 'eventName', e.name, 'eventCategory', e.kind, 'description', e.description,
        'eventDate', to_char(e.starts_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'),
        'location', e.location, 'isActive', e.is_active, 'createdBy', e.created_by,
        'ticketCategories', coalesce((
            select json_agg(json_build_object(
                'id', c.id, 'categoryName', c.name, 'price', c.price::text, 'totalSeats', c.total_seats,
                'reservedSeats', c.reserved_seats, 'availableSeats', c.total_seats - c.reserved_seats,
                'isActive', c.is_active and e.is_active, 'eventId', c.event_id) order by c.id)
            from events.category c where c.event_id = e.id), '[]'))
    from events.event e where $1::bigint is null or e.id = $1 order by e.id"#;

/// The events-service.
pub struct Events {
    pool: PgPool,
}

/// `reserve-tickets` and `release-tickets`. Callers that name the order may repeat themselves.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Seats {
    event_id: i64,
    category_id: i64,
    quantity: i32,
    order_id: Option<i64>,
}

impl Service for Events {
    async fn handle(&self, pattern: &str, data: Value) -> Result<Value, Fault> {
        match pattern {
            "get-events" => Ok(Value::Array(self.list(None).await?)),
            "get-event-by-id" => self.event(&data).await,
            // The heart of the integration: Seatlock asks this for its stock.
            "get-ticket-categories" => Ok(self.event(&data).await?["ticketCategories"].take()),
            "reserve-tickets" => self.reserve(&read(data)?).await,
            "release-tickets" => self.release(&read(data)?).await,
            _ => Err(Fault::NoHandler),
        }
    }
}

/// Data of a message, or a refusal that says what is wrong with it.
pub fn read<T: DeserializeOwned>(data: Value) -> Result<T, Refusal> {
    serde_json::from_value(data).map_err(|error| Refusal::new(400, "invalid_request", error.to_string()))
}

impl Events {
    /// On this database.
    pub fn new(pool: PgPool) -> Self {
        Self { pool }
    }

    async fn list(&self, event: Option<i64>) -> Result<Vec<Value>, Fault> {
        Ok(sqlx::query_scalar(EVENTS).bind(event).fetch_all(&self.pool).await.map_err(Broken)?)
    }

    async fn event(&self, data: &Value) -> Result<Value, Fault> {
        // The id travels bare, `{"data":3}`; some callers wrap it.
        let id = data.as_i64().or_else(|| data.get("eventId")?.as_i64());
        let id = id.ok_or_else(|| Refusal::new(400, "invalid_request", "the event's id must be an integer"))?;
        let found = self.list(Some(id)).await?.pop();
        Ok(found.ok_or_else(|| Refusal::new(404, "event_not_found", format!("Event with ID {id} not found")))?)
    }

    /// Takes seats, all of them or none.
    async fn reserve(&self, seats: &Seats) -> Result<Value, Fault> {
        if seats.quantity < 1 {
            return Err(Refusal::new(400, "invalid_request", "quantity must be at least 1").into());
        }
        let mut tx = self.pool.begin().await.map_err(Broken)?;
        if let Some(known) = note(&mut tx, seats, "reserved").await? {
            return match known.as_str() {
                "reserved" => Ok(json!(true)),
                _ => Err(Refusal::new(409, "order_released", "The order gave its tickets back").into()),
            };
        }
        let taken = sqlx::query(
            "update events.category set reserved_seats = reserved_seats + $3
             where id = $2 and event_id = $1 and is_active and total_seats - reserved_seats >= $3
               and exists (select from events.event where id = $1 and is_active)",
        );
        let taken = taken.bind(seats.event_id).bind(seats.category_id).bind(seats.quantity);
        if taken.execute(&mut *tx).await.map_err(Broken)?.rows_affected() == 0 {
            return Err(Refusal::new(409, "sold_out", "Not enough seats available").into());
        }
        tx.commit().await.map_err(Broken)?;
        Ok(json!(true))
    }

    /// Gives seats back.
    async fn release(&self, seats: &Seats) -> Result<Value, Fault> {
        let mut tx = self.pool.begin().await.map_err(Broken)?;
        let quantity = match (seats.order_id, note(&mut tx, seats, "released").await?) {
            // A caller that names no order is believed.
            (None, _) => seats.quantity.max(0),
            (Some(order), Some(known)) if known == "reserved" => {
                let reserved: i32 = sqlx::query_scalar(
                    "update events.reservation set state = 'released', changed_at = now()
                     where order_id = $1 returning quantity",
                )
                .bind(order)
                .fetch_one(&mut *tx)
                .await
                .map_err(Broken)?;
                reserved
            }
            // Nothing is reserved, and nothing will be: the row stands in the way of a reservation that comes late.
            (Some(_), None | Some(_)) => 0,
        };
        sqlx::query(
            "update events.category set reserved_seats = greatest(0, reserved_seats - $3) where id = $2 and event_id = $1",
        )
        .bind(seats.event_id)
        .bind(seats.category_id)
        .bind(quantity)
        .execute(&mut *tx)
        .await
        .map_err(Broken)?;
        tx.commit().await.map_err(Broken)?;
        Ok(json!(true))
    }
}

/// Writes what an order does, unless it did something before: then that, locked until the transaction ends.
async fn note(tx: &mut Transaction<'_, Postgres>, seats: &Seats, state: &str) -> Result<Option<String>, Fault> {
    let Some(order) = seats.order_id else { return Ok(None) };
    let written = sqlx::query(
        "insert into events.reservation (order_id, category_id, quantity, state) values ($1, $2, $3, $4)
         on conflict do nothing",
    );
    let written = written.bind(order).bind(seats.category_id).bind(seats.quantity).bind(state);
    if written.execute(&mut **tx).await.map_err(Broken)?.rows_affected() == 1 {
        return Ok(None);
    }
    let known = sqlx::query_scalar("select state from events.reservation where order_id = $1 for update");
    let known: Option<String> = known.bind(order).fetch_optional(&mut **tx).await.map_err(Broken)?;
    Ok(Some(known.ok_or_else(|| Broken(anyhow!("reservation {order} came and went")))?))
}
