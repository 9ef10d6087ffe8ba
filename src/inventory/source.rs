//! Which source is meant (`SEATLOCK_EVENTS_URL`), how it is opened, and what can break between it and us.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use url::Url;

use super::{Catalogue, CatalogueError, NestRmq, NestTcp, StockSource};

/// The queue of the events-service where the URL names none.
const QUEUE_DEFAULT: &str = "events_queue";

/// Why a source gave no stock.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// It does not know the event.
    #[error("the events-service does not know the event")]
    EventNotFound,
    /// It cannot be reached, or the connection broke while the question was open.
    #[error("the events-service cannot be reached: {0}")]
    Unavailable(String),
    /// No answer in time.
    #[error("no answer from the events-service within {0:?}")]
    Timeout(Duration),
    /// Too many questions are open already.
    #[error("too many questions to the events-service are open")]
    Busy,
    /// It answered with an error that does not say that the event is unknown.
    #[error("the events-service refused: {0}")]
    Refused(String),
    /// Its answer makes no sense.
    #[error("the events-service's answer makes no sense: {0}")]
    Malformed(String),
    /// The ledger gave no number for the question, or did not store the answer.
    #[error("the ledger did not take part in asking the events-service")]
    Ledger,
    /// This process is stopping.
    #[error("stopping")]
    Stopping,
}

/// The closed set of kinds, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceErrorKind {
    /// [`SourceError::EventNotFound`].
    EventNotFound,
    /// [`SourceError::Unavailable`].
    Unavailable,
    /// [`SourceError::Timeout`].
    Timeout,
    /// [`SourceError::Busy`].
    Busy,
    /// [`SourceError::Refused`].
    Refused,
    /// [`SourceError::Malformed`].
    Malformed,
    /// [`SourceError::Ledger`].
    Ledger,
    /// [`SourceError::Stopping`].
    Stopping,
}

impl SourceErrorKind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::EventNotFound,
        Self::Unavailable,
        Self::Timeout,
        Self::Busy,
        Self::Refused,
        Self::Malformed,
        Self::Ledger,
        Self::Stopping,
    ];

    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::EventNotFound => "event_not_found",
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Busy => "busy",
            Self::Refused => "refused",
            Self::Malformed => "malformed",
            Self::Ledger => "ledger",
            Self::Stopping => "stopping",
        }
    }
}

impl SourceError {
    /// Which kind it is.
    #[must_use]
    pub const fn kind(&self) -> SourceErrorKind {
        match self {
            Self::EventNotFound => SourceErrorKind::EventNotFound,
            Self::Unavailable(_) => SourceErrorKind::Unavailable,
            Self::Timeout(_) => SourceErrorKind::Timeout,
            Self::Busy => SourceErrorKind::Busy,
            Self::Refused(_) => SourceErrorKind::Refused,
            Self::Malformed(_) => SourceErrorKind::Malformed,
            Self::Ledger => SourceErrorKind::Ledger,
            Self::Stopping => SourceErrorKind::Stopping,
        }
    }

    /// Whether asking again, unchanged, can help soon.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable(_) | Self::Timeout(_) | Self::Busy | Self::Refused(_) | Self::Ledger => true,
            Self::EventNotFound | Self::Malformed(_) | Self::Stopping => false,
        }
    }

    /// Whether it says something about the one event asked for, rather than about the source as a whole.
    pub(super) const fn is_of_event(&self) -> bool {
        match self {
            Self::EventNotFound | Self::Refused(_) | Self::Malformed(_) => true,
            Self::Unavailable(_) | Self::Timeout(_) | Self::Busy | Self::Ledger | Self::Stopping => false,
        }
    }
}

