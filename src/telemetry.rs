//! Logging: one subscriber for the process, lines on standard error. And traces: whose request a line is about, and, in a
//! build with the feature `otlp`, the spans that a collector is sent.
//!
//! Where nothing is exported, requests of callers who name no trace have no span and cost nothing.

#[cfg(feature = "otlp")]
mod otlp;
#[cfg(not(feature = "otlp"))]
#[path = "telemetry/none.rs"]
mod otlp;

use std::io;
use std::time::Duration;

use tracing::{Instrument as _, Span};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt};

pub use otlp::{Request, Work, exports, flush, script};

/// Drivers that log at `info` or at `error` what their peers can trigger at will, or what is reported once by the
/// module that owns them. They come before the operator's filter, which can raise them again.
const QUIET: &str = "socketioxide=off,engineioxide=off,redis=off,lapin=off,hyper=warn,h2=warn,rustls=warn,reqwest=warn,\
    opentelemetry=off";

/// A bare level is for this program: libraries are at `info` at most, because below it some log what they carry, tokens
/// and passwords among it. Whoever names a library in the filter gets all of it.
fn for_us(filter: &str) -> String {
    let directive = |part: &str| match part.trim().parse::<LevelFilter>() {
        Ok(level) if level > LevelFilter::INFO => format!("info,seatlock={level}"),
        Ok(_) | Err(_) => part.to_owned(),
    };
    filter.split(',').map(directive).collect::<Vec<_>>().join(",")
}

/// Where spans are sent, and which.
#[derive(Debug, Clone)]
pub struct Export {
    /// The whole URL; may hold a password, and is never logged.
    pub endpoint: String,
    /// What may be logged of it.
    pub shown: String,
    /// How many of those are sampled for which no caller decides, from 0 to 1.
    pub share: f64,
    /// Whether a caller that names its trace decides for it.
    pub heeds_parent: bool,
    /// The limit of one export.
    pub timeout: Duration,
}

/// Starts logging what `filter` lets through, as JSON objects or as text for people, and exporting spans, if that is
/// wanted and this build can. Must be called within a Tokio runtime.
///
/// # Errors
/// When the filter cannot be read or a subscriber is installed already.
pub fn install(
    filter: &str,
    json: bool,
    export: Option<&Export>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = EnvFilter::try_new(format!("{QUIET},{}", for_us(filter)))?;
    match export {
        None => tracing_subscriber::registry().with(lines(json)).with(filter).try_init()?,
        // What decides about log lines does not decide about exported spans.
        Some(export) => {
            tracing_subscriber::registry().with(lines(json).with_filter(filter)).with(otlp::carrier()).try_init()?;
            otlp::start(export);
        }
    }
    Ok(())
}

fn lines(json: bool) -> Box<dyn Layer<Registry> + Send + Sync> {
    let lines = fmt::layer().with_writer(io::stderr);
    if json {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    } else {
        lines.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).boxed()
    }
}

/// The longest `tracestate` that is passed on: what W3C asks of everybody.
pub const STATE_BYTES_MAX: usize = 512;

/// What a caller says of its trace: the W3C headers `traceparent` and `tracestate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TraceParent<'a> {
    /// 32 hexadecimal digits.
    trace: &'a str,
    /// The caller's own span, 16 hexadecimal digits.
    parent: &'a str,
    /// The caller's span is exported, and so should be those below it.
    sampled: bool,
    /// What those before us told each other, for those behind us: nothing of it is read here, or logged.
    state: &'a str,
}

impl<'a> TraceParent<'a> {
    /// `version-trace-parent-flags`.
    const LEN: usize = 2 + 1 + 32 + 1 + 16 + 1 + 2;

