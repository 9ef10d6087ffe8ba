//! The reference of every setting: one flag, one variable, one default each. `--help` prints this table.

use clap::{Arg, ArgAction, Command, builder::OsStringValueParser};

/// One setting.
pub(super) struct Flag {
    /// The flag without its dashes; the variable is `SEATLOCK_` and the same words.
    pub name: &'static str,
    /// What a value is called in the reference.
    pub value: &'static str,
    /// The default, where there is one.
    pub default: Option<&'static str>,
    /// Under which heading it stands.
    heading: &'static str,
    /// What it means.
    help: &'static str,
}

const NETWORK: &str = "Network";
const NEIGHBOURS: &str = "Neighbours";
const TOKENS: &str = "Tokens (exactly one key, unless --demo)";
const LOCKS: &str = "Locks";
const CALLERS: &str = "Callers (docs/security.md says what to set on a public address)";
const PACE: &str = "Pace and patience";
const PROCESS: &str = "Process";

/// The flag that asks instead of serving.
pub(super) const HEALTH: &str = "health";

const fn flag(
    heading: &'static str,
    name: &'static str,
    value: &'static str,
    default: Option<&'static str>,
    help: &'static str,
) -> Flag {
    Flag { name, value, default, heading, help }
}

/// All of them, in the order of `--help`.
pub(super) const FLAGS: &[Flag] = &[
    flag(NETWORK, "listen", "ADDR:PORT", Some("0.0.0.0:8880"), "Where Socket.IO and HTTP are served"),
    flag(
        NETWORK,
        "admin-listen",
        "ADDR:PORT",
        None,
        "Where /metrics, /livez and /readyz are served instead, away from the public; without it on --listen",
    ),
    flag(
        NETWORK,
        "cors-origins",
        "ORIGINS",
        None,
        "Web origins that may connect, separated by commas, or * for any; also checked when a WebSocket opens. Without \
         it only pages of the same origin may",
    ),
    flag(
        NEIGHBOURS,
        "redis-url",
        "URL",
        None,
        "Where lock state lives: redis://, redis-sentinel://, redis-cluster://HOST:PORT, each with rediss for TLS, or \
         unix:PATH. Without it lock state lives in this process: one replica only, and a restart forgets it",
    ),
    flag(NEIGHBOURS, "redis-url-file", "PATH", None, "The same, read from a file, because it may hold a password"),
    flag(
        NEIGHBOURS,
        "redis-ca-file",
        "PATH",
        None,
        "The certificates that TLS to Redis trusts, a PEM file; without it those of the system",
    ),
    flag(
        NEIGHBOURS,
        "redis-wait",
        "N",
        Some("0"),
        "Redis replicas that must have a grant before it is answered; 0 does not wait",
    ),
    flag(NEIGHBOURS, "amqp-url", "URL", None, "RabbitMQ, as amqp:// or amqps://. Without it no RPC is served"),
    flag(NEIGHBOURS, "amqp-url-file", "PATH", None, "The same, read from a file"),
    flag(NEIGHBOURS, "amqp-queue", "NAME", Some("realtime_queue"), "The queue that the other services send to"),
    flag(
        NEIGHBOURS,
        "events-url",
        "URL",
        None,
        "The events-service that knows the stock: tcp://HOST:PORT (NestJS TCP), amqp://HOST/?queue=NAME (NestJS \
         RabbitMQ), or file:PATH (a fixed catalogue in JSON). Required, unless --demo",
    ),
    flag(NEIGHBOURS, "events-url-file", "PATH", None, "The same, read from a file"),
    flag(
        TOKENS,
        "jwt-secret",
        "SECRET",
        None,
        "The shared key of HS256, HS384 or HS512 tokens, 32 bytes or more. Better given as the variable: flags can be seen by other users \
         of the machine",
    ),
    flag(TOKENS, "jwt-secret-file", "PATH", None, "The same, read from a file; the end of its line is not part of it"),
    flag(TOKENS, "jwt-public-key-file", "PATH", None, "The public key of signed tokens, a PEM file"),
    flag(TOKENS, "jwks-url", "URL", None, "Where the identity service publishes its keys, http:// or https://"),
    flag(TOKENS, "jwks-url-file", "PATH", None, "The same, read from a file, because it may hold a password"),
    flag(TOKENS, "jwt-issuer", "TEXT", None, "The issuer that tokens must name; without it any"),
    flag(TOKENS, "jwt-audience", "TEXT", None, "The audience that tokens must name; without it any"),
    flag(
        TOKENS,
        "jwt-events-claim",
        "NAME",
        Some("events"),
        "The claim of a token that lists the ids of the only events it is for; a token without it is for any. off looks at \
         none",
    ),
    flag(
        TOKENS,
        "token-grace",
        "DURATION",
        Some("25s"),
        "From the message that a token expired to the end of its connection",
    ),
    flag(LOCKS, "lock-ttl", "DURATION", Some("5m"), "How long a lock stands if nothing else happens"),
    flag(
        LOCKS,
        "abandoner-ttl",
        "DURATION",
        None,
        "The shortest time that a lock stands for users who let one after the other lapse: half as long for each beyond \
         two in a row, as counted by this replica, until they buy. Without it all have the same time",
    ),
    flag(
        LOCKS,
        "checkout-window",
        "DURATION",
        Some("60s"),
        "How long a lock stands at least from the moment the orders-service validated it",
    ),
    flag(
        LOCKS,
        "disconnect-grace",
        "DURATION",
        Some("15s"),
        "How long the locks of a user stand after the last connection of that user ended",
    ),
    flag(
        LOCKS,
        "settle-timeout",
        "DURATION",
        Some("30s"),
        "How long a confirmed lock waits for its order to be reported before its tickets are counted by the stock alone",
    ),
    flag(LOCKS, "expiry-warning", "DURATION", Some("60s"), "How long before its end the owner of a lock is warned"),
    flag(LOCKS, "max-per-lock", "N", Some("10"), "Tickets in one lock at most"),
    flag(
        LOCKS,
        "max-per-event",
        "N",
        None,
        "Tickets of one event that a user may hold and have bought at most; without it any",
    ),
    flag(LOCKS, "rate-limit", "RATE", Some("10/s burst 20"), "Lock requests per user and event, or off"),
    flag(CALLERS, "user-connections", "N", Some("50"), "Sockets of one user on this replica at most"),
    flag(CALLERS, "user-handshakes", "RATE", Some("10/s burst 100"), "Sockets that one user may open, or off"),
    flag(
        CALLERS,
        "user-messages",
        "RATE",
        Some("1000/s burst 2000"),
        "Messages of one user over all sockets on this replica, or off",
    ),
    flag(
        CALLERS,
        "trusted-proxies",
        "RANGES",
        None,
        "The load balancers in front, such as 10.0.0.0/8,fd00::/8: their X-Forwarded-For says whose address a request \
         counts for. Without it that is whoever connects",
    ),
    flag(
        CALLERS,
        "address-connections",
        "N",
        None,
        "Transports of one address on this replica at most, and apart from them connections before an upgrade; without \
         it any. An IPv6 address stands for its /64",
    ),
    flag(
        CALLERS,
        "address-handshakes",
        "RATE",
        Some("off"),
        "Transports that one address may open, and apart from them tokens that it may present, or off",
    ),
    flag(
        CALLERS,
        "address-messages",
        "RATE",
        Some("off"),
        "Messages of one address, HTTP requests for stock and statistics among them, or off",
    ),
    flag(
        PACE,
        "fanout-tick",
        "DURATION",
        Some("50ms"),
        "A room hears of each category at once, then at most once in this time",
    ),
    flag(
        PACE,
        "stock-refresh",
        "DURATION",
        Some("10s"),
        "How often the stock of events that somebody watches is asked for",
    ),
    flag(PACE, "request-timeout", "DURATION", Some("2s"), "Within which every request is answered"),
    flag(PACE, "drain-timeout", "DURATION", Some("25s"), "Within which the process stops after SIGTERM or SIGINT"),
    flag(
        PACE,
        "slow-client",
        "DURATION",
        Some("15s"),
        "How long a client may leave what was sent to it unread before its connection ends",
    ),
    flag(
        PROCESS,
        "threads",
        "N",
        None,
        "Threads that the service runs on, by itself one less than there are processors (or than its container may use), and \
         at least one. What is left is for the system's own share of every message; a second thread costs each request \
         more, so it is better to have more replicas",
    ),
    flag(
        PROCESS,
        "log",
        "FILTER",
        Some("info"),
        "What is logged: error, warn, info, debug, trace, or a list such as info,seatlock::rpc=debug. Libraries log what \
         they carry below info, and are heard there only when they are named",
    ),
    flag(
        PROCESS,
        "log-format",
        "FORMAT",
        Some("text"),
        "How it is logged: text or json, one line each, on standard error",
    ),
    flag(
        PROCESS,
        "demo",
        "BOOL",
        Some("false"),
        "Serve a page to try the service at /demo/, with a token key of its own, tokens for anybody and, unless set \
         otherwise, a built-in catalogue. Never for real sales",
    ),
];

