//! Every metric of the service: name, help, labels and buckets, described once and registered at start.
//!
//! Labels take values from closed enums only, never an event, a user, a lock or a socket.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
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
    handles: Handles,
}

/// The recorder's handles by label values: finding one anew for every event would cost as much as reading a message.
type Handles = RwLock<Vec<(Vec<&'static str>, Recorded)>>;

#[derive(Debug)]
enum Recorded {
    Counter(metrics::Counter),
    Gauge(metrics::Gauge),
    Histogram(metrics::Histogram),
}

/// Handles made before there is a recorder would count for nobody, for ever.
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// Seconds, for request latencies: from what a script takes to the request timeout.
pub const LATENCY_SECONDS: &[f64] =
    &[0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0];

/// Seconds, for lateness that users notice: from a tick to what would be an outage.
pub const LAG_SECONDS: &[f64] = &[0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Seconds that a lock was held: from a second thought to the longest usual life, five minutes and a checkout.
pub const HELD_SECONDS: &[f64] =
    &[1.0, 5.0, 10.0, 15.0, 30.0, 60.0, 90.0, 120.0, 180.0, 240.0, 300.0, 360.0, 600.0, 1800.0];

macro_rules! metrics {
    ($($(#[doc = $help:literal])+ $kind:ident $ident:ident = $name:literal $({ $($label:ident),* })? $([ $buckets:expr ])?;)*) => {
        $(
            $(#[doc = $help])+
            pub static $ident: Metric = Metric {
                kind: metrics!(@kind $kind $([ $buckets ])?),
                name: $name,
                help: concat!($($help),+),
                labels: &[$($(stringify!($label)),*)?],
                handles: RwLock::new(Vec::new()),
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
    /// Locks that ended, by how (`confirmed`, `released`, `expired`, `abandoned`), counted once in the fleet: by the replica
    /// that ended it or, for deadlines, that learned of it from the ledger.
    counter LEDGER_ENDS = "seatlock_ledger_ends_total" { reason };
    /// Seconds that locks were held before they ended, by how they ended.
    histogram LEDGER_HELD = "seatlock_ledger_held_seconds" { reason } [HELD_SECONDS];
    /// Seconds from a lock's deadline to its end.
    histogram LEDGER_EXPIRY_LAG = "seatlock_ledger_expiry_lag_seconds" [LAG_SECONDS];
    /// Seconds until the ledger answered, by script.
    histogram LEDGER_CALL = "seatlock_ledger_call_seconds" { script } [LATENCY_SECONDS];
    /// Ledger calls that got no answer, by script and kind of error.
    counter LEDGER_ERRORS = "seatlock_ledger_errors_total" { script, kind };
    /// 1 while the connection to Redis stands.
    gauge LEDGER_UP = "seatlock_ledger_connected";
    /// Connections to Redis that were lost.
    counter LEDGER_DISCONNECTS = "seatlock_ledger_disconnects_total";
    /// Seconds from a publication by this replica to its delivery to this replica, twice a second.
    histogram LEDGER_DELIVERY = "seatlock_ledger_delivery_seconds" [LAG_SECONDS];
    /// Items that wait between the ledger and the fan-out, sampled every round of updates.
    gauge LEDGER_FEED_LEN = "seatlock_ledger_feed_len";
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
    /// Seconds since the stock of watched events was last known to be fresh, of the event for which that is longest.
    gauge INVENTORY_STOCK_AGE = "seatlock_inventory_stock_age_seconds";
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
    /// Seconds from the first news of a room to the moment at which it is told them; the tick is part of it.
    histogram FANOUT_LAG = "seatlock_fanout_lag_seconds" [LAG_SECONDS];
    /// Watched categories of which more tickets are active and settling than exist. Must be 0.
    gauge FANOUT_OVERSOLD = "seatlock_fanout_oversold_categories";
    /// Grants after which more tickets were active and settling than there was stock, as every watching replica sees them.
    /// Must be 0.
    counter FANOUT_OVERGRANTS = "seatlock_fanout_overgrants_total";
    /// Seconds that it took to tell every room that was due once.
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
    /// Requests of clients that were refused because of how much had come before, by the limit that was reached.
    counter GATEWAY_LIMITED = "seatlock_gateway_limited_total" { limit };
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
    /// Messages to sockets that nobody asked for, news of rooms aside, by what became of them (`sent`, `waiting`, `dropped`;
    /// `again`: told to who may have missed it).
    counter GATEWAY_PUSHES = "seatlock_gateway_pushes_total" { outcome };
    /// Times an answer had to wait because the socket's send buffer was full.
    counter GATEWAY_FULL = "seatlock_gateway_send_waits_total";
    /// Messages that a socket did not get because its send buffer was full, by kind.
    counter GATEWAY_DROPPED = "seatlock_gateway_messages_dropped_total" { kind };
    /// Connections of sessions that were taken over from the library that opened them.
    counter GATEWAY_TAKEN_OVER = "seatlock_gateway_connections_taken_over_total";
    /// Sockets that were told news of a room, by whether these were written at once (`write`) or queued (`queue`).
    counter GATEWAY_NEWS = "seatlock_gateway_news_total" { kind };
    /// Rounds in which sockets that had missed updates were told the latest ones.
    counter GATEWAY_MENDED = "seatlock_gateway_mendings_total";
    /// Sessions that ended, by whether the ledger was told (`left`, `retried`, `given_up`).
    counter GATEWAY_LEAVES = "seatlock_gateway_leaves_total" { outcome };
    /// Locks granted here by how they ended.
    counter GATEWAY_LOCK_ENDINGS = "seatlock_gateway_lock_endings_total" { ending };
    /// Users by the share of their locks that they abandoned instead of buying, of the last hours on this replica; who
    /// has had fewer than three is among the `few`.
    gauge GATEWAY_ABANDONERS = "seatlock_gateway_users_by_abandoned_share" { share };
    // rpc
    /// RabbitMQ messages by pattern and by what became of them.
    counter RPC_MESSAGES = "seatlock_rpc_messages_total" { pattern, outcome };
    /// Seconds from the delivery of a message to its acknowledgement.
    histogram RPC_SECONDS = "seatlock_rpc_message_seconds" { pattern } [LATENCY_SECONDS];
    /// Validations of locks for the orders-service, by outcome.
    counter RPC_VALIDATIONS = "seatlock_rpc_validations_total" { outcome };
    /// Confirmations of locks by the orders-service, by outcome.
    counter RPC_CONFIRMS = "seatlock_rpc_confirms_total" { outcome };
    /// Releases of locks by the orders-service, by outcome.
    counter RPC_RELEASES = "seatlock_rpc_releases_total" { outcome };
    /// Reported orders by their result and by what the report changed (`noted`, `repeated`, `after_cancel`).
    counter RPC_ORDERS = "seatlock_rpc_orders_total" { result, outcome };
    /// Replies to RabbitMQ requests by what became of them.
    counter RPC_REPLIES = "seatlock_rpc_replies_total" { outcome };
    /// Losses of the connection to RabbitMQ, and consumers ended by the broker.
    counter RPC_INTERRUPTIONS = "seatlock_rpc_interruptions_total" { what };
    /// 1 where RabbitMQ is configured.
    gauge RPC_CONFIGURED = "seatlock_rpc_configured";
    /// 1 while the queue is being consumed.
    gauge RPC_CONSUMING = "seatlock_rpc_consuming";
    /// 1 while the broker takes no replies because it lacks memory or disk.
    gauge RPC_BLOCKED = "seatlock_rpc_blocked";
    /// Messages in work, sampled every second.
    gauge RPC_IN_WORK = "seatlock_rpc_in_work";
    // app
    /// 1, with the version of the program.
    gauge APP_INFO = "seatlock_app_info" { version };
    /// Tasks of this process, sampled every five seconds: a few for each open socket.
    gauge APP_TASKS = "seatlock_app_tasks";
    // http
    /// HTTP answers beside Socket.IO, by route and class of status.
    counter HTTP_REQUESTS = "seatlock_http_requests_total" { route, status };
    /// Connections by what became of them first: accepted, refused by the system, of an address that has too many
    /// (`crowded`), or closed because no request came.
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

    /// Shows a counter as zero until something is counted: a rate would say nothing of the first.
    pub fn show(&self, values: &[&'static str]) {
        self.add(values, 0);
    }

    /// Counts `n`.
    pub fn add(&self, values: &[&'static str], n: u64) {
        self.with(values, |handle| {
            if let Recorded::Counter(counter) = handle {
                counter.increment(n);
            }
        });
    }

    /// Sets a gauge.
    pub fn set(&self, values: &[&'static str], value: f64) {
        self.with(values, |handle| {
            if let Recorded::Gauge(gauge) = handle {
                gauge.set(value);
            }
        });
    }

    /// Adds a duration, in seconds, to a histogram.
    pub fn observe(&self, values: &[&'static str], elapsed: Duration) {
        self.with(values, |handle| {
            if let Recorded::Histogram(histogram) = handle {
                histogram.record(elapsed.as_secs_f64());
            }
        });
    }

    /// Calls `act` with the handle of these label values.
    fn with(&self, values: &[&'static str], act: impl FnOnce(&Recorded)) {
        let known = self.handles.read().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, handle)) = known.iter().find(|(of, _)| of == values) {
            return act(handle);
        }
        drop(known);
        let labels = self.labels(values);
        let handle = match self.kind {
            Kind::Counter => Recorded::Counter(metrics::counter!(self.name, labels)),
            Kind::Gauge => Recorded::Gauge(metrics::gauge!(self.name, labels)),
            Kind::Histogram(_) => Recorded::Histogram(metrics::histogram!(self.name, labels)),
        };
        act(&handle);
        if INSTALLED.load(Ordering::Relaxed) {
            // Two at once may both be added; they are handles of the same metric.
            self.handles.write().unwrap_or_else(PoisonError::into_inner).push((values.to_vec(), handle));
        }
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
    INSTALLED.store(true, Ordering::Relaxed);
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
                Kind::Counter => metric.show(&[]),
                Kind::Gauge => metric.set(&[], 0.0),
                Kind::Histogram(_) => {}
            }
        }
    }
    Ok(handle)
}