    /// Reads `version-trace-parent-flags`, as <https://www.w3.org/TR/trace-context/> has it: lower case, no id of zeros,
    /// and of later versions what this one knows. Nothing else of it can reach a log line.
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.trim_ascii().split('-');
        let mut digits = |count: usize| {
            let part = parts.next()?;
            let hex = part.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
            (part.len() == count && hex).then_some(part)
        };
        let (version, trace, parent) = (digits(2)?, digits(32)?, digits(16)?);
        let flags = u8::from_str_radix(digits(2)?, 16).ok()?;
        let whole = version != "00" || parts.next().is_none();
        let named = [trace, parent].iter().all(|id| id.bytes().any(|digit| digit != b'0'));
        (whole && named && version != "ff").then_some(Self { trace, parent, sampled: flags & 1 == 1, state: "" })
    }

    /// With what the second header says; it counts for nothing without the first.
    fn read(text: &'a str, state: Option<&'a str>) -> Option<Self> {
        let parent = Self::parse(text)?;
        Some(Self { state: state.map_or("", passed_on), ..parent })
    }

    /// Every log line inside carries the ids. At the level that every filter but `off` lets through: lines that are
    /// logged at all say whose they are.
    fn span(self, transport: &'static str) -> Span {
        tracing::error_span!("request", transport, trace_id = self.trace, parent_id = self.parent)
    }
}

/// What of a `tracestate` is passed on: as many of its members, from the left, as there is room for; nothing of one that
/// has something else in it than characters that can be printed.
fn passed_on(state: &str) -> &str {
    if !state.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t')) {
        return "";
    }
    match state.as_bytes().get(..=STATE_BYTES_MAX) {
        None => state,
        Some(room) => &state[..room.iter().rposition(|byte| *byte == b',').unwrap_or(0)],
    }
}

/// What the sender of a request says of its trace, the texts of both headers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Headers<'a> {
    /// `traceparent`.
    pub parent: Option<&'a str>,
    /// `tracestate`; the values of several headers of this name are joined by commas.
    pub state: Option<&'a str>,
}

impl<'a> Headers<'a> {
    fn read(self) -> Option<TraceParent<'a>> {
        TraceParent::read(self.parent?, self.state)
    }
}

/// Which trace a session belongs to, as its client says.
#[derive(Debug)]
pub struct Trace {
    parent: Box<str>,
    state: Box<str>,
}

impl Trace {
    fn read(&self) -> Option<TraceParent<'_>> {
        TraceParent::read(&self.parent, Some(&self.state))
    }
}

/// For a session whose client says which trace it belongs to: that, for [`from_socket`], and the span of its log lines.
/// `None` for all others, who then cost nothing.
#[must_use]
pub fn session(headers: Headers<'_>) -> Option<(Box<Trace>, Span)> {
    let text = headers.parent?.trim_ascii();
    let read = headers.read()?;
    // Not what a later version may have added: it is kept as long as the session, and nobody asks for it. Nor what is only
    // passed on, where nothing is.
    let state = if exports() { read.state } else { "" };
    let trace = Trace { parent: text[..TraceParent::LEN].into(), state: state.into() };
    Some((Box::new(trace), read.span("socket")))
}

/// One request of a session whose client says, or does not say, which trace it belongs to: the span of its log lines and
/// the one that is exported. `None` where nothing is exported: the session's own span says all there is to say.
#[must_use]
pub fn from_socket(trace: Option<&Trace>) -> Option<(Span, Request)> {
    otlp::from_socket(|| trace.and_then(Trace::read))
}

/// The handshake of a session, before there is one, as [`from_socket`]. Both spans are none for clients who name no trace,
/// where nothing is exported.
#[must_use]
pub fn from_handshake(headers: Headers<'_>) -> (Span, Request) {
    let spans = otlp::from_socket(|| headers.read());
    spans.unwrap_or_else(|| (headers.read().map_or_else(Span::none, |read| read.span("socket")), Request::default()))
}

/// One message of a queue, as [`from_handshake`].
#[must_use]
pub fn from_queue(queue: &str, headers: Headers<'_>) -> (Span, Request) {
    let spans = otlp::from_queue(queue, || headers.read());
    spans.unwrap_or_else(|| (headers.read().map_or_else(Span::none, |read| read.span("amqp")), Request::default()))
}

/// Work that nobody asked for: in a trace of its own where spans are exported, and as it is everywhere else. `kind` is what
/// went wrong.
pub async fn work<T, E>(
    name: &'static str,
    work: impl Future<Output = Result<T, E>>,
    kind: impl FnOnce(&E) -> &'static str,
) -> Result<T, E> {
    let Some((span, open)) = otlp::work(name) else { return work.await };
    let done = work.instrument(span).await;
    open.ends(done.as_ref().map(|_| "ok").map_err(kind));
    done
}