impl Flag {
    /// The environment variable.
    pub(super) fn variable(&self) -> String {
        format!("SEATLOCK_{}", self.name.to_ascii_uppercase().replace('-', "_"))
    }

    fn argument(&self) -> Arg {
        let argument = Arg::new(self.name)
            .long(self.name)
            .value_name(self.value)
            .value_parser(OsStringValueParser::new())
            .action(ArgAction::Set)
            .help_heading(self.heading)
            .help(format!("{}\n[env: {}]", filled(self.help), self.variable()));
        let argument = match self.default {
            Some(default) if default != "false" => argument.default_value(default),
            _ => argument,
        };
        if self.value == "BOOL" {
            argument.num_args(0..=1).require_equals(true).default_missing_value("true")
        } else {
            argument
        }
    }
}

/// The command line as `clap` sees it. Values are read as they are: this module's parent parses them, so that one
/// mistake does not hide the next and none is echoed.
pub(super) fn command() -> Command {
    Command::new("seatlock")
        .version(env!("CARGO_PKG_VERSION"))
        .about("A distributed ticket-lock service: thousands of buyers, live truth, nothing sold twice.")
        .after_help(
            "A flag goes before its variable; an empty variable is one that is not set.\n\
             Durations have a unit: 50ms, 30s, 5m.\n\n\
             Spans are exported, by a build with the feature otlp, where OTEL_EXPORTER_OTLP_ENDPOINT\n\
             and the other standard variables say (docs/operations.md).\n\n\
             Exit codes:\n  \
             0   stopped as asked, everything in flight answered\n  \
             1   not ready (--health)\n  \
             64  a mistake in flags or variables; all of them are listed\n  \
             69  something needed at the start cannot be had, such as the port\n  \
             70  stopped by a fault of its own, or before the drain had ended",
        )
        .next_line_help(true)
        .args(FLAGS.iter().map(Flag::argument))
        .arg(Arg::new(HEALTH).long(HEALTH).action(ArgAction::SetTrue).help_heading(PROCESS).help(filled(
            "Ask the process that runs here with the same --listen and --admin-listen whether it is ready, and \
                     exit with 0 or 1: for containers without a shell. No variable",
        )))
}

/// The text in lines of at most a hundred characters, broken between words.
fn filled(text: &str) -> String {
    const WIDTH: usize = 100;
    let mut lines = String::with_capacity(text.len() + 8);
    let mut line_len = 0;
    for word in text.split(' ') {
        if line_len > 0 {
            let fits = line_len + 1 + word.len() <= WIDTH;
            lines.push(if fits { ' ' } else { '\n' });
            line_len = if fits { line_len + 1 } else { 0 };
        }
        lines.push_str(word);
        line_len += word.len();
    }
    lines
}
