//! What takes the place of the export in a build without it: nothing, at no cost.

use std::convert::Infallible;
use std::time::Duration;

use tracing::Span;
use tracing_subscriber::layer::Identity;

use super::{Export, TraceParent};

/// The exported span of a request: there is none.
#[derive(Debug, Default)]
pub struct Request(());

impl Request {
    /// Says how the request ended; nobody listens.
    pub fn ends(self, _name: &'static str, _outcome: &'static str, _failed: bool) {}
}

/// The exported span of a script call, or of work that nobody asked for: there is none.
#[derive(Debug)]
pub struct Work(Infallible);

impl Work {
    /// Says how it ended.
    pub fn ends(self, _outcome: Result<&str, &'static str>) {
        match self.0 {}
    }
}

/// The span of a script call.
#[must_use]
pub fn script(_name: &'static str) -> Option<Work> {
    None
}

/// The spans of work that nobody asked for.
pub(super) fn work(_name: &'static str) -> Option<(Span, Work)> {
    None
}

/// Whether spans are exported.
#[must_use]
pub const fn exports() -> bool {
    false
}

/// Returns when what was recorded has been sent.
pub async fn flush(_within: Duration) {}

pub(super) fn carrier() -> Identity {
    Identity::new()
}

/// A configuration that wants it has been warned of when it was read.
pub(super) fn start(_export: &Export) {}

pub(super) fn from_socket<'a>(_parent: impl FnOnce() -> Option<TraceParent<'a>>) -> Option<(Span, Request)> {
    None
}

pub(super) fn from_queue<'a>(
    _queue: &str,
    _parent: impl FnOnce() -> Option<TraceParent<'a>>,
) -> Option<(Span, Request)> {
    None
}
