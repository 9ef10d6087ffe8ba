//! What a Redis URL says: which servers, as whom, with TLS or without. The forms are in `docs/redis.md`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, pem::PemObject};
use rustls::{ClientConfig, RootCertStore};
use url::Url;

use crate::ledger::redis::RedisSettingError;

const PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26_379;

/// A server's host and port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Server {
    pub(super) host: String,
    pub(super) port: u16,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Where the keys are.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// On one server.
    Server(Server),
    /// On one server of this machine.
    Unix(PathBuf),
    /// On the one that the sentinels name; the one at this place is asked first.
    Sentinel { sentinels: Vec<Server>, first: Arc<AtomicUsize>, master: String, login: Login },
    /// On the masters of a cluster; some of its nodes are known.
    Cluster(Vec<Server>),
}

/// As whom a connection is made.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
}

/// Without the secret.
impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({:?}, {})", self.username, if self.password.is_some() { "***" } else { "no password" })
    }
}

/// All that a Redis URL says.
#[derive(Debug, Clone)]
pub(super) struct Address {
    pub(super) place: Place,
    pub(super) login: Login,
    pub(super) database: i64,
    pub(super) tls: Option<Arc<ClientConfig>>,
}

impl Address {
    /// Reads a URL. `ca_file` holds the certificates to trust instead of the system's.
    pub(super) fn read(url: &str, ca_file: Option<PathBuf>) -> Result<Self, RedisSettingError> {
        let url = Url::parse(url).map_err(|_| RedisSettingError::Url)?;
        let asked = |name: &str| url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned());
        let place = match url.scheme() {
            "redis" | "rediss" => Place::Server(hosts(&url, PORT)?.remove(0)),
            "redis-sentinel" | "rediss-sentinel" => Place::Sentinel {
                sentinels: hosts(&url, SENTINEL_PORT)?,
                first: Arc::default(),
                master: asked("sentinelServiceName").ok_or(RedisSettingError::Url)?,
                login: Login { username: asked("sentinelUsername"), password: asked("sentinelPassword") },
            },
            "redis-cluster" | "rediss-cluster" => Place::Cluster(hosts(&url, PORT)?),
            "unix" => Place::Unix(PathBuf::from(decoded(url.path()))),
            _ => return Err(RedisSettingError::Url),
        };
        let database = match (&place, url.path().trim_start_matches('/')) {
            // A path is no number, and a cluster has no other than the first.
            (Place::Unix(_) | Place::Cluster(_), _) | (_, "") => 0,
            (Place::Server(_) | Place::Sentinel { .. }, number) => {
                number.parse::<u32>().map_err(|_| RedisSettingError::Url)?.into()
            }
        };
        let given = |part: &str| Some(part).filter(|part| !part.is_empty()).map(decoded);
        let (username, password) = (given(url.username()), url.password().and_then(given));
        let tls = if url.scheme().starts_with("rediss") { Some(tls(ca_file)?) } else { None };
        Ok(Self { place, login: Login { username, password }, database, tls })
    }
}

/// The URL's own host and those of `node=`.
fn hosts(url: &Url, port: u16) -> Result<Vec<Server>, RedisSettingError> {
    let first = url.host_str().filter(|host| !host.is_empty()).ok_or(RedisSettingError::Url)?;
    let mut hosts = vec![Server { host: bare(first), port: url.port().unwrap_or(port) }];
    for (_, node) in url.query_pairs().filter(|(key, _)| key == "node") {
        // The colons of an IPv6 address are inside its brackets.
        let (host, number) = match node.rsplit_once(':').filter(|(_, number)| !number.ends_with(']')) {
            Some((host, number)) => (host, number.parse().map_err(|_| RedisSettingError::Url)?),
            None => (&*node, port),
        };
        if host.is_empty() {
            return Err(RedisSettingError::Url);
        }
        hosts.push(Server { host: bare(host), port: number });
    }
    Ok(hosts)
}

/// Without the brackets of an IPv6 address.
fn bare(host: &str) -> String {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).to_owned()
}