/// Both headers as a stranger may write them, a line each: what is read of them is what W3C lets them be.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (parent, state) = text.split_once('\n').unwrap_or((&text, ""));
    let headers = Headers { parent: Some(parent), state: Some(state) };
    let Some(TraceParent { trace, parent, state: passed, .. }) = headers.read() else {
        assert!(session(headers).is_none(), "no trace is none");
        return;
    };
    let is_id = |id: &str| id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
    assert!(trace.len() == 32 && parent.len() == 16 && is_id(trace) && is_id(parent), "{trace} {parent}");
    assert!(passed.len() <= STATE_BYTES_MAX && state.starts_with(passed), "{passed}");
    assert!(session(headers).is_some_and(|(trace, _)| trace.parent.len() == TraceParent::LEN));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_level_is_of_this_program() {
        for (filter, ours) in [
            ("info", "info"),
            ("warn", "warn"),
            ("off", "off"),
            ("debug", "info,seatlock=debug"),
            ("trace,lapin=debug", "info,seatlock=trace,lapin=debug"),
            ("info,seatlock::rpc=debug", "info,seatlock::rpc=debug"),
        ] {
            assert_eq!(for_us(filter), ours);
            assert!(EnvFilter::try_new(format!("{QUIET},{ours}")).is_ok());
        }
    }

    /// A session whose client says which trace it belongs to has a span also where only warnings are logged, and keeps no more
    /// of what the client sent than the ids.
    #[test]
    fn a_log_of_warnings_says_whose_they_are() {
        let log = tracing_subscriber::registry().with(EnvFilter::new("warn"));
        tracing::subscriber::with_default(log, || {
            let text = format!("01-{TRACE}-{PARENT}-01");
            let later = format!(" {text}-{}", "x".repeat(1000));
            let of = |parent| session(Headers { parent, state: Some("a=b") });
            let (trace, span) = of(Some(&later)).expect("a trace");
            // Nothing is exported here: there is nobody to pass the rest on to.
            assert_eq!((&*trace.parent, &*trace.state, span.is_disabled()), (text.as_str(), "", false));
            assert!(of(Some("00-")).is_none() && of(None).is_none());
        });
    }

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const PARENT: &str = "00f067aa0ba902b7";

    #[test]
    fn a_trace_parent_is_read_as_w3c_writes_it() {
        for (text, sampled) in [
            (format!("00-{TRACE}-{PARENT}-01"), true),
            (format!(" 00-{TRACE}-{PARENT}-00 "), false),
            (format!("01-{TRACE}-{PARENT}-03-what-a-later-version-adds"), true),
        ] {
            let read = Some(TraceParent { trace: TRACE, parent: PARENT, sampled, state: "" });
            assert_eq!(TraceParent::parse(&text), read, "{text}");
        }
        let zeros = "0".repeat(32);
        for text in [
            String::new(),
            "00".to_owned(),
            format!("00-{TRACE}-{PARENT}"),
            format!("00-{TRACE}-{PARENT}-1"),
            format!("00-{TRACE}-{PARENT}-01-more"),
            format!("ff-{TRACE}-{PARENT}-01"),
            format!("00-{zeros}-{PARENT}-01"),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{PARENT}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}\n-{PARENT}-01"),
            format!("00-{}-{PARENT}-01", &TRACE[1..]),
        ] {
            assert_eq!(TraceParent::parse(&text), None, "{text:?}");
        }
    }

    #[test]
    fn of_a_trace_state_whole_members_are_passed_on_and_nothing_that_cannot_be_printed() {
        let member = |letter: &str| format!("{letter}={}", letter.repeat(200));
        let long = ["a", "b", "c"].map(member).join(",");
        for (state, passed) in [
            ("", ""),
            ("congo=t61rcWkgMzE, rojo=00f067aa0ba902b7", "congo=t61rcWkgMzE, rojo=00f067aa0ba902b7"),
            (long.as_str(), &long[..=2 * 202]),
            (&"x".repeat(513), ""),
            (&"x".repeat(512), &"x".repeat(512)),
            ("a=b\nc=d", ""),
            ("a=\u{e9}", ""),
        ] {
            assert_eq!(passed_on(state), passed, "{state:?}");
        }
    }
}
