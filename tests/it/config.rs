//! Flags and variables: that the reference is true, that mistakes are found all at once, and that no secret is printed.

use std::{ffi::OsString, net::SocketAddr, time::Duration};

use proptest::prelude::*;
use seatlock::config::{self, Config, Invocation, LogFormat, Rate, TokenKey};

use crate::support::process::run;

/// A 32-byte key that appears nowhere else.
const KEY: &str = "tell-nobody-this-key-of-32-bytes";
const NEEDED: &[(&str, &str)] = &[("SEATLOCK_JWT_SECRET", KEY), ("SEATLOCK_EVENTS_URL", "tcp://events:8879")];

fn parse(args: &[&str], env: &[(&str, &str)]) -> Result<Config, Vec<String>> {
    let args = std::iter::once("seatlock").chain(args.iter().copied()).map(OsString::from);
    let env = env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value)));
    match config::parse(args, env) {
        Ok(Invocation::Run(config)) => Ok(*config),
        Ok(Invocation::Print(text)) => Err(vec![format!("not a run: {text}")]),
        Ok(Invocation::Health(address)) => Err(vec![format!("not a run: {address}")]),
        Err(mistakes) => {
            let text = mistakes.to_string();
            Err(text.lines().filter_map(|line| line.strip_prefix("  ")).map(ToOwned::to_owned).collect())
        }
    }
}

fn with<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    NEEDED.iter().chain(more).copied().collect()
}

/// Every default is the one that the contract promises. The values are written out here a second time on purpose.
#[test]
fn the_defaults_are_the_promised_ones() {
    let config = parse(&[], NEEDED).expect("the needed settings are enough");
    let seconds = Duration::from_secs;
    assert_eq!(config.listen, SocketAddr::from(([0, 0, 0, 0], 8880)));
    assert_eq!(config.admin_listen, None);
    assert!(config.cors_origins.is_empty());
    assert_eq!((config.redis_url, config.redis_ca_file, config.redis_wait), (None, None, 0));
    assert_eq!((config.amqp_url, config.amqp_queue.as_str()), (None, "realtime_queue"));
    assert_eq!((config.jwt_issuer, config.jwt_audience), (None, None));
    assert_eq!(config.jwt_events_claim.as_deref(), Some("events"));
    assert_eq!(config.token_grace, seconds(25));
    assert_eq!(config.lock_ttl, seconds(300));
    assert_eq!(config.abandoner_ttl, None);
    assert_eq!(config.checkout_window, seconds(60));
    assert_eq!(config.disconnect_grace, seconds(15));
    assert_eq!(config.settle_timeout, seconds(30));
    assert_eq!(config.expiry_warning, seconds(60));
    assert_eq!((config.max_per_lock, config.max_per_event), (10, None));
    assert_eq!(config.rate_limit, Some(Rate { interval: Duration::from_millis(100), burst: 20 }));
    assert_eq!(config.user_connections, 50);
    assert_eq!(config.user_handshakes, Some(Rate { interval: Duration::from_millis(100), burst: 100 }));
    assert_eq!(config.user_messages, Some(Rate { interval: Duration::from_millis(1), burst: 2000 }));
    assert!(config.trusted_proxies.is_empty());
    assert_eq!((config.address_connections, config.address_handshakes, config.address_messages), (None, None, None));
    assert_eq!(config.fanout_tick, Duration::from_millis(50));
    assert_eq!(config.stock_refresh, seconds(10));
    assert_eq!(config.request_timeout, seconds(2));
    assert_eq!(config.drain_timeout, seconds(25));
    assert_eq!(config.slow_client, seconds(15));
    assert_eq!((config.log.as_str(), config.log_format), ("info", LogFormat::Text));
    assert!(!config.demo);
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
}

