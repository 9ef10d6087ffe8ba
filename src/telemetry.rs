//! Logging: one subscriber for the process, lines on standard error.

use std::io;

use tracing_subscriber::EnvFilter;

/// Drivers that log at `info` or at `error` what their peers can trigger at will, or what is reported once by the
/// module that owns them. They come before the operator's filter, which can raise them again.
const QUIET: &str = "socketioxide=off,engineioxide=off,fred=off,lapin=off,hyper=warn,h2=warn,rustls=warn,reqwest=warn";

/// Starts logging what `filter` lets through, as JSON objects or as text for people.
///
/// # Errors
/// When the filter cannot be read or a subscriber is installed already.
pub fn install(filter: &str, json: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let filter = EnvFilter::try_new(format!("{QUIET},{filter}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    if json {
        builder.json().flatten_event(true).with_current_span(true).with_span_list(false).try_init()
    } else {
        builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init()
    }
}
