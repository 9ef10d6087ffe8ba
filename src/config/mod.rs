//! Flags and environment variables become one typed [`Config`].
//!
//! All mistakes are found before any is reported, and no message repeats what was given, because it may be a secret.
//! Knows nothing of the modules that it configures: [`crate::app`] translates.

mod flags;
mod otel;
mod secret;
mod value;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fmt,
    io::Read as _,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{
    ArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use flags::{FLAGS, Flag};
pub use otel::Traces;
pub use secret::{Secret, SecretUrl, redacted};

/// What the process was started with.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each field is the flag of its name, explained once, in `flags`")]
pub struct Config {
    pub listen: SocketAddr,
    pub admin_listen: Option<SocketAddr>,
    pub cors_origins: Vec<String>,
    pub redis_url: Option<SecretUrl>,
    pub redis_ca_file: Option<PathBuf>,
    pub redis_wait: u32,
    pub amqp_url: Option<SecretUrl>,
    pub amqp_queue: String,
    /// `None` only with `demo`: the built-in catalogue.
    pub events_url: Option<SecretUrl>,
    pub token_key: TokenKey,
    pub jwt_issuer: Option<String>,
    pub jwt_audience: Option<String>,
    pub jwt_events_claim: Option<String>,
    pub token_grace: Duration,
    pub lock_ttl: Duration,
    pub abandoner_ttl: Option<Duration>,
    pub checkout_window: Duration,
    pub disconnect_grace: Duration,
    pub settle_timeout: Duration,
    pub expiry_warning: Duration,
    pub max_per_lock: u32,
    pub max_per_event: Option<u32>,
    pub rate_limit: Option<Rate>,
    pub user_connections: u32,
    pub user_handshakes: Option<Rate>,
    pub user_messages: Option<Rate>,
    /// First addresses of ranges, and how many of their bits are the range's.
    pub trusted_proxies: Vec<(IpAddr, u8)>,
    pub address_connections: Option<u32>,
    pub address_handshakes: Option<Rate>,
    pub address_messages: Option<Rate>,
    pub fanout_tick: Duration,
    pub stock_refresh: Duration,
    pub request_timeout: Duration,
    pub drain_timeout: Duration,
    pub slow_client: Duration,
    /// `None`: as many as fit the machine.
    pub threads: Option<u32>,
    pub log: String,
    pub log_format: LogFormat,
    pub demo: bool,
    /// `None` when no spans are exported.
    pub traces: Option<Traces>,
    /// What is odd but not wrong, to be logged once logging works.
    pub warnings: Vec<String>,
}

/// What tokens are checked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenKey {
    /// A shared secret.
    Secret(Secret),
    /// A PEM file with a public key.
    PublicKeyFile(PathBuf),
    /// A key set published by the identity service.
    Jwks(SecretUrl),
    /// A random secret, made at the start; only with `--demo`.
    Random,
}

/// A steady rate, one per `interval` on average, with `burst` at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Between two at the steady rate.
    pub interval: Duration,
    /// How many may come at once.
    pub burst: u32,
}

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// To serve.
    Run(Box<Config>),
    /// To print this text and stop: help or version.
    Print(String),
    /// To ask the process that serves this address whether it is ready.
    Health(SocketAddr),
}

/// Everything that is wrong with the flags and variables.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let noun = if self.0.len() == 1 { "mistake" } else { "mistakes" };
        writeln!(f, "cannot start: {} {noun} in the configuration", self.0.len())?;
        for mistake in &self.0 {
            writeln!(f, "  {mistake}")?;
        }
        f.write_str("seatlock --help explains every setting")
    }
}

impl std::error::Error for Mistakes {}

/// A second `s` is TLS.
const REDIS_SCHEMES: &[&str] =
    &["redis", "rediss", "redis-sentinel", "rediss-sentinel", "redis-cluster", "rediss-cluster", "unix"];

/// Settings that hold a secret, or a URL that may: each can be given as `FLAG-file` instead, the path of a file with
/// the value. Orchestrators mount secrets so, and a file is in no list of processes and in no dump of variables.
const FROM_FILES: &[&str] = &["jwt-secret", "jwks-url", "redis-url", "amqp-url", "events-url"];

/// A secret or a URL is far shorter; more is some other file.
const SECRET_FILE_BYTES_MAX: u64 = 64 * 1024;

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_hours(1);
/// What a drain takes beside the requests in flight.
const DRAIN_REST: Duration = Duration::from_secs(3);
/// Tickets in one lock, whatever a deployment sets. Ten thousand is a stadium's block; the domain's own bound is higher.
const PER_LOCK_MAX: u32 = 10_000;