/// Every variable of the contract stands in `--help`, once, beside the flag of the same words.
#[test]
fn help_explains_every_flag_and_variable() {
    let help = run(&["--help"], &[]);
    assert_eq!((help.code, help.err.as_str()), (0, ""));
    for name in [
        "listen",
        "admin-listen",
        "redis-url",
        "redis-ca-file",
        "amqp-url",
        "amqp-queue",
        "events-url",
        "jwt-secret",
        "jwt-public-key-file",
        "jwks-url",
        "jwt-issuer",
        "jwt-audience",
        "jwt-events-claim",
        "jwt-secret-file",
        "jwks-url-file",
        "redis-url-file",
        "amqp-url-file",
        "events-url-file",
        "token-grace",
        "cors-origins",
        "lock-ttl",
        "abandoner-ttl",
        "checkout-window",
        "disconnect-grace",
        "settle-timeout",
        "expiry-warning",
        "max-per-lock",
        "max-per-event",
        "rate-limit",
        "user-connections",
        "user-handshakes",
        "user-messages",
        "trusted-proxies",
        "address-connections",
        "address-handshakes",
        "address-messages",
        "fanout-tick",
        "stock-refresh",
        "request-timeout",
        "drain-timeout",
        "slow-client",
        "redis-wait",
        "threads",
        "log",
        "log-format",
        "demo",
    ] {
        let variable = format!("[env: SEATLOCK_{}]", name.to_uppercase().replace('-', "_"));
        assert_eq!(help.out.matches(&variable).count(), 1, "{variable} in {}", help.out);
        assert!(help.out.contains(&format!("--{name} <")) || help.out.contains(&format!("--{name}[=<")), "--{name}");
    }
    assert!(help.out.contains("Exit codes:"));
    assert_eq!(run(&["--version"], &[]).out, format!("seatlock {}\n", env!("CARGO_PKG_VERSION")));
}

/// Nothing hides behind the first mistake: unknown flags, stray words, mistyped variables, bad values and what does not
/// fit together come in one report, and the process ends with 64.
#[test]
fn all_mistakes_are_reported_at_once() {
    let ended = run(
        &["--lock-ttl", "300", "--lsten", "x", "stray", "--log-format=xml", "--fanout-tick", "10s", "--jwt-issuer"],
        &[
            ("SEATLOCK_REDIS_ULR", "redis://cache"),
            ("SEATLOCK_AMQP_URL", "http://rabbit"),
            ("SEATLOCK_RATE_LIMIT", "fast"),
            ("SEATLOCK_REDIS_WAIT", "1"),
            ("SEATLOCK_DRAIN_TIMEOUT", "2s"),
            ("SEATLOCK_MAX_PER_LOCK", "0"),
            ("SEATLOCK_THREADS", "none"),
            ("SEATLOCK_LOG", "inof"),
        ],
    );
    assert_eq!(ended.code, 64, "{ended:?}");
    assert_eq!(ended.out, "");
    let expected = [
        "16 mistakes",
        "--lsten: no such flag; did you mean --listen?",
        "belongs to no flag",
        "--jwt-issuer: needs a value",
        "SEATLOCK_REDIS_ULR: no such variable; did you mean SEATLOCK_REDIS_URL?",
        "no token key: give SEATLOCK_JWT_SECRET, SEATLOCK_JWT_PUBLIC_KEY_FILE or SEATLOCK_JWKS_URL",
        "no events-service: give SEATLOCK_EVENTS_URL",
        "SEATLOCK_AMQP_URL: must be a URL of the form amqp://HOST, amqps://HOST",
        "--lock-ttl: needs a unit",
        "SEATLOCK_MAX_PER_LOCK: must be an integer between 1 and 10000",
        "SEATLOCK_RATE_LIMIT: must look like '10/s burst 20'",
        "--fanout-tick: must be between 1ms and 1s",
        "SEATLOCK_THREADS: must be an integer between 1 and 256",
        "SEATLOCK_LOG: must be error, warn",
        "--log-format: must be text or json",
        "SEATLOCK_REDIS_WAIT waits for Redis replicas, and no SEATLOCK_REDIS_URL is given",
        "SEATLOCK_DRAIN_TIMEOUT must be at least 3 seconds more than SEATLOCK_REQUEST_TIMEOUT",
    ];
    for part in expected {
        assert!(ended.err.contains(part), "{part:?} is missing in {}", ended.err);
    }
}

