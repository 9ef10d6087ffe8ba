//! What the fault run writes down: everything that was seen, and when the paths of requests were broken.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::audit::outside::{Seen, Span};

/// What a request may suffer from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Road {
    /// From clients to replicas.
    Front,
    /// From the orders-service to replicas.
    Broker,
}

#[derive(Default)]
pub struct Log {
    seen: Mutex<Vec<(Span, Seen)>>,
    complaints: Mutex<Vec<String>>,
    /// While these lasted, requests on the road may have had no answer, or a late one.
    disturbed: Mutex<Vec<(Road, Span)>>,
    /// Requests without an answer, or with a late one: excused or not at the end.
    late: Mutex<Vec<(Road, Span, String)>>,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    pub asked: u64,
    pub unknown: u64,
    pub called: u64,
    pub calls_unknown: u64,
    pub reconnects: u64,
}

/// The machine's clock in milliseconds.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    u64::try_from(since.as_millis()).expect("before the year 584 million")
}

/// The milliseconds of an instant of the contract; 0 when it is none.
pub fn instant(value: &Value) -> u64 {
    let text = value.as_str().unwrap_or_default();
    chrono::DateTime::parse_from_rfc3339(text).map_or(0, |at| u64::try_from(at.timestamp_millis()).unwrap_or(0))
}

impl Log {
    pub fn end(&self, began: u64, seen: Seen) {
        self.note(Span { began, ended: now() + 1 }, seen);
    }

    pub fn note(&self, span: Span, seen: Seen) {
        self.seen.lock().unwrap().push((span, seen));
    }

    pub fn complain(&self, complaint: String) {
        self.complaints.lock().unwrap().push(complaint);
    }

    /// A road is disturbed from `began` until now and the time that requests on it may take to recover.
    pub fn disturb(&self, road: Road, began: u64, recovery: Duration) {
        let ended = now() + u64::try_from(recovery.as_millis()).expect("short");
        self.disturbed.lock().unwrap().push((road, Span { began, ended }));
    }

    /// The machine, or one of the test's own processes, had no processor for more than a second: nothing that happened
    /// then was late.
    pub fn stood_still(&self, span: Span, who: &str) {
        crate::support::say(&format!("{who} stood still for {} ms", span.ended - span.began));
        let span = Span { began: span.began.saturating_sub(1_000), ended: span.ended + 1_000 };
        self.disturbed.lock().unwrap().extend([(Road::Front, span), (Road::Broker, span)]);
    }

    /// Looks for such moments as long as it lives.
    pub fn watch_the_clock(log: &Arc<Self>) {
        let log = Arc::downgrade(log);
        std::thread::spawn(move || {
            let mut before = now();
            while let Some(log) = log.upgrade() {
                std::thread::sleep(Duration::from_millis(100));
                let after = now();
                if after - before > 1_000 {
                    log.stood_still(Span { began: before, ended: after }, "the machine");
                }
                before = after;
            }
        });
    }

    pub fn late(&self, road: Road, span: Span, what: String) {
        self.late.lock().unwrap().push((road, span, what));
    }

    pub fn count(&self, change: impl Fn(&mut Counts)) {
        change(&mut self.counts.lock().unwrap());
    }

    pub fn counts(&self) -> Counts {
        *self.counts.lock().unwrap()
    }

    /// A call over RabbitMQ has ended.
    pub fn called(&self, took: Duration, is_answered: bool, pattern: &str) {
        self.count(|counts| {
            counts.called += 1;
            counts.calls_unknown += u64::from(!is_answered);
        });
        if !is_answered || took > super::ANSWER_LATE {
            let ended = now();
            let span = Span { began: ended - u64::try_from(took.as_millis()).expect("short"), ended };
            self.late(
                Road::Broker,
                span,
                format!("{pattern}: {} after {took:?}", if is_answered { "answered" } else { "silence" }),
            );
        }
    }

    /// Everything in the order in which it began.
    pub fn seen(&self) -> Vec<(Span, Seen)> {
        let mut seen = self.seen.lock().unwrap().clone();
        seen.sort_by_key(|(span, _)| span.began);
        seen
    }

    /// What was complained of, and requests that nothing excuses.
    pub fn complaints(&self) -> Vec<String> {
        let disturbed = self.disturbed.lock().unwrap().clone();
        let excused = |road, span: &Span| disturbed.iter().any(|(of, when)| *of == road && when.overlaps(span));
        let late = self.late.lock().unwrap();
        let late = late.iter().filter(|(road, span, _)| !excused(*road, span));
        let late = late.map(|(road, span, what)| format!("{road:?} {span:?}: {what}"));
        self.complaints.lock().unwrap().iter().cloned().chain(late).collect()
    }
}
