//! What the box office is told by its environment.

use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Settings, each from one variable.
#[derive(Clone)]
pub struct Config {
    /// `BOX_OFFICE_DATABASE_URL`: PostgreSQL.
    pub database_url: String,
    /// `BOX_OFFICE_AMQP_URL`: RabbitMQ.
    pub amqp_url: String,
    /// `BOX_OFFICE_LISTEN`: the gateway's HTTP.
    pub listen: SocketAddr,
    /// `BOX_OFFICE_EVENTS_LISTEN`: the events-service's NestJS TCP.
    pub events_listen: SocketAddr,
    /// `BOX_OFFICE_JWT_SECRET`: the key of tokens, the same as Seatlock's.
    pub jwt_secret: String,
    /// `BOX_OFFICE_REALTIME_QUEUE`, `BOX_OFFICE_ORDERS_QUEUE`, `BOX_OFFICE_EVENTS_QUEUE`.
    pub queues: Queues,
    /// The simulated payments.
    pub payment: Payment,
}

/// Who is asked where.
#[derive(Clone)]
pub struct Queues {
    /// Seatlock.
    pub realtime: String,
    /// The orders-service.
    pub orders: String,
    /// The events-service.
    pub events: String,
}

/// How buyers pay.
#[derive(Clone, Copy)]
pub struct Payment {
    /// `BOX_OFFICE_PAYMENT_TIME`: how long a payment takes.
    pub time: Duration,
    /// `BOX_OFFICE_PAYMENT_FAILS`: the share that is declined, 0 to 1.
    pub fails: f64,
    /// `BOX_OFFICE_PAYMENT_ABANDONS`: the share that is never finished, 0 to 1.
    pub abandons: f64,
    /// `BOX_OFFICE_PAYMENT_WINDOW`: how long a payment is waited for. Below Seatlock's settle timeout and checkout
    /// window, or the tickets may be gone when it comes.
    pub window: Duration,
}

impl Config {
    /// Reads the environment.
    pub fn read() -> Result<Self> {
        let jwt_secret: String = required("BOX_OFFICE_JWT_SECRET")?;
        ensure!(jwt_secret.len() >= 32, "BOX_OFFICE_JWT_SECRET has fewer than 32 bytes");
        Ok(Self {
            database_url: required("BOX_OFFICE_DATABASE_URL")?,
            amqp_url: required("BOX_OFFICE_AMQP_URL")?,
            listen: or("BOX_OFFICE_LISTEN", "127.0.0.1:3000")?,
            events_listen: or("BOX_OFFICE_EVENTS_LISTEN", "127.0.0.1:8879")?,
            jwt_secret,
            queues: Queues {
                realtime: or("BOX_OFFICE_REALTIME_QUEUE", "realtime_queue")?,
                orders: or("BOX_OFFICE_ORDERS_QUEUE", "orders_queue")?,
                events: or("BOX_OFFICE_EVENTS_QUEUE", "events_queue")?,
            },
            payment: Payment {
                time: duration("BOX_OFFICE_PAYMENT_TIME", "1500ms")?,
                fails: share("BOX_OFFICE_PAYMENT_FAILS", "0.05")?,
                abandons: share("BOX_OFFICE_PAYMENT_ABANDONS", "0.02")?,
                window: duration("BOX_OFFICE_PAYMENT_WINDOW", "20s")?,
            },
        })
    }
}

fn required(name: &str) -> Result<String> {
    match std::env::var(name) {
        Ok(value) if !value.is_empty() => Ok(value),
        _ => bail!("{name} is required"),
    }
}

fn or<T: FromStr<Err: std::error::Error + Send + Sync + 'static>>(name: &str, default: &str) -> Result<T> {
    let text = std::env::var(name).unwrap_or_else(|_| default.to_owned());
    text.parse().with_context(|| format!("{name}={text}"))
}

fn duration(name: &str, default: &str) -> Result<Duration> {
    let text = std::env::var(name).unwrap_or_else(|_| default.to_owned());
    humantime::parse_duration(&text).with_context(|| format!("{name}={text}"))
}

fn share(name: &str, default: &str) -> Result<f64> {
    let share: f64 = or(name, default)?;
    ensure!((0.0..=1.0).contains(&share), "{name}={share} is not between 0 and 1");
    Ok(share)
}