/// A part of a URL as it is meant.
fn decoded(part: &str) -> String {
    // A plus is a plus here, and a blank in what the library reads.
    let text = format!("x={}", part.replace('+', "%2B").replace('&', "%26"));
    url::form_urlencoded::parse(text.as_bytes()).map(|(_, value)| value.into_owned()).collect()
}

/// TLS that trusts the certificates of a file, or those of the system.
fn tls(ca_file: Option<PathBuf>) -> Result<Arc<ClientConfig>, RedisSettingError> {
    let roots = if let Some(file) = ca_file {
        trusted(&file).map_err(|why| RedisSettingError::CaFile { file, why })?
    } else {
        let mut roots = RootCertStore::empty();
        // What cannot be read is not trusted, and the connection says so.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        roots
    };
    // Named, because the library's own choice panics when another crate brings it a second one.
    let builder = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().expect("the provider has ciphers for TLS 1.2 and 1.3");
    Ok(Arc::new(builder.with_root_certificates(roots).with_no_client_auth()))
}

fn trusted(file: &Path) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(file).map_err(|error| error.to_string())? {
        let certificate = certificate.map_err(|error| error.to_string())?;
        roots.add(certificate).map_err(|error| error.to_string())?;
    }
    if roots.is_empty() {
        return Err("no certificate in it".to_owned());
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Address {
        Address::read(url, None).unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    fn server(host: &str, port: u16) -> Server {
        Server { host: host.to_owned(), port }
    }

    #[test]
    fn every_form_is_read() {
        let plain = read("redis://cache");
        assert!(matches!(&plain.place, Place::Server(one) if *one == server("cache", 6379)), "{plain:?}");
        assert!(plain.login == Login::default() && plain.database == 0 && plain.tls.is_none());
        let full = read("rediss://me:p%40ss%2Bw+rd@[::1]:7000/3");
        assert!(matches!(&full.place, Place::Server(one) if *one == server("::1", 7000)), "{full:?}");
        let login = Login { username: Some("me".to_owned()), password: Some("p@ss+w+rd".to_owned()) };
        assert!(full.login == login && full.database == 3 && full.tls.is_some());
        assert_eq!(read("redis://me:@cache").login, Login { username: Some("me".to_owned()), password: None });
        let odd = read("redis://u%3Aser:a%26b=c%3Dd%25e%23%2F%3F%40@cache").login;
        assert_eq!((odd.username.as_deref(), odd.password.as_deref()), (Some("u:ser"), Some("a&b=c=d%e#/?@")));
        assert_eq!(read("redis://:only@cache").login, Login { username: None, password: Some("only".to_owned()) });
        let unix = read("unix:/run/my%20redis.sock");
        assert!(matches!(&unix.place, Place::Unix(path) if path == Path::new("/run/my redis.sock")), "{unix:?}");
        let watched = read(
            "redis-sentinel://u:p@s1/2?sentinelServiceName=main&node=s2:1&node=s3&sentinelUsername=a&sentinelPassword=b%20c",
        );
        let Place::Sentinel { sentinels, master, login, .. } = &watched.place else { panic!("{watched:?}") };
        assert_eq!(*sentinels, [server("s1", 26_379), server("s2", 1), server("s3", 26_379)]);
        assert_eq!((master.as_str(), login.username.as_deref()), ("main", Some("a")));
        assert_eq!((login.password.as_deref(), watched.database), (Some("b c"), 2));
        let cluster = read("rediss-cluster://n1:1/7?node=[::2]:2&node=[::3]");
        let nodes = [server("n1", 1), server("::2", 2), server("::3", 6379)];
        assert!(matches!(&cluster.place, Place::Cluster(told) if *told == nodes), "{cluster:?}");
        assert_eq!(cluster.database, 0);
        assert!(!format!("{full:?}{watched:?}").contains("p@ss") && !format!("{watched:?}").contains("b c"));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for url in [
            "redis:",
            "redis://",
            "http://cache",
            "redis://cache/first",
            "redis-sentinel://cache",
            "redis-cluster://n1?node=n2:x",
            "redis-cluster://n1?node=:1",
            "cache:6379",
            "redisunix:/run/redis.sock",
            "redis://cache/-1",
        ] {
            assert!(matches!(Address::read(url, None), Err(RedisSettingError::Url)), "{url}");
        }
    }
}