/// A secret in any setting, rightly or wrongly placed, well or badly written, never reaches an output.
#[test]
fn no_output_ever_shows_a_secret() {
    let secret = "hunter2-hunter2-hunter2-hunter2-x";
    let bad_urls = [
        format!("redis://:{secret}@"),
        format!("redis://:{secret}@host:port"),
        format!("redis://:{secret}/{secret}@host"),
        format!("http://user:{secret}@host"),
        secret.to_owned(),
        format!("{secret}://host"),
        format!("amqp://{secret}"),
    ];
    for value in &bad_urls {
        for name in
            ["redis-url", "amqp-url", "events-url", "jwks-url", "lock-ttl", "listen", "cors-origins", "log", "demo"]
        {
            let variable = format!("SEATLOCK_{}", name.to_uppercase().replace('-', "_"));
            let flag = format!("--{name}={value}");
            let split = format!("--{name}");
            for (args, env) in [
                (vec![], vec![(variable.as_str(), value.as_str())]),
                (vec![flag.as_str()], vec![]),
                (vec![split.as_str(), value], vec![]),
                (vec![split.as_str(), value, split.as_str(), value], vec![]),
            ] {
                let texts = match config::parse(
                    std::iter::once("seatlock").chain(args).map(OsString::from),
                    env.iter().map(|(name, value)| (OsString::from(name), OsString::from(value))),
                ) {
                    Ok(Invocation::Run(config)) => format!("{config:?}"),
                    Ok(Invocation::Print(text)) => text,
                    Ok(Invocation::Health(address)) => address.to_string(),
                    Err(mistakes) => format!("{mistakes} {mistakes:?}"),
                };
                assert!(!texts.contains("hunter2"), "{name}={value}: {texts}");
            }
        }
    }
    let everywhere = [
        ("SEATLOCK_JWT_SECRET", secret),
        ("SEATLOCK_REDIS_URL", "redis://:hunter2@host:port"),
        ("SEATLOCK_AMQP_URL", "amqps://u:hunter2@"),
        ("SEATLOCK_EVENTS_URL", "amqp://u:hunter2@host:99999"),
        ("SEATLOCK_JWKS_URL", "https://u:hunter2@/"),
        ("SEATLOCK_LOG", "trace"),
    ];
    for args in [
        &[][..],
        &["--help"],
        &["hunter2"],
        &["--hunter-url=redis://:hunter2@x"],
        &["--demo=hunter2"],
        &["-p", "hunter2"],
    ] {
        let ended = run(args, &everywhere);
        assert_eq!(ended.code, if args == ["--help"] { 0 } else { 64 }, "{ended:?}");
        let shown = format!("{}{}", ended.out, ended.err);
        assert!(!shown.contains("hunter2"), "{args:?}: {shown}");
    }
}

/// Whatever is on the command line, reading it ends, and a known flag with a good value is not lost between others.
#[test]
fn any_command_line_is_read_to_its_end() {
    let words = prop::sample::select(vec![
        "--listen",
        "--listen=x",
        "--lock-ttl",
        "300",
        "--",
        "-",
        "-l",
        "--demo",
        "--demo=no",
        "--jwt-secret",
        "--nope",
        "--nope=1",
        "",
        "=",
        "--=",
        "x",
        "--log-format=json",
    ]);
    proptest!(ProptestConfig::with_cases(500), |(args in prop::collection::vec(words, 0..8))| {
        let _ = parse(&args, NEEDED);
    });
    let mistakes = parse(&["--nope", "--lock-ttl", "1ms"], NEEDED).expect_err("two mistakes");
    assert_eq!(mistakes, ["--nope: no such flag", "--lock-ttl: must be between 1s and 1day"]);
}

#[test]
fn a_flag_goes_before_its_variable_and_an_empty_variable_is_not_set() {
    let env = with(&[("SEATLOCK_LOCK_TTL", "2m"), ("SEATLOCK_REDIS_URL", ""), ("SEATLOCK_MAX_PER_LOCK", "")]);
    let config = parse(&["--lock-ttl=90s"], &env).expect("valid");
    assert_eq!(config.lock_ttl, Duration::from_secs(90));
    assert_eq!((config.redis_url, config.max_per_lock), (None, 10));
    assert_eq!(parse(&[], &env).expect("valid").lock_ttl, Duration::from_mins(2));
}