/// Reads the command line (`args[0]` is the program) and the environment.
///
/// # Errors
/// Every mistake in them, none with a value in its text.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Invocation, Mistakes> {
    let mut mistakes = Vec::new();
    let matches = match command_line(args.into_iter().collect(), &mut mistakes) {
        CommandLine::Print(text) => return Ok(Invocation::Print(text)),
        CommandLine::Read(matches) => matches,
    };
    let env: Vec<_> = env.into_iter().collect();
    let mut warnings = Vec::new();
    let traces = otel::traces(&env, cfg!(feature = "otlp"), &mut warnings);
    let env = env
        .into_iter()
        .filter_map(|(name, value)| name.into_string().ok().map(|name| (name, value)))
        .filter(|(name, value)| name.starts_with("SEATLOCK_") && !value.is_empty())
        .collect();
    let mut read = Read { matches, env, files: BTreeMap::new(), mistakes, warnings };
    if read.matches.get_flag(flags::HEALTH) {
        let public = read.value("listen", value::address);
        let address = read.value("admin-listen", value::address).or(public);
        let mistakes = read.mistakes;
        return address.filter(|_| mistakes.is_empty()).map(Invocation::Health).ok_or(Mistakes(mistakes));
    }
    read.foreign_variables();
    read.read_files();
    let mut config = read.config();
    if read.mistakes.is_empty() {
        (config.traces, config.warnings) = (traces, read.warnings);
        Ok(Invocation::Run(Box::new(config)))
    } else {
        Err(Mistakes(read.mistakes))
    }
}

enum CommandLine {
    Read(ArgMatches),
    Print(String),
}

/// Takes what `clap` cannot read out of the line, one by one, so that everything else is still read.
fn command_line(mut args: Vec<OsString>, mistakes: &mut Vec<String>) -> CommandLine {
    loop {
        let error = match flags::command().try_get_matches_from(&args) {
            Ok(matches) => return CommandLine::Read(matches),
            Err(error) => error,
        };
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            return CommandLine::Print(error.render().to_string());
        }
        let (mistake, at) = describe(&error, &args);
        mistakes.push(mistake);
        // Nothing left to take out: only the program's name is always readable.
        let Some(at) = at else {
            args.truncate(1);
            continue;
        };
        let lone = !args[at].to_string_lossy().contains('=');
        args.remove(at);
        // An unknown `--flag value` is one mistake, not two.
        if lone && args.get(at).is_some_and(|next| !next.to_string_lossy().starts_with('-')) {
            args.remove(at);
        }
    }
}

/// A mistake of the command line without any value in it, and where it stands.
fn describe(error: &clap::Error, args: &[OsString]) -> (String, Option<usize>) {
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => texts.first().cloned(),
        _ => None,
    };
    let given = text(ContextKind::InvalidArg).unwrap_or_default();
    let flag = given.split(['=', ' ']).next().unwrap_or_default().to_owned();
    let stands = |arg: &OsString| arg.to_string_lossy().split('=').next() == Some(flag.as_str());
    if !flag.starts_with('-') {
        let at = args.iter().skip(1).position(|arg| arg.to_string_lossy() == given).map(|at| at + 1);
        return ("an argument that belongs to no flag (not shown: it may be a secret)".to_owned(), at);
    }
    // The last one, so that of a flag given twice the first remains.
    let at = args.iter().skip(1).rposition(stands).map(|at| at + 1);
    let mistake = if error.kind() == ErrorKind::UnknownArgument {
        let hint = text(ContextKind::SuggestedArg).map_or(String::new(), |known| format!("; did you mean {known}?"));
        format!("{flag}: no such flag{hint}")
    } else if error.kind() == ErrorKind::ArgumentConflict {
        format!("{flag}: given more than once")
    } else {
        format!("{flag}: needs a value")
    };
    (mistake, at)
}

/// Reads settings one by one and collects what is wrong with them.
struct Read {
    matches: ArgMatches,
    /// Variables that begin with `SEATLOCK_` and are not empty.
    env: BTreeMap<String, OsString>,
    /// What was read from files, by flag: the name of the setting that names the file, and the text in it.
    files: BTreeMap<String, (String, OsString)>,
    mistakes: Vec<String>,
    warnings: Vec<String>,
}

