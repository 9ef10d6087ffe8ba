//! Every metric of the service: name, help, labels and buckets, described once and registered at start.
//!
//! Labels take values from closed enums only, never an event, a user, a lock or a socket.

use std::time::Duration;

use metrics::{Label, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};

pub use metrics_exporter_prometheus::{BuildError, PrometheusHandle as Handle};

/// What a metric measures.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution over these bucket bounds.
    Histogram(&'static [f64]),
}

/// One metric. The help text is what an operator reads in Prometheus.
#[derive(Debug)]
pub struct Metric {
    /// Counter, gauge or histogram.
    pub kind: Kind,
    /// `seatlock_<module>_<noun>_<unit>`.
    pub name: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// Label names, in the order in which values are given.
    pub labels: &'static [&'static str],
}

/// Seconds, for request latencies: from what a script takes to the request timeout.
pub const LATENCY_SECONDS: &[f64] =
    &[0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0];

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $kind:ident $ident:ident = $name:literal $({ $($label:ident),* })? $([ $buckets:expr ])?;)*) => {
        $(
            $(#[doc = $help])+
            pub static $ident: Metric = Metric {
                kind: metrics!(@kind $kind $([ $buckets ])?),
                name: $name,
                help: concat!($($help),+),
                labels: &[$($(stringify!($label)),*)?],
            };
        )*
        /// All of them, in the order of this file.
        pub static ALL: &[&Metric] = &[$(&$ident),*];
    };
    (@kind counter) => { Kind::Counter };
    (@kind gauge) => { Kind::Gauge };
    (@kind histogram [ $buckets:expr ]) => { Kind::Histogram($buckets) };
}

metrics! {
    // ledger
    /// Lock requests by outcome.
    counter LEDGER_LOCKS = "seatlock_ledger_locks_total" { outcome };
    /// Seconds until the ledger answered, by script.
    histogram LEDGER_CALL = "seatlock_ledger_call_seconds" { script } [LATENCY_SECONDS];
    /// Ledger calls that got no answer, by script and kind of error.
    counter LEDGER_ERRORS = "seatlock_ledger_errors_total" { script, kind };
    /// 1 while the connection to Redis stands.
    gauge LEDGER_UP = "seatlock_ledger_connected";
    /// Notices lost because this replica was too slow to take them; everything watched is read again.
    counter LEDGER_NOTICES_LOST = "seatlock_ledger_notices_lost_total";
    /// Times the subscription looked alive and delivered nothing.
    counter LEDGER_PROBES_LOST = "seatlock_ledger_probes_lost_total";
    /// Notices that did not read as one.
    counter LEDGER_NOTICES_UNREADABLE = "seatlock_ledger_notices_unreadable_total";
    /// Confirmed locks whose order was not reported in time.
    counter LEDGER_SETTLE_TIMEOUTS = "seatlock_ledger_settle_timeouts_total";
    /// Remembered locks handed back to a ledger that may have lost them, by outcome.
    counter LEDGER_RESTORED = "seatlock_ledger_restored_total" { outcome };
    // inventory
    /// Questions to the events-service by what became of them (`fresh`: another replica had asked).
    counter INVENTORY_QUESTIONS = "seatlock_inventory_questions_total" { outcome };
    /// Seconds until the events-service answered.
    histogram INVENTORY_QUESTION_SECONDS = "seatlock_inventory_question_seconds" [LATENCY_SECONDS];
    /// Answers that came after the answer to a later question and changed nothing.
    counter INVENTORY_OLDER = "seatlock_inventory_older_answers_total";
    /// Events whose stock is kept fresh by this replica.
    gauge INVENTORY_WATCHED = "seatlock_inventory_watched_events";
    /// 1 while the connection to the events-service stands.
    gauge INVENTORY_CONNECTED = "seatlock_inventory_connected";
    /// Connections to the events-service that broke or could not be made.
    counter INVENTORY_DISCONNECTS = "seatlock_inventory_disconnects_total";
    // fanout
    /// Notices of changed categories by what they were (`news`, `stale`, `unwatched`).
    counter FANOUT_NOTICES = "seatlock_fanout_notices_total" { result };
    /// Category updates given to rooms.
    counter FANOUT_UPDATES = "seatlock_fanout_updates_total";
    /// Tickets of other users' changes that rooms were not told of, because too much happened at once.
    counter FANOUT_SHED = "seatlock_fanout_shed_tickets_total";
    /// Messages given to the sockets of one user.
    counter FANOUT_PERSONAL = "seatlock_fanout_personal_total";
    /// Categories whose news came by reading again, not by a notice.
    counter FANOUT_HEALED = "seatlock_fanout_healed_total";
    /// Times when notices may have been missed and everything watched was read again.
    counter FANOUT_RESYNCS = "seatlock_fanout_resyncs_total";
    /// Readings of watched events that failed and are repeated.
    counter FANOUT_READ_ERRORS = "seatlock_fanout_read_errors_total";
    /// Events that local sockets watch.
    gauge FANOUT_WATCHED = "seatlock_fanout_watched_events";
    /// Users that local sockets belong to.
    gauge FANOUT_LISTENING = "seatlock_fanout_listening_users";
    /// Seconds that one round of updates took.
    histogram FANOUT_ROUND_SECONDS = "seatlock_fanout_round_seconds" [LATENCY_SECONDS];
    // gateway
    /// Attempts to fetch the keys that tokens are verified with, by outcome.
    counter GATEWAY_KEY_FETCHES = "seatlock_gateway_key_fetches_total" { outcome };
    /// Open sockets.
    gauge GATEWAY_SOCKETS = "seatlock_gateway_sockets";
    /// Users with at least one open socket.
    gauge GATEWAY_USERS = "seatlock_gateway_users";
    /// Connections that were not accepted, by reason.
    counter GATEWAY_REFUSED = "seatlock_gateway_handshakes_refused_total" { reason };
    /// Sockets that ended, by what the transport says about it.
    counter GATEWAY_DISCONNECTS = "seatlock_gateway_disconnects_total" { reason };
    /// Sockets that this service ended, by its reason.
    counter GATEWAY_ENDED = "seatlock_gateway_ended_total" { reason };
    /// Messages from clients by name; names that do not exist are `unknown`.
    counter GATEWAY_MESSAGES = "seatlock_gateway_messages_total" { name };
    /// Answers by the name of the message answered and by code; `ok` is granted.
    counter GATEWAY_ANSWERS = "seatlock_gateway_answers_total" { name, outcome };
    /// Seconds from the turn of a message to its answer.
    histogram GATEWAY_ANSWER_SECONDS = "seatlock_gateway_answer_seconds" { name } [LATENCY_SECONDS];
    /// Times an answer had to wait because the socket's send buffer was full.
    counter GATEWAY_FULL = "seatlock_gateway_send_waits_total";
    /// Messages that a socket did not get because its send buffer was full, by kind.
    counter GATEWAY_DROPPED = "seatlock_gateway_messages_dropped_total" { kind };
    /// Sockets that were told news of a room, by whether these were written at once (`bypass`) or queued (`queue`).
    counter GATEWAY_NEWS = "seatlock_gateway_news_total" { kind };
    /// Rounds in which sockets that had missed updates were told the latest ones.
    counter GATEWAY_MENDED = "seatlock_gateway_mendings_total";
    /// Sessions that ended, by whether the ledger was told (`left`, `retried`, `given_up`).
    counter GATEWAY_LEAVES = "seatlock_gateway_leaves_total" { outcome };
    // rpc
    /// RabbitMQ messages by pattern and by what became of them.
    counter RPC_MESSAGES = "seatlock_rpc_messages_total" { pattern, outcome };
    /// Seconds from the delivery of a message to its acknowledgement.
    histogram RPC_SECONDS = "seatlock_rpc_message_seconds" { pattern } [LATENCY_SECONDS];
    /// Replies to RabbitMQ requests by what became of them.
    counter RPC_REPLIES = "seatlock_rpc_replies_total" { outcome };
    /// Losses of the connection to RabbitMQ, and consumers ended by the broker.
    counter RPC_INTERRUPTIONS = "seatlock_rpc_interruptions_total" { what };
    /// 1 while the queue is being consumed.
    gauge RPC_CONSUMING = "seatlock_rpc_consuming";
    /// 1 while the broker takes no replies because it lacks memory or disk.
    gauge RPC_BLOCKED = "seatlock_rpc_blocked";
    /// Messages in work, sampled every second.
    gauge RPC_IN_WORK = "seatlock_rpc_in_work";
    // app
    /// Tasks of this process, sampled every five seconds: a few for each open socket.
    gauge APP_TASKS = "seatlock_app_tasks";
    // http
    /// HTTP answers beside Socket.IO, by route and class of status.
    counter HTTP_REQUESTS = "seatlock_http_requests_total" { route, status };
    /// Connections by what became of them first: accepted, refused by the system, or closed because no request came.
    counter HTTP_CONNECTIONS = "seatlock_http_connections_total" { outcome };
    /// One while new clients are welcome, else zero.
    gauge HTTP_READY = "seatlock_http_ready";
}

