//! The gateway's decoders of outside bytes, one function each: whatever they are given, they return.

use axum::http::{HeaderMap, HeaderValue, header};

use std::ops::ControlFlow;

use super::attend::Packet;
use super::auth::fuzzing as tokens;
use super::frame::{Breach, Frames, Received};
use super::handshake;
use super::wire::{self, Auth, Name, Request};
use crate::domain::UserId;

/// Tickets in one lock, as the messages are read here.
const PER_LOCK_MAX: u32 = 10;

/// What a client sends in the namespace, read under each name.
pub fn messages(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some((name, data)) = wire::split(text) else { return };
    let (Ok(user), known) = (UserId::new(7), Name::parse(&name)) else { return };
    for name in known.into_iter().chain(Name::ALL) {
        let (about, request) = wire::read(name, data, user, PER_LOCK_MAX);
        match request {
            Ok(Request::Lock { event, quantity, .. }) => {
                assert!(quantity.value() <= PER_LOCK_MAX && about.event == Some(event), "{about:?}");
            }
            Ok(
                Request::Join(_)
                | Request::Leave(_)
                | Request::UnlockCategory(..)
                | Request::UnlockLock(_)
                | Request::MyLocks
                | Request::Heartbeat
                | Request::Refresh(_),
            ) => {}
            Err(refusal) => {
                serde_json::from_str::<serde_json::Value>(wire::refused(&refusal, &about).get())
                    .expect("a refusal is JSON, whatever it repeats");
            }
        }
    }
}

/// The frames of a WebSocket, of which the first byte says how many bytes come at once: what is read does not depend on
/// it.
pub fn frames(data: &[u8]) {
    let Some((&first, data)) = data.split_first() else { return };
    let (whole, pieces) = (read_frames(data, data.len()), read_frames(data, usize::from(first)));
    assert_eq!(whole, pieces);
}

fn read_frames(data: &[u8], portion: usize) -> (Vec<String>, Option<Breach>) {
    let (mut frames, mut seen) = (Frames::default(), Vec::new());
    for piece in data.chunks(portion.max(1)) {
        let read = frames.read(&mut piece.to_vec(), |received| {
            if let Received::Text(text) = received
                && let Some(Packet::Message(message, _)) = Packet::read(text)
            {
                assert!(message.starts_with('[') && text.ends_with(message));
            }
            seen.push(format!("{received:?}"));
            ControlFlow::<()>::Continue(())
        });
        if let Err(breach) = read {
            return (seen, Some(breach));
        }
    }
    (seen, None)
}

/// A handshake: a line each of the query, the `Origin`, the `Host`, the `Authorization`, and the rest what comes with
/// CONNECT.
pub fn handshakes(data: &[u8]) {
    let mut lines = data.splitn(5, |&byte| byte == b'\n');
    let query = String::from_utf8_lossy(lines.next().unwrap_or_default());
    let mut headers = HeaderMap::new();
    for name in [header::ORIGIN, header::HOST, header::AUTHORIZATION] {
        if let Ok(value) = HeaderValue::from_bytes(lines.next().unwrap_or_default()) {
            headers.insert(name, value);
        }
    }
    let auth: Auth = serde_json::from_slice(lines.next().unwrap_or_default()).unwrap_or_default();
    handshake::fuzzing::read(&auth, &query, &headers);
}

/// A token, as text.
pub fn tokens(data: &[u8]) {
    tokens::verify(&String::from_utf8_lossy(data));
}

/// The claims of a token whose signature is good.
pub fn claims(data: &[u8]) {
    tokens::read_claims(data);
}

/// A key set, and a public key file.
pub fn keys(data: &[u8]) {
    tokens::read_keys(data);
}
