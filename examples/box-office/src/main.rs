//! The neighbours of Seatlock in miniature: an api gateway, an orders-service and an events-service, to be run and read.
//!
//! `box-office` runs all three in one process; `box-office gateway`, `box-office orders`, `box-office events` one each.
//!
//! | file | what |
//! | --- | --- |
//! | `nest.rs`, `broker.rs`, `tcp.rs` | the NestJS wire formats, on RabbitMQ and on TCP |
//! | `orders/` | the state machine of an order: this is what talks to Seatlock |
//! | `events.rs` | the stock, and reservations that cannot oversell |
//! | `gateway.rs`, `token.rs` | HTTP for pages |
//! | `payment.rs` | a payment provider, simulated |
//!
//! Invariant: an order's step is written only after its neighbour answered, and every question may be asked again. So
//! `kill -9` anywhere leaves no order half done for longer than a lease.

mod broker;
mod config;
mod events;
mod gateway;
mod nest;
mod orders;
mod payment;
mod tcp;
mod token;

use std::io::IsTerminal;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use broker::Broker;
use config::Config;

/// Below PostgreSQL's default of 100 for three processes, with room for people.
const CONNECTIONS_MAX: u32 = 24;

#[tokio::main]
async fn main() -> Result<()> {
    let filter = std::env::var("BOX_OFFICE_LOG").unwrap_or_else(|_| "info,lapin=warn,sqlx=warn".to_owned());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let parts: Vec<String> = std::env::args().skip(1).collect();
    let known = ["gateway", "orders", "events"];
    if let Some(other) = parts.iter().find(|part| !known.contains(&part.as_str())) {
        bail!("{other} is none of {}; without any, all of them run", known.join(", "));
    }
    let runs = |part: &str| parts.is_empty() || parts.iter().any(|named| named == part);
    let config = Config::read()?;
    let mut terminated = signal(SignalKind::terminate())?;
    let mut interrupted = signal(SignalKind::interrupt())?;
    let broker = Arc::new(Broker::new(&config.amqp_url));

    if runs("events") || runs("orders") {
        let pool = database(&config.database_url).await?;
        if runs("events") {
            let service = Arc::new(events::Events::new(pool.clone()));
            let listener = listen(config.events_listen).await?;
            tracing::info!(listen = %config.events_listen, "events-service: serving NestJS TCP");
            tokio::spawn(tcp::serve(listener, Arc::clone(&service)));
            tokio::spawn(broker::serve(config.amqp_url.clone(), config.queues.events.clone(), service));
        }
        if runs("orders") {
            let service = orders::Orders::start(pool, &broker, &config);
            tokio::spawn(broker::serve(config.amqp_url.clone(), config.queues.orders.clone(), service));
        }
    }
    if runs("gateway") {
        let routes = gateway::Gateway::new(broker, config.queues.clone(), &config.jwt_secret).routes();
        let listener = listen(config.listen).await?;
        tracing::info!(listen = %config.listen, "gateway: serving HTTP");
        tokio::spawn(async move { axum::serve(listener, routes).await });
    }
    // Nothing has to be finished: whatever is open is taken up at the next start.
    tokio::select! {
        _ = terminated.recv() => {}
        _ = interrupted.recv() => {}
    }
    Ok(())
}

async fn listen(address: std::net::SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// The database, with its tables. The processes may start at the same time; the first makes them.
async fn database(url: &str) -> Result<PgPool> {
    let options = PgPoolOptions::new().max_connections(CONNECTIONS_MAX).acquire_timeout(Duration::from_secs(10));
    let pool = options.connect(url).await.context("the database")?;
    sqlx::migrate!().run(&pool).await.context("the tables")?;
    Ok(pool)
}
