//! The export of spans: one for each request and each sweep of an event, one below it for each script call, sent by OTLP
//! over HTTP.
//!
//! Owns the exporter, its HTTP client and what is logged about it. Its invariant: nothing here waits for the collector
//! but [`flush`]. Spans go into a bounded queue; when it is full they are lost.
//!
//! An exported span travels with the span of the request's log lines, through tasks and calls, as an extension of it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr as _;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId, TraceState, Tracer as _,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request as HttpRequest, Response as HttpResponse};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig as _, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{Sampler, SdkTracer, SdkTracerProvider};
use tokio::runtime::Handle;
use tracing::{Metadata, Span, Subscriber, dispatcher};
use tracing_subscriber::Registry;
use tracing_subscriber::filter::{LevelFilter, filter_fn};
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;

use super::{Export, TraceParent};

/// What the service is called when nobody says otherwise.
const SERVICE: &str = "seatlock";

/// How often the log says, at most, that spans cannot be sent.
const COMPLAINT_EVERY: Duration = Duration::from_mins(1);

/// The largest answer of a collector that is read: it says at most why spans were not taken.
const ANSWER_BYTES_MAX: usize = 64 << 10;

static EXPORTER: OnceLock<Exporter> = OnceLock::new();

struct Exporter {
    tracer: SdkTracer,
    provider: SdkTracerProvider,
}

/// Sends spans from here on. A collector that cannot be sent to stops nothing.
pub(super) fn start(export: &Export) {
    match build(export) {
        Ok(provider) => {
            let tracer = provider.tracer(SERVICE);
            // The first stays: there is one process, and it starts once.
            EXPORTER.set(Exporter { tracer, provider }).ok();
            tracing::info!(
                endpoint = export.shown,
                share = export.share,
                heeds_parent = export.heeds_parent,
                "exporting spans"
            );
        }
        Err(error) => tracing::warn!(%error, "no spans are exported"),
    }
}

fn build(export: &Export) -> Result<SdkTracerProvider, HttpError> {
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(Client::new(export)?)
        .with_protocol(Protocol::HttpBinary)
        .with_endpoint(&export.endpoint)
        .with_timeout(export.timeout)
        .build()
        // Its own words have the endpoint in them.
        .map_err(|_| "the endpoint, or another variable OTEL_EXPORTER_OTLP_…, cannot be used")?;
    let share = Sampler::TraceIdRatioBased(export.share);
    let sampler = if export.heeds_parent { Sampler::ParentBased(Box::new(share)) } else { share };
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter);
    Ok(provider.with_sampler(sampler).with_resource(resource()).build())
}

/// Who exports: what the environment says, and where it says nothing, what we know.
fn resource() -> Resource {
    let given = Resource::builder().build();
    let is_given = |name: &'static str| {
        given.get(&name.into()).is_some_and(|value| !value.as_str().starts_with("unknown_service"))
    };
    let ours = [("service.name", SERVICE), ("service.version", env!("CARGO_PKG_VERSION"))];
    let ours = ours.into_iter().filter(|(name, _)| !is_given(name));
    Resource::builder().with_attributes(ours.map(|(name, value)| KeyValue::new(name, value))).build()
}

/// Returns when what was recorded has been sent, or after `within`. Nothing is recorded afterwards.
pub async fn flush(within: Duration) {
    let Some(exporter) = EXPORTER.get() else { return };
    // It blocks its thread.
    let flushed = tokio::task::spawn_blocking(move || exporter.provider.shutdown_with_timeout(within));
    if !matches!(tokio::time::timeout(within, flushed).await, Ok(Ok(Ok(())))) {
        tracing::warn!("the last spans were not exported in time");
    }
}

// ---- requests and script calls ------------------------------------------------------------------------------------

/// The exported span of a request, where there is one.
#[derive(Debug, Default)]
pub struct Request(Option<Open>);

impl Request {
    /// Says how the request, a message of this name, ended.
    pub fn ends(self, name: &'static str, outcome: &'static str, failed: bool) {
        let Some(open) = self.0 else { return };
        let span = open.context.span();
        if open.is_rpc {
            span.update_name(name);
            span.set_attribute(KeyValue::new("rpc.method", name));
        } else {
            span.set_attribute(KeyValue::new("seatlock.pattern", name));
        }
        open.close(if failed { Err(outcome) } else { Ok(outcome) });
    }
}

/// The exported span of a script call, or of work that nobody asked for.
#[derive(Debug)]
pub struct Work(Open);

impl Work {
    /// Says how it ended: with the word of its reply, or with a kind of error.
    pub fn ends(self, outcome: Result<&str, &'static str>) {
        self.0.close(outcome);
    }
}

/// A span that has not ended.
#[derive(Debug)]
struct Open {
    context: Context,
    is_rpc: bool,
    closed: bool,
}

impl Open {
    fn begin(name: Cow<'static, str>, kind: SpanKind, attributes: Vec<KeyValue>, parent: &Context) -> Option<Self> {
        let tracer = &EXPORTER.get()?.tracer;
        let span =
            tracer.span_builder(name).with_kind(kind).with_attributes(attributes).start_with_context(tracer, parent);
        Some(Self { context: parent.with_span(span), is_rpc: false, closed: false })
    }

