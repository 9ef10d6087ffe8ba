//! Sentinel's choice of a master: found when a connection is made, and followed before the old one breaks off.
//!
//! In a planned failover the connection does not break: the old master goes on to take what will be lost, for ten
//! seconds or more, until the sentinels demote it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::Driver;
use super::address::{Address, Login, Place, Server};
use super::command::Command;
use super::connection::{Connection, Failure, Pushed};
use super::link::Link;
use super::reply::Reply;

/// How often a sentinel is asked.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// Connects to the master that a sentinel names, the first that names a living one. One that was cut off from the
/// others goes on to tell what it knew; so does each for a second or two after a failover that another one led.
pub(super) async fn open(address: &Address, pushed: Option<Pushed>) -> Result<Connection, Failure> {
    let Place::Sentinel { sentinels, first, .. } = &address.place else { return Err(no_sentinel()) };
    let mut last = no_sentinel();
    // One that is no master, or cannot be reached, is not tried again for the next sentinel.
    let mut tried: Vec<Server> = Vec::new();
    let (before, after) = sentinels.split_at(first.load(Ordering::Relaxed).min(sentinels.len()));
    for sentinel in after.iter().chain(before) {
        let named = match connect(address, sentinel).await {
            Ok(connection) => ask(&connection, address).await,
            Err(failure) => Err(failure),
        };
        match named {
            Ok(master) if tried.contains(&master) => {}
            Ok(master) => match join(address, &master, pushed.clone()).await {
                Ok(connection) => return Ok(connection),
                Err(failure) => {
                    tried.push(master);
                    last = failure;
                }
            },
            Err(failure) => last = failure,
        }
    }
    Err(last)
}

fn no_sentinel() -> Failure {
    Failure::Lost("no sentinel is known".to_owned())
}

async fn connect(address: &Address, sentinel: &Server) -> Result<Connection, Failure> {
    let none = Login::default();
    let login = if let Place::Sentinel { login, .. } = &address.place { login } else { &none };
    let own = Address { database: 0, ..address.clone() };
    Connection::to(&own, sentinel, login, None).await
}

async fn ask(connection: &Connection, address: &Address) -> Result<Server, Failure> {
    let Place::Sentinel { master, .. } = &address.place else { return Err(no_sentinel()) };
    let reply = connection.ask(Command::new("SENTINEL", &["get-master-addr-by-name", master])).await?;
    named(&reply).ok_or_else(|| Failure::Lost(format!("the sentinel knows no master of the name {master}")))
}

fn named(reply: &Reply) -> Option<Server> {
    let mut parts = reply.value().parts()?;
    let (host, port) = (parts.next()?.text()?, parts.next()?.text()?);
    Some(Server { host: host.to_owned(), port: port.parse().ok()? })
}

/// Connects to a server if it is the master that it was said to be.
async fn join(address: &Address, server: &Server, pushed: Option<Pushed>) -> Result<Connection, Failure> {
    let connection = Connection::to(address, server, &address.login, pushed).await?;
    let role = connection.ask(Command::new("ROLE", &[])).await?;
    if role.word() == "master" {
        return Ok(connection);
    }
    Err(Failure::Lost(format!("{server} is no master")))
}

/// Connects anew when a sentinel names another master than the one that is connected, until the driver ends.
pub(super) async fn follow(driver: Arc<Driver>, link: Arc<Link>, sentinels: Vec<Server>, first: Arc<AtomicUsize>) {
    let mut connection: Option<Connection> = None;
    let mut turn = 0;
    // Sentinels may know a master by several names: each is a reason only once.
    let mut followed: Option<Server> = None;
    loop {
        if connection.is_none()
            && let Some(sentinel) = sentinels.get(turn % sentinels.len())
        {
            connection = connect(&driver.address, sentinel).await.ok();
        }
        let named = match &connection {
            Some(connection) => ask(connection, &driver.address).await.ok(),
            None => None,
        };
        if let Some(master) = named {
            if link.commands.server().as_ref() == Some(&master) {
                followed = None;
            } else if link.is_up.load(Ordering::Relaxed) && followed.as_ref() != Some(&master) {
                tracing::info!(%master, "Sentinel names another master; connecting anew");
                // The one that has just said so, or the next may still name the old one.
                first.store(turn % sentinels.len(), Ordering::Relaxed);
                link.reconnect();
                followed = Some(master);
            }
        } else {
            // Another one next time.
            turn += 1;
            connection = None;
        }
        tokio::select! {
            () = driver.stop.cancelled() => return,
            () = tokio::time::sleep(ASK_EVERY) => {}
        }
    }
}
