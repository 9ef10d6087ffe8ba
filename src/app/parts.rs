//! What each part of the process is made with: settings become the parts' own options.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::StartError;
use crate::{
    callers::{Addresses, Quota, Range},
    config::{Config, Rate, Secret, TokenKey},
    domain::{RateLimit, ReplicaId},
    gateway::{
        GatewayOptions, Origins,
        auth::{KeySource, TokenIssuer, TokenVerifier, VerifierOptions},
    },
    http::{demo::Demo, stats::Stats},
    inventory::{self, Catalogue, SourceOptions, SourceUrl, Stock, StockOptions},
    ledger::{
        Ledger, LedgerError, LedgerOptions, MemoryLedger, RedisClock, RedisLedger, RedisOptions, RedisSettingError,
    },
    metrics,
    rpc::{self, Rpc, RpcOptions},
};

/// RabbitMQ messages in work at once. One takes a round trip to Redis, below a millisecond: 64 are tens of thousands a
/// second, and few enough to be finished or given back within a drain.
const PREFETCH: u16 = 64;

/// What locks have left, at least, when their user's last socket is closed by a drain: time for a browser to notice, to
/// back off and to find a replica that has just started.
const DRAIN_GRACE_MIN: Duration = Duration::from_mins(1);

/// A PEM file with one public key has far below a thousand bytes per key; more is some other file.
const PEM_BYTES_MAX: u64 = 64 * 1024;

pub(super) async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { address, source })
}

/// Where lock state lives, and says so.
pub(super) fn ledger(config: &Config, replica: ReplicaId) -> Result<Arc<dyn Ledger>, StartError> {
    let options = LedgerOptions { settle_timeout: config.settle_timeout, expiry_warning: config.expiry_warning };
    let Some(url) = &config.redis_url else {
        tracing::warn!(
            "lock state is embedded in this process: one replica only, and a restart forgets every lock \
             (SEATLOCK_REDIS_URL is not set)"
        );
        metrics::LEDGER_UP.set(&[], 1.0);
        return Ok(Arc::new(MemoryLedger::new(options)));
    };
    let redis = RedisOptions {
        url: url.reveal().to_owned(),
        ca_file: config.redis_ca_file.clone(),
        replica,
        // A request that finds no answer of Redis in this time has a moment left to say so.
        timeout: config.request_timeout * 3 / 4,
        wait: config.redis_wait,
        clock: RedisClock::Server,
    };
    let ledger = RedisLedger::connect(&redis, options).map_err(|error| {
        let setting = match &error {
            // No setting leads to the stepped clock.
            RedisSettingError::Url | RedisSettingError::Scripts(_) => "SEATLOCK_REDIS_URL",
            RedisSettingError::CaFile { .. } => "SEATLOCK_REDIS_CA_FILE",
        };
        StartError::Setting { setting, why: error.to_string() }
    })?;
    tracing::info!(redis = %url, "lock state is in Redis");
    Ok(Arc::new(ledger))
}

/// The stock and, where it comes from one, its catalogue.
pub(super) fn stock(
    config: &Config,
    ledger: &Arc<dyn Ledger>,
    stop: &CancellationToken,
) -> Result<(Arc<Stock>, Option<Arc<Catalogue>>), StartError> {
    let url = match &config.events_url {
        Some(url) => url
            .reveal()
            .parse::<SourceUrl>()
            .map_err(|error| StartError::Setting { setting: "SEATLOCK_EVENTS_URL", why: error.to_string() })?,
        None => SourceUrl::Embedded,
    };
    tracing::info!(source = %url, "the source of stock");
    let request_timeout = config.request_timeout / 2;
    let source = inventory::connect(&url, SourceOptions { request_timeout, ..SourceOptions::default() }, stop.clone())?;
    if source.catalogue.is_some() {
        metrics::INVENTORY_CONNECTED.set(&[], 1.0);
    }
    let options = StockOptions::new(config.stock_refresh, request_timeout);
    Ok((Stock::new(Arc::clone(ledger), source.stock, options, stop.clone()), source.catalogue))
}

/// Who may connect, and how the demo makes tokens, if this is one.
pub(super) fn tokens(config: &Config) -> Result<(Arc<TokenVerifier>, Option<TokenIssuer>), StartError> {
    let secret = |secret: &Secret| {
        let bytes = secret.reveal().as_bytes();
        ("SEATLOCK_JWT_SECRET", KeySource::Secret(bytes.to_vec()), config.demo.then(|| TokenIssuer::new(bytes)))
    };
    let (setting, keys, issuer) = match &config.token_key {
        TokenKey::Secret(given) => secret(given),
        // 244 random bits.
        TokenKey::Random => secret(&Secret::new(format!("{}{}", uuid::Uuid::new_v4(), uuid::Uuid::new_v4()))),
        TokenKey::PublicKeyFile(path) => ("SEATLOCK_JWT_PUBLIC_KEY_FILE", KeySource::PublicKeyPem(pem(path)?), None),
        TokenKey::Jwks(url) => {
            let url = url.reveal().parse().map_err(|error: url::ParseError| StartError::Setting {
                setting: "SEATLOCK_JWKS_URL",
                why: error.to_string(),
            })?;
            ("SEATLOCK_JWKS_URL", KeySource::Jwks(url), None)
        }
    };
    let options = VerifierOptions {
        keys,
        issuer: config.jwt_issuer.clone(),
        audience: config.jwt_audience.clone(),
        events_claim: config.jwt_events_claim.clone(),
    };
    let verifier =
        TokenVerifier::new(options).map_err(|error| StartError::Setting { setting, why: error.to_string() })?;
    Ok((Arc::new(verifier), issuer))
}