    fn close(mut self, outcome: Result<&str, &'static str>) {
        self.closed = true;
        let span = self.context.span();
        let word = outcome.unwrap_or_else(|kind| kind).to_owned();
        span.set_attribute(KeyValue::new("seatlock.outcome", word));
        if let Err(kind) = outcome {
            span.set_attribute(KeyValue::new("error.type", kind));
            span.set_status(Status::error(""));
        }
        span.end();
    }
}

impl Drop for Open {
    /// Work that was given up in the middle, by a panic or with its task.
    fn drop(&mut self) {
        if !self.closed {
            let span = self.context.span();
            span.set_attribute(KeyValue::new("error.type", "unfinished"));
            span.set_status(Status::error(""));
            span.end();
        }
    }
}

/// What a span of the log carries.
struct Carried(Context);

/// The spans of a socket's message: of its log lines and the exported one. `None` when nothing is exported.
pub(super) fn from_socket<'a>(parent: impl FnOnce() -> Option<TraceParent<'a>>) -> Option<(Span, Request)> {
    EXPORTER.get()?;
    let parent = parent();
    let attributes = vec![KeyValue::new("rpc.system.name", "socket.io")];
    // Named when it is known what it asks for.
    let mut open = Open::begin("message".into(), SpanKind::Server, attributes, &above(parent))?;
    open.is_rpc = true;
    Some(spans("socket", parent, open))
}

/// The same of a queue's message.
pub(super) fn from_queue<'a>(queue: &str, parent: impl FnOnce() -> Option<TraceParent<'a>>) -> Option<(Span, Request)> {
    EXPORTER.get()?;
    let parent = parent();
    let attributes = vec![
        KeyValue::new("messaging.system", "rabbitmq"),
        KeyValue::new("messaging.operation.name", "process"),
        KeyValue::new("messaging.operation.type", "process"),
        KeyValue::new("messaging.destination.name", queue.to_owned()),
    ];
    let open = Open::begin(format!("process {queue}").into(), SpanKind::Consumer, attributes, &above(parent))?;
    Some(spans("amqp", parent, open))
}

fn spans(transport: &'static str, parent: Option<TraceParent<'_>>, open: Open) -> (Span, Request) {
    let trace = open.context.span().span_context().trace_id().to_string();
    // Apart from the session's own span, which has the same ids where it has any.
    let span = tracing::error_span!(
        parent: None,
        "request",
        transport,
        trace_id = trace.as_str(),
        parent_id = parent.map(|parent| parent.parent),
    );
    carry(&span, &open.context);
    (span, Request(Some(open)))
}

/// What a request is below: the caller's span, or nothing.
fn above(parent: Option<TraceParent<'_>>) -> Context {
    let context = Context::new();
    match parent.and_then(remote) {
        Some(caller) => context.with_remote_span_context(caller),
        None => context,
    }
}

/// The caller's span, as it says of itself.
fn remote(parent: TraceParent<'_>) -> Option<SpanContext> {
    let trace = TraceId::from_hex(parent.trace).ok()?;
    let span = SpanId::from_hex(parent.parent).ok()?;
    let flags = TraceFlags::default().with_sampled(parent.sampled);
    // One that cannot be read is dropped alone, as W3C has it.
    let state = TraceState::from_str(parent.state).unwrap_or_default();
    Some(SpanContext::new(trace, span, flags, true, state))
}

/// The span of a script call, below that of the request in work; `None` when that one is not exported.
#[must_use]
pub fn script(name: &'static str) -> Option<Work> {
    EXPORTER.get()?;
    let above = carried()?;
    if !above.span().span_context().is_sampled() {
        return None;
    }
    let attributes = vec![
        KeyValue::new("db.system.name", "redis"),
        KeyValue::new("db.operation.name", "EVALSHA"),
        KeyValue::new("db.stored_procedure.name", name),
    ];
    Open::begin(format!("EVALSHA {name}").into(), SpanKind::Client, attributes, &above).map(Work)
}

/// The spans of work that nobody asked for: of its log lines and the exported one, in a trace of its own. `None` when
/// nothing is exported.
pub(super) fn work(name: &'static str) -> Option<(Span, Work)> {
    let open = Open::begin(name.into(), SpanKind::Internal, Vec::new(), &Context::new())?;
    let trace = open.context.span().span_context().trace_id().to_string();
    let span = tracing::error_span!(parent: None, "work", name, trace_id = trace.as_str());
    carry(&span, &open.context);
    Some((span, Work(open)))
}

/// Whether spans are exported.
#[must_use]
pub fn exports() -> bool {
    EXPORTER.get().is_some()
}

// ---- the way from a request to its script calls -------------------------------------------------------------------

