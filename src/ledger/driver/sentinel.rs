//! Sentinel's choice of a master, followed before the old one breaks off.
//!
//! The client asks the sentinels when its connection breaks. In a planned failover it does not break: the old master
//! goes on to take what will be lost, for ten seconds or more, until the sentinels demote it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fred::clients::Client;
use fred::error::Error;
use fred::interfaces::ClientLike;
use fred::types::config::{Config, Server, ServerConfig};
use fred::types::{Builder, RespVersion};

use super::link::{self, Link};
use super::{Driver, custom};

/// How often a sentinel is asked.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// The sentinels of an address.
pub(super) struct Sentinels {
    hosts: Vec<Server>,
    master: String,
    config: Config,
}

impl Sentinels {
    /// `None` when the address is not Sentinel's.
    pub(super) fn of(config: &Config) -> Option<Self> {
        let ServerConfig::Sentinel { hosts, service_name, username, password } = &config.server else { return None };
        let own = Config {
            username: username.clone(),
            password: password.clone(),
            database: None,
            version: RespVersion::RESP2,
            ..config.clone()
        };
        Some(Self { hosts: hosts.clone(), master: service_name.clone(), config: own })
    }

    fn builder(&self, host: &Server) -> Builder {
        link::builder(&self.config, Some(host), ASK_EVERY)
    }

    async fn ask(&self, client: &Client) -> Result<Server, Error> {
        let args = vec!["get-master-addr-by-name".to_owned(), self.master.clone()];
        let (host, port): (String, u16) = custom(client.clone(), "SENTINEL", args).await?.convert()?;
        Ok(Server::new(host, port))
    }
}

/// Connects anew when a sentinel names another master than the one that is connected, until the driver ends.
pub(super) async fn follow(driver: Arc<Driver>, link: Arc<Link>, sentinels: Sentinels) {
    let mut client: Option<Client> = None;
    let mut turn = 0;
    // Sentinels may know a master by several names: each is a reason only once.
    let mut followed: Option<Server> = None;
    loop {
        if client.is_none() {
            let host = &sentinels.hosts[turn % sentinels.hosts.len()];
            client = connect(&sentinels.builder(host)).await;
        }
        let named = match &client {
            Some(client) => sentinels.ask(client).await.ok(),
            None => None,
        };
        if let Some(master) = named {
            let is_connected = link.commands.active_connections().contains(&master);
            if is_connected {
                followed = None;
            } else if link.is_up.load(Ordering::Relaxed) && followed.as_ref() != Some(&master) {
                tracing::info!(%master, "Sentinel names another master; connecting anew");
                link.reconnect();
                followed = Some(master);
            }
        } else {
            // Another one next time.
            turn += 1;
            if let Some(client) = client.take() {
                client.quit().await.ok();
            }
        }
        tokio::select! {
            () = driver.stop.cancelled() => break,
            () = tokio::time::sleep(ASK_EVERY) => {}
        }
    }
    if let Some(client) = client {
        client.quit().await.ok();
    }
}

async fn connect(builder: &Builder) -> Option<Client> {
    let client = builder.build().ok()?;
    client.init().await.ok()?;
    Some(client)
}
