//! Seatlock: a distributed ticket-lock service.
//!
//! # The map
//!
//! ```text
//! main -> app -> gateway, rpc, http, fanout, inventory -> ledger -> domain
//!                callers (of gateway and http), config, metrics, shutdown, telemetry: leaves
//! ```
//!
//! - [`domain`]: the words and the model of one event. Pure.
//! - [`ledger`]: the one door to lock state; Redis with one script per transition, or the model in memory.
//! - [`inventory`]: where the stock comes from, and how it reaches the ledger.
//! - [`fanout`]: from the ledger's notices to whoever watches here; the tick.
//! - [`gateway`]: Socket.IO. [`rpc`]: RabbitMQ. [`http`]: the rest. Siblings: each parses, asks the ledger, renders.
//! - [`app`]: puts them together, in the order of starting and, reversed, of stopping.
//!
//! # What is deliberately absent
//!
//! - No replica holds lock state: every decision is one step of the ledger.
//! - No deadline is compared with any clock but the ledger's.
//! - No decision depends on a sweep, a notice or an index: those make things prompt, live and findable.
//! - Nothing waits without a limit, and nothing that grows is without a bound.

pub mod app;
pub mod callers;
pub mod config;
pub mod domain;
pub mod fanout;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
pub mod gateway;
pub mod http;
pub mod inventory;
pub mod ledger;
pub mod metrics;
pub mod rpc;
pub mod shutdown;
pub mod telemetry;
