//! Every test that needs more than one module, in one binary.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that meets an error fails and shows it")]
#![expect(clippy::unchecked_time_subtraction, reason = "of constants; a wrong one panics, which fails the test")]

mod audit;
mod book;
mod churn;
mod config;
mod cost;
mod deadline;
mod fanout;
mod fleet;
mod gateway;
mod histories;
mod http;
mod inventory;
mod inventory_rmq;
mod ledger;
mod limits;
mod lua;
mod operate;
mod outage;
mod rounds;
mod rpc;
mod security;
mod sessions;
mod support;
mod tidy;
mod topology;
mod wave;