fn carry(span: &Span, context: &Context) {
    span.with_subscriber(|(id, dispatch)| {
        if let Some(span) = dispatch.downcast_ref::<Registry>().and_then(|registry| registry.span(id)) {
            span.extensions_mut().insert(Carried(context.clone()));
        }
    });
}

fn carried() -> Option<Context> {
    dispatcher::get_default(|dispatch| {
        let current = dispatch.current_span();
        let span = dispatch.downcast_ref::<Registry>()?.span(current.id()?)?;
        span.scope().find_map(|span| span.extensions().get::<Carried>().map(|carried| carried.0.clone()))
    })
}

/// Keeps the spans of requests also where the filter of the log lets nothing through.
pub(super) fn carrier<S: Subscriber + for<'a> LookupSpan<'a>>() -> impl Layer<S> {
    struct Carrier;
    impl<S: Subscriber> Layer<S> for Carrier {}

    let ours = |metadata: &Metadata<'_>| metadata.is_span() && metadata.target() == module_path!();
    Carrier.with_filter(filter_fn(ours).with_max_level_hint(LevelFilter::ERROR))
}

// ---- the collector ------------------------------------------------------------------------------------------------

/// Why spans did not arrive.
#[derive(Debug, thiserror::Error)]
enum SendError {
    #[error("no complete answer of the collector within {0:?}")]
    Timeout(Duration),
    #[error("{0}")]
    Http(String),
    #[error("the collector answered more than {ANSWER_BYTES_MAX} bytes")]
    TooLong,
    #[error("the process ends")]
    Ended,
}

/// The HTTP client of the exporter. Its requests run on the runtime of the service: the exporter's thread has none.
struct Client {
    http: reqwest::Client,
    runtime: Handle,
    timeout: Duration,
    complaint: Mutex<Complaint>,
}

/// What the log has been told.
#[derive(Default)]
struct Complaint {
    /// When it was last said that the collector takes no spans.
    said: Option<Instant>,
    /// Attempts that failed since.
    failed: u64,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    fn new(export: &Export) -> Result<Self, HttpError> {
        let client = reqwest::Client::builder();
        // Where no TLS will be spoken, the root certificates, which a small image may lack, need not be there.
        let client = if export.endpoint.starts_with("https") { client } else { client.tls_certs_only([]) };
        let http = client
            .redirect(reqwest::redirect::Policy::none())
            .user_agent(concat!("seatlock/", env!("CARGO_PKG_VERSION")))
            .build()?;
        let (runtime, timeout) = (Handle::current(), export.timeout);
        Ok(Self { http, runtime, timeout, complaint: Mutex::default() })
    }

    async fn send(http: reqwest::Client, request: HttpRequest<Bytes>) -> Result<HttpResponse<Bytes>, SendError> {
        // The URL may hold a password.
        let unreached = |error: reqwest::Error| SendError::Http(chain(&error.without_url()));
        let request = request.try_into().map_err(unreached)?;
        let mut response = http.execute(request).await.map_err(unreached)?;
        let mut body = Vec::new();
        while let Some(portion) = response.chunk().await.map_err(unreached)? {
            if body.len() + portion.len() > ANSWER_BYTES_MAX {
                return Err(SendError::TooLong);
            }
            body.extend_from_slice(&portion);
        }
        let mut answer = HttpResponse::new(Bytes::from(body));
        *answer.status_mut() = response.status();
        std::mem::swap(answer.headers_mut(), response.headers_mut());
        Ok(answer)
    }

    /// Tells the log of a collector that is not there, and that it is back, each at most once in [`COMPLAINT_EVERY`].
    fn tell(&self, sent: &Result<HttpResponse<Bytes>, SendError>) {
        let error = match sent {
            Ok(answer) if answer.status().is_success() => None,
            Ok(answer) => Some(format!("the collector answered {}", answer.status().as_u16())),
            Err(error) => Some(error.to_string()),
        };
        let mut complaint = self.complaint.lock().unwrap_or_else(PoisonError::into_inner);
        let may_speak = complaint.said.is_none_or(|said| said.elapsed() >= COMPLAINT_EVERY);
        if let Some(error) = error {
            complaint.failed += 1;
            if may_speak {
                let attempts = complaint.failed;
                *complaint = Complaint { said: Some(Instant::now()), failed: 0 };
                tracing::warn!(error, attempts, "spans cannot be exported; requests go on without them");
            }
        } else if may_speak && complaint.said.is_some() {
            *complaint = Complaint::default();
            tracing::info!("spans are exported again");
        }
    }
}

/// An error with its causes: the outermost says only that something did not work.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: HttpRequest<Bytes>) -> Result<HttpResponse<Bytes>, HttpError> {
        let (http, timeout) = (self.http.clone(), self.timeout);
        // A timer is made where it runs, too.
        let sending = async move { tokio::time::timeout(timeout, Self::send(http, request)).await };
        let sent = match self.runtime.spawn(sending).await {
            Ok(Ok(sent)) => sent,
            Ok(Err(_)) => Err(SendError::Timeout(self.timeout)),
            Err(_) => Err(SendError::Ended),
        };
        self.tell(&sent);
        Ok(sent?)
    }
}