/// The CA's file is for TLS, and one that cannot be used stops the start and says so.
#[test]
fn the_ca_of_redis_is_for_tls_and_must_be_one() {
    for scheme in ["rediss", "rediss-sentinel", "rediss-cluster"] {
        let url = format!("{scheme}://cache:6379/?sentinelServiceName=x");
        let env = with(&[("SEATLOCK_REDIS_URL", &url), ("SEATLOCK_REDIS_CA_FILE", "ca.pem")]);
        assert_eq!(parse(&[], &env).expect("valid").redis_ca_file, Some("ca.pem".into()), "{scheme}");
    }
    let plain = with(&[("SEATLOCK_REDIS_URL", "redis://cache"), ("SEATLOCK_REDIS_CA_FILE", "ca.pem")]);
    let mistakes = parse(&[], &plain).expect_err("no TLS");
    assert!(mistakes.len() == 1 && mistakes[0].starts_with("SEATLOCK_REDIS_CA_FILE is for TLS"), "{mistakes:?}");

    let folder = tempfile::tempdir().expect("a temporary folder");
    let (absent, empty) = (folder.path().join("absent.pem"), folder.path().join("empty.pem"));
    std::fs::write(&empty, "nothing of the kind").expect("a temporary file");
    for file in [absent, empty] {
        let file = file.display().to_string();
        let env = [("SEATLOCK_REDIS_URL", "rediss://:hunter2@127.0.0.1:1"), ("SEATLOCK_REDIS_CA_FILE", file.as_str())];
        let ended = run(&["--demo", "--listen=127.0.0.1:0"], &env);
        assert_ne!(ended.code, 0);
        assert!(ended.err.contains(&format!("SEATLOCK_REDIS_CA_FILE: {file}")), "{}", ended.err);
        assert!(!ended.err.contains("hunter2"), "{}", ended.err);
    }
}

#[test]
fn there_is_exactly_one_token_key() {
    let two = parse(&[], &with(&[("SEATLOCK_JWKS_URL", "https://id.example/keys")])).expect_err("two keys");
    assert_eq!(two, ["SEATLOCK_JWT_SECRET, SEATLOCK_JWKS_URL: give one token key, not 2"]);
    let none = parse(&[], &[("SEATLOCK_EVENTS_URL", "file:x.json")]).expect_err("no key");
    assert!(none.len() == 1 && none[0].starts_with("no token key"), "{none:?}");
    let demo = parse(&["--demo"], &[]).expect("the demo needs nothing");
    assert!(demo.demo && demo.token_key == TokenKey::Random && demo.events_url.is_none());
    let unsignable = parse(&["--demo"], &[("SEATLOCK_JWKS_URL", "https://id.example/keys")]).expect_err("cannot sign");
    assert!(unsignable.len() == 1 && unsignable[0].contains("--demo cannot sign"), "{unsignable:?}");
    let named = parse(&["--demo", "--jwt-issuer=me"], &[]).expect_err("no issuer");
    assert!(named.len() == 1 && named[0].contains("tokens of --demo name neither"), "{named:?}");
}