impl Metric {
    fn labels(&self, values: &[&'static str]) -> Vec<Label> {
        debug_assert_eq!(self.labels.len(), values.len(), "labels of {}", self.name);
        self.labels.iter().zip(values).map(|(&name, &value)| Label::from_static_parts(name, value)).collect()
    }

    /// Counts one.
    pub fn count(&self, values: &[&'static str]) {
        self.add(values, 1);
    }

    /// Counts `n`.
    pub fn add(&self, values: &[&'static str], n: u64) {
        metrics::counter!(self.name, self.labels(values)).increment(n);
    }

    /// Sets a gauge.
    pub fn set(&self, values: &[&'static str], value: f64) {
        metrics::gauge!(self.name, self.labels(values)).set(value);
    }

    /// Adds a duration, in seconds, to a histogram.
    pub fn observe(&self, values: &[&'static str], elapsed: Duration) {
        metrics::histogram!(self.name, self.labels(values)).record(elapsed.as_secs_f64());
    }
}

/// Installs the process's recorder and describes every metric.
///
/// The returned handle renders the Prometheus text; its `run_upkeep` must be called every few seconds.
///
/// # Errors
/// When a recorder is installed already.
pub fn install() -> Result<Handle, BuildError> {
    let mut builder = PrometheusBuilder::new();
    for metric in ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)?;
        }
    }
    let handle = builder.install_recorder()?;
    for metric in ALL {
        let help = SharedString::const_str(metric.help.trim_ascii());
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, help),
            Kind::Histogram(_) => metrics::describe_histogram!(metric.name, help),
        }
        // Shown as zero from the start. Which values the labels of the others take is known where they are used.
        if metric.labels.is_empty() {
            match metric.kind {
                Kind::Counter => metric.add(&[], 0),
                Kind::Gauge => metric.set(&[], 0.0),
                Kind::Histogram(_) => {}
            }
        }
    }
    Ok(handle)
}