/// Which source: a checked `SEATLOCK_EVENTS_URL`. Its `Debug` and `Display` show no password.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum SourceUrl {
    /// The demo catalogue that is part of the program.
    #[default]
    Embedded,
    /// A catalogue in a file.
    File(PathBuf),
    /// The events-service over the NestJS TCP transport.
    Tcp {
        /// Name or address; an IPv6 address without brackets.
        host: String,
        /// Its port.
        port: u16,
    },
    /// The events-service over the NestJS `RabbitMQ` transport.
    Amqp {
        /// The broker, without the `queue` parameter. Holds the password: never logged.
        broker: Box<Url>,
        /// The queue that the events-service consumes.
        queue: String,
    },
}

/// Why a text is not a source's URL. Never repeats the text, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceUrlError {
    /// No known scheme.
    #[error("must begin with tcp://, amqp://, amqps:// or file:")]
    Scheme,
    /// Not a URL.
    #[error("not a URL: {0}")]
    Url(url::ParseError),
    /// `tcp://` without a host or a port, or with more than these.
    #[error("must be tcp://HOST:PORT")]
    Tcp,
    /// `file:` without a path.
    #[error("must be file:PATH")]
    File,
    /// `amqp://` without a host, or with an empty queue name.
    #[error("must be amqp://USER:PASSWORD@HOST:PORT/VHOST?queue=NAME")]
    Amqp,
}

impl FromStr for SourceUrl {
    type Err = SourceUrlError;

    /// `tcp://HOST:PORT`, `amqp[s]://[USER:PASSWORD@]HOST[:PORT][/VHOST][?queue=NAME]` or `file:PATH`.
    fn from_str(text: &str) -> Result<Self, SourceUrlError> {
        if let Some(path) = text.strip_prefix("file:") {
            // `file:///etc/x` is the URL form of the absolute path; `file:x` and `file:/etc/x` are paths as they stand.
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.is_empty() { Err(SourceUrlError::File) } else { Ok(Self::File(path.into())) };
        }
        match text.split_once("://").map(|(scheme, _)| scheme) {
            Some("tcp") => Self::tcp(&Url::parse(text).map_err(SourceUrlError::Url)?),
            Some("amqp" | "amqps") => Self::amqp(Url::parse(text).map_err(SourceUrlError::Url)?),
            _ => Err(SourceUrlError::Scheme),
        }
    }
}

impl SourceUrl {
    fn tcp(url: &Url) -> Result<Self, SourceUrlError> {
        let bare = url.username().is_empty()
            && url.password().is_none()
            && matches!(url.path(), "" | "/")
            && url.query().is_none()
            && url.fragment().is_none();
        match (url.host_str(), url.port()) {
            (Some(host), Some(port)) if bare && !host.is_empty() => {
                Ok(Self::Tcp { host: host.trim_matches(['[', ']']).to_owned(), port })
            }
            _ => Err(SourceUrlError::Tcp),
        }
    }

    fn amqp(mut url: Url) -> Result<Self, SourceUrlError> {
        if url.host_str().is_none_or(str::is_empty) {
            return Err(SourceUrlError::Amqp);
        }
        let mut queue = QUEUE_DEFAULT.to_owned();
        let mut others = Vec::new();
        for (name, value) in url.query_pairs().into_owned() {
            if name == "queue" {
                queue = value;
            } else {
                others.push((name, value));
            }
        }
        // AMQP's short string.
        if queue.is_empty() || queue.len() > 255 {
            return Err(SourceUrlError::Amqp);
        }
        url.set_query(None);
        if !others.is_empty() {
            url.query_pairs_mut().extend_pairs(others);
        }
        Ok(Self::Amqp { broker: Box::new(url), queue })
    }
}

impl fmt::Display for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded => f.write_str("the embedded catalogue"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Amqp { broker, queue } => {
                write!(f, "{}://{}", broker.scheme(), broker.host_str().unwrap_or_default())?;
                if let Some(port) = broker.port() {
                    write!(f, ":{port}")?;
                }
                write!(f, "{}?queue={queue}", broker.path())
            }
        }
    }
}

impl fmt::Debug for SourceUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SourceUrl({self})")
    }
}