/// What may hold a secret can be in a file instead: one line, whose end is no part of it. Both at once, or a file that
/// holds no such thing, is a mistake, and no text of it is ever repeated.
#[test]
fn secrets_are_read_from_files() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("our folder");
        path.display().to_string()
    };
    let key = file("key", format!("{KEY}\r\n").as_bytes());
    let redis = file("redis", b"redis://:hunter2@cache:6379\n");
    let amqp = file("amqp", b"amqp://u:hunter2@rabbit");
    let events = file("events", b"amqp://u:hunter2@rabbit/?queue=events\n");
    let given = [
        ("SEATLOCK_JWT_SECRET_FILE", key.as_str()),
        ("SEATLOCK_REDIS_URL_FILE", &redis),
        ("SEATLOCK_AMQP_URL_FILE", &amqp),
        ("SEATLOCK_EVENTS_URL_FILE", &events),
    ];
    let config = parse(&[], &given).expect("all that is needed");
    assert_eq!(config.token_key, TokenKey::Secret(config::Secret::new(KEY)));
    assert_eq!(config.redis_url.as_ref().map(config::SecretUrl::reveal), Some("redis://:hunter2@cache:6379"));
    assert_eq!(config.amqp_url.as_ref().map(config::SecretUrl::reveal), Some("amqp://u:hunter2@rabbit"));
    let url = config.events_url.as_ref().map(config::SecretUrl::reveal);
    assert_eq!(url, Some("amqp://u:hunter2@rabbit/?queue=events"));
    assert!(!format!("{config:?}").contains("hunter2"));
    let flag = parse(&["--jwt-secret-file", &key], &given[1..]).expect("the flag does too");
    assert_eq!(flag.token_key, config.token_key);
    let jwks = file("jwks", b"https://u:hunter2@id.example/keys\n");
    let fetched = parse(&["--jwks-url-file", &jwks], &given[1..]).expect("a token key");
    assert_eq!(fetched.token_key, TokenKey::Jwks(config::SecretUrl::new("https://u:hunter2@id.example/keys")));
    assert!(!format!("{fetched:?}").contains("hunter2"));

    let long = file("long", &vec![b'x'; 100_000]);
    for (path, what) in [
        (file("empty", b" \n"), "the file is empty"),
        (file("binary", b"hunter2\xff"), "the file is not UTF-8"),
        (long, "the file is too long to be a secret"),
        (folder.path().join("hunter2").display().to_string(), "the file cannot be read (entity not found)"),
        (folder.path().display().to_string(), "the file cannot be read (is a directory)"),
        (redis.clone(), ""),
    ] {
        let env = [given[0], given[3], ("SEATLOCK_REDIS_URL_FILE", path.as_str())];
        let expected = if what.is_empty() { vec![] } else { vec![format!("SEATLOCK_REDIS_URL_FILE: {what}")] };
        assert_eq!(parse(&[], &env).err().unwrap_or_default(), expected);
    }
    let wrong = file("wrong", b"http://u:hunter2@cache");
    let mistakes = parse(&[], &[given[0], given[3], ("SEATLOCK_REDIS_URL_FILE", &wrong)]).expect_err("no Redis URL");
    assert!(mistakes[0].starts_with("SEATLOCK_REDIS_URL_FILE: must be a URL of the form redis://"), "{mistakes:?}");
    assert!(!mistakes[0].contains("hunter2"), "{mistakes:?}");

    let both = [given[0], ("SEATLOCK_JWT_SECRET", "hunter2"), given[3], ("SEATLOCK_EVENTS_URL", "file:hunter2")];
    assert_eq!(
        parse(&[], &both).expect_err("two of each"),
        [
            "SEATLOCK_JWT_SECRET, SEATLOCK_JWT_SECRET_FILE: give one of them, not both",
            "SEATLOCK_EVENTS_URL, SEATLOCK_EVENTS_URL_FILE: give one of them, not both",
        ]
    );
    let keys = parse(&["--jwks-url=https://id.example"], &given).expect_err("two keys");
    assert_eq!(keys, ["SEATLOCK_JWT_SECRET, SEATLOCK_JWKS_URL: give one token key, not 2"]);
}

#[test]
fn odd_settings_are_warned_of() {
    let env = with(&[
        ("SEATLOCK_EXPIRY_WARNING", "5m"),
        ("SEATLOCK_COLOUR_SCHEME", "dark"),
        // What Kubernetes puts into every pod beside a service named seatlock, and one named seatlock-admin.
        ("SEATLOCK_SERVICE_HOST", "10.0.0.1"),
        ("SEATLOCK_SERVICE_PORT", "8880"),
        ("SEATLOCK_SERVICE_PORT_HTTP", "8880"),
        ("SEATLOCK_PORT", "tcp://10.0.0.1:8880"),
        ("SEATLOCK_PORT_8880_TCP", "tcp://10.0.0.1:8880"),
        ("SEATLOCK_PORT_8880_TCP_PROTO", "tcp"),
        ("SEATLOCK_PORT_8880_TCP_PORT", "8880"),
        ("SEATLOCK_PORT_8880_TCP_ADDR", "10.0.0.1"),
        ("SEATLOCK_ADMIN_SERVICE_HOST", "10.0.0.2"),
        ("SEATLOCK_ADMIN_PORT_9000_TCP", "tcp://10.0.0.2:9000"),
    ]);
    let warnings = parse(&[], &env).expect("valid").warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].starts_with("SEATLOCK_COLOUR_SCHEME is set"));
    assert!(warnings[1].starts_with("SEATLOCK_EXPIRY_WARNING is not below SEATLOCK_LOCK_TTL"));
}