impl Read {
    /// A mistaken variable next to a known name is a mistake: a lost `SEATLOCK_REDIS_URL` would mean that every replica
    /// sells the same tickets. Others are only warned of, because Kubernetes and newer versions bring variables too.
    fn foreign_variables(&mut self) {
        for name in self.env.keys() {
            if is_kubernetes(name) || FLAGS.iter().any(|flag| flag.variable() == *name) {
                continue;
            }
            match FLAGS.iter().map(Flag::variable).find(|known| is_near(name, known)) {
                Some(known) => self.mistakes.push(format!("{name}: no such variable; did you mean {known}?")),
                None => self.warnings.push(format!("{name} is set, and seatlock knows no such variable")),
            }
        }
    }

    fn config(&mut self) -> Config {
        let demo = self.value("demo", value::switch).unwrap_or_else(|| self.is_given("demo"));
        let token_key = self.token_key(demo);
        let mut config = Config {
            listen: self.value("listen", value::address).unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], 0))),
            admin_listen: self.value("admin-listen", value::address),
            cors_origins: self.value("cors-origins", value::origins).unwrap_or_default(),
            redis_url: self.url("redis-url", REDIS_SCHEMES),
            redis_ca_file: self.value("redis-ca-file", |text| Ok(PathBuf::from(text))),
            redis_wait: self.integer("redis-wait", 0..=16).unwrap_or_default(),
            amqp_url: self.url("amqp-url", &["amqp", "amqps"]),
            amqp_queue: self.value("amqp-queue", queue).unwrap_or_default(),
            events_url: self.url("events-url", &["tcp", "amqp", "amqps", "file"]),
            token_key,
            jwt_issuer: self.value("jwt-issuer", text),
            jwt_audience: self.value("jwt-audience", text),
            jwt_events_claim: self.value("jwt-events-claim", text).filter(|name| name != "off"),
            token_grace: self.duration("token-grace", Duration::ZERO..=HOUR),
            lock_ttl: self.duration("lock-ttl", SECOND..=24 * HOUR),
            abandoner_ttl: self.value("abandoner-ttl", |text| value::duration(text, &(SECOND..=24 * HOUR))),
            checkout_window: self.duration("checkout-window", SECOND..=24 * HOUR),
            disconnect_grace: self.duration("disconnect-grace", Duration::ZERO..=HOUR),
            settle_timeout: self.duration("settle-timeout", SECOND..=HOUR),
            expiry_warning: self.duration("expiry-warning", Duration::ZERO..=24 * HOUR),
            max_per_lock: self.integer("max-per-lock", 1..=PER_LOCK_MAX).unwrap_or_default(),
            max_per_event: self.integer("max-per-event", 1..=1_000_000),
            rate_limit: self.value("rate-limit", value::rate).flatten(),
            user_connections: self.integer("user-connections", 1..=10_000).unwrap_or_default(),
            user_handshakes: self.value("user-handshakes", value::rate).flatten(),
            user_messages: self.value("user-messages", value::rate).flatten(),
            trusted_proxies: self.value("trusted-proxies", value::ranges).unwrap_or_default(),
            address_connections: self.integer("address-connections", 1..=1_000_000),
            address_handshakes: self.value("address-handshakes", value::rate).flatten(),
            address_messages: self.value("address-messages", value::rate).flatten(),
            // A lost announcement must heal within 5 s, tick included.
            fanout_tick: self.duration("fanout-tick", Duration::from_millis(1)..=SECOND),
            stock_refresh: self.duration("stock-refresh", SECOND..=HOUR),
            request_timeout: self.duration("request-timeout", Duration::from_millis(100)..=60 * SECOND),
            drain_timeout: self.duration("drain-timeout", SECOND..=HOUR),
            slow_client: self.duration("slow-client", SECOND..=HOUR),
            threads: self.integer("threads", 1..=256),
            log: self.value("log", filter).unwrap_or_default(),
            log_format: self.value("log-format", log_format).unwrap_or(LogFormat::Text),
            demo,
            traces: None,
            warnings: Vec::new(),
        };
        self.cross_check(&mut config);
        config
    }

    fn token_key(&mut self, demo: bool) -> TokenKey {
        let keys = ["jwt-secret", "jwt-public-key-file", "jwks-url"];
        let given: Vec<String> = keys.iter().filter(|flag| self.is_given(flag)).map(|flag| variable(flag)).collect();
        if given.len() > 1 {
            self.mistakes.push(format!("{}: give one token key, not {}", given.join(", "), given.len()));
        }
        if given.is_empty() && !demo {
            self.mistakes.push(
                "no token key: give SEATLOCK_JWT_SECRET, SEATLOCK_JWT_PUBLIC_KEY_FILE or SEATLOCK_JWKS_URL (or --demo to \
                 try the service without)"
                    .to_owned(),
            );
        }
        let secret = self.value("jwt-secret", |text| Ok(Secret::new(text)));
        let file = self.value("jwt-public-key-file", |text| Ok(PathBuf::from(text)));
        let jwks = self.url("jwks-url", &["http", "https"]);
        if demo && (file.is_some() || jwks.is_some()) {
            self.mistakes.push(format!("{}: --demo cannot sign tokens for this key; leave it out", given.join(", ")));
        }
        if let Some(secret) = secret {
            if demo {
                self.warnings
                    .push("--demo hands tokens signed with SEATLOCK_JWT_SECRET to anybody who asks".to_owned());
            }
            return TokenKey::Secret(secret);
        }
        match (file, jwks) {
            (Some(path), _) => TokenKey::PublicKeyFile(path),
            (None, Some(url)) => TokenKey::Jwks(url),
            (None, None) => TokenKey::Random,
        }
    }

    /// What no setting can say of itself.
    fn cross_check(&mut self, config: &mut Config) {
        if config.events_url.is_none() && !self.is_given("events-url") && !config.demo {
            self.mistakes.push(
                "no events-service: give SEATLOCK_EVENTS_URL (or --demo to try the service with a built-in catalogue)"
                    .to_owned(),
            );
        }
        if config.demo && (config.jwt_issuer.is_some() || config.jwt_audience.is_some()) {
            self.mistakes.push(
                "SEATLOCK_JWT_ISSUER, SEATLOCK_JWT_AUDIENCE: tokens of --demo name neither; leave them out".to_owned(),
            );
        }
        if config.redis_wait > 0 && !self.is_given("redis-url") {
            self.mistakes
                .push("SEATLOCK_REDIS_WAIT waits for Redis replicas, and no SEATLOCK_REDIS_URL is given".to_owned());
        }
        let is_tls = config.redis_url.as_ref().is_some_and(|url| url.scheme().starts_with("rediss"));
        if config.redis_ca_file.is_some() && !is_tls {
            self.mistakes.push(
                "SEATLOCK_REDIS_CA_FILE is for TLS: SEATLOCK_REDIS_URL must begin with rediss (rediss://, \
                 rediss-sentinel://, rediss-cluster://)"
                    .to_owned(),
            );
        }
        // Draining is one sum: what is in flight takes up to the request timeout, and the rest is kept for connections
        // that do not close by themselves and for the farewell to the ledger.
        if config.drain_timeout < config.request_timeout + DRAIN_REST {
            self.mistakes.push(
                "SEATLOCK_DRAIN_TIMEOUT must be at least 3 seconds more than SEATLOCK_REQUEST_TIMEOUT".to_owned(),
            );
        }
        if !config.expiry_warning.is_zero() && config.expiry_warning >= config.lock_ttl {
            config.expiry_warning = config.lock_ttl / 2;
            self.warnings.push(
                "SEATLOCK_EXPIRY_WARNING is not below SEATLOCK_LOCK_TTL: owners are warned when half of it is over"
                    .to_owned(),
            );
        }
        if config.admin_listen == Some(config.listen) && config.listen.port() != 0 {
            self.mistakes.push("SEATLOCK_ADMIN_LISTEN is the same as SEATLOCK_LISTEN: leave it out".to_owned());
        }
    }

    /// Whether a setting is given, by itself or by the file that holds it.
    fn is_given(&self, flag: &str) -> bool {
        self.is_given_itself(flag) || FROM_FILES.contains(&flag) && self.is_given_itself(&format!("{flag}-file"))
    }

    fn is_given_itself(&self, flag: &str) -> bool {
        self.matches.value_source(flag) == Some(ValueSource::CommandLine) || self.env.contains_key(&variable(flag))
    }

    /// Takes the settings that are in files of their own as if they had been given themselves.
    fn read_files(&mut self) {
        for flag in FROM_FILES {
            let in_file = format!("{flag}-file");
            let Some((name, path)) = self.raw(&in_file) else { continue };
            if self.is_given_itself(flag) {
                self.mistakes.push(format!("{}, {name}: give one of them, not both", variable(flag)));
                continue;
            }
            match secret_file(path.as_ref()) {
                Ok(text) => {
                    self.files.insert((*flag).to_owned(), (name, text.into()));
                }
                Err(error) => self.mistakes.push(format!("{name}: {error}")),
            }
        }
    }

    /// The text of a setting and the name under which it was given: its file, else the flag, else the variable, else
    /// the default.
    fn raw(&self, flag: &str) -> Option<(String, OsString)> {
        if let Some(given) = self.files.get(flag) {
            return Some(given.clone());
        }
        let value = self.matches.get_one::<OsString>(flag).filter(|value| !value.is_empty()).cloned();
        if self.matches.value_source(flag) == Some(ValueSource::CommandLine) {
            return value.map(|value| (format!("--{flag}"), value));
        }
        let variable = variable(flag);
        match self.env.get(&variable) {
            Some(text) => Some((variable, text.clone())),
            None => value.map(|value| (variable, value)),
        }
    }

    /// A setting's value; `None` when it is absent, or mistaken, which is noted.
    fn value<T>(&mut self, flag: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        let (name, raw) = self.raw(flag)?;
        let parsed = raw.to_str().map_or_else(|| Err("is not UTF-8".to_owned()), |text| parse(text.trim()));
        parsed.map_err(|error| self.mistakes.push(format!("{name}: {error}"))).ok()
    }

    fn url(&mut self, flag: &str, schemes: &[&str]) -> Option<SecretUrl> {
        self.value(flag, |text| value::url(text, schemes))
    }

    fn integer(&mut self, flag: &str, bounds: RangeInclusive<u32>) -> Option<u32> {
        self.value(flag, |text| value::integer(text, &bounds))
    }

    /// A setting with a default. A mistaken one counts as its default from here on, so that it does not cause others.
    fn duration(&mut self, flag: &str, bounds: RangeInclusive<Duration>) -> Duration {
        let default = FLAGS.iter().find(|known| known.name == flag).and_then(|known| known.default);
        self.value(flag, |text| value::duration(text, &bounds))
            .or_else(|| default.and_then(|text| value::duration(text, &bounds).ok()))
            .unwrap_or(*bounds.start())
    }
}