fn pem(path: &Path) -> Result<Vec<u8>, StartError> {
    let unusable = |why: String| StartError::Setting {
        setting: "SEATLOCK_JWT_PUBLIC_KEY_FILE",
        why: format!("{}: {why}", path.display()),
    };
    let len = std::fs::metadata(path).map_err(|error| unusable(error.to_string()))?.len();
    if len > PEM_BYTES_MAX {
        return Err(unusable(format!("{len} bytes are no public key")));
    }
    std::fs::read(path).map_err(|error| unusable(error.to_string()))
}

pub(super) fn gateway_options(config: &Config, stock: &Stock) -> GatewayOptions {
    GatewayOptions {
        origins: Origins::new(config.cors_origins.clone()),
        request_timeout: config.request_timeout,
        lock_ttl: config.lock_ttl,
        abandoner_ttl: config.abandoner_ttl,
        expiry_warning: config.expiry_warning,
        disconnect_grace: config.disconnect_grace,
        drain_grace: config.disconnect_grace.max(DRAIN_GRACE_MIN),
        max_per_lock: config.max_per_lock,
        max_per_event: config.max_per_event,
        rate: config.rate_limit.map(rate_limit),
        stock_age_max: stock.age_wanted(),
        token_grace: config.token_grace,
        slow_client: config.slow_client,
        sockets_per_user_max: config.user_connections as usize,
        user_handshakes: config.user_handshakes.map(rate_limit),
        user_messages: config.user_messages.map(rate_limit),
        addresses: addresses(config),
        ..GatewayOptions::default()
    }
}

fn rate_limit(rate: Rate) -> RateLimit {
    RateLimit { interval: rate.interval, burst: rate.burst }
}

/// What one address may take, and who says for whom he speaks.
fn addresses(config: &Config) -> Arc<Addresses> {
    let proxies = config.trusted_proxies.iter().map(|&(base, bits)| Range::new(base, bits)).collect();
    let quota = Quota {
        connections: config.address_connections.map(|max| max as usize),
        handshakes: config.address_handshakes.map(rate_limit),
        messages: config.address_messages.map(rate_limit),
    };
    Addresses::new(proxies, quota)
}

/// What RabbitMQ's callers are told is what `/stats` says.
struct RpcStats(Arc<Stats>);

#[async_trait]
impl rpc::StatsSource for RpcStats {
    async fn stats(&self) -> Result<serde_json::Value, LedgerError> {
        self.0.json().await
    }
}

/// The RabbitMQ consumer, if there is a broker.
pub(super) fn rpc(
    config: &Config,
    ledger: &Arc<dyn Ledger>,
    stock: &Arc<Stock>,
    stats: &Arc<Stats>,
    stop: &CancellationToken,
) -> Result<Option<Rpc>, StartError> {
    let Some(url) = &config.amqp_url else {
        tracing::info!("RPC is off (SEATLOCK_AMQP_URL is not set)");
        return Ok(None);
    };
    rpc::check_url(url.reveal())
        .map_err(|error| StartError::Setting { setting: "SEATLOCK_AMQP_URL", why: error.to_string() })?;
    tracing::info!(broker = %url, queue = config.amqp_queue, "RPC is on");
    let options = RpcOptions {
        url: url.reveal().to_owned(),
        queue: config.amqp_queue.clone(),
        prefetch: PREFETCH,
        request_timeout: config.request_timeout,
        checkout_window: config.checkout_window,
    };
    metrics::RPC_CONFIGURED.set(&[], 1.0);
    let stats = Arc::new(RpcStats(Arc::clone(stats)));
    Ok(Some(rpc::start(options, Arc::clone(ledger), Arc::clone(stock), stats, stop.clone())))
}

/// The demo, if this is one: it has a way to make tokens.
pub(super) fn demo(issuer: Option<TokenIssuer>, catalogue: Option<&Catalogue>) -> Option<Demo> {
    let issuer = issuer?;
    let issue = Arc::new(move |user, lifetime| issuer.issue(user, lifetime));
    Some(Demo::new(issue, catalogue.map_or(&[], Catalogue::events)))
}
