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

use tracing::Span;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt};

pub use otlp::{Request, Script, flush, script};

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

/// What a caller says of its trace: the W3C header `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct TraceParent<'a> {
    /// 32 hexadecimal digits.
    trace: &'a str,
    /// The caller's own span, 16 hexadecimal digits.
    parent: &'a str,
    /// The caller's span is exported, and so should be those below it.
    sampled: bool,
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
        (whole && named && version != "ff").then_some(Self { trace, parent, sampled: flags & 1 == 1 })
    }

    /// Every log line inside carries the ids. At the level that every filter but `off` lets through: lines that are
    /// logged at all say whose they are.
    fn span(self, transport: &'static str) -> Span {
        tracing::error_span!("request", transport, trace_id = self.trace, parent_id = self.parent)
    }
}

/// For a session whose client says which trace it belongs to: that, for [`from_socket`], and the span of its log lines.
/// `None` for all others, who then cost nothing.
#[must_use]
pub fn session(traceparent: Option<&str>) -> Option<(Box<str>, Span)> {
    let text = traceparent?.trim_ascii();
    let parent = TraceParent::parse(text)?;
    // Not what a later version may have added: it is kept as long as the session, and nobody asks for it.
    Some((text[..TraceParent::LEN].into(), parent.span("socket")))
}

/// One request of a session whose client says, or does not say, which trace it belongs to: the span of its log lines and
/// the one that is exported. `None` where nothing is exported: the session's own span says all there is to say.
#[must_use]
pub fn from_socket(traceparent: Option<&str>) -> Option<(Span, Request)> {
    otlp::from_socket(|| traceparent.and_then(TraceParent::parse))
}

/// One message of a queue, as [`from_socket`]. Both spans are none for senders who name no trace, where nothing is
/// exported.
#[must_use]
pub fn from_queue(queue: &str, traceparent: Option<&str>) -> (Span, Request) {
    let parent = || traceparent.and_then(TraceParent::parse);
    let spans = otlp::from_queue(queue, parent);
    spans.unwrap_or_else(|| (parent().map_or_else(Span::none, |parent| parent.span("amqp")), Request::default()))
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
            let (trace, span) = session(Some(&format!(" {text}-{}", "x".repeat(1000)))).expect("a trace");
            assert_eq!((&*trace, span.is_disabled()), (text.as_str(), false));
            assert!(session(Some("00-")).is_none() && session(None).is_none());
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
            let read = Some(TraceParent { trace: TRACE, parent: PARENT, sampled });
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
}