/// The variable of a flag.
fn variable(flag: &str) -> String {
    FLAGS.iter().find(|known| known.name == flag).map(Flag::variable).unwrap_or_default()
}

/// Variables that Kubernetes sets in every pod for services named `seatlock` or `seatlock-something`.
fn is_kubernetes(name: &str) -> bool {
    let rest = name.trim_end_matches("_PROTO").trim_end_matches("_ADDR").trim_end_matches("_PORT");
    let port_number = rest
        .trim_end_matches("_TCP")
        .trim_end_matches("_UDP")
        .rsplit_once("_PORT_")
        .is_some_and(|(_, number)| number.bytes().all(|byte| byte.is_ascii_digit()));
    port_number || name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || name.ends_with("_PORT")
}

/// Whether one name becomes the other by at most two edits of a character (Levenshtein).
fn is_near(name: &str, known: &str) -> bool {
    const EDITS_MAX: usize = 2;
    let mut row: Vec<usize> = (0..=known.len()).collect();
    for (i, a) in name.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in known.bytes().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row.last().is_some_and(|&edits| edits <= EDITS_MAX)
}

#[expect(clippy::unnecessary_wraps, reason = "one shape for all parsers")]
fn text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

/// The text in a file without the end of its line. No error says what the file holds or where it is: the path itself
/// may be a secret in the wrong place.
fn secret_file(path: &Path) -> Result<String, String> {
    let mut bytes = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(SECRET_FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| format!("the file cannot be read ({})", error.kind()))?;
    if bytes.len() as u64 > SECRET_FILE_BYTES_MAX {
        return Err("the file is too long to be a secret".to_owned());
    }
    let text = String::from_utf8(bytes).map_err(|_| "the file is not UTF-8".to_owned())?;
    let text = text.trim_end_matches(['\r', '\n']);
    if text.trim().is_empty() { Err("the file is empty".to_owned()) } else { Ok(text.to_owned()) }
}

/// A queue name: AMQP carries it as a short string.
fn queue(text: &str) -> Result<String, String> {
    if text.len() > 255 { Err("must be 255 bytes or less".to_owned()) } else { Ok(text.to_owned()) }
}

fn filter(text: &str) -> Result<String, String> {
    // The filter takes a word that is no level for a target, and then logs nothing else: a typo would be silence.
    let level = |word: &str| word.parse::<LevelFilter>().is_ok();
    let plain = |part: &str| part.contains(['=', '[']) || level(part.trim());
    if EnvFilter::try_new(text).is_ok() && text.split(',').all(plain) {
        Ok(text.to_owned())
    } else {
        Err("must be error, warn, info, debug, trace, off, or a list such as info,seatlock::rpc=debug".to_owned())
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err("must be text or json".to_owned()),
    }
}