/// How a source is talked to.
#[derive(Debug, Clone, Copy)]
pub struct SourceOptions {
    /// From a question to its answer, everything included.
    pub request_timeout: Duration,
    /// From the first byte to a usable connection.
    pub connect_timeout: Duration,
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self { request_timeout: Duration::from_secs(1), connect_timeout: Duration::from_secs(3) }
    }
}

/// An opened source.
#[derive(Clone)]
pub struct Source {
    /// Whom to ask.
    pub stock: Arc<dyn StockSource>,
    /// The catalogue behind it, where there is one: it can also list its events.
    pub catalogue: Option<Arc<Catalogue>>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("catalogue", &self.catalogue.is_some()).finish_non_exhaustive()
    }
}

/// Opens a source. A catalogue is read now; the events-service is connected in the background and for as long as `stop`
/// is not cancelled, so an unreachable one is no error here. Must be called inside a runtime.
///
/// # Errors
/// When the catalogue cannot be read or makes no sense.
pub fn connect(url: &SourceUrl, options: SourceOptions, stop: CancellationToken) -> Result<Source, CatalogueError> {
    let catalogue = match url {
        SourceUrl::Embedded => Catalogue::embedded(),
        SourceUrl::File(path) => Catalogue::read(path)?,
        SourceUrl::Tcp { host, port } => {
            let stock = Arc::new(NestTcp::start(host.clone(), *port, options, stop));
            return Ok(Source { stock, catalogue: None });
        }
        SourceUrl::Amqp { broker, queue } => {
            let stock = Arc::new(NestRmq::start(broker, queue.clone(), options, stop));
            return Ok(Source { stock, catalogue: None });
        }
    };
    let catalogue = Arc::new(catalogue);
    Ok(Source { stock: Arc::clone(&catalogue) as Arc<dyn StockSource>, catalogue: Some(catalogue) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SourceUrl, SourceUrlError> {
        text.parse()
    }

    #[test]
    fn every_form_of_the_contract_is_understood() {
        assert_eq!(parse("tcp://events:8879"), Ok(SourceUrl::Tcp { host: "events".into(), port: 8879 }));
        assert_eq!(parse("tcp://[::1]:8879/"), Ok(SourceUrl::Tcp { host: "::1".into(), port: 8879 }));
        assert_eq!(parse("file:events.json"), Ok(SourceUrl::File("events.json".into())));
        assert_eq!(parse("file:/etc/events.json"), Ok(SourceUrl::File("/etc/events.json".into())));
        assert_eq!(parse("file:///etc/events.json"), Ok(SourceUrl::File("/etc/events.json".into())));
        let Ok(SourceUrl::Amqp { broker, queue }) = parse("amqp://u:p@host:5672/v%2F1?heartbeat=7&queue=other") else {
            panic!("an amqp source")
        };
        assert_eq!((broker.as_str(), queue.as_str()), ("amqp://u:p@host:5672/v%2F1?heartbeat=7", "other"));
        let Ok(SourceUrl::Amqp { queue, .. }) = parse("amqps://host/") else { panic!("an amqp source") };
        assert_eq!(queue, "events_queue");
    }

    #[test]
    fn what_cannot_be_a_source_is_refused_without_repeating_it() {
        for text in [
            "",
            "events",
            "http://secret",
            "tcp://host",
            "tcp://:1",
            "tcp://u:secret@h:1",
            "tcp://h:1/secret",
            "tcp://h:99999",
            "file:",
            "file://",
            "amqp://",
            "amqp://host/?queue=",
        ] {
            let error = parse(text).expect_err(text).to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn no_text_form_shows_the_password() {
        let url = parse("amqp://user:secret@host:5672/vhost?queue=q").expect("a source");
        assert_eq!(url.to_string(), "amqp://host:5672/vhost?queue=q");
        assert!(!format!("{url:?}").contains("secret"));
    }
}
