//! Replies: published on a connection of their own, confirmed by the broker, and safe from bad addresses.
//!
//! Two facts of RabbitMQ shape this. A publisher that the broker blocks (low memory or disk) is not read from at all,
//! so acknowledgements must travel elsewhere. And a reply to a direct reply-to address that the broker cannot decode
//! (forged, or from another cluster) ends the *whole connection* with 541 `INTERNAL_ERROR`, and every unconfirmed reply
//! with it. A reply that was lost so is sent again on a connection where it is alone: if that one breaks too, the
//! address is bad, and only that reply is given up.

use std::sync::Arc;

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::uri::AMQPUri;
use lapin::{BasicProperties, Channel, Confirmation};
use tokio::sync::Mutex;

use super::link::{CALL_TIMEOUT, Link, LinkError, within};

/// What became of a reply that reached no requester.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// There is no connection to publish on. The request should be delivered again.
    #[error("no connection for replies: {0}")]
    Unreachable(#[source] LinkError),
    /// The broker ends every connection on which this reply is published. No delivery will change that.
    #[error("the broker cannot route to the reply address: {0}")]
    BadAddress(#[source] LinkError),
    /// The broker would not take it (a full reply queue).
    #[error("the broker rejected the reply")]
    Rejected,
}

/// Publishes replies.
pub struct Replies {
    uri: AMQPUri,
    /// The connection of all replies, while it stands.
    shared: Mutex<Option<Arc<Outlet>>>,
    /// The connection of those sent one at a time. Opened when needed and closed with the session.
    alone: Mutex<Option<Outlet>>,
}

struct Outlet {
    link: Link,
    channel: Channel,
}

impl Replies {
    /// Connects, so that the first reply does not wait for it.
    pub async fn open(uri: &AMQPUri) -> Result<Self, LinkError> {
        let outlet = Outlet::open(uri, "seatlock replies").await?;
        Ok(Self { uri: uri.clone(), shared: Mutex::new(Some(Arc::new(outlet))), alone: Mutex::default() })
    }

    /// Publishes one reply and waits until the broker has it. A requester that is gone is no error: the broker drops
    /// the reply.
    pub async fn send(
        &self,
        address: &ShortString,
        correlation: Option<&ShortString>,
        body: &[u8],
    ) -> Result<(), ReplyError> {
        let outlet = self.shared_outlet().await.map_err(ReplyError::Unreachable)?;
        let lost = match outlet.publish(address, correlation, body).await {
            Ok(taken) => return rejected_unless(taken),
            Err(lost) => lost,
        };
        self.retire(&outlet).await;
        tracing::debug!(error = %lost, "a reply was lost with its connection and is sent again");
        let mut alone = self.alone.lock().await;
        let outlet = match alone.take() {
            Some(outlet) if outlet.link.is_connected() => outlet,
            Some(_) | None => {
                Outlet::open(&self.uri, "seatlock reply, alone").await.map_err(ReplyError::Unreachable)?
            }
        };
        match outlet.publish(address, correlation, body).await {
            Ok(taken) => {
                *alone = Some(outlet);
                rejected_unless(taken)
            }
            Err(lost) => Err(ReplyError::BadAddress(lost)),
        }
    }

    /// True while the broker takes no replies. (While the connection is being replaced there is nothing to block.)
    pub fn is_blocked(&self) -> bool {
        self.shared.try_lock().is_ok_and(|shared| shared.as_ref().is_some_and(|outlet| outlet.link.is_blocked()))
    }

    /// Says goodbye.
    pub async fn close(&self) {
        if let Some(outlet) = self.shared.lock().await.take() {
            outlet.link.close().await;
        }
        if let Some(outlet) = self.alone.lock().await.take() {
            outlet.link.close().await;
        }
    }

    async fn shared_outlet(&self) -> Result<Arc<Outlet>, LinkError> {
        let mut shared = self.shared.lock().await;
        if let Some(outlet) = shared.as_ref().filter(|outlet| outlet.link.is_connected()) {
            return Ok(Arc::clone(outlet));
        }
        let outlet = Arc::new(Outlet::open(&self.uri, "seatlock replies").await?);
        *shared = Some(Arc::clone(&outlet));
        Ok(outlet)
    }

    /// Lets nobody use this connection any more.
    async fn retire(&self, outlet: &Arc<Outlet>) {
        let mut shared = self.shared.lock().await;
        if shared.as_ref().is_some_and(|current| Arc::ptr_eq(current, outlet)) {
            *shared = None;
        }
    }
}

fn rejected_unless(taken: bool) -> Result<(), ReplyError> {
    if taken { Ok(()) } else { Err(ReplyError::Rejected) }
}

impl Outlet {
    async fn open(uri: &AMQPUri, name: &str) -> Result<Self, LinkError> {
        let link = Link::open(uri, name).await?;
        let channel = link.channel().await?;
        within(channel.confirm_select(ConfirmSelectOptions::default())).await?;
        Ok(Self { link, channel })
    }

    /// True when the broker has the reply, false when it would not take it.
    async fn publish(
        &self,
        address: &ShortString,
        correlation: Option<&ShortString>,
        body: &[u8],
    ) -> Result<bool, LinkError> {
        // What a NestJS server sets: an empty table of headers and the request's correlation id, nothing else.
        let mut properties = BasicProperties::default().with_headers(FieldTable::default());
        if let Some(correlation) = correlation {
            properties = properties.with_correlation_id(correlation.clone());
        }
        // Never mandatory: RabbitMQ 3.10 returns even what it delivered to a direct reply-to address.
        let options = BasicPublishOptions::default();
        let confirmed =
            async { self.channel.basic_publish("".into(), address.clone(), options, body, properties).await?.await };
        tokio::pin!(confirmed);
        loop {
            match tokio::time::timeout(CALL_TIMEOUT, &mut confirmed).await {
                Ok(confirmation) => {
                    return Ok(match confirmation? {
                        Confirmation::Ack(_) | Confirmation::NotRequested => true,
                        Confirmation::Nack(_) => false,
                    });
                }
                // The broker will read on when it has memory again; the requester may still be waiting.
                Err(_) if self.link.is_blocked() && self.link.is_connected() => {}
                Err(_) => return Err(LinkError::Timeout(CALL_TIMEOUT)),
            }
        }
    }
}
